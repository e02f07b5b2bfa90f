"""Exercise 4: what a random B does to epoch 0. N samples, C classes."""
import torch
from torch import nn


@torch.no_grad()
def randomise_B(model: nn.Module, std: float) -> list[str]:
    """Fill every lora_B of `model` with N(0, std^2), in place; -> their names."""
    names = []
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.normal_(0, std)
            names.append(name)
    return names


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """The mean over samples of 1/2 sum_c |p_c - q_c|. p, q: probabilities (N, C)."""
    return float((p - q).abs().sum(-1).mean() / 2)
