"""The check of exercise 7, on a query matrix of the toy's pre-trained audio encoder."""
import torch

from encoders import build
from pretrained import checkpoints


def layer_and_update(scale):
    """-> W0, an update BA of rank 1 with |BA| = scale |W0|, inputs in bf16, and BA x, exact"""
    encoder = build("audio_vit_toy")
    checkpoints.load_public(encoder, checkpoints.download("audio_vit_toy"))
    W = encoder.blocks[0].attention.query.weight.detach()             # (48, 48)
    rng = torch.Generator().manual_seed(0)
    BA = torch.randn(48, 1, generator=rng) @ torch.randn(1, 48, generator=rng)
    BA = BA * (scale * W.norm() / BA.norm())
    x = torch.randn(4000, 48, generator=rng).bfloat16()
    return W, BA, x, x.double() @ BA.double().T


def share(answer, way, scale):
    W, BA, x, wanted = layer_and_update(scale)
    before, after = way(W, 0 * BA, x), way(W, BA, x)
    assert after.dtype == torch.bfloat16, f"the output is {after.dtype}, asked for is bfloat16."
    return answer.survives(before, after, wanted)


def test_survives(answer):
    before, wanted = torch.ones(4), torch.tensor([1e-3, -2e-3, 0, 1e-3])
    for kept in (0.0, 0.25, 1.0):
        found = answer.survives(before, before.double() + kept * wanted.double(), wanted)
        assert abs(found - kept) < 1e-6, (
            f"{100 * kept:g} % of the wanted change happened; yours says {100 * found:.4g} %."
            " Subtract in float64: the change, projected on what was wanted.")


def test_late_swallows_the_update(answer):
    found = share(answer, answer.late, 1e-4)
    assert 0.02 < found < 0.3, (
        f"{100 * found:.0f} % of an update of 1e-4 survives; it should be about 10 %. 0 %: BA x is"
        " not added. About 100 %: you added before rounding. W x must be bf16 BEFORE the sum.")


def test_early_keeps_it(answer):
    found = share(answer, answer.early, 1e-4)
    assert 0.5 < found < 1.6, (
        f"{100 * found:.0f} % of an update of 1e-4 survives; on average it should be all, with some"
        " noise. Add W + BA in float32, and round the sum: (W + BA).bfloat16().")


def test_large_updates_survive_both(answer):
    for name in ("late", "early"):
        found = share(answer, getattr(answer, name), 1e-2)
        assert 0.97 < found < 1.03, (
            f"of an update of 1e-2 all should survive in {name}; yours keeps {100 * found:.0f} %.")
