"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (Peng et al., "Balanced Multimodal Learning via On-the-fly
Gradient Modulation", CVPR 2022; GeWu-Lab/OGM-GE_CVPR2022).

    python -m baselines.ogm_ge --dataset crema_d
    python -m baselines.ogm_ge --dataset crema_d --encoder resnet18 --pretrained none --conv-only     # closest to the authors' setting

Of two modalities one is learnt first, drives the joint loss down, and leaves the other without gradient. So slow the leader's encoder down.
The model is the concat baseline; between backward and step, in every batch,

    s_m   = sum_i softmax(W_m h_m(x_i) + b/M)[y_i]                  how well modality m does alone
    rho_m = s_m / min_k s_k                                         how far ahead of the weakest it is
    k_m   = 1 - tanh(alpha rho_m) if rho_m > 1 else 1               OGM: its encoder's gradients are multiplied by k_m
    g    <- k_m g + N(0, std(g)^2)                                  GE: and all encoders' gradients get noise as large as they were

With M = 2 this is as published (rho_a = s_a/s_v, rho_v = 1/rho_a: whichever is below 1 gives k = 1); the minimum is how BalanceBenchmark
(GeWu-Lab/BalanceBenchmark) carries it over to more modalities. The classifier is never modulated.

Where we differ from the authors' code, and why:
 1. It modulates 4-D parameters only, convolutions. In a ViT that is the patch embedding and nothing else, so we take all encoder parameters
    with two axes or more; the authors recommend it (issue 22), BalanceBenchmark does so. --conv-only is their code.
 2. It optimises with SGD, we with AdamW as everything else here. AdamW divides by the running size of a gradient, so a factor k that
    stays the same cancels out; only its changes, and the noise, are felt. Judge OGM with that in mind.
 3. Modulated epochs: theirs 0 to 50 of 100; ours the first half. alpha: its default is in doubt (issue 45); 0.3 is their example's.
 4. std(g) is that of the elements of one tensor before modulation, as in their code. The paper derives the noise from the covariance of
    SGD's gradients over a batch, which neither they nor we compute.
 5. Single-label data only: s_m has no counterpart with several labels a sample. Validation and public weights: see concat.py.
"""
import math

import torch

import data
from baselines import parts
from harness import arguments, metrics, optim, runs


def coefficients(scores: dict, alpha: float) -> dict:
    """k_m of every modality from its score s_m (tensors without axes): 1 for the weakest, the smaller the further ahead."""
    weakest = torch.stack(list(scores.values())).min()
    rho = {m: s / weakest for m, s in scores.items()}
    return {m: torch.where(r > 1, 1 - torch.tanh(alpha * r), 1.0) for m, r in rho.items()}


@torch.no_grad()
def modulate(encoder, k, noise: bool, conv_only: bool) -> None:
    """Change the gradients of an encoder in place.

    The noise comes from the device's generator, which every epoch seeds anew. A row without gradient
    gets none: it belongs to a word that is not in the batch, and AdamW would move that word.
    """
    for p in encoder.parameters():
        wanted = p.ndim == 4 if conv_only else p.ndim > 1
        if p.grad is None or not wanted:
            continue
        touched = (p.grad != 0).flatten(1).any(1)             # rows of an embedding, outputs of a layer
        std = p.grad[touched].std() + 1e-8                    # of the gradient as it was
        p.grad.mul_(k)
        if noise:
            drawn = torch.randn_like(p.grad) * std
            drawn[~touched] = 0
            p.grad.add_(drawn)


def train(args, seed: int) -> runs.Run:
    folder, info = arguments.open_data(args, seed)
    parts.one_label("ogm_ge", args, info)
    settings = arguments.joint_settings(args, seed, info, "ogm_ge", options=OPTIONS)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train"), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: pre-trained encoders, one linear layer on all their features ----
    models = parts.pretrained_encoders(settings, info)
    torch.manual_seed(seed)
    joint = models["joint"] = parts.ConcatHead(models, len(info["classes"]))
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x):                       # in training and in validation
        h = parts.features(models, x, args.device, settings)
        return {"joint": joint(h), **joint.split(h)}

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    modulated_epochs = args.modulated_epochs
    if modulated_epochs is None:
        modulated_epochs = (settings["epochs"] + 1) // 2

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
            alone = dict.fromkeys(settings["encoders"], 0.0)
            for x, y, share in data.parts(batch, args.micro_batch):
                logits = forward(x)
                loss = metrics.cross_entropy(logits["joint"], y)
                (share * loss).backward()
                run.count(loss, logits, y)
                for m in alone:                               # s_m
                    p = logits[m].detach().softmax(-1)
                    alone[m] += p.gather(1, y[:, None]).sum()
            # ---- OGM-GE: the leader's gradients are made smaller, all get noise ----
            if epoch <= modulated_epochs:
                for m, k in coefficients(alone, args.alpha).items():
                    modulate(models[m].encoder, k, not args.no_ge, args.conv_only)
                    run.note(**{f"k_{m}": k})
            optimizer.step()
            step += 1
        run.end_of_epoch(epoch, predict(val_split), parts.trained(models, optimizer))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    run.save_tensors("model.safetensors", parts.whole(models))
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


OPTIONS = ("alpha", "no_ge", "conv_only", "modulated_epochs")


def parser():
    p = arguments.parser(__doc__, __file__)
    own = p.add_argument_group("OGM-GE")
    own.add_argument("--alpha", type=float, default=0.3,
                     help="how strongly the leader is slowed down, tanh(alpha rho); default: 0.3")
    own.add_argument("--no-ge", action="store_true", help="OGM without the noise")
    own.add_argument("--conv-only", action="store_true",
                     help="modulate convolutions only, as the authors' code does")
    own.add_argument("--modulated-epochs", type=int,
                     help="modulate in the first so many epochs; default: half of them")
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
