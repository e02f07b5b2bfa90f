"""Metrics, fusion rules, tables; and the evaluation of finished runs.

    python evaluate.py --run runs/toy/mmlora-all-r1-s0                              # test scores again, from the stored weights
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --fusion entropy --plot
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --drop audio                 # as if nothing could be heard

The prediction of a sample never depends on the other samples of its batch, whatever the fusion rule.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

import checkpoints
import data
import paper
from lora import mean_log_prob, mean_logits, mean_prob_loss

FUSIONS = ("prob", "logits", "entropy")


# ------------------------------------------------------------------------------------------------ predictions
@torch.no_grad()
def predict(model, split: data.Split, modality: str, device: str, setting: dict, precision: str = "fp32", batch_size: int = 256) -> torch.Tensor:
    """Logits (N, C), float32 on the CPU, of the deterministic test view of every sample."""
    model.eval()
    out = []
    for index in data.batches(len(split), batch_size):
        x = data.model_input(split, modality, index, model.encoder, device, setting)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16"):
            out.append(model(x).float().cpu())
    return torch.cat(out)


def fuse(logits: dict[str, torch.Tensor], rule: str = "prob", multilabel: bool = False) -> torch.Tensor:
    """Class probabilities (N, C) of all modalities together.

    prob      the average of the probabilities: UME and MMLoRA, Sec. 3.2
    logits    the probabilities of the averaged logits: a product of experts
    entropy   probabilities weighted by softmax over modalities of minus their entropy, per sample: a sure modality counts more
              (test-time fusion of MLA, Zhang et al. 2024)
    """
    if rule == "logits":
        logits = mean_logits(logits)
    p = torch.stack([z.sigmoid() if multilabel else z.softmax(-1) for z in logits.values()])            # (M, N, C)
    if rule != "entropy":
        return p.mean(0)
    entropy = (torch.special.entr(p) + torch.special.entr(1 - p)).sum(-1) if multilabel else torch.special.entr(p).sum(-1)
    return (entropy.neg().softmax(0).unsqueeze(-1) * p).sum(0)


# ------------------------------------------------------------------------------------------------ metrics
def metric(info: dict) -> str:
    """The score that selects epochs: accuracy, or F1-micro where a sample has several labels."""
    return "f1_micro" if info["multilabel"] else "accuracy"


def count_right(logits: dict, y: torch.Tensor) -> float:
    """How many samples of a batch the averaged prediction gets right; with several labels a sample, the sum of the shares of right labels."""
    if y.ndim == 1:
        return int((mean_log_prob(logits).argmax(-1) == y).sum())
    return float(((fuse(logits, multilabel=True) > 0.5) == y.bool()).float().mean(-1).sum())


def f1(predicted: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """(micro, macro) F1 of bool (N, C). Micro pools the counts of all classes; macro averages the classes' F1, where a class that
    occurs neither in `true` nor in `predicted` counts 0 (as scikit-learn's default does)."""
    hit, either = (predicted & true).sum(0).double(), (predicted.sum(0) + true.sum(0)).double()         # F1 = 2 TP / (2 TP + FP + FN)
    return float(2 * hit.sum() / either.sum().clamp(min=1)), float((2 * hit / either.clamp(min=1)).mean())


def scores(logits: dict[str, torch.Tensor], labels: torch.Tensor, info: dict, fusion: str = "prob") -> dict:
    """All numbers of one prediction: `accuracy` (and `groups`, accuracy per group of classes, where dataset.json names groups), or
    `f1_micro` and `f1_macro` at threshold 0.5; and `loss`, Eq. 3 (of the averaged logits when those are fused)."""
    p = fuse(logits, fusion, info["multilabel"])
    loss = float(mean_prob_loss(mean_logits(logits) if fusion == "logits" else logits, labels))
    if info["multilabel"]:
        return dict(zip(("f1_micro", "f1_macro"), f1(p > 0.5, labels.bool())), loss=loss)
    right = p.argmax(-1) == labels
    out = dict(accuracy=float(right.float().mean()), loss=loss)
    if info.get("groups"):
        out["groups"] = {g: float(right[torch.isin(labels, torch.tensor(classes))].float().mean()) for g, classes in info["groups"].items()}
    return out


def all_scores(logits: dict, labels: torch.Tensor, info: dict) -> dict:
    """Each modality alone, under its name; with more than one also their averages, under "prob" and "logits"."""
    out = {m: scores({m: z}, labels, info) for m, z in logits.items()}
    return out if len(logits) == 1 else {**out, **{rule: scores(logits, labels, info, rule) for rule in ("prob", "logits")}}


# ------------------------------------------------------------------------------------------------ tables and curves
def mean_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def print_table(rows: list, folder: Path, info: dict) -> None:
    """rows: (label, [(scores, result)] one per seed). One seed: score +- binomial standard error; more: mean +- standard deviation."""
    name, n, seeds = metric(info), len(data.Split(folder, "test")), len(rows[0][1])
    print(f"\n{info['name']}, test split, {n} samples, {len(info['classes'])} classes. "
          + ("+- is the binomial standard error of one test run." if seeds == 1 else f"Mean +- standard deviation of {seeds} seeds."))
    extra = list(info.get("groups") or (["f1_macro"] if info["multilabel"] else []))
    print(f"{'':40}{name:>14}" + "".join(f"{g:>14}" for g in extra) + f"{'trained':>12}{'seconds':>9}")
    for label, per_seed in rows:
        cells = []
        for key in [name] + extra:
            values = [100 * (s["groups"][key] if key in s.get("groups", {}) else s[key]) for s, _ in per_seed]
            mean, std = mean_std(values)
            if seeds == 1:
                std = 100 * math.sqrt(mean / 100 * (1 - mean / 100) / n) if key == "accuracy" else None
            cells.append(f"{mean:.1f}" + (f" +- {std:.1f}" if std is not None else ""))
        result = [r for _, r in per_seed if r]
        tail = (f"{result[0]['trained_parameters']:>12,}{mean_std([r['seconds'] for r in result])[0]:>9.0f}" if result else f"{0:>12}{'':>9}")
        print(f"{label:40}" + "".join(f"{c:>14}" for c in cells) + tail)


def plot(folder: Path) -> None:
    """Training curves of a run -> curves.png in its folder: loss, and the validation score of each modality and of all together."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    _, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot([line["epoch"] for line in log if line["loss"] is not None], [line["loss"] for line in log if line["loss"] is not None])
    left.set(xlabel="epoch", ylabel="training loss")
    for name in log[0]["val"]:
        key = "f1_micro" if "f1_micro" in log[0]["val"][name] else "accuracy"
        right.plot([line["epoch"] for line in log], [100 * line["val"][name][key] for line in log], label=name)
    right.set(xlabel="epoch", ylabel=f"validation {key} (%)")
    right.legend()
    pyplot.suptitle(folder.name)
    pyplot.tight_layout()
    pyplot.savefig(folder / "curves.png", dpi=120)
    pyplot.close()
    print(f"wrote {folder / 'curves.png'}")


# ------------------------------------------------------------------------------------------------ finished runs
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--run", nargs="+", type=Path, required=True, metavar="RUN", help="folders of finished runs")
    a("--fusion", choices=FUSIONS, default="prob", help="what is averaged over modalities")
    a("--drop", nargs="+", default=[], metavar="MODALITY", help="leave these modalities out of the average")
    a("--plot", action="store_true", help="draw each run's training curves (needs matplotlib)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--data-root", default="data", help="folder of the prepared data sets")
    args = parser.parse_args()
    for folder in args.run:
        settings, models = checkpoints.load_run(folder, args.data_root)
        where = data.find(args.data_root, settings["dataset"], settings["seed"])
        info, test = json.loads((where / "dataset.json").read_text()), data.Split(where, "test")
        kept = [m for m in models if m not in args.drop]
        if unknown := set(args.drop) - set(models):
            raise ValueError(f"--drop {' '.join(unknown)}: {folder} has {', '.join(models)}")
        if not kept:
            raise ValueError(f"--drop leaves no modality of {folder}")
        setting = paper.settings_for(settings["dataset"])
        logits = {m: predict(models[m].to(args.device), test, m, args.device, setting, settings["precision"]) for m in kept}
        rows = [(f"{m} alone", [(scores({m: z}, test.labels, info), None)]) for m, z in logits.items()]
        if len(kept) > 1:
            rows.append((f"together, fusion {args.fusion}", [(scores(logits, test.labels, info, args.fusion), None)]))
        print(f"\n{folder}" + (f", without {', '.join(args.drop)}" if args.drop else ""), end="")
        print_table(rows, where, info)
        if args.plot:
            plot(folder)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
