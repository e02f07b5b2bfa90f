"""The two equations of MMLoRA: low-rank updates of frozen weights, and the averaged prediction.

    Eq. 2    W0 + BA        A Gaussian, B zero, rank r; only A and B are trained
    Eq. 3    max over (A, B) of  sum_(x,y) log sum_m P_m(y|x)      one P_m for each modality m

Wrap a fine-tuned model with `add_lora`. Train what still requires a gradient with `mean_prob_loss`.
Fold the result back into plain layers with `merge_lora`. `train_joint.py` puts data around this.

Shapes: B batch, C classes, M modalities, r rank. A weight is (out, in), a convolution's is
(out, in, kh, kw).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---- Eq. 2: W0 + BA ----

class _LoRA(nn.Module):
    """What both kinds of layer share. A subclass says how A and B act on its input."""

    def __init__(self, base: nn.Module, rank: int, scale: float, shape_A: tuple, shape_B: tuple):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {rank}")
        self.base = base.requires_grad_(False)                        # W0 is frozen
        self.rank = rank
        self.scale = scale
        # A and B are never bf16, even if W0 is: bf16 cannot hold their small steps.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        like = dict(device=base.weight.device, dtype=dtype)
        fan_in = math.prod(shape_A[1:])
        A = torch.randn(shape_A, **like) / math.sqrt(fan_in)          # ours: variance 1/fan_in
        self.lora_A = nn.Parameter(A)                                 # Eq. 2: A Gaussian
        self.lora_B = nn.Parameter(torch.zeros(shape_B, **like))      # Eq. 2: B zero

    def delta(self) -> torch.Tensor:
        """scale * BA in the shape of the weight; its rank, as a matrix (out, the rest), is <= r."""
        with torch.autocast(self.lora_A.device.type, enabled=False):  # else BA is bf16
            BA = self.lora_B.flatten(1) @ self.lora_A.flatten(1)      # (out, the rest)
            return self.scale * BA.view_as(self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type) or x.dtype != self.lora_A.dtype:
            # bf16 keeps 8 bits. After the first step, BA x is about 1e-4 of W0 x. Added to outputs
            # that are already rounded, most of it is lost, and LoRA seems not to learn. So add the
            # weights in float32, and round their sum.
            weight = self.base.weight + self.delta()                  # Eq. 2: W0 + BA
            return self.apply_weight(x, weight.to(x.dtype))
        # The same value for less: W0 + BA is never formed, nor its gradient.
        return self.base(x) + self.update(x)                          # Eq. 2: W0 x + BA x

    def merged(self) -> nn.Module:
        """The plain layer with the weight W0 + BA."""
        with torch.no_grad():
            self.base.weight += self.delta()                          # Eq. 2: W0 + BA
        return self.base


class LoRALinear(_LoRA):
    """`base(x) + scale * B A x` with A (r, in), B (out, r); `base`, an `nn.Linear`, is frozen."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 1.0):
        shape_A = (rank, base.in_features)
        shape_B = (base.out_features, rank)
        super().__init__(base, rank, scale, shape_A, shape_B)

    def update(self, x):
        Ax = F.linear(x, self.lora_A)                                 # (..., r)
        return F.linear(self.scale * Ax, self.lora_B)                 # (..., out)

    def apply_weight(self, x, weight):
        return F.linear(x, weight, self.base.bias)


