"""MMLoRA's two equations: low-rank updates of frozen weights (Eq. 2) and the loss of the averaged prediction (Eq. 3).

    Eq. 2    W0 + BA          A Gaussian, B zero, rank r: only A and B are trained
    Eq. 3    max over (A, B) of  sum_(x,y) log sum_m P_m(y|x)      one P_m for each modality m

Wrap a fine-tuned model with `add_lora`, train what still requires a gradient with `mean_prob_loss`, fold the result back
into plain layers with `merge_lora`. `train_joint.py` is that sentence with data around it.

Shapes: B batch, C classes, M modalities, r rank; a weight is (out, in), a convolution's (out, in, kh, kw).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------ Eq. 2: W0 + BA
class _LoRA(nn.Module):
    """What both kinds of layer share. A subclass says how A and B act on its input, and how they look as one weight."""

    def __init__(self, base: nn.Module, rank: int, scale: float, shape_A: tuple, shape_B: tuple):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {rank}")
        self.base, self.rank, self.scale = base.requires_grad_(False), rank, scale
        fan_in = math.prod(shape_A[1:])
        like = dict(device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, torch.float32))   # never bf16: see forward
        self.lora_A = nn.Parameter(torch.randn(shape_A, **like) / math.sqrt(fan_in))   # Eq. 2: Gaussian; variance 1/fan_in is ours
        self.lora_B = nn.Parameter(torch.zeros(shape_B, **like))                       # Eq. 2: zero, so training starts at W0

    def delta(self) -> torch.Tensor:
        """The update in the shape of the weight, scale * BA. Its rank as a (out, everything else) matrix is at most r."""
        with torch.autocast(self.lora_A.device.type, enabled=False):     # autocast would round the product to bf16
            return self.scale * (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).view_as(self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type) or x.dtype != self.lora_A.dtype:
            # bf16 keeps 8 bits. After the first step BA is about 1e-4 of W0's outputs: added to an output that has already been
            # rounded it is mostly rounded away, and LoRA seems not to learn. So add the weights, in float32, before any rounding.
            return self.apply_weight(x, (self.base.weight + self.delta()).to(x.dtype))
        return self.base(x) + self.update(x)       # same value; cheaper, since W0 + BA is never formed nor differentiated

    def merged(self) -> nn.Module:
        """The plain layer with weight W0 + BA."""
        with torch.no_grad():
            self.base.weight += self.delta()
        return self.base


class LoRALinear(_LoRA):
    """`base(x) + scale * B A x` with A (r, in), B (out, r); `base`, an `nn.Linear`, is frozen (Eq. 2)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 1.0):
        super().__init__(base, rank, scale, (rank, base.in_features), (base.out_features, rank))

    def update(self, x):
        return F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)      # (..., r) is the cheap place to scale

    def apply_weight(self, x, weight):
        return F.linear(x, weight, self.base.bias)


class LoRAConv2d(_LoRA):
    """The same for a convolution: A (r, in, kh, kw) filters the input down to r maps, B (out, r, 1, 1) mixes them.

    The kernel, read as a matrix (out, in*kh*kw), then gets an update of rank r, as Eq. 2 says. (The other published form, A (r*k, in*k)
    and B (out*k, r*k) reshaped to the kernel, has a rank up to r*k*k and twice the parameters.)
    """

    def __init__(self, base: nn.Conv2d, rank: int, scale: float = 1.0):
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ValueError("LoRAConv2d needs a convolution with groups=1 and zero padding")
        super().__init__(base, rank, scale, (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1))

    def update(self, x):
        return F.conv2d(self.scale * self._conv(x, self.lora_A), self.lora_B)

    def apply_weight(self, x, weight):
        return self._conv(x, weight, self.base.bias)

    def _conv(self, x, weight, bias=None):
        return F.conv2d(x, weight, bias, self.base.stride, self.base.padding, self.base.dilation)


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def add_lora(model: nn.Module, rank: int = 1, scale: float = 1.0) -> list[str]:
    """Freeze all of `model` and put LoRA where the class of its encoder, or encoders, says so; -> the names of the wrapped layers.

    The class attribute `lora_targets` lists endings of layer names (Sec. 4.1.2: every query, key and value of a transformer; every
    convolution of a ResNet). An ending matches whole name parts, so "key" does not match "monkey". Each of query, key and value gets its
    own A and B: one pair for a fused matrix would share A, which is a smaller model. Raises ValueError when nothing matches.
    """
    encoders = [(f"{path}." if path else "", m) for path, m in model.named_modules() if hasattr(m, "lora_targets")]
    found = [(path + name, layer) for path, encoder in encoders for name, layer in encoder.named_modules()
             if type(layer) in KINDS and any(f".{name}".endswith(f".{target}") for target in encoder.lora_targets)]
    if not found:
        raise ValueError(f"add_lora: {type(model).__name__} has no plain layer named like {[e.lora_targets for _, e in encoders]}"
                         " (no lora_targets on its class, or LoRA added before?)")
    model.requires_grad_(False)
    for name, layer in found:
        model.set_submodule(name, KINDS[type(layer)](layer, rank, scale))
    model.eval()       # frozen means frozen: no dropout, no drop path, no moving BatchNorm statistics
    return [name for name, _ in found]


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRA layer by the plain layer W0 + BA (Sec. 3.2: no cost at inference); -> model.

    An explicit call, never a side effect of `train()` or `eval()`: weights that change with the mode end up merged twice.
    """
    if isinstance(model, _LoRA):
        return model.merged()
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, _LoRA)]:
        model.set_submodule(name, layer.merged())
    return model


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B of every LoRA layer, and nothing else: what has to be stored of a trained MMLoRA model."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(("lora_A", "lora_B"))}


# ------------------------------------------------------------------------------------------------ Eq. 3: the averaged prediction
def _log_mean_exp(log_p: list[torch.Tensor]) -> torch.Tensor:
    """log (1/M) sum_m exp(log_p_m): an average of probabilities that never leaves the log, so it can't underflow to log 0."""
    return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def _wide(z: torch.Tensor) -> torch.Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))    # bf16 logits have 8 bits: too few for a log-probability


def mean_log_prob(logits: dict[str, torch.Tensor]) -> torch.Tensor:
    """log (1/M) sum_m softmax(z_m): the log of MMLoRA's (and UME's) prediction. logits: modality -> (B, C); -> (B, C)."""
    return _log_mean_exp([F.log_softmax(_wide(z), dim=-1) for z in logits.values()])


def mean_prob_loss(logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Eq. 3 as a loss, -log (1/M) sum_m P_m(y|x), averaged over the batch. With one modality it is Eq. 1, the cross-entropy.

    target: class indices (B,), or multi-hot (B, C). The paper gives no formula for several labels a sample; there every P_m(class) is a
    sigmoid and the loss is the binary cross-entropy of the averaged sigmoids, averaged over samples and classes (ours).
    """
    if target.ndim == 1:
        return F.nll_loss(mean_log_prob(logits), target)
    zs = [_wide(z) for z in logits.values()]
    yes, no = _log_mean_exp([F.logsigmoid(z) for z in zs]), _log_mean_exp([F.logsigmoid(-z) for z in zs])   # (B, C): log p, log (1 - p)
    return -torch.where(target.bool(), yes, no).mean()


def mean_logits(logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other ensemble people mean by "averaging": of logits. It multiplies evidence (a product of experts) where Eq. 3 adds it.

    -> {"mean": (B, C)}, a "model" of one modality, so that `mean_log_prob` and `mean_prob_loss` take it as they stand.
    """
    return {"mean": torch.stack([_wide(z) for z in logits.values()]).mean(0)}
