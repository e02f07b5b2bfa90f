"""PMF: prompt-based multimodal fusion (Li et al., "Efficient Multimodal Fusion via Interactive
Prompting", CVPR 2023; yaoweilee/PMF).

    python -m baselines.pmf --dataset food101
    python -m baselines.pmf --umft             # fine-tuned towers, frozen: where MMLoRA starts
    python -m baselines.pmf --dataset crema_d --fusion-layers 4 --prompts 8

Two frozen towers talk through prompts: learnt tokens, put beside the tower's own in its last F
blocks. Each of these blocks runs twice: first a tower is asked what the other one should know, then
it is told what the other one said. With T_m the same frozen block both times:

    query     [.. ; .. ; q_m] <- T_m([z_m ; qc_m ; qp_m])          query-context and query prompts
              t_m = MLP_m(q_m)                                     as wide as the other tower
    fusion    [z_m ; .. ; ..] <- T_m([z_m ; fc_m ; t_other(m)])    fusion-context prompts
    f_m = W_m h_m + c_m                                            h_m: the class token of tower m
    loss: cross-entropy of (f_a + f_b) / 2

q_m is what became of the query prompts qp_m. After each pass, all that was added is cut off again.
h_m is taken after the last norm (BERT: [CLS] as it is). Trained are the prompts, the MLPs (linear,
ReLU, linear) and the two heads: under 3 % of all parameters. No gradient flows in the blocks before
the last F, which saves memory. Two modalities, on ViT, AudioViT and BERT.

Where we differ from the authors' code, and why:
 1. It never trains the fusion-context prompts: the routine that freezes asks for an attribute
    "fcp", and they are called vision_fcp and text_fcp. We train them, as the paper says.
 2. It fails when all blocks fuse: it uses the variable of a loop that then never ran. Here F may be
    the whole tower. If a tower has fewer than F blocks, both fuse in as many as it has.
 3. Only the model was released. Optimiser and epochs are those of all methods here. The learning
    rate is 1e-3, because nothing that is trained was pre-trained: ours.
 4. Its ViT was pre-trained on ImageNet-21k. Ours are the encoders and public weights of all methods
    here, also audio with visual.
 5. Each of several views of a sample is a sequence of its own with the same prompts. q_m is
    averaged over them.
 6. Frozen towers stay in eval mode, without dropout.
 7. --umft is ours. Without public weights (toy_mimics) a frozen tower is random, and the prompts
    have little to work with.
 8. --umft has step 1 and then a second run as long as step 1: on the toy 40 + 40 epochs. MMLoRA
    has 40 + 15 there.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch
from torch import nn

import data
import train_unimodal
from baselines import parts
from harness import arguments, metrics, optim, runs

OPTIONS = ("prompts", "fusion_layers", "umft")
LR = 1e-3      # ours: paper silent


class FusionLayer(nn.Module):
    """What one block of both towers gets beside its own tokens. widths: modality -> D_m, of two."""

    def __init__(self, widths: dict, prompts: int):
        super().__init__()
        self.prompts = prompts                                        # n
        self.query_context = new_prompts(widths, prompts)             # qc_m
        self.query = new_prompts(widths, prompts)                     # qp_m
        self.fusion_context = new_prompts(widths, prompts)            # fc_m
        a, b = widths
        self.other = {a: b, b: a}
        hidden = max(widths.values()) // 2
        self.translate = nn.ModuleDict()                              # MLP_m
        for m, other in self.other.items():
            first, second = nn.Linear(widths[m], hidden), nn.Linear(hidden, widths[other])
            self.translate[m] = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, towers: dict, i: int) -> None:
        """Run block i of both towers (modality -> parts.Tower)."""
        told = {}
        for m, tower in towers.items():       # both are asked before either is told anything
            prompts = torch.cat([self.query_context[m], self.query[m]])           # (2n, D_m)
            samples = len(tower.x) // tower.views
            _, out = tower.block(i, prompts.expand(samples, -1, -1))
            q = out[:, -self.prompts:]                                            # (B, n, D_m)
            told[self.other[m]] = self.translate[m](q)                            # (B, n, D_other)
        for m, tower in towers.items():
            context = self.fusion_context[m].expand(len(told[m]), -1, -1)
            tower.x, _ = tower.block(i, torch.cat([context, told[m]], dim=1))


def new_prompts(widths: dict, n: int) -> nn.ParameterDict:
    """n learnt tokens for every tower: modality -> (n, D_m)."""
    prompts = {m: nn.Parameter(torch.randn(n, width) * 0.02) for m, width in widths.items()}
    return nn.ParameterDict(prompts)


def train(args, seed: int) -> runs.Run:
    if min(args.prompts, args.fusion_layers) < 1:
        raise ValueError(f"--prompts {args.prompts} --fusion-layers {args.fusion_layers}: both are"
                         " 1 or more")
    folder, info = arguments.open_data(args, seed)
    modalities = list(info["modalities"])
    if len(modalities) != 2:
        raise ValueError(f"{args.dataset} has {', '.join(modalities)}: pmf is defined for two"
                         " modalities")
    parts.only_transformers(arguments.encoders_of(args, info))

    # ---- Step 1, Eq. 1, with --umft: one encoder per modality, each fine-tuned alone ----
    unimodal = {}
    if args.umft:
        for m in modalities:
            unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)

    settings = arguments.joint_settings(args, seed, info, "pmf", unimodal, lr=LR, options=OPTIONS)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: frozen towers, a head each, prompts in their last blocks ----
    if args.umft:
        models = parts.frozen_encoders(unimodal, info)
    else:
        models = parts.pretrained_encoders(settings, info).requires_grad_(False)
    torch.manual_seed(seed)
    widths = {m: models[m].encoder.width for m in modalities}
    depths = [len(models[m].encoder.blocks) for m in modalities]
    layers = min(args.fusion_layers, *depths)
    for m in modalities:
        models[m].head = nn.Linear(widths[m], len(info["classes"]))
    models["fusion"] = nn.ModuleList(FusionLayer(widths, args.prompts) for _ in range(layers))
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x):                       # in training and in validation
        with metrics.autocast(args.device, settings):
            towers = {m: parts.Tower(models[m].encoder, x[m], layers) for m in x}
            # ---- PMF: the towers talk through prompts ----
            for i, layer in enumerate(models["fusion"]):
                layer(towers, i)
            h = {m: tower.feature() for m, tower in towers.items()}
        # No modality is alone any more: each knows of the other.
        return {"joint": sum(models[m].head(h[m]) for m in h) / 2}

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
                logits = forward(x)
                loss = metrics.cross_entropy(logits["joint"], y)
                (share * loss).backward()
                run.count(loss, logits, y)
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
    own = p.add_argument_group("PMF")
    own.add_argument("--prompts", type=int, default=4,
                     help="tokens of each of the three kinds, in each tower and layer; default: 4")
    own.add_argument("--fusion-layers", type=int, default=2,
                     help="how many blocks, the last ones, have them; at most all of the shallower"
                          " tower; default: 2")
    own.add_argument("--umft", action="store_true",
                     help="start from uni-modally fine-tuned towers (trained first where missing)")
    arguments.add_step_1(p)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
