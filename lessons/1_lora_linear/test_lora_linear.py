"""The check of exercise 1."""
import torch
from torch import nn


def made(answer, rank=2):
    """-> (the layer that was wrapped, a copy of its weight, your layer)"""
    torch.manual_seed(0)
    base = nn.Linear(40, 30)
    before = base.weight.detach().clone()
    layer = answer.LoRALinear(base, rank)
    names = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert names.get("lora_A") == (rank, 40) and names.get("lora_B") == (30, rank), (
        f"parameters are {names}, but Eq. 2 needs lora_A (rank, in) = ({rank}, 40) and lora_B"
        f" (out, rank) = (30, {rank}). A tensor is trained only as nn.Parameter.")
    return base, before, layer


def test_the_start_is_the_old_layer(answer):
    base, _, layer = made(answer)
    x = torch.randn(5, 7, 40)
    assert not layer.lora_B.any(), "B must be zero: then B A = 0, and training begins at W0."
    assert torch.equal(layer(x), base(x)), "B is zero, but the output differs from base(x)."


def test_A_is_gaussian(answer):
    _, _, layer = made(answer, rank=500)
    A = layer.lora_A.detach()
    assert A.any(), "A is zero. B A x has the gradient 0 for A and for B, then: nothing ever moves."
    assert abs(float(A.var()) * 40 - 1) < 0.1, (
        f"the variance of A is {float(A.var()):.4f}, but 1/in = {1 / 40:.4f} keeps A x as large as"
        " x is, for layers of any width.")


def test_only_A_and_B_are_trained(answer):
    base, before, layer = made(answer)
    trained = sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    assert trained == ["lora_A", "lora_B"], (
        f"{trained} require a gradient: freeze base, its bias too, with requires_grad_(False).")
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x, wanted = torch.randn(64, 40), torch.randn(64, 30)
    for step in range(3):
        optimizer.zero_grad()
        (layer(x) - wanted).square().sum().backward()
        if step == 0:
            assert layer.lora_B.grad is not None and layer.lora_B.grad.any(), (
                "B has no gradient in the first step: is B A x in the output?")
            assert layer.lora_A.grad is not None and not layer.lora_A.grad.any(), (
                "in the first step A's gradient is B^T (...) = 0, since B is zero; yours is not.")
        for p in (layer.lora_A, layer.lora_B):
            p.grad.div_(p.grad.norm() + 1e-9)
        optimizer.step()
    assert torch.equal(base.weight, before), "W0 has moved."


def test_the_update_has_the_rank(answer):
    base, _, layer = made(answer, rank=3)
    with torch.no_grad():
        layer.lora_B.normal_()
        eye = torch.eye(40)                           # its images are the columns of the matrix
        update = (layer(eye) - base(eye)).T           # (30, 40)
        rank = int(torch.linalg.matrix_rank(update, atol=1e-4))
        assert rank == 3, f"the update of rank 3 has rank {rank} as a matrix (out, in)."
        wanted = layer.lora_B @ layer.lora_A
        assert torch.allclose(update, wanted, atol=1e-4), "the update is not B A."
