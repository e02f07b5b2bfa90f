"""Exercise 5: the control, and what three seeds can say. B batch, C classes."""
import math
import statistics

import torch
import torch.nn.functional as F


def loss(logits: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """The mean over modalities of -log P_m(y), averaged over the batch.

    logits: modality -> (B, C); y: (B,).
    """
    return sum(F.cross_entropy(z, y) for z in logits.values()) / len(logits)


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """-> the mean of the differences seed by seed, and the standard error of this mean."""
    differences = [a - b for a, b in zip(ours, theirs)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), error
