"""PMR: prototypical modal rebalance (Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal
Learning", CVPR 2023; fanyunfeng-bit/Modal-Imbalance-PMR).

    python -m baselines.pmr --dataset crema_d

The concat baseline, and a loss that speaks to the slow encoder directly: pull its features towards
the prototype of their class, the mean feature of that class. The same distances say how much a
modality needs it:

    c_mk = class mean of h_m, over a tenth of train      new every epoch, with momentum
    p_m(k|x) = softmax_k(-||h_m(x) - c_mk||)             s_m = sum_i p_m(y_i|x_i), over the batch
    beta_m = clip(max_j s_j / s_m - 1, 0, 1)             0 for the leading modality
    L = CE(z, y) + alpha sum_m beta_m PCE_m              PCE_m = -mean log p_m(y): prototype loss
      - mu max_m(beta_m) H(p_leader)                     PER, first epochs: keeps its entropy up

With M = 2 this is the paper's: rho = s_0/s_1; beta = clip(1/rho - 1, 0, 1) for modality 0 if
rho < 1, gamma = clip(rho - 1, 0, 1) for modality 1 otherwise; the leader's entropy is weighed by
the other's coefficient. The form above for M > 2 is ours.

Where we differ from the authors' code, and why:
 1. It has no PER (issues 4, 7, 9), and switches beta and gamma between 0 and 1. We follow the
    paper. The paper gives no number of epochs for PER: a tenth of all.
 2. It takes the first tenth of the batches for prototypes, and a class that is absent there becomes
    NaN. We draw the tenth class by class, at least one sample of each, once for the whole run;
    where theirs is shuffled, every epoch has another one. A class without any training sample has
    no prototype and takes no part in the softmax.
 3. For some data sets it computes prototypes from validation or test samples. We take train only,
    without augmentation, in eval mode.
 4. AdamW and our schedule instead of SGD (--optimizer sgd). Momentum 0.2, alpha 1 and mu 1e-2 are
    the code's and the paper's values. The prototype loss ends after two thirds of the epochs, as
    theirs does (100 of 150).
 5. Distances by torch.cdist instead of a double loop. Single-label data only: there is no class
    mean with several labels a sample.
 6. With --micro-batch s_m is still that of the whole batch. Its parts are encoded twice for that,
    the first time in eval mode: with dropout or drop path s_m then differs a little. With BatchNorm
    it differs much: even the leader can be another modality.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch
import torch.nn.functional as F

import data
from baselines import parts
from harness import arguments, metrics, optim, runs

OPTIONS = ("alpha", "pce_epochs", "mu", "per_epochs", "momentum", "prototype_share",
           "optimizer")


class Prototypes(torch.nn.Module):
    """c_mk of every modality and class, as buffers; `seen`: which classes have one."""

    def __init__(self, models, classes: int):
        super().__init__()
        for m, model in models.items():
            self.register_buffer(m, torch.zeros(classes, model.encoder.width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, h: dict, y: torch.Tensor, momentum: float) -> None:
        """h: modality -> (n, D_m); y: (n,). The share `momentum` of the old prototypes is kept.

        A class that is met for the first time takes its mean as it is. One that is absent keeps
        what it had.
        """
        one_hot = F.one_hot(y, len(self.seen)).float()                         # (n, C)
        count = one_hot.sum(0)
        keep = torch.where(self.seen, momentum, 0.0)[:, None]
        for m, v in h.items():
            c = getattr(self, m)                                               # (C, D_m)
            mean = (one_hot.T @ v) / count.clamp(min=1)[:, None]               # (C, D_m)
            new = keep * c + (1 - keep) * mean
            c.copy_(torch.where(count[:, None] > 0, new, c))
        self.seen |= count > 0

    def log_prob(self, m: str, h: torch.Tensor) -> torch.Tensor:
        """log p_m(k|x), (B, C); -inf for classes without prototype."""
        # The faster way through a matrix product rounds too much: 1e-3 of a distance.
        distance = torch.cdist(h, getattr(self, m), compute_mode="donot_use_mm_for_euclid_dist")
        return (-distance).masked_fill(~self.seen, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def scores(self, h: dict, y: torch.Tensor) -> dict:
        """s_m of these samples; those of a class without prototype do not count."""
        known = self.seen[y]
        s = {}
        for m, v in h.items():
            p = self.log_prob(m, v[known]).exp()
            s[m] = p.gather(1, y[known][:, None]).sum()
        return s

    def loss(self, h: dict, y: torch.Tensor, s: dict, alpha: float, mu: float):
        """-> what PMR adds to the cross-entropy, and beta_m. s: scores of the whole batch."""
        leader = max(s, key=s.get)
        beta = {}
        for m in s:
            ahead = s[leader] / s[m].clamp(min=1e-12)
            beta[m] = (ahead - 1).clamp(0, 1)
        known = self.seen[y]
        n = max(int(known.sum()), 1)
        extra = 0.0
        for m, v in h.items():
            log_p = self.log_prob(m, v[known])
            pce = F.nll_loss(log_p, y[known], reduction="sum") / n             # PCE_m
            extra = extra + alpha * beta[m] * pce
            if m == leader:
                log_p = log_p[:, self.seen]           # p log p has no gradient at p = 0
                entropy = -(log_p.exp() * log_p).sum() / n
                extra = extra - mu * max(beta.values()) * entropy              # PER
        return extra, beta


def a_share_of_every_class(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Indices, sorted: of every class that occurs, `share` of its samples, at least one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for k in labels.unique():
        of_class = order[labels[order] == k]
        chosen.append(of_class[:max(1, round(share * len(of_class)))])
    return torch.cat(chosen).sort().values


def train(args, seed: int) -> runs.Run:
    folder, info = arguments.open_data(args, seed)
    parts.one_label("pmr", args, info)
    lr = parts.lr_of(args.optimizer)
    settings = arguments.joint_settings(args, seed, info, "pmr", lr=lr, options=OPTIONS)
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
    prototypes = Prototypes(models, len(info["classes"]))
    models["joint"] = joint
    models["prototypes"] = prototypes
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer(args.optimizer, models, settings["lr"],
                                     settings["weight_decay"])

    def features(x):
        return parts.features(models, x, args.device, settings)

    def forward(x):                       # in validation
        h = features(x)
        return {"joint": joint(h), **joint.split(h)}

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- PMR: who leads in a batch, what prototypes are means of, how long its losses act ----
    @torch.no_grad()
    def look_at(pieces):
        """s_m of a batch that comes in parts: they are encoded once more, in eval mode, since
        BatchNorm's statistics must not move twice."""
        models.eval()
        s = dict.fromkeys(settings["encoders"], 0.0)
        for x, y, _ in pieces:
            for m, value in prototypes.scores(features(x), y).items():
                s[m] = s[m] + value
        models.train()
        return s

    subset = a_share_of_every_class(train_split.labels, args.prototype_share, seed)
    subset_labels = train_split.labels[subset].to(args.device)
    per_epochs = args.per_epochs
    if per_epochs is None:
        per_epochs = round(settings["epochs"] / 10)
    pce_epochs = args.pce_epochs
    if pce_epochs is None:
        pce_epochs = round(settings["epochs"] * 2 / 3)

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
        # ---- PMR: new prototypes every epoch, of features without augmentation ----
        h = metrics.predict(features, models, train_split, args.device, settings, subset)
        h = {m: v.to(args.device) for m, v in h.items()}
        # The first refresh, before epoch 2, keeps nothing of the prototypes of untrained encoders.
        momentum = args.momentum if epoch > 2 else 0.0
        prototypes.update(h, subset_labels, momentum)
        alpha = args.alpha if epoch <= pce_epochs else 0.0
        mu = args.mu if epoch <= per_epochs else 0.0
        for index in run.progress(batches, epoch):
            optim.set_lr(optimizer, settings, step, steps, run.history)
            batch = data.inputs(train_split, index, models, args.device, settings, rng)
            optimizer.zero_grad()
            pieces = data.parts(batch, args.micro_batch)
            if len(pieces) > 1:                               # s is about the whole batch
                s = look_at(pieces)
            for x, y, share in pieces:
                h = features(x)
                z = joint(h)
                if len(pieces) == 1:
                    s = prototypes.scores(h, y)
                # ---- PMR: pull slow features to their prototypes ----
                extra, beta = prototypes.loss(h, y, s, alpha, mu)
                loss = metrics.cross_entropy(z, y) + extra
                (share * loss).backward()
                run.count(loss, {"joint": z}, y)
                run.note(**{f"beta_{m}": b for m, b in beta.items()})
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
    own = p.add_argument_group("PMR")
    own.add_argument("--alpha", type=arguments.from_zero(float), default=1.0,
                     help="weight of the prototype losses; default: 1")
    own.add_argument("--pce-epochs", type=arguments.from_zero(int),
                     help="they act in the first so many epochs; default: two thirds of them")
    own.add_argument("--mu", type=arguments.from_zero(float), default=0.01,
                     help="weight of the entropy term PER, 0 turns it off; default: 0.01")
    own.add_argument("--per-epochs", type=arguments.from_zero(int),
                     help="PER acts in the first so many epochs; default: a tenth of them")
    own.add_argument("--momentum", type=arguments.rate, default=0.2,
                     help="share of the old prototype that is kept every epoch; default: 0.2")
    own.add_argument("--prototype-share", type=arguments.positive(float), default=0.1,
                     help="share of train that prototypes are means of; default: 0.1")
    parts.add_optimizer(own)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
