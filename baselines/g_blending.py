"""G-Blending: gradient blending (Wang, Tran, Feiszli, "What Makes Training Multi-Modal
Classification Networks Hard?", CVPR 2020; facebookresearch/VMZ).

    python -m baselines.g_blending --dataset crema_d
    python -m baselines.g_blending --weights 1 1 1       # control: the joint loss and all others

Modalities overfit at different speeds, so no single moment is right to stop them all. G-Blending
gives every modality a head of its own beside the joint one: K = M + 1 heads, for M >= 2 modalities.
It weighs their losses by how well each one turns training into generalisation:

    L   = sum_k w_k CE(z_k, y)                              w_k >= 0, sum_k w_k = 1
    G_k = LV_k(before) - LV_k(after)                        generalisation that head k gained
    O_k = [LV_k - LT_k](after) - [LV_k - LT_k](before)      overfitting that it gained
    w_k ~ G_k / O_k^2                                       least overfitting for generalisation

LT_k and LV_k are the losses of head k on training data and on held-out data. This is the "online"
form: before every super-epoch the present model is copied K times. Copy k is trained for a
super-epoch on loss k alone, tells w_k, and is thrown away. At test the joint head predicts.

Where we differ from the authors' code, and why:
 1. It takes fixed weights (--audio_weight and so on) and can't estimate them (issue 133). We
    estimate them as the paper says. --weights fixes them; then all of train is trained on.
 2. LV is measured on a tenth of train, on which no copy and no model is trained. It is not measured
    on validation, which chooses the epoch, nor on test, as BalanceBenchmark does for most data
    sets. So the model is trained on a tenth fewer samples than in the other methods.
 3. G_k < 0 (the held-out loss rose) counts as 0, and O_k^2 as at least 1e-4. BalanceBenchmark takes
    |G_k|, which rewards a head for getting worse; MultiBench, by default, the held-out loss itself.
    If no head gained, all weigh the same.
 4. Losses are means over samples, without augmentation and in eval mode. So the losses of two sets
    can be subtracted although the sets differ in size.
 5. A copy has the learning rates of the epochs that it looks ahead to (under "plateau" the present
    one), and a fresh AdamW. A
    super-epoch is 10 epochs, as in BalanceBenchmark. With two modalities, the copies make training
    about three times as long; the seconds of the log and of tables count them.
"""
import copy
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
from baselines import parts
from harness import arguments, metrics, optim, runs

OPTIONS = ("super_epoch", "held_out", "weights")


def blend_weights(train_before, train_after, held_before, held_after) -> torch.Tensor:
    """The weights w, (K,), of sum 1, from the losses of K heads, (K,) each.

    They are on the training part and on the held-out part, before and after every head was trained
    alone.
    """
    gain = (held_before - held_after).clamp(min=0)                             # G_k
    gap_before = held_before - train_before
    gap_after = held_after - train_after
    overfit = gap_after - gap_before                                           # O_k
    w = gain / overfit.square().clamp(min=1e-4)
    if w.sum() > 0:
        return w / w.sum()
    return torch.full_like(w, 1 / len(w))                                      # no head gained


