"""Eq. 2: what LoRA may change (at first nothing, then A and B only).
Eq. 3: the loss of the averaged prediction, against float64."""
import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from encoders import BERT, AudioViT, DeBERTa, ResNet, UnimodalModel, ViT, build
from lora import (KINDS, LoRAConv2d, LoRALinear, add_lora, lora_state_dict, mean_log_prob,
                  mean_logits, mean_prob_loss, merge_lora)

TEXT = dict(vocab_size=60, width=32, depth=2, heads=4, mlp_width=64, max_length=16)
LAYERS = {     # name -> (layer, shape of its input)
    "linear": (lambda: nn.Linear(12, 20), (6, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (6, 12)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (4, 3, 9, 9)),
    "conv 1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (4, 6, 5, 5)),
    "conv, uneven": (lambda: nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding=(2, 0),
                                       dilation=(2, 1)), (4, 3, 9, 9)),
}
ENCODERS = {   # name -> (encoder, with whatever randomness it has in training turned up; its input)
    "vit": (lambda: ViT(32, 8, 32, 2, 4), lambda: torch.randn(6, 2, 3, 32, 32)),
    "audio_vit": (lambda: AudioViT(32, 2, 4, mel=(32, 64), drop_path=0.5),
                  lambda: torch.randn(6, 1, 1, 32, 64)),
    "bert": (lambda: BERT(**TEXT, dropout=0.3), lambda: torch.randint(1, 60, (6, 9))),
    "deberta": (lambda: DeBERTa(**TEXT, dropout=0.3), lambda: torch.randint(1, 60, (6, 9))),
    "resnet": (lambda: ResNet((1, 1, 1, 1), False, width=8), lambda: torch.randn(6, 1, 3, 64, 64)),
    "resnet, bottleneck": (lambda: ResNet((1, 1, 1, 1), True, width=4),
                           lambda: torch.randn(6, 1, 3, 64, 64)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_encoder = pytest.mark.parametrize("kind", ENCODERS)


def layer_of(kind, rank=2, scale=1.0):
    """(plain layer, the same one with LoRA, input)"""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make()
    return plain, KINDS[type(plain)](copy.deepcopy(plain), rank, scale), torch.randn(shape)


def model_of(kind, rank=2, lora=True):
    """(plain model, the same one with LoRA, input)"""
    torch.manual_seed(0)
    plain = UnimodalModel(ENCODERS[kind][0](), 5).eval()
    model = copy.deepcopy(plain).train()     # as a caller leaves it who has just trained it
    if lora:
        add_lora(model, rank)
    return plain, model, ENCODERS[kind][1]()


def shake(model):
    """B away from zero, so that the update is there."""
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p.data, std=0.3)
    return model


# ---- Eq. 2: before and during training ----
@every_layer
def test_a_layer_starts_where_it_was(kind):
    plain, lora, x = layer_of(kind)
    assert torch.equal(lora(x), plain(x))
    assert not torch.allclose(shake(lora)(x), plain(x), atol=0.01)     # the line above can fail


@every_encoder
@torch.no_grad()
def test_a_model_starts_where_it_was(kind):
    plain, lora, x = model_of(kind)
    # Though nothing of `lora` but A and B requires a gradient: F.linear chooses its kernel by that.
    assert torch.equal(lora(x), plain(x))
    assert not torch.allclose(shake(lora)(x), plain(x), atol=1e-4)


@every_encoder
def test_gradients_reach_A_and_B_only(kind):
    _, model, x = model_of(kind)
    shake(model)(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith(("lora_A", "lora_B")), name
        assert (p.grad is not None and p.grad.any()) if p.requires_grad else p.grad is None, name


@every_encoder
def test_frozen_means_bit_identical_buffers_included(kind):
    _, model, x = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    # Every parameter, as a careless caller might.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(4):
        model.train()     # as careless
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(6) % 5).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith(("lora_A", "lora_B")), name
    if "resnet" in kind:
        assert any(name.endswith("running_mean") for name in before)
        plain = model_of(kind)[0].train()
        state = copy.deepcopy(plain.state_dict())
        plain(x)     # what would have happened to the buffers
        assert not torch.equal(plain.state_dict()["encoder.bn1.running_mean"],
                               state["encoder.bn1.running_mean"])


@every_encoder
@torch.no_grad()
def test_a_frozen_encoder_draws_nothing_at_random(kind):
    plain, model, x = model_of(kind)
    assert torch.equal(shake(model).train()(x), model.eval()(x))
    torch.manual_seed(1)
    # The plain ones do draw, or use the statistics of the batch.
    assert torch.equal(plain.train()(x), plain.eval()(x)) == (kind == "vit")
    # A modality without LoRA is frozen, too.
    head_only = model_of(kind, lora=False)[1].requires_grad_(False)
    assert torch.equal(head_only.train()(x), head_only.eval()(x))


# ---- Eq. 2: the update ----
@every_layer
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_update_is_scale_BA_of_rank_r(kind, scale):
    """The additive forward against a product or convolution with W + scale BA, in float64.

    Also the rank of BA as a matrix (out, the rest).
    """
    plain, lora, x = layer_of(kind, 2, scale)
    shake(lora)
    W, A, B = plain.weight.double(), lora.lora_A.double(), lora.lora_B.double()
    BA = torch.zeros_like(W.flatten(1))
    # Naive: (BA)[out] = sum_r B[out, r] A[r].
    for out, r in itertools.product(range(B.shape[0]), range(2)):
        BA[out] += B.flatten(1)[out, r] * A[r].flatten()
    weight = W + scale * BA.view_as(W)
    bias = plain.bias if plain.bias is None else plain.bias.double()
    wanted = F.linear(x.double(), weight, bias) if type(plain) is nn.Linear else \
        F.conv2d(x.double(), weight, bias, plain.stride, plain.padding, plain.dilation)
    torch.testing.assert_close(lora(x).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.delta().double(), scale * BA.view_as(W), rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(lora.delta().double().flatten(1), rtol=1e-5) == 2
    # r (out + in kh kw)
    assert lora.lora_A.numel() + lora.lora_B.numel() == 2 * sum(W.flatten(1).shape)
    torch.testing.assert_close(merge_lora(lora)(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_start_of_A_and_B():
    torch.manual_seed(0)
    for layer, fan_in in [(LoRALinear(nn.Linear(400, 30), 64), 400),
                          (LoRAConv2d(nn.Conv2d(50, 30, (2, 4)), 64), 400)]:
        # 25,600 draws from N(0, 1): the error of the mean is 0.006, of the variance 0.009.
        # The fourth moment tells a Gaussian from a uniform distribution.
        A = layer.lora_A.detach() * math.sqrt(fan_in)
        assert abs(A.mean()) < 0.03 and abs(A.var() - 1) < 0.04 and abs((A ** 4).mean() - 3) < 0.3
        assert not layer.lora_B.any() and layer.lora_B.requires_grad and layer.lora_A.requires_grad
    state = torch.random.get_rng_state()
    one = LoRALinear(nn.Linear(5, 5), 2).lora_A
    torch.random.set_rng_state(state)
    assert torch.equal(LoRALinear(nn.Linear(5, 5), 2).lora_A, one)     # the seed decides
    for dtype, own in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                       (torch.float64, torch.float64)]:
        # bf16 could not hold the small steps.
        assert LoRALinear(nn.Linear(5, 5, dtype=dtype), 1).lora_A.dtype == own


# ---- add_lora, merge_lora ----
@pytest.mark.parametrize("name, parameters, layers", [
    ("vit_b16", 55_296, 36), ("vit_l14", 147_456, 72), ("audio_vit_b", 55_296, 36),
    ("bert_base", 55_296, 36), ("deberta_large", 147_456, 72)])
def test_rank_one_is_small(name, parameters, layers):
    with torch.device("meta"):     # shapes without numbers
        model = UnimodalModel(build(name), 6)
        names = add_lora(model, rank=1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert sum(t.numel() for t in lora_state_dict(model).values()) == parameters
    assert len(names) == layers and len(lora_state_dict(model)) == 2 * layers
    assert names == [f"encoder.blocks.{i}.attention.{x}" for i in range(layers // 3)
                     for x in ("query", "key", "value")]


def test_every_convolution_of_a_resnet_gets_lora():
    with torch.device("meta"):
        model = UnimodalModel(build("resnet18"), 6)
        convolutions = [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
        assert add_lora(model) == convolutions
    assert len(convolutions) == 20
    assert {"encoder.conv1", "encoder.layer2.0.downsample.0"} <= set(convolutions)


def test_names_match_whole_parts():
    class Zoo(nn.Module):
        lora_targets = ("key", "box.0")

        def __init__(self):
            super().__init__()
            self.key, self.monkey, self.keys = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.box, self.mybox = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    model = Zoo()
    assert add_lora(model) == ["key", "box.0"]
    assert type(model.monkey) is type(model.keys) is type(model.mybox[0]) is nn.Linear


def test_add_lora_refuses():
    model = UnimodalModel(build("vit_toy"), 4)
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
            LoRALinear(nn.Linear(4, 4), rank)
        with pytest.raises(ValueError, match="rank"):
            add_lora(model, rank)
    with pytest.raises(ValueError, match="groups"):
        LoRAConv2d(nn.Conv2d(4, 4, 3, groups=2), 1)
    model = UnimodalModel(build("vit_toy"), 4)
    names = add_lora(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="LoRA added before"):
        add_lora(model)
    assert model.state_dict().keys() == state.keys() and len(names) == 9     # and left it as it was
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential has no plain layer"):
        add_lora(plain)
    assert all(p.requires_grad for p in plain.parameters())


@every_encoder
@torch.no_grad()
def test_merge_gives_plain_layers_with_the_same_output(kind):
    plain, model, x = model_of(kind)
    x = x.double() if x.is_floating_point() else x
    before = shake(model).double()(x)
    assert not torch.allclose(plain.double()(x), before, atol=1e-4)
    assert merge_lora(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys() and not lora_state_dict(model)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    once = copy.deepcopy(model.state_dict())
    merge_lora(model)     # nothing left to merge
    assert all(torch.equal(t, once[name]) for name, t in model.state_dict().items())


@every_encoder
def test_modes_never_change_weights(kind):
    _, model, _ = model_of(kind)
    state = copy.deepcopy(shake(model).state_dict())
    for merged in (False, True):
        if merged:
            state = copy.deepcopy(merge_lora(model).state_dict())
        for mode in (True, False, True, True, False):
            model.train(mode)
            assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# ---- precision and cost ----
@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_small_updates_survive_bf16(kind):
    """After Adam's first step B is 1e-4. How much of its effect is left in outputs that autocast
    rounds to bf16? (1: all of it.)"""
    torch.manual_seed(0)
    if kind == "linear":
        base, x = nn.Linear(512, 512), torch.randn(2048, 512)
    else:
        base, x = nn.Conv2d(64, 128, 3, padding=1), torch.randn(16, 64, 24, 24)
    layer = KINDS[type(base)](base, 1)
    for parameter, rms in [(base.weight, 0.03), (layer.lora_A, 0.02), (layer.lora_B, 1e-4)]:
        nn.init.normal_(parameter, std=rms)
    with torch.autocast("cpu", torch.bfloat16):
        frozen, ours, additive = base(x), layer(x), base(x) + layer.update(x)
    assert frozen.dtype == ours.dtype == additive.dtype == torch.bfloat16
    true = layer.update(x).double()
    share = lambda y: float(((y.double() - frozen.double()) * true).sum() / true.square().sum())
    assert 0.9 <= share(ours) <= 1.1
    # What most LoRA code does: the update drowns in the rounding of base(x).
    assert share(additive) < 0.5


def test_autocast_does_not_round_the_update():
    torch.manual_seed(0)
    layer, x, g = (shake(LoRALinear(nn.Linear(64, 48), 3)), torch.randn(100, 64),
                   torch.randn(100, 48))
    wanted = torch.autograd.grad((layer(x) * g).sum(), (layer.lora_A, layer.lora_B))
    delta = layer.delta()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta(), delta)
        found = torch.autograd.grad((layer(x).float() * g).sum(), (layer.lora_A, layer.lora_B))
    for w, f in zip(wanted, found):
        assert f.dtype == torch.float32 and (w - f).norm() < 0.01 * w.norm()     # nor its gradients


def test_nothing_as_wide_as_the_output_is_kept_for_backward():
    """The additive form keeps x and the r numbers a token. W0 + BA is never formed: its gradient
    would be a full weight."""
    layer, x, kept = LoRALinear(nn.Linear(64, 96), 2), torch.randn(10, 7, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 10 * 7 * (64 + 2)


# ---- Eq. 3 ----
def logits_of(M, B=7, C=5, scale=3.0, dtype=torch.float32):
    torch.manual_seed(M)
    logits = {f"modality{m}": (scale * torch.randn(B, C)).to(dtype) for m in range(M)}
    return logits, torch.randint(C, (B,)), torch.randint(2, (B, C), dtype=torch.uint8)


def naive(logits, target):
    """Eq. 3 as it reads, in float64: sample by sample, class by class,
    no logarithm before the end."""
    z = [[[float(v) for v in row] for row in m] for m in logits.values()]
    B, C, M = len(z[0]), len(z[0][0]), len(z)
    p = [[0.0] * C for _ in range(B)]
    for m, b, c in itertools.product(range(M), range(B), range(C)):
        if target.ndim == 1:
            P = math.exp(z[m][b][c]) / sum(math.exp(v) for v in z[m][b])
        else:
            P = 1 / (1 + math.exp(-z[m][b][c]))
        p[b][c] += P / M
    if target.ndim == 1:
        return p, -sum(math.log(p[b][y]) for b, y in enumerate(target.tolist())) / B
    return p, -sum(math.log(p[b][c] if target[b, c] else 1 - p[b][c])
                   for b in range(B) for c in range(C)) / (B * C)


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_against_a_naive_loop(M, dtype):
    logits, y, multi = logits_of(M, dtype=dtype)
    p, loss = naive(logits, y)
    assert mean_log_prob(logits).dtype == torch.float32
    ours = mean_log_prob(logits).exp().double()
    torch.testing.assert_close(ours, torch.tensor(p, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert float(mean_prob_loss(logits, y)) == pytest.approx(loss, rel=1e-5)
    for target in (multi, multi.long(), multi.bool(), multi.float()):
        assert float(mean_prob_loss(logits, target)) == pytest.approx(naive(logits, multi)[1],
                                                                      rel=1e-5)


def test_one_modality_is_the_usual_loss():
    logits, y, multi = logits_of(1)
    z = logits["modality0"]
    torch.testing.assert_close(mean_prob_loss(logits, y), F.cross_entropy(z, y))     # Eq. 1
    torch.testing.assert_close(mean_prob_loss(logits, multi),
                               F.binary_cross_entropy_with_logits(z, multi.float()))


@pytest.mark.parametrize("M", [1, 2, 3])
def test_loss_of_extreme_logits_is_finite(M):
    torch.manual_seed(0)
    logits = {m: (1000 * (2.0 * torch.randint(2, (50, 4)) - 1)).requires_grad_() for m in range(M)}
    for target in (torch.randint(4, (50,)), torch.randint(2, (50, 4))):
        loss = mean_prob_loss(logits, target)
        gradients = torch.autograd.grad(loss, list(logits.values()))
        assert (loss.isfinite() and all(g.isfinite().all() for g in gradients)
                and any(g.any() for g in gradients))
    sure = {"right": torch.tensor([[1000.0, -1000.0]]), "wrong": torch.tensor([[-1000.0, 1000.0]])}
    # One modality that is sure and wrong costs log 2 at most, if another is sure and right.
    assert float(mean_prob_loss(sure, torch.tensor([0]))) == pytest.approx(math.log(2))
    sure["right"] = sure["wrong"]
    # exp(-2000) is 0 in float32 and in float64.
    assert float(mean_prob_loss(sure, torch.tensor([0]))) == pytest.approx(2000)
    assert float(mean_prob_loss(sure, torch.tensor([[1, 0]]))) == pytest.approx(1000)


def test_gradient_of_a_modality_carries_its_share_of_the_probability():
    """d loss / d z_m = P_m(y) / sum_k P_k(y) (softmax(z_m) - onehot(y)):
    the cross-entropy's, weighted."""
    logits, y, _ = logits_of(3, dtype=torch.float64)
    z = [v.requires_grad_() for v in logits.values()]
    P = torch.stack([v.softmax(-1) for v in z])     # (M, B, C)
    share = P[:, torch.arange(7), y] / P[:, torch.arange(7), y].sum(0)     # (M, B)
    for m, gradient in enumerate(torch.autograd.grad(mean_prob_loss(logits, y), z)):
        torch.testing.assert_close(gradient, share[m, :, None] * (P[m] - F.one_hot(y, 5)) / 7)


def test_order_of_modalities_does_not_matter():
    logits, y, multi = logits_of(3, dtype=torch.float64)
    for order in itertools.permutations(logits):
        again = {m: logits[m] for m in order}
        torch.testing.assert_close(mean_log_prob(again), mean_log_prob(logits))
        for target in (y, multi):
            torch.testing.assert_close(mean_prob_loss(again, target),
                                       mean_prob_loss(logits, target))


def test_mean_logits_is_the_other_average():
    logits, y, multi = logits_of(3)
    ours, mean = mean_logits(logits), sum(z.double() for z in logits.values()) / 3
    for found, wanted in [(mean_log_prob(ours), mean.log_softmax(-1)),
                          (mean_prob_loss(ours, y), F.cross_entropy(mean, y)),
                          (mean_prob_loss(ours, multi),
                           F.binary_cross_entropy_with_logits(mean, multi.double()))]:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mean_log_prob(mean_logits(logits)), mean_log_prob(logits), atol=0.1)
