"""The check of exercise 6."""
import math

import torch
from torch import nn


def with_gradients():
    """-> an encoder with a frozen layer, and a copy of its gradients"""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 3))
    encoder[2].requires_grad_(False)
    encoder(torch.randn(8, 60)).square().sum().backward()
    before = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.requires_grad}
    return encoder, before


def test_the_leader_is_slowed_down(answer):
    k = answer.coefficients({"audio": torch.tensor(12.0), "visual": torch.tensor(8.0)}, 0.3)
    k = {m: float(v) for m, v in k.items()}
    assert abs(k["visual"] - 1) < 1e-6, (
        f"visual is the weakest, so its k is 1: yours is {k['visual']:.3f}.")
    wanted = 1 - math.tanh(0.3 * 1.5)
    assert abs(k["audio"] - wanted) < 1e-6, (
        f"audio is ahead by rho = 12/8: k = 1 - tanh(0.3 x 1.5) = {wanted:.3f}, yours is"
        f" {k['audio']:.3f}.")


def test_three_modalities(answer):
    k = answer.coefficients({m: torch.tensor(s) for m, s in zip("abc", (3.0, 6.0, 9.0))}, 0.3)
    found = [round(float(v), 3) for v in k.values()]
    wanted = [1.0, round(1 - math.tanh(0.6), 3), round(1 - math.tanh(0.9), 3)]
    assert found == wanted, (
        f"scores 3, 6 and 9: each is compared with the WEAKEST, k = {wanted}; yours are {found}.")


def test_gradients_without_noise(answer):
    encoder, before = with_gradients()
    answer.modulate(encoder, torch.tensor(0.5), False)
    for name, p in encoder.named_parameters():
        if p.grad is None:
            continue
        k = 0.5 if p.ndim > 1 else 1.0
        assert torch.allclose(p.grad, k * before[name]), (
            f"the gradient of {name}, shape {tuple(p.shape)}, must be {k:g} times what it was:"
            " weights (two axes or more) are changed, biases are not.")


def test_the_noise_is_as_large_as_the_gradient_was(answer):
    encoder, before = with_gradients()
    torch.manual_seed(1)
    answer.modulate(encoder, torch.tensor(0.5), True)
    for name in ("0.weight", "1.weight"):
        noise = encoder.get_parameter(name).grad - 0.5 * before[name]
        ratio = float(noise.std() / before[name].std())
        assert 0.9 < ratio < 1.1, (
            f"the noise of {name} has {ratio:.2f} times the deviation that its gradient had. Half:"
            " you took std(g) after g was multiplied with k. 0: there is no noise.")
