"""MLA: alternating uni-modal adaptation (Zhang et al., "Multimodal Representation Learning by
Alternating Unimodal Adaptation", CVPR 2024;
Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation).

    python -m baselines.mla --dataset crema_d
    python -m baselines.mla --dataset crema_d --order visual audio --separate-heads

There is no joint loss, so no modality can be lazy. In every batch the modalities take turns, each
with its own loss. They meet in one shared head:

    for m in order:   L_m = CE(W h_m + b, y), updates encoder m and the head (W, b)

What one modality does to the head should not undo what the one before has learnt. So the head's
gradient is projected away from the mean features seen so far (orthogonal weight modification, by
recursive least squares; every feature with a 1 appended, for the bias):

    grad_W <- grad_W P     P_0 = I,  q = P hbar / (alpha + hbar^T P hbar),  P <- P - q (P hbar)^T
                           hbar: mean of h_m over the batch

P is updated after the step. When m has its turn, P knows the modalities before it, of this batch
and of all earlier ones. A gradient step G P moves the logits of a seen mean by G P hbar, almost
nothing. At test each sample is fused by how sure each modality is: p = sum_m lambda_m p_m, lambda =
softmax over m of minus the entropy of p_m. Any number of modalities M >= 2.

Where we differ from the authors' code, and why:
 1. As released it never projects: it asks an nn.Linear for a parameter "module.weight", and its
    name is "weight". --no-projection is what it does.
 2. There P would be updated with the present modality first, divided elementwise by the matrix
    alpha + P h h^T where the formula has the number alpha + h^T P h, and normalised at each step:
    not symmetric any more, with negative eigenvalues. Ours is the formula.
 3. Our P collapses: every mean feature of the run stays in it, and together they leave few
    directions. `python -m baselines.mla --dataset toy_mimics --epochs 12 --seeds 0 1 2` has, as the
    mean of |grad P| / |grad| over the last epoch (`left` in log.jsonl), .018, .016, .026. The
    authors divide P by its norm. Under AdamW only the direction of grad P counts, see 8.
 4. alpha is 0.1 for good. There it falls from 0.1 to 0.01 inside each epoch.
 5. The bias is projected, too. There only the weight would be, and the bias undoes what that
    protects.
 6. Entropy is that of one sample. There the softmax runs over the batch, so a prediction depends on
    who else is in the batch. Probabilities are weighted, as MMLoRA averages them. There logits are.
 7. Other encoders' gradients are None, so neither momentum nor decay moves them. With the torch it
    was written for they were zeros.
 8. AdamW instead of SGD. It divides the projected gradient by its running size, element by element,
    which turns a small step into a full one, slightly off its direction: the protection of seen
    features is weaker than with SGD (--optimizer sgd).
 9. --separate-heads: no shared head, hence no projection: uni-modal training with entropy fusion,
    the control that its reviewers asked for.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
from baselines import parts
from harness import arguments, metrics, optim, runs

OPTIONS = ("order", "alpha", "no_projection", "separate_heads", "optimizer")


class Projection(torch.nn.Module):
    """P (D + 1, D + 1) float32, a buffer: about I - (projector onto all features seen).

    Features get a 1 appended, [h ; 1], so that the bias is protected with the weight.
    """

    def __init__(self, width: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.register_buffer("P", torch.eye(width + 1))

    def project(self, head: torch.nn.Linear) -> torch.Tensor:
        """Replace the gradient of [W b], (C, D + 1), by its part away from what was seen.

        -> which share of it is left, |grad P| / |grad|.
        """
        whole = torch.cat([head.weight.grad, head.bias.grad[:, None]], dim=1)
        gradient = whole @ self.P
        # Copies: fused AdamW reads a view of a larger matrix as if it were one block of memory.
        head.weight.grad = gradient[:, :-1].contiguous()
        head.bias.grad = gradient[:, -1].contiguous()
        return gradient.norm() / whole.norm()

    @torch.no_grad()
    def update(self, h: torch.Tensor) -> None:
        """h: a mean feature (D,). P stays symmetric, with eigenvalues in [0, 1]: it is the inverse
        of I + sum h h^T / alpha."""
        h = torch.cat([h, h.new_ones(1)])
        Ph = self.P @ h
        self.P -= torch.outer(Ph, Ph) / (self.alpha + h @ Ph)


def train(args, seed: int) -> runs.Run:
    folder, info = arguments.open_data(args, seed)
    modalities = list(info["modalities"])
    order = args.order or modalities
    if sorted(order) != sorted(modalities):
        raise ValueError(f"--order {' '.join(order)}: {args.dataset} has {', '.join(modalities)},"
                         " each takes one turn")
    lr = parts.lr_of(args.optimizer)
    settings = arguments.joint_settings(args, seed, info, "mla", lr=lr, options=OPTIONS)
    settings |= parts.decay_of(args.optimizer)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: pre-trained encoders, one head for all of them ----
    models = parts.pretrained_encoders(settings, info)
    torch.manual_seed(seed)
    widths = {m: models[m].encoder.width for m in modalities}
    if not args.separate_heads and len(set(widths.values())) > 1:
        told = ", ".join(f"{m} {width}" for m, width in widths.items())
        raise ValueError(f"encoders of different widths ({told}) cannot share a head: use"
                         " --separate-heads")
    shared = torch.nn.Linear(widths[order[0]], len(info["classes"]))
    for m in modalities:
        models[m].head = shared
        if args.separate_heads:
            models[m].head = torch.nn.Linear(widths[m], len(info["classes"]))
    project = not (args.no_projection or args.separate_heads)
    if project:
        projection = Projection(widths[order[0]], args.alpha)
        models["projection"] = projection
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer(args.optimizer, models, settings["lr"],
                                     settings["weight_decay"])

    def alone(m, x):                      # one modality: its feature (B, D) and its logits (B, C)
        h = parts.features(models, {m: x[m]}, args.device, settings)[m]
        return h, models[m].head(h)

    def forward(x):                       # in validation: all modalities, the surer counts more
        z = {m: alone(m, x)[1] for m in modalities}
        p = metrics.fuse(z, "entropy", info["multilabel"])
        if info["multilabel"]:
            return {"joint": p.logit(1e-6), **z}              # the logits that belong to p
        return {"joint": p.clamp(min=1e-30).log(), **z}

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
            # ---- MLA: each modality in turn ----
            for m in order:
                optimizer.zero_grad()                         # the others' encoders are left alone
                mean = 0
                for x, y, share in data.parts(batch, args.micro_batch):
                    h, z = alone(m, x)
                    loss = metrics.cross_entropy(z, y)
                    (share * loss).backward()
                    mean = mean + share * h.detach().mean(0)  # hbar (D,)
                    run.count(loss, {m: z}, y)
                if project:
                    run.note(left=projection.project(shared))     # for the log
                optimizer.step()
                if project:
                    projection.update(mean)
            step += 1
        run.end_of_epoch(epoch, predict(val_split), parts.trained(models, optimizer))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    run.save_tensors("model.safetensors", parts.whole(models))
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    own = p.add_argument_group("MLA")
    own.add_argument("--order", nargs="+", metavar="MODALITY",
                     help="whose turn is first; default: as in dataset.json")
    own.add_argument("--alpha", type=arguments.positive(float), default=0.1,
                     help="the larger, the less is projected away; default: 0.1")
    own.add_argument("--no-projection", action="store_true",
                     help="leave the head's gradient as it is")
    own.add_argument("--separate-heads", action="store_true",
                     help="a head for every modality, also where encoders have different widths")
    parts.add_optimizer(own)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