class LoRAConv2d(_LoRA):
    """The same for a convolution: A (r, in, kh, kw) filters to r maps, B (out, r, 1, 1) mixes them.

    So the kernel, as a matrix (out, in*kh*kw), gets an update of rank r, as Eq. 2 says. The other
    published form has A (r*k, in*k) and B (out*k, r*k), and reshapes BA to the kernel. Its rank is
    up to r*k*k, and it has more parameters: 1.8 times for 64 maps to 64 with 3 x 3.
    """

    def __init__(self, base: nn.Conv2d, rank: int, scale: float = 1.0):
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ValueError("LoRAConv2d needs a convolution with groups=1 and zero padding")
        shape_A = (rank, base.in_channels, *base.kernel_size)
        shape_B = (base.out_channels, rank, 1, 1)
        super().__init__(base, rank, scale, shape_A, shape_B)

    def update(self, x):
        Ax = self._conv(x, self.lora_A)                               # (B, r, h, w)
        return F.conv2d(self.scale * Ax, self.lora_B)                 # (B, out, h, w)

    def apply_weight(self, x, weight):
        return self._conv(x, weight, self.base.bias)

    def _conv(self, x, weight, bias=None):
        return F.conv2d(x, weight, bias, self.base.stride, self.base.padding, self.base.dilation)


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def add_lora(model: nn.Module, rank: int = 1, scale: float = 1.0) -> list[str]:
    """Freeze all of `model` and add LoRA to its encoders; return the names of the changed layers.

    The class of an encoder lists in `lora_targets` how the names of these layers end. Sec. 4.1.2:
    every query, key and value of a transformer, every convolution of a ResNet. Each layer gets its
    own A and B. (One pair for query, key and value in one matrix would share A: a smaller model.)
    Raises ValueError when no layer matches.
    """
    targets = []
    found = {}                                                        # name -> layer
    for path, encoder in model.named_modules():
        if not hasattr(encoder, "lora_targets"):
            continue
        targets.append(encoder.lora_targets)
        for name, layer in encoder.named_modules(prefix=path):
            if type(layer) in KINDS and _ends_with(name, encoder.lora_targets):
                found[name] = layer
    if not found:
        raise ValueError(f"add_lora: {type(model).__name__} has no plain layer named like {targets}"
                         " (no lora_targets on its class, or LoRA added before?)")
    model.requires_grad_(False)
    for name, layer in found.items():
        lora = KINDS[type(layer)](layer, rank, scale)
        model.set_submodule(name, lora)                               # Eq. 2: W0 becomes W0 + BA
    model.eval()    # what is frozen has no dropout, no drop path and no moving statistics
    return list(found)


def _ends_with(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a target ends the name, in whole parts: "key" ends "a.key" but not "a.monkey"."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by the plain layer W0 + BA (Sec. 3.2: no cost at inference).

    Returns the model. It is an explicit call and never a side effect of `train()` or `eval()`:
    weights that change with the mode get merged twice one day.
    """
    if isinstance(model, _LoRA):
        return model.merged()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _LoRA)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged())
    return model


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B of every LoRA layer and nothing else: all that MMLoRA has trained."""
    state = model.state_dict()
    return {name: state[name] for name in state if name.endswith(("lora_A", "lora_B"))}


# ---- Eq. 3: the averaged prediction ----

def _log_mean_exp(log_p: list[torch.Tensor]) -> torch.Tensor:
    """log (1/M) sum_m exp(log_p_m): it averages probabilities, but none can underflow to log 0."""
    return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def _wide(z: torch.Tensor) -> torch.Tensor:
    # bf16 logits have 8 bits, too few for a log-probability.
    return z.to(torch.promote_types(z.dtype, torch.float32))


def mean_log_prob(logits: dict[str, torch.Tensor]) -> torch.Tensor:
    """log (1/M) sum_m softmax(z_m): the log of MMLoRA's prediction, and of UME's.

    logits: modality -> (B, C). Returns (B, C).
    """
    log_p = [F.log_softmax(_wide(z), dim=-1) for z in logits.values()]
    return _log_mean_exp(log_p)                                       # Eq. 3: log (1/M) sum_m P_m


def mean_prob_loss(logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Eq. 3 as a loss: -log (1/M) sum_m P_m(y|x), averaged over the batch.

    With one modality it is Eq. 1, the cross-entropy. target: classes (B,), or multi-hot (B, C).
    For several labels a sample, the paper gives no formula. Ours: every P_m is a sigmoid, and the
    loss is the binary cross-entropy of their average, averaged over samples and classes.
    """
    if target.ndim == 1:
        return F.nll_loss(mean_log_prob(logits), target)              # Eq. 3, at the true class y
    zs = [_wide(z) for z in logits.values()]
    log_yes = _log_mean_exp([F.logsigmoid(z) for z in zs])            # (B, C): log p
    log_no = _log_mean_exp([F.logsigmoid(-z) for z in zs])            # (B, C): log (1 - p)
    return -torch.where(target.bool(), log_yes, log_no).mean()


def mean_logits(logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other average: of logits. It multiplies evidence (a product of experts), Eq. 3 adds it.

    Returns {"mean": (B, C)}, which looks like one modality: `mean_log_prob` and `mean_prob_loss`
    take it as it is.
    """
    return {"mean": torch.stack([_wide(z) for z in logits.values()]).mean(0)}
