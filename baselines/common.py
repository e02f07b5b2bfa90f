"""What the compared methods share, so that each file beside this one is little else than its method: `diff concat.py ogm_ge.py` shows OGM-GE.

A method is one function, `train(args, seed) -> Run`, in this order:

    task = start(...)                                      data, the paper's settings, the folder of the run
    models, load = encoders(task)                          modality -> encoder; the method adds its own heads and buffers
    for epoch in epochs(task, models, ...):                the loop: resuming, validation, log, the best epoch
        for batch in epoch:                                learning rate, inputs
            for x, y, share in batch: ...                  one part, or several with --micro-batch
    return finish(task, models, ...)                       the best epoch on test

and `logits(x) -> {"joint": (B, C), ...}`, its prediction: "joint" is the method's own, other names are modalities alone, where it has such a thing.
Everything a method must remember to go on after a kill is a parameter or a buffer of `models`.

Epochs, batch size, schedule and weight decay are those of uni-modal training, so that all methods get the same budget.

Shapes: B batch, C classes, M modalities, D_m width of the feature h_m of modality m.
"""
import argparse
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import evaluate
import paper
import train_unimodal
from encoders import BERT, BUILD, AudioViT, ViT, padding_mask
from lora import mean_prob_loss
from train_unimodal import Epoch, Task, loader, new_task  # noqa: F401  Epoch is for the methods


# ------------------------------------------------------------------------------------------------ before training
def arguments(doc: str) -> argparse.ArgumentParser:
    return train_unimodal.common_arguments(argparse.ArgumentParser(description=doc))


def encoder_names(args, info: dict) -> dict:
    """Modality -> the name of its encoder: what --encoder says, else paper.py. Raises ValueError where neither says anything."""
    default = paper.encoders_for(args.dataset)
    names = {m: train_unimodal.of_modality(args.encoder, m, default.get(m)) for m in info["modalities"]}
    if unknown := [m for m in names if names[m] is None]:
        raise ValueError(f"no encoder is known for modality {unknown[0]} of {args.dataset}: name one, --encoder {unknown[0]}=NAME")
    return names


def start(args, seed: int, method: str, parser: argparse.ArgumentParser, *options: str, lr: float | None = None, one_label=False, **more) -> Task:
    """Open the data and the folder runs/<dataset>/<method>[-options]-s<seed>.

    options: names of the method's own arguments; they become settings, and part of the folder's name where they are not the parser's
    default. lr: default learning rate, the paper's for joint training if not given. one_label: the method is not defined for samples with
    several labels. more: further settings. Raises ValueError for data the method cannot use.
    """
    folder, info = train_unimodal.open_data(args, seed)
    setting, modalities, default = paper.settings_for(args.dataset), list(info["modalities"]), paper.encoders_for(args.dataset)
    if len(modalities) < 2:
        raise ValueError(f"{args.dataset} has only {modalities[0]}: {method} needs two modalities or more")
    if one_label and info["multilabel"]:
        raise ValueError(f"{args.dataset} has several labels a sample: {method} is defined for one label only")
    encoders = encoder_names(args, info)
    own, lr = {name: getattr(args, name) for name in options}, lr or paper.joint_lr(args.dataset, encoders, "joint")
    settings = dict(method=method, dataset=args.dataset, seed=seed, encoders=encoders, fusion="joint",
                    pretrained={m: train_unimodal.pretrained_of(args, m, encoders[m]) for m in modalities},
                    epochs=args.epochs or setting["umft_epochs"], batch_size=args.batch_size or setting["batch_size"],
                    lr=args.lr or lr, precision=train_unimodal.precision(args),
                    classes=info["classes"], samples=info.get("counts"), **train_unimodal.recipe(setting), **own, **more)
    words = [method]
    for name, value in own.items():
        if value != parser.get_default(name):
            words += [name.replace("_", "-"), *map(str, value if isinstance(value, list) else [] if value is True else [value])]
    words += [f"{m}-{encoders[m]}" for m in modalities if encoders[m] != default.get(m)]
    words += [f"lr{args.lr:g}"] if args.lr not in (None, lr) else []
    run = checkpoints.Run(Path(args.out) / args.dataset / f"{'-'.join(words)}-s{seed}", settings, info)
    return new_task(args, seed, folder, info, setting, run)


