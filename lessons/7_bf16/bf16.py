"""Exercise 7: where a small update survives in bfloat16. n samples."""
import torch


def survives(before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor) -> float:
    """<after - before, wanted> / <wanted, wanted>, in float64. All have the same shape."""
    return -1.0                                         # your turn


def late(W: torch.Tensor, BA: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """W x, rounded to bf16, plus BA x in bf16.

    W, BA: (out, in) float32; x: (n, in) bfloat16; -> (n, out) bfloat16.
    """
    return x @ W.bfloat16().T                           # your turn: BA is not in it yet


def early(W: torch.Tensor, BA: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(W + BA) x: the weights are added in float32, and their sum is rounded to bf16."""
    return x @ W.bfloat16().T                           # your turn: BA is not in it yet
