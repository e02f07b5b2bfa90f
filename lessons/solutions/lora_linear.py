"""Exercise 1: a linear layer with a low-rank update, y = W0 x + b + B A x."""
import math

import torch
from torch import nn


class LoRALinear(nn.Module):
    """A (rank, in) is Gaussian with variance 1/in, B (out, rank) zero; `base` is frozen."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        A = torch.randn(rank, base.in_features) / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)"""
        Ax = x @ self.lora_A.T                                        # (..., rank)
        return self.base(x) + Ax @ self.lora_B.T
