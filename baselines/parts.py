"""What the compared methods share: encoders without heads, the joint head, towers in the open.

Every file beside this one has the skeleton of `train_joint.py`. What a method must remember, to go
on after a kill, is a parameter or a buffer of its `models`.

Shapes: B batch, V views, T tokens, D width, C classes, D_m width of the feature h_m of modality m.
"""
import torch
import torch.nn.functional as F
from torch import nn

from encoders import BERT, AudioViT, ViT, padding_mask
from harness import metrics
from harness.models import family_of, load_unimodal, pretrained_model

SGD_LR = 0.03      # ours
SGD_DECAY = 1e-4   # of OGM-GE, PMR and MLA


# ---- Models ----

def pretrained_encoders(settings: dict, info: dict) -> nn.ModuleDict:
    """-> modality -> UnimodalModel with public weights and without a head: that is the method's.

    Every encoder starts from the very weights that step 1 with this seed starts it from.
    """
    models = nn.ModuleDict()
    for m in settings["encoders"]:
        torch.manual_seed(settings["seed"])
        models[m] = pretrained_model(settings, m, info)
        models[m].head = None
    return models


def frozen_encoders(unimodal: dict, info: dict) -> nn.ModuleDict:
    """The same of finished runs of step 1: fine-tuned, and frozen."""
    models = nn.ModuleDict()
    for m, run in unimodal.items():
        models[m] = load_unimodal(run, info)
        models[m].head = None
    return models.requires_grad_(False)


class ConcatHead(nn.Module):
    """One linear layer on all features side by side: z = W [h_1; ...; h_M] + b.

    forward: modality -> (B, D_m); -> (B, C). models: modality -> UnimodalModel.
    """

    def __init__(self, models: nn.ModuleDict, classes: int):
        super().__init__()
        self.widths = {m: model.encoder.width for m, model in models.items()}
        self.linear = nn.Linear(sum(self.widths.values()), classes)

    def forward(self, h):
        return self.linear(torch.cat([h[m] for m in self.widths], dim=-1))

    def blocks(self):
        """Modality -> (W_m (C, D_m), b / M): its own columns of W, an equal share of the bias."""
        columns = self.linear.weight.split(list(self.widths.values()), dim=1)
        return {m: (W, self.linear.bias / len(self.widths)) for m, W in zip(self.widths, columns)}

    def split(self, h):
        """Modality -> W_m h_m + b / M, (B, C): what each contributes. Their sum is z."""
        return {m: F.linear(h[m], W, b) for m, (W, b) in self.blocks().items()}


def features(models: nn.ModuleDict, x: dict, device: str, settings: dict) -> dict:
    """h_m of the modalities in x, (B, D_m) float32.

    Encoders may run in bfloat16. Heads, distances and losses are small and stay exact.
    """
    with metrics.autocast(device, settings):
        h = {m: models[m].features(x[m]) for m in x}
    return {m: v.float() for m, v in h.items()}


# ---- --optimizer, for methods whose authors train with SGD ----

def add_optimizer(p) -> None:
    """AdamW divides a gradient by its running size. What a method does to that size is lost in
    part; SGD shows it."""
    p.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw",
                   help=f"sgd has momentum 0.9 and the rate {SGD_LR:g}; default: adamw, as all"
                        " methods here")


def lr_of(optimizer: str) -> float | None:
    """The default learning rate; None: that of joint training, which is AdamW's."""
    return SGD_LR if optimizer == "sgd" else None


def decay_of(optimizer: str) -> dict:
    """SGD's weight decay, as a setting. At these rates AdamW's would pull the weights to zero."""
    return dict(weight_decay=SGD_DECAY) if optimizer == "sgd" else {}


# ---- What a run stores ----

def trained(models: nn.ModuleDict, optimizer) -> dict:
    """The tensors that training changes: all but the parameters that the optimiser has not got."""
    ours = set()
    for group in optimizer.param_groups:
        ours |= {id(p) for p in group["params"]}
    frozen = {name for name, p in models.named_parameters() if id(p) not in ours}
    return {name: v for name, v in copies(models).items() if name not in frozen}


def whole(models: nn.ModuleDict) -> dict:
    """All tensors. A modality's columns of the joint head become a head of its own. So whoever
    loads the run finds complete uni-modal models in it."""
    tensors = copies(models)
    if "joint" in models and isinstance(models["joint"], ConcatHead):
        for m, (W, b) in models["joint"].blocks().items():
            if models[m].head is None:
                tensors[f"{m}.head.weight"] = W
                tensors[f"{m}.head.bias"] = b
    return tensors


def copies(models: nn.ModuleDict) -> dict:
    """The tensors of a model. Heads are copied: MLA's one head stands in several places, and a file
    wants a memory of its own for each tensor."""
    tensors = {}
    for name, v in models.state_dict().items():
        tensors[name] = v.clone() if ".head." in name else v
    return tensors


# ---- Transformers with tokens of the method's own between their blocks ----

class Tower:
    """One modality's transformer, with its last `layers` blocks in the open.

    x: (N, T, D), the tokens so far. N = B V: every view (frame, clip) of a sample is a sequence of
    its own, as its encoder knows it. What a method adds goes to all views alike. What comes back is
    averaged over them.
    """

    def __init__(self, encoder, x, layers: int):
        self.encoder = encoder
        self.blocks = encoder.blocks[-layers:]
        self.views = 1
        if x.dim() == 5:                                              # (B, V, C, H, W)
            self.views = x.shape[1]
            x = x.flatten(0, 1)
        self.mask = {}                                                # of BERT: which tokens count
        if isinstance(encoder, BERT):
            self.mask = dict(mask=padding_mask(x)[:, None, None])     # (N, 1, 1, T)
        self.x = encoder.embed(x)
        for block in encoder.blocks[:-layers]:
            self.x = block(self.x, **self.mask)

    def block(self, i: int, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[x ; added] through the i-th of the last blocks.

        added: (B, n, D); -> x (N, T, D) and added (B, n, D), as they come out of it.
        """
        T, n = self.x.shape[1], added.shape[1]
        # What is added is never padding.
        mask = {name: F.pad(m, (0, n), value=True) for name, m in self.mask.items()}
        of_each_view = added.repeat_interleave(self.views, 0)         # (N, n, D)
        sequence = torch.cat([self.x, of_each_view], dim=1)           # (N, T + n, D)
        out = self.blocks[i](sequence, **mask)
        x, added = out[:, :T], out[:, T:]
        return x, self.mean_over_views(added)

    def feature(self) -> torch.Tensor:
        """The class token after the last norm, averaged over views: (B, D) float32.

        Of BERT that is [CLS] before the pooler.
        """
        cls = self.encoder.norm(self.x[:, 0]).float()
        return self.mean_over_views(cls)

    def mean_over_views(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, self.views)).mean(1)               # (N, ...) -> (B, ...)


# ---- Checks before any work ----

def only_transformers(encoders: dict) -> None:
    """ValueError unless a `Tower` can be made of all encoders, modality -> name."""
    for m, name in encoders.items():
        if family_of(name) not in (ViT, AudioViT, BERT):
            raise ValueError(f"--encoder {m}={name}: tokens can be added between the blocks of ViT,"
                             " AudioViT and BERT only (a ResNet has no tokens, DeBERTa no distances"
                             " for added ones)")


def one_label(method: str, args, info: dict) -> None:
    """ValueError for data with several labels a sample."""
    if info["multilabel"]:
        raise ValueError(f"{args.dataset} has several labels a sample: {method} is defined for one"
                         " label only")
