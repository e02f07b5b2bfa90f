"""Exercise 1: a linear layer with a low-rank update, y = W0 x + b + B A x."""
import torch
from torch import nn


class LoRALinear(nn.Module):
    """A (rank, in) is Gaussian with variance 1/in, B (out, rank) zero; `base` is frozen."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        # Your turn: freeze base; make self.lora_A and self.lora_B.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)"""
        return self.base(x)
