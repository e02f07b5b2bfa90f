"""MBT: attention bottlenecks (Nagrani et al., "Attention Bottlenecks for Multimodal Fusion",
NeurIPS 2021; google-research/scenic, projects/mbt).

    python -m baselines.mbt --dataset crema_d
    python -m baselines.mbt --dataset crema_d --fusion-layers 1       # control: nothing crosses
    python -m baselines.mbt --dataset food101 --bottlenecks 8         # ViT and BERT

If every token of one modality attends to every token of the other, attention is quadratic in all of
them, and most of them have little to tell. So MBT lets modalities meet in n bottleneck tokens b
only: each tower must write down in very little space what the others should know.

    first blocks     z_m <- T_m(z_m)                          each tower alone
    last F blocks    [z_m ; b_m] <- T_m([z_m ; b])            every tower reads the same b ...
                     b <- (1/M) sum_m b_m                     ... and what they wrote is averaged
    f_m = W_m h_m + c_m                                       h_m: the class token of tower m
    loss: (1/M) sum_m CE(f_m, y)                              prediction: softmax of (1/M) sum_m f_m

What one tower writes in a block the others read in the next block. So F = 1 exchanges nothing,
although it has bottlenecks: a fair control. M >= 2 modalities, on ViT, AudioViT and BERT.

Where we differ from the authors' code, and why:
 1. It trains audio and video towers from ImageNet-21k weights, with SGD (momentum, rate 0.5,
    cosine, 2.5 epochs of warm-up). Ours are the encoders, the public weights, the optimiser and the
    schedule of all methods here.
 2. Towers may differ in width. b is as wide as the widest one. A narrower one gets a linear layer
    in and one back, the same two for all its blocks.
 3. There, frames become one sequence of 16 x 16 x 2 tubes, and 8 s of sound one picture. Our
    encoders read single frames and 2 s clips. Each view is a sequence of its own, and b_m is
    averaged over the views of a sample. So views meet in the bottleneck, too.
 4. We classify class tokens, as the paper does (of BERT: after its pooler). There one head is
    shared, which towers of different width can't do; each of ours has its own. Theirs starts from
    W = 0, ours do not. The last LayerNorm is shared there, and each tower's own here.
 5. Its released configuration has no class token: it averages all tokens. In its class-token mode
    there are n + 1 bottleneck tokens. We have n.
 6. The paper averages logits. Its code does so at test only, and in training it averages the
    cross-entropies. So do we.
 7. Mixup, label smoothing, dropped layers and SpecAugment are left out: no method here has them.
 8. F = 4 of 12 blocks and n = 4 are published. If a tower has fewer than F blocks, all towers fuse
    in as many as it has.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch
from torch import nn

import data
from baselines import parts
from encoders import BERT
from harness import arguments, metrics, optim, runs

OPTIONS = ("bottlenecks", "fusion_layers")


class Bottleneck(nn.Module):
    """The shared tokens b, and the last `layers` blocks of all towers.

    models: modality -> UnimodalModel, with nothing else in it yet.
    """

    def __init__(self, models: nn.ModuleDict, tokens: int, layers: int):
        super().__init__()
        depths = [len(model.encoder.blocks) for model in models.values()]
        self.layers = min(layers, *depths)
        widths = {m: model.encoder.width for m, model in models.items()}
        widest = max(widths.values())
        self.tokens = nn.Parameter(torch.randn(tokens, widest) * 0.02)             # b, (n, D)
        self.into = nn.ModuleDict({m: bridge(widest, w) for m, w in widths.items()})
        self.back = nn.ModuleDict({m: bridge(w, widest) for m, w in widths.items()})

    def forward(self, models: nn.ModuleDict, x: dict) -> dict:
        """-> h_m of every modality in x, (B, D_m) float32. Each has read what the others wrote."""
        towers = {m: parts.Tower(models[m].encoder, x[m], self.layers) for m in x}
        samples = len(next(iter(x.values())))
        b = self.tokens.expand(samples, -1, -1)                                    # (B, n, D)
        for i in range(self.layers):
            written = []
            for m, tower in towers.items():
                # All towers read the same b: it changes after this loop.
                tower.x, b_m = tower.block(i, self.into[m](b))
                written.append(self.back[m](b_m))
            b = torch.stack(written).mean(0)
        h = {}
        for m, tower in towers.items():
            h[m] = tower.feature()
            if isinstance(models[m].encoder, BERT):
                h[m] = models[m].encoder.pooler(h[m]).tanh().float()
        return h


def bridge(width_in: int, width_out: int) -> nn.Module:
    """From one width to another; nothing where they are the same."""
    if width_in == width_out:
        return nn.Identity()
    return nn.Linear(width_in, width_out)


def train(args, seed: int) -> runs.Run:
    if min(args.bottlenecks, args.fusion_layers) < 1:
        raise ValueError(f"--bottlenecks {args.bottlenecks} --fusion-layers {args.fusion_layers}:"
                         " both are 1 or more")
    folder, info = arguments.open_data(args, seed)
    parts.only_transformers(arguments.encoders_of(args, info))
    settings = arguments.joint_settings(args, seed, info, "mbt", options=OPTIONS)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: pre-trained encoders with a head each, and what is between them ----
    models = parts.pretrained_encoders(settings, info)
    torch.manual_seed(seed)
    for m in settings["encoders"]:
        models[m].head = nn.Linear(models[m].encoder.width, len(info["classes"]))
    models["bottleneck"] = Bottleneck(models, args.bottlenecks, args.fusion_layers)
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def heads(x):                         # no modality is alone any more: each head knows of all
        with metrics.autocast(args.device, settings):
            h = models["bottleneck"](models, x)
        return {m: models[m].head(h[m]) for m in h}

    def joint(z):
        return {"joint": torch.stack(list(z.values())).mean(0)}

    def forward(x):                       # in validation
        return joint(heads(x))

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- Training ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:
        run.end_of_epoch(0, predict(val_split), parts.trained(models, optimizer))
        first_epoch = 1

    for epoch in range(first_epoch, settings["epochs"] + 1):
        models.train()
        rng = data.epoch_rng(seed, epoch)                     # all randomness of this epoch
        batches = data.batches(len(train_split), settings["batch_size"], rng)
        step = (epoch - 1) * steps_per_epoch
        for index in run.progress(batches, epoch):
            optim.set_lr(optimizer, settings, step, steps, run.history)
            batch = data.inputs(train_split, index, models, args.device, settings, rng)
            optimizer.zero_grad()
            for x, y, share in data.parts(batch, args.micro_batch):
                z = heads(x)
                # ---- MBT: a loss for each class token ----
                loss = sum(metrics.cross_entropy(z[m], y) for m in z) / len(z)
                (share * loss).backward()
                run.count(loss, joint(z), y)
            optimizer.step()
            step += 1
        run.end_of_epoch(epoch, predict(val_split), parts.trained(models, optimizer))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    run.save_tensors("model.safetensors", parts.whole(models))
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    own = p.add_argument_group("MBT")
    own.add_argument("--bottlenecks", type=int, default=4,
                     help="tokens that all modalities share: the fewer, the less can cross;"
                          " default: 4")
    own.add_argument("--fusion-layers", type=int, default=4,
                     help="how many blocks, the last ones, have them; at most all of the shallowest"
                          " tower; default: 4")
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
