"""The check of exercise 4, on the pre-trained picture encoder of the toy."""
import pytest
import torch

from encoders import UnimodalModel, build
from lora import add_lora
from pretrained import checkpoints


@pytest.fixture
def adapted():
    """-> a model with LoRA, pictures, and the model's prediction without LoRA"""
    torch.manual_seed(0)
    model = UnimodalModel(build("vit_toy"), 8)
    checkpoints.load_public(model.encoder, checkpoints.download("vit_toy"))
    model.head.weight.data.mul_(5)                    # a head that is rather sure
    x = torch.randn(20, 1, 3, 32, 32)
    before = model(x).softmax(-1).detach()
    add_lora(model, rank=1)
    return model, x, before


def test_distance(answer):
    p = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    q = torch.tensor([[0, 0, 1.0], [0.5, 0.25, 0.25]])
    found = answer.distance(p, q)
    assert abs(found - 0.625) < 1e-6, (
        f"of these two samples one moves by 1, one by 1/4: the mean is 0.625, yours is {found:.3f}."
        " Sum over the classes, halve, and average over the samples.")


def test_every_B_is_filled_in_place(answer, adapted):
    model, _, _ = adapted
    held = {name: p for name, p in model.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in held.items() if not name.endswith("lora_B")}
    found = answer.randomise_B(model, 0.1)
    wanted = sorted(name for name in held if name.endswith("lora_B"))
    assert sorted(found) == wanted, (
        f"there are {len(wanted)} layers with LoRA (query, key and value of each block); yours"
        f" names {len(found)}. Their parameters end with lora_B.")
    for name, p in model.named_parameters():
        assert p is held[name], (
            f"{name} is a new tensor. An optimiser made before would go on training the old one:"
            " fill it in place, p.normal_(0, std) under torch.no_grad().")
        if name in frozen:
            assert torch.equal(p, frozen[name]), f"{name} has changed; only B may."
    std = float(torch.cat([held[name].detach().flatten() for name in wanted]).std())
    assert 0.08 < std < 0.12, f"the deviation of all B is {std:.3f}, asked for was 0.1."


def test_epoch_0_is_no_longer_UME(answer, adapted):
    model, x, before = adapted
    assert torch.equal(model(x).softmax(-1), before)  # B = 0: the same bits
    moved = {}
    for std in (0.0, 0.03, 0.3):
        torch.manual_seed(1)
        answer.randomise_B(model, std)
        moved[std] = answer.distance(model(x).softmax(-1).detach(), before)
    told = ", ".join(f"std {std:g}: {far:.4f}" for std, far in moved.items())
    assert moved[0.0] == 0, f"with std 0 B is zero, and nothing moves; yours says {told}."
    assert 0 < moved[0.03] < moved[0.3], (
        f"a larger B moves the prediction further; yours says {told}.")