def encoders(task: Task) -> tuple[nn.ModuleDict, Callable]:
    """-> modality -> UnimodalModel without its head (the classifier is the method's), with public weights, on the device; and their `loader`.

    Every encoder starts from the very weights that uni-modal training with this seed would start it from.
    """
    settings, models = task.run.settings, nn.ModuleDict()
    for m in task.modalities:
        torch.manual_seed(task.seed)
        models[m] = train_unimodal.pretrained_model(settings["pretrained"][m], settings["encoders"][m], task.info, m)
        models[m].head = None
    return models.to(task.args.device), loader(task, models)


class ConcatHead(nn.Module):
    """One linear layer on all features side by side: W [h_1; ...; h_M] + b with W = [W_1 ... W_M]. forward: modality -> (B, D_m); -> (B, C).

    models: as `encoders` gives them, nothing added yet.
    """

    def __init__(self, models: nn.ModuleDict, classes: int):
        super().__init__()
        self.widths = {m: model.encoder.width for m, model in models.items()}
        self.linear = nn.Linear(sum(self.widths.values()), classes)

    def forward(self, h):
        return self.linear(torch.cat([h[m] for m in self.widths], dim=-1))

    def blocks(self):
        """Modality -> (W_m (C, D_m), b / M): each its own columns of W, and an equal share of the bias, which nobody owns."""
        columns = self.linear.weight.split(list(self.widths.values()), dim=1)
        return {m: (W, self.linear.bias / len(self.widths)) for m, W in zip(self.widths, columns)}

    def split(self, h):
        """Modality -> W_m h_m + b / M, (B, C): what each modality contributes. They sum to the joint logits."""
        return {m: F.linear(h[m], W, b) for m, (W, b) in self.blocks().items()}


# ------------------------------------------------------------------------------------------------ inputs, features, loss
def autocast(task: Task):
    return torch.autocast(task.args.device.split(":")[0], torch.bfloat16, enabled=task.run.settings["precision"] == "bf16")


def features(task: Task, models: nn.ModuleDict, x: dict) -> dict:
    """h_m of the modalities in x, (B, D_m) float32: encoders may run in bf16, but heads, distances and losses are small and stay exact."""
    with autocast(task):
        h = {m: models[m].features(x[m]) for m in x}
    return {m: v.float() for m, v in h.items()}


