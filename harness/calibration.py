"""What a validation set can do for finished models, without any training: temperatures, weights.

    P_m(y|x) = softmax(z_m / T_m)        a temperature: large ones make a modality less sure
    P(y|x) = sum_m w_m P_m(y|x)          UME and MMLoRA have T_m = 1 and w_m = 1/M

With growing T the average of probabilities becomes the average of logits. Everything here works on
stored logits, for data with one label a sample.

Shapes: N samples, C classes, M modalities.
"""
import itertools
from pathlib import Path

import torch

import data
from harness import metrics
from harness.stored import encoders_of, logits_of_step_1, read_config, read_logits

GRID = [2 ** (i / 4) for i in range(-8, 13)]          # temperatures from 0.25 to 8
STEPS = 20                                            # weights are multiples of 1/20
BINS = 15                                             # of equal width, for the calibration error


# ---- Scores of probabilities p (N, C), labels y (N,) ----

def accuracy(p: torch.Tensor, y: torch.Tensor) -> float:
    return float((p.argmax(-1) == y).double().mean())


def nll(p: torch.Tensor, y: torch.Tensor) -> float:
    """The mean of -log p(y)."""
    of_label = p.gather(1, y[:, None])
    return float(-of_label.clamp_min(1e-300).log().mean())


def ece(p: torch.Tensor, y: torch.Tensor) -> float:
    """Expected calibration error (Guo et al. 2017): how far confidence is from accuracy.

    The confidence of a sample is its largest probability. Samples are sorted into 15 bins of equal
    width; the error is the mean over bins of |accuracy - mean confidence|, by number of samples.
    """
    confidence, predicted = p.max(-1)
    right = (predicted == y).double()
    bin_of = (confidence * BINS).ceil().long().clamp(1, BINS)     # bin b is ((b - 1)/15, b/15]
    error = 0.0
    for b in range(1, BINS + 1):
        inside = bin_of == b
        if inside.any():
            gap = right[inside].mean() - confidence[inside].mean()
            error += float(gap.abs()) * float(inside.double().mean())
    return error


def scores(p: torch.Tensor, y: torch.Tensor) -> dict:
    return dict(accuracy=accuracy(p, y), nll=nll(p, y), ece=ece(p, y))


# ---- Choices: (modality -> temperature, modality -> weight) ----

def fuse(logits: dict, temperatures: dict, weights: dict) -> torch.Tensor:
    """-> (N, C) float64. logits: modality -> (N, C)."""
    p = 0
    for m, z in logits.items():
        p = p + weights[m] * (z.double() / temperatures[m]).softmax(-1)
    return p


def unchanged(names) -> tuple[dict, dict]:
    """T = 1 and equal weights: UME, MMLoRA."""
    return dict.fromkeys(names, 1.0), dict.fromkeys(names, 1 / len(names))


def candidates(kind: str, names: list[str]) -> list[tuple]:
    """What can be chosen. kind: "one" temperature for all modalities, one "each", or "weighted"."""
    ones, equal = unchanged(names)
    if kind == "one":
        return [(dict.fromkeys(names, T), equal) for T in GRID]
    if kind == "each":
        chosen = itertools.product(GRID, repeat=len(names))
        return [(dict(zip(names, values)), equal) for values in chosen]
    steps = itertools.product(range(STEPS + 1), repeat=len(names))
    return [(ones, {m: k / STEPS for m, k in zip(names, parts)})
            for parts in steps if sum(parts) == STEPS]


def choose(kind: str, by: str, logits: dict, y: torch.Tensor) -> tuple[dict, dict]:
    """The best candidate on validation: the largest "accuracy", of equal ones the smallest NLL; or
    the smallest "nll". What changes nothing wins a tie."""
    best, best_key = None, None
    for candidate in [unchanged(list(logits)), *candidates(kind, list(logits))]:
        p = fuse(logits, *candidate)
        key = [-nll(p, y)]
        if by == "accuracy":
            key.insert(0, accuracy(p, y))
        if best is None or key > best_key:
            best, best_key = candidate, key
    return best


# ---- Of finished runs ----

def stored(folder: Path, split: str) -> dict[str, dict]:
    """The stored logits of a run: {"UME": modality -> (N, C), "run": name -> (N, C)}.

    "UME" is what the run started from, if it had a step 1. The average of the probabilities of
    "run" is the run's own prediction. So a method with a head of its own has "joint" alone, and
    one that averages logits has their "mean".
    """
    settings, found = read_config(folder)["settings"], {}
    n = (settings.get("samples") or {}).get(split)
    if "unimodal" in settings:
        found["UME"] = logits_of_step_1(folder, settings, split, n)
    names = list(encoders_of(settings))
    if settings.get("fusion") == "joint":
        names = ["joint"]
    found["run"] = read_logits(folder, settings, split, n, names)
    if settings.get("fusion") == "logits":
        found["run"] = metrics.average_logits(found["run"])
    return found


def ume_with_one_temperature(run, info: dict) -> dict:
    """Test `metrics.rates` of the UME that a run started from; T chosen on validation accuracy."""
    splits = {name: data.Split(run.data_folder, name) for name in ("val", "test")}
    val, test = (stored(run.folder, name)["UME"] for name in splits)
    p = fuse(test, *choose("one", "accuracy", val, splits["val"].labels))
    return metrics.rates(p, splits["test"].labels, info, splits["test"].groups)


def only_one_label(info: dict) -> None:
    """ValueError for data with several labels a sample."""
    if info["multilabel"]:
        raise ValueError(f"{info['name']} has several labels a sample: temperature, weights, their"
                         " NLL and calibration error are defined for one label only")