def train(args, seed: int) -> runs.Run:
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out}: a share of the training samples, between 0"
                         " and 1")
    folder, info = arguments.open_data(args, seed)
    settings = arguments.joint_settings(args, seed, info, "g_blending", options=OPTIONS)
    fixed = args.weights
    if fixed and (len(fixed) != 1 + len(settings["encoders"]) or min(fixed) < 0 or sum(fixed) == 0):
        raise ValueError(f"--weights {' '.join(map(str, fixed))}: one number for the joint head and"
                         f" one for each of {', '.join(settings['encoders'])}; not negative, not"
                         " all zero")
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    order = torch.randperm(len(train_split), generator=torch.Generator().manual_seed(seed))
    size = 0 if fixed else math.ceil(args.held_out * len(train_split))
    held, kept = order[:size], order[size:]                   # one to measure, one to train on
    steps_per_epoch = math.ceil(len(kept) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: pre-trained encoders, a head each, the joint head ----
    models = parts.pretrained_encoders(settings, info)
    torch.manual_seed(seed)
    joint = parts.ConcatHead(models, len(info["classes"]))
    for m in settings["encoders"]:
        models[m].head = torch.nn.Linear(models[m].encoder.width, len(info["classes"]))
    models["joint"] = joint
    heads = ["joint", *settings["encoders"]]
    models["blend"] = torch.nn.Module()
    # w is a buffer, so that a resumed run has it.
    w = torch.tensor(fixed or [1.0] * len(heads))
    models["blend"].register_buffer("w", w / w.sum())
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x, model=models):         # of the modalities in x; the joint head needs them all
        h = parts.features(model, x, args.device, settings)
        z = {m: model[m].head(h[m]) for m in h}
        if len(h) == len(settings["encoders"]):
            z = {"joint": model["joint"](h), **z}
        return z

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    def losses(model, index):
        """The loss of every head, (K,): the mean over the samples `index` of train."""
        def of_model(x):
            return forward(x, model)
        z = metrics.predict(of_model, model, train_split, args.device, settings, index)
        y = train_split.labels[index]
        return torch.stack([metrics.cross_entropy(z[head], y) for head in heads])

    def train_copy(head, first):
        """A copy of the models, trained on the loss of one head alone: for the super-epoch that
        begins with epoch `first`."""
        model = copy.deepcopy(models).train()
        optimizer = optim.make_optimizer("adamw", model, settings["lr"], settings["weight_decay"])
        last = min(first + args.super_epoch - 1, settings["epochs"])
        for epoch in range(first, last + 1):
            rng = data.epoch_rng(seed, epoch)
            batches = data.batches(len(kept), settings["batch_size"], rng)
            for step, index in enumerate(batches, (epoch - 1) * steps_per_epoch):
                optim.set_lr(optimizer, settings, step, steps, run.history)
                batch = data.inputs(train_split, kept[index], model, args.device, settings, rng)
                optimizer.zero_grad()
                for x, y, share in data.parts(batch, args.micro_batch):
                    if head != "joint":                       # other encoders stay as they are
                        x = {head: x[head]}
                    loss = metrics.cross_entropy(forward(x, model)[head], y)
                    (share * loss).backward()
                optimizer.step()
        return model

    def estimate(epoch):
        """-> w (K,), from K copies, each trained apart."""
        train_before = losses(models, kept)
        held_before = losses(models, held)
        train_after = torch.zeros(len(heads))
        held_after = torch.zeros(len(heads))
        for k, head in enumerate(heads):
            model = train_copy(head, epoch)
            train_after[k] = losses(model, kept)[k]
            held_after[k] = losses(model, held)[k]
        return blend_weights(train_before, train_after, held_before, held_after)

    # ---- Training ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:
        run.end_of_epoch(0, predict(val_split), parts.trained(models, optimizer))
        first_epoch = 1

    for epoch in range(first_epoch, settings["epochs"] + 1):
        models.train()
        # ---- G-Blending: new weights every super-epoch ----
        if not fixed and (epoch - 1) % args.super_epoch == 0:
            models["blend"].w.copy_(estimate(epoch))
        w = dict(zip(heads, models["blend"].w))
        rng = data.epoch_rng(seed, epoch)                     # all randomness of this epoch
        batches = data.batches(len(kept), settings["batch_size"], rng)
        step = (epoch - 1) * steps_per_epoch
        for index in run.progress(batches, epoch):
            optim.set_lr(optimizer, settings, step, steps, run.history)
            batch = data.inputs(train_split, kept[index], models, args.device, settings, rng)
            optimizer.zero_grad()
            for x, y, share in data.parts(batch, args.micro_batch):
                logits = forward(x)
                # ---- G-Blending: every head has its loss, and its weight ----
                loss = sum(w[head] * metrics.cross_entropy(logits[head], y) for head in heads)
                (share * loss).backward()
                run.count(loss, logits, y)
                run.note(**{f"w_{head}": value for head, value in w.items()})
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
    own = p.add_argument_group("G-Blending")
    own.add_argument("--super-epoch", type=arguments.positive(int), default=10,
                     help="epochs between two estimates of the weights; default: 10")
    own.add_argument("--held-out", type=float, default=0.1,
                     help="share of train that only measures generalisation; default: 0.1")
    own.add_argument("--weights", type=float, nargs="+", metavar="W",
                     help="fixed weights of the losses, of the joint head first; nothing is held"
                          " out, no copy is trained; default: estimate them")
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