class Tower:
    """One modality's transformer with its last `layers` blocks in the open, for methods that put tokens of their own between blocks.

    x: (N, T, D), the tokens so far. N = B V: every view (frame, clip) of a sample is a sequence of its own, as its encoder knows it. What a
    method adds goes to all views alike, and what comes back of it is averaged over them.
    """

    def __init__(self, encoder, x, layers: int):
        self.encoder, self.views, self.blocks = encoder, x.shape[1] if x.dim() == 5 else 1, encoder.blocks[-layers:]
        x = x.flatten(0, 1) if x.dim() == 5 else x
        self.where = dict(mask=padding_mask(x)[:, None, None]) if isinstance(encoder, BERT) else {}           # (N, 1, 1, T)
        self.x = encoder.embed(x)
        for block in encoder.blocks[:-layers]:
            self.x = block(self.x, **self.where)

    def block(self, i: int, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[x ; added] through the i-th of the last blocks. added: (B, n, D); -> x (N, T, D) and added (B, n, D), as they come out of it."""
        T, n = self.x.shape[1], added.shape[1]
        where = {name: F.pad(mask, (0, n), value=True) for name, mask in self.where.items()}                  # what is added is never padding
        x = self.blocks[i](torch.cat([self.x, added.repeat_interleave(self.views, 0)], dim=1), **where)      # (N, T + n, D)
        return x[:, :T], x[:, T:].unflatten(0, (-1, self.views)).mean(1)

    def feature(self) -> torch.Tensor:
        """The class token after the last norm, averaged over views: (B, D) float32. Of BERT that is [CLS] before the pooler."""
        return self.encoder.norm(self.x[:, 0]).float().unflatten(0, (-1, self.views)).mean(1)


def only_transformers(names: dict) -> None:
    """ValueError unless all encoders (modality -> name) are such that a `Tower` can be made of them."""
    for m, name in names.items():
        if name not in BUILD or BUILD[name][0] not in (ViT, AudioViT, BERT):
            raise ValueError(f"--encoder {m}={name}: tokens can be added between the blocks of ViT, AudioViT and BERT only"
                             " (a ResNet has no tokens, DeBERTa no distances for added ones)")


def cross_entropy(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of logits (B, C) and class indices (B,); binary, averaged over classes, for multi-hot targets (B, C)."""
    return mean_prob_loss({"": z}, y)


@torch.no_grad()
def predict(task: Task, models: nn.ModuleDict, logits: Callable, load: Callable, split: str, index: torch.Tensor | None = None) -> dict:
    """`logits`, or any function of inputs with a dict of tensors, for a whole split or its samples `index`; float32 on the CPU."""
    training = models.training
    models.eval()
    index = torch.arange(len(task.split(split))) if index is None else index
    parts = [logits(load(split, part)) for part in index.split(256)]
    models.train(training)
    return {name: torch.cat([p[name].float().cpu() for p in parts]) for name in parts[0]}


def scores(task: Task, z: dict, split: str) -> dict:
    return {name: evaluate.scores({name: v}, task.split(split).labels, task.info) for name, v in z.items()}


# ------------------------------------------------------------------------------------------------ the loop
def optimizer_for(task: Task, models: nn.Module) -> torch.optim.Optimizer:
    """AdamW, as Sec. 4.1.2 of the paper has it for joint training."""
    return train_unimodal.make_optimizer("adamw", models, task.run.settings["lr"], task.setting["weight_decay"], 0)


def epochs(task: Task, models: nn.ModuleDict, optimizer, logits: Callable, load: Callable, subset: torch.Tensor | None = None):
    """`train_unimodal.epochs`, where the best epoch is the one whose joint prediction has the highest validation score, among equals the lowest loss."""
    metric, trained = evaluate.metric(task.info), {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {name for name, p in models.named_parameters() if id(p) not in trained}       # never changes, so it need not be written every epoch

    def kept():     # heads may be one module in several places, but a file wants one memory for each tensor
        return {k: v.clone() if ".head." in k else v for k, v in models.state_dict().items() if k not in frozen}

    def judge():
        now = scores(task, predict(task, models, logits, load, "val"), "val")
        return now, [now["joint"][metric], -now["joint"]["loss"]]

    return train_unimodal.epochs(task, models, optimizer, judge, load, kept, subset)


def finish(task: Task, models: nn.ModuleDict, logits: Callable, load: Callable) -> checkpoints.Run:
    """Scores of the chosen epoch on validation and on test, which is opened here and nowhere else; logits and weights are kept.

    The file of weights is made whole: with what was frozen, and with each modality's part of a joint head as its own, so that
    `checkpoints.load_run` finds complete uni-modal models in it.
    """
    z = {split: predict(task, models, logits, load, split) for split in ("val", "test")}
    task.run.save_tensors("logits.safetensors", {f"{split}.{name}": v for split in z for name, v in z[split].items()})
    trained = sum(p.numel() for p in models.parameters() if p.requires_grad)
    tensors = {k: v.clone() if ".head." in k else v for k, v in models.state_dict().items()}
    if "joint" in models and isinstance(models["joint"], ConcatHead):
        for m, (W, b) in models["joint"].blocks().items():
            if models[m].head is None:
                tensors.update({f"{m}.head.weight": W, f"{m}.head.bias": b})
    task.run.save_tensors("model.safetensors", tensors)
    settings = task.run.settings
    task.run.finish(dict(method=settings["method"], dataset=settings["dataset"], seed=task.seed, fusion="joint", encoders=settings["encoders"],
                         **{split: scores(task, z[split], split) for split in z}, best_epoch=task.state["best_epoch"], trained_parameters=trained,
                         seconds=task.state["seconds"], peak_memory_mib=train_unimodal.peak_memory_mib(task.args.device)))
    return task.run


def main(parser: argparse.ArgumentParser, train: Callable, title: Callable | str) -> None:
    """The command line of a method: one run for each seed, then the table of them all. What is wrong with the input is told in one line."""
    args = parser.parse_args()

    def show():
        runs = train_unimodal.tuned(args, train)
        rows = [((title if isinstance(title, str) else title(args)) if name == "joint" else f"    {name} alone",
                 [(r.result["test"][name], r.result) for r in runs]) for name in runs[0].result["test"]]
        evaluate.print_table(rows, *train_unimodal.open_data(args, runs[0].settings["seed"]))
        for run in runs if args.plot else ():
            evaluate.plot(run.folder)

    train_unimodal.run(show)
