"""Predictions, fusion rules and scores.

Nothing here uses `lora.py`: what measures must not change when the loss is edited.
Whatever the fusion rule, the prediction of a sample never depends on the others of its batch.

Shapes: N samples, B batch, C classes, M modalities.
"""
import math

import torch
import torch.nn.functional as F

import data

FUSIONS = ("prob", "logits", "entropy")


# ---- Predictions ----

@torch.no_grad()
def predict(forward, models, split: data.Split, device: str, settings: dict, index=None) -> dict:
    """`forward(x)`, a dict of tensors (B, ...), for a whole split or its samples `index`.

    Not augmented, in eval mode; -> name -> (N, ...), float32 on the CPU. At most 256 samples at a
    time, with --micro-batch so many.
    """
    training = models.training
    models.eval()
    if index is None:
        index = torch.arange(len(split))
    out = {}
    for part in index.split(min(256, settings.get("micro_batch", 256))):
        x, _ = data.inputs(split, part, models, device, settings)
        for name, tensor in forward(x).items():
            out.setdefault(name, []).append(tensor.float().cpu())
    models.train(training)
    return {name: torch.cat(tensors) for name, tensors in out.items()}


def autocast(device: str, settings: dict):
    """bfloat16 where the settings say so; for the forward pass."""
    enabled = settings["precision"] == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def fuse(logits: dict[str, torch.Tensor], rule: str = "prob", multilabel: bool = False):
    """Class probabilities (N, C) of all modalities together.

    prob      the average of the probabilities: UME and MMLoRA, Sec. 3.2
    logits    the probabilities of the averaged logits: a product of experts
    entropy   probabilities weighted by softmax over modalities of minus their entropy, sample by
              sample: a sure modality counts more (test-time fusion of MLA, Zhang et al. 2024)
    """
    if rule not in FUSIONS:
        raise ValueError(f"no fusion is called {rule}; there are {', '.join(FUSIONS)}")
    if rule == "logits":
        logits = average_logits(logits)
    if multilabel:
        p = torch.stack([z.sigmoid() for z in logits.values()])                # (M, N, C)
    else:
        p = torch.stack([z.softmax(-1) for z in logits.values()])              # (M, N, C)
    if rule != "entropy":
        return p.mean(0)
    entropy = torch.special.entr(p)
    if multilabel:                                    # of every class, a coin
        entropy = entropy + torch.special.entr(1 - p)
    weight = entropy.sum(-1).neg().softmax(0)                                  # (M, N)
    return (weight.unsqueeze(-1) * p).sum(0)


def fuse_missing(logits: dict, drop: list[str], share: float, rule="prob", multilabel=False):
    """`fuse` where `share` of the samples lack the modalities `drop`: 0.7 = 70 % lack them.

    Those are predicted from what they have. Which samples is a fixed draw, the first of one random
    order: whoever lacks a modality at 30 % lacks it at 70 %, too.
    """
    p = fuse(logits, rule, multilabel)
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(0))
    lost = order[:round(share * len(p))]
    left = {m: z for m, z in logits.items() if m not in drop}
    p[lost] = fuse(left, rule, multilabel)[lost]
    return p


# ---- Losses ----

def wide(z: torch.Tensor) -> torch.Tensor:
    """At least float32: bfloat16 has too few bits for a log-probability."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Eq. 1 as a loss: -log P(y|x), averaged over the batch. logits: (B, C); target: (B,) classes.

    With several labels a sample, target multi-hot (B, C): the binary cross-entropy, averaged over
    samples and classes.
    """
    if target.ndim == 1:
        return F.cross_entropy(wide(logits), target)
    return fused_loss({"": logits}, target)


def fused_loss(logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """-log of the averaged probability of the label: the loss that `scores` reports."""
    if target.ndim == 1:
        log_p = log_mean([F.log_softmax(wide(z), dim=-1) for z in logits.values()])
        return F.nll_loss(log_p, target)
    yes = log_mean([F.logsigmoid(wide(z)) for z in logits.values()])           # log p, (B, C)
    no = log_mean([F.logsigmoid(-wide(z)) for z in logits.values()])           # log (1 - p)
    return -torch.where(target.bool(), yes, no).mean()


def log_mean(log_p: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def average_logits(logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"mean": torch.stack([wide(z) for z in logits.values()]).mean(0)}


# ---- Scores ----

def metric(info: dict) -> str:
    """The score that chooses epochs: accuracy, or F1-micro where a sample has several labels."""
    return "f1_micro" if info["multilabel"] else "accuracy"


def count_right(logits: dict, y: torch.Tensor) -> torch.Tensor:
    """How many samples of a batch the averaged prediction gets right.

    With several labels a sample: the sum over samples of the share of labels that are right.
    """
    if y.ndim == 1:
        log_p = log_mean([F.log_softmax(wide(z), dim=-1) for z in logits.values()])
        return (log_p.argmax(-1) == y).float().sum()
    right = (fuse(logits, multilabel=True) > 0.5) == y.bool()                  # (B, C)
    return right.float().mean(-1).sum()


def f1(predicted: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """(micro, macro) F1 of bool (N, C): F1 = 2 TP / (2 TP + FP + FN).

    Micro adds up the counts of all classes. Macro averages the F1 of the classes; a class that is
    neither in `true` nor in `predicted` counts 0, as in scikit-learn.
    """
    hit = 2 * (predicted & true).sum(0).double()
    either = predicted.sum(0).double() + true.sum(0).double()
    micro = hit.sum() / either.sum().clamp(min=1)
    macro = (hit / either.clamp(min=1)).mean()
    return float(micro), float(macro)


def rates(p: torch.Tensor, labels: torch.Tensor, info: dict, groups: dict | None = None) -> dict:
    """Of probabilities (N, C): `accuracy`, and that of each of the `groups`, name -> (N,) bool;
    or `f1_micro` and `f1_macro` at threshold 0.5."""
    if info["multilabel"]:
        return dict(zip(("f1_micro", "f1_macro"), f1(p > 0.5, labels.bool())))
    right = p.argmax(-1) == labels
    out = dict(accuracy=float(right.float().mean()))
    if groups:
        out["groups"] = {}
        for group, members in groups.items():
            if members.any():
                out["groups"][group] = float(right[members].float().mean())
    return out


def scores(logits: dict[str, torch.Tensor], labels: torch.Tensor, info: dict, rule="prob",
           groups: dict | None = None) -> dict:
    """All numbers of one prediction: its `rates`, and `loss`, -log of the averaged probability;
    with the rule "logits" of the probability of the averaged logits."""
    p = fuse(logits, rule, info["multilabel"])
    if rule == "logits":
        logits = average_logits(logits)
    return dict(rates(p, labels, info, groups), loss=float(fused_loss(logits, labels)))


def all_scores(logits: dict, labels: torch.Tensor, info: dict, groups: dict | None = None) -> dict:
    """Each entry of `logits` alone; of several modalities also their fusions, "prob" and "logits".

    A method with a head of its own has "joint" among its logits; that is its fusion.
    """
    out = {}
    for name, z in logits.items():
        out[name] = scores({name: z}, labels, info, groups=groups)
    if len(logits) > 1 and "joint" not in logits:
        for rule in ("prob", "logits"):
            out[rule] = scores(logits, labels, info, rule, groups)
    return out
