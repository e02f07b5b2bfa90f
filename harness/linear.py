"""Linear evaluation: how good the features of a frozen encoder are (Sec. 3.1; Tables 3, 4, 8)."""
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from harness import fingerprint, metrics

CODE = fingerprint.hash_of_code(Path(__file__).resolve())       # probe.json keeps it
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)      # ours: the paper trains "a linear layer" (Sec. 3.1)


def logistic_regression(x: torch.Tensor, y: torch.Tensor, classes: int, l2: float,
                        start: nn.Linear | None = None) -> nn.Linear:
    """The linear layer with the smallest cross-entropy + l2/2 |W|^2.

    x: (N, D) float64; y: (N,), or (N, C) multi-hot: then a binary problem a class. The problem is
    convex, so it is solved, not trained: L-BFGS on all samples, from zero or from `start`, until
    the gradient vanishes. No learning rate, no epochs, no seed: two encoders differ in their
    features and in nothing else.
    """
    layer = nn.Linear(x.shape[1], classes, dtype=x.dtype, device=x.device)
    if start is None:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    else:
        layer.load_state_dict(start.state_dict())
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=2000, history_size=20,
                               tolerance_grad=1e-7, tolerance_change=1e-12,
                               line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        z = layer(x)
        if y.ndim == 1:
            loss = F.cross_entropy(z, y)
        else:
            loss = F.binary_cross_entropy_with_logits(z, y.to(z), reduction="sum") / len(z)
        loss = loss + l2 / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return layer


@torch.no_grad()
def standardise(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Every feature with mean 0 and deviation 1 over `like`; constant ones become 0.

    One L2 strength then means the same to all features.
    """
    std = like.std(0)
    return (x - like.mean(0)) / std.where(std > 1e-6, torch.inf)


def probe(model, modality: str, where: Path, info: dict, device: str, settings: dict) -> dict:
    """Linear evaluation of a frozen encoder. Validation chooses the L2 strength; test once."""
    began = time.perf_counter()
    models = nn.ModuleDict({modality: model}).to(device)

    def forward(x):
        with metrics.autocast(device, settings):
            return {modality: model.features(x[modality])}

    splits, x = {}, {}
    solver = device if device.startswith("cuda") else "cpu"
    for name in ("train", "val", "test"):
        splits[name] = data.Split(where, name, settings if name == "train" else None)
        h = metrics.predict(forward, models, splits[name], device, settings)[modality]
        x[name] = h.to(solver, torch.float64)
    x = {name: standardise(h, x["train"]) for name, h in x.items()}

    @torch.no_grad()
    def score(layer, name):
        logits, split = {modality: layer(x[name]).cpu()}, splits[name]
        return metrics.scores(logits, split.labels, info, groups=split.groups)

    layer, tried = None, []
    y = splits["train"].labels.to(solver)
    for l2 in STRENGTHS:         # strongest first: its solution is a good start for the next
        layer = logistic_regression(x["train"], y, len(info["classes"]), l2, layer)
        tried.append((l2, layer, score(layer, "val")))
    l2, layer, val = max(tried, key=lambda t: (t[2][metrics.metric(info)], -t[2]["loss"]))
    trained = sum(p.numel() for p in layer.parameters())
    return dict(l2=l2, val=val, test=score(layer, "test"), trained_parameters=trained,
                seconds=time.perf_counter() - began, code=CODE)


def is_of_this_code(probes: dict) -> bool:
    """Whether all of probe.json, modality -> what `probe` found, was found by this file."""
    return all(found.get("code") == CODE for found in probes.values())
