"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (Peng et al., "Balanced
Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022; GeWu-Lab/OGM-GE_CVPR2022).

    python -m baselines.ogm_ge --dataset crema_d
    python -m baselines.ogm_ge --dataset crema_d --encoder resnet18 --pretrained none --conv-only

The second command is closest to the authors' setting.

One modality is learnt first. It drives the joint loss down, and the others are left without
gradient. OGM slows the encoder of the leader down. The model is the concat baseline. In every
batch, between backward and step:

    s_m   = sum_i softmax(W_m h_m(x_i) + b/M)[y_i]        how well modality m does alone
    rho_m = s_m / min_k s_k                               how far it is ahead of the weakest
    k_m   = 1 - tanh(alpha rho_m) if rho_m > 1, else 1    OGM: the factor of its encoder's gradients
    g    <- k_m g + N(0, std(g)^2)                        GE: noise, as large as g was before

Every encoder's gradients get the noise; the classifier is never modulated. With M = 2 this is as
published: rho_a = s_a/s_v, rho_v = 1/rho_a, and the one below 1 gives k = 1. The minimum, for more
modalities, is BalanceBenchmark's (GeWu-Lab/BalanceBenchmark); its score for three is another one.

Where we differ from the authors' code, and why:
 1. It modulates parameters with four axes only: convolutions. In a ViT that is the patch embedding
    and nothing else. So we take all encoder parameters with two axes or more. The authors recommend
    it (issue 22), and BalanceBenchmark does it. --conv-only is their code.
 2. It optimises with SGD, we with AdamW, as everywhere here. AdamW divides by the running size of
    a gradient. So a factor k that stays the same cancels out: only its changes, and the noise, are
    felt. --optimizer sgd shows OGM as it is meant (compare with concat.py's).
 3. It modulates epochs 0 to 50 of 100. We modulate the first half of the epochs. The default of
    alpha is in doubt (issue 45); 0.3 is their example's.
 4. std(g) is that of the elements of one tensor before modulation, as in their code. The paper
    derives the noise from the covariance of SGD's gradients over a batch. Neither they nor we
    compute that one.
 5. A row without gradient gets no noise and does not count in std(g). Their convolutions have no
    such row, a table of word embeddings has many.
 6. Single-label data only: s_m has no counterpart with several labels a sample.
 7. Validation and public weights: see concat.py.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
from baselines import parts
from harness import arguments, metrics, optim, runs

OPTIONS = ("alpha", "no_ge", "conv_only", "modulated_epochs", "optimizer")


def coefficients(scores: dict, alpha: float) -> dict:
    """k_m of every modality, from its score s_m: 1 for the weakest, below 1 for those ahead of it.

    The scores are tensors without axes.
    """
    weakest = torch.stack(list(scores.values())).min()
    k = {}
    for m, s in scores.items():
        rho = s / weakest
        k[m] = torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)
    return k


@torch.no_grad()
def modulate(encoder, k, noise: bool, conv_only: bool) -> None:
    """Change the gradients of an encoder in place.

    The noise comes from the device's generator, which every epoch seeds anew. A row without
    gradient gets none: it belongs to a word that is not in the batch, and AdamW would move it.
    """
    for p in encoder.parameters():
        wanted = p.ndim > 1
        if conv_only:
            wanted = p.ndim == 4
        if p.grad is None or not wanted:
            continue
        touched = (p.grad != 0).flatten(1).any(1)             # which rows have a gradient
        std = p.grad[touched].std() + 1e-8                    # of the gradient as it was
        p.grad.mul_(k)
        if noise:
            drawn = torch.randn_like(p.grad) * std
            drawn[~touched] = 0
            p.grad.add_(drawn)


def train(args, seed: int) -> runs.Run:
    folder, info = arguments.open_data(args, seed)
    parts.one_label("ogm_ge", args, info)
    lr = parts.lr_of(args.optimizer)
    settings = arguments.joint_settings(args, seed, info, "ogm_ge", lr=lr, options=OPTIONS)
    settings |= parts.decay_of(args.optimizer)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: pre-trained encoders, one linear layer on all their features ----
    models = parts.pretrained_encoders(settings, info)
    torch.manual_seed(seed)
    joint = parts.ConcatHead(models, len(info["classes"]))
    models["joint"] = joint
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer(args.optimizer, models, settings["lr"],
                                     settings["weight_decay"])

    def forward(x):                       # in training and in validation
        h = parts.features(models, x, args.device, settings)
        return {"joint": joint(h), **joint.split(h)}

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- OGM-GE: how long it acts ----
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
            s = dict.fromkeys(settings["encoders"], 0.0)
            for x, y, share in data.parts(batch, args.micro_batch):
                logits = forward(x)
                loss = metrics.cross_entropy(logits["joint"], y)
                (share * loss).backward()
                run.count(loss, logits, y)
                for m in s:                                   # s_m: how well m does alone
                    p = logits[m].detach().softmax(-1)
                    s[m] += p.gather(1, y[:, None]).sum()
            # ---- OGM-GE: the leader's gradients are made smaller, all get noise ----
            if epoch <= modulated_epochs:
                for m, k in coefficients(s, args.alpha).items():
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


def parser():
    p = arguments.parser(__doc__, __file__)
    own = p.add_argument_group("OGM-GE")
    own.add_argument("--alpha", type=arguments.from_zero(float), default=0.3,
                     help="how strongly the leader is slowed down, tanh(alpha rho); default: 0.3")
    own.add_argument("--no-ge", action="store_true", help="OGM without the noise")
    own.add_argument("--conv-only", action="store_true",
                     help="modulate convolutions only, as the authors' code does")
    own.add_argument("--modulated-epochs", type=arguments.from_zero(int),
                     help="modulate in the first so many epochs; default: half of them")
    parts.add_optimizer(own)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
