"""Exercise 6: OGM-GE, what happens between backward and step."""
import torch
from torch import nn


def coefficients(scores: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """k_m of every modality from its score s_m, tensors without axes."""
    weakest = min(scores.values())
    k = {}
    for m, s in scores.items():
        rho = s / weakest
        k[m] = torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)
    return k


@torch.no_grad()
def modulate(encoder: nn.Module, k: torch.Tensor, noise: bool) -> None:
    """Change the gradients of the encoder's weights in place: k g, and noise N(0, std(g)^2)."""
    for p in encoder.parameters():
        if p.grad is None or p.ndim < 2:
            continue
        std = p.grad.std()                              # of the gradient as it was
        p.grad.mul_(k)
        if noise:
            p.grad.add_(torch.randn_like(p.grad) * std)
