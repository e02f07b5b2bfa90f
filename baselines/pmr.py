"""PMR: prototypical modal rebalance (Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023;
fanyunfeng-bit/Modal-Imbalance-PMR).

    python -m baselines.pmr --dataset crema_d

The concat baseline, plus a loss that speaks to the slow encoder directly: pull its features towards the prototype of their class, the mean
feature of that class. How much a modality needs it is read off the same distances:

    c_mk = class mean of h_m, over a tenth of train, anew every epoch with momentum
    p_m(k|x) = softmax_k(-||h_m(x) - c_mk||)             s_m = sum_i p_m(y_i|x_i)
    beta_m = clip(max_j s_j / s_m - 1, 0, 1)             0 for the leading modality
    L = CE(z, y) + alpha sum_m beta_m PCE_m              PCE_m = -mean log p_m(y): the prototype loss
      - mu max_m(beta_m) H(p_leader)                     PER, first epochs only: keeps the leader's entropy up, so it does not run away

With M = 2 this is the paper's: rho = s_0/s_1, beta = clip(1/rho - 1, 0, 1) for modality 0 if rho < 1, gamma = clip(rho - 1, 0, 1) for
modality 1 otherwise, and the leader's entropy weighed by the other's coefficient. The form above for M > 2 is ours.

Where we differ from the authors' code, and why:
 1. It has no PER (issues 4, 7, 9), and switches beta and gamma between 0 and 1; we follow the paper. The paper gives no number of epochs for PER:
    a tenth of all.
 2. It takes the first tenth of the batches for prototypes, and a class that is absent there becomes NaN. We draw the tenth class by class, at
    least one sample of each; a class without any training sample has no prototype and takes no part in the softmax.
 3. For some data sets it computes prototypes from validation or test samples; we from train only, without augmentation, in eval mode.
 4. AdamW and our schedule instead of SGD; momentum 0.2, alpha 1 and mu 1e-2 are the code's and the paper's values.
 5. Distances by torch.cdist instead of a double loop. Single-label data only: there is no class mean with several labels a sample.
"""
import torch
import torch.nn.functional as F

from baselines import common


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--alpha", type=float, default=1.0, help="weight of the prototype losses")
    a("--mu", type=float, default=0.01, help="weight of the entropy term PER; 0 turns it off")
    a("--per-epochs", type=int, help="PER acts in the first so many epochs; default: a tenth of them")
    a("--momentum", type=float, default=0.2, help="share of the old prototype kept every epoch")
    a("--share", type=float, default=0.1, help="share of train that prototypes are means of")
    return parser


class Prototypes(torch.nn.Module):
    """c_mk of every modality and class as buffers, so that a resumed run has them; `seen`: which classes have one."""

    def __init__(self, models, classes: int):
        super().__init__()
        for m, model in models.items():
            self.register_buffer(m, torch.zeros(classes, model.encoder.width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, h: dict, y: torch.Tensor, momentum: float) -> None:
        """h: modality -> (n, D_m); y: (n,). A class met for the first time takes its mean as it is; one that is absent keeps what it had."""
        one_hot = F.one_hot(y, len(self.seen)).float()                                     # (n, C)
        count = one_hot.sum(0)
        keep = torch.where(self.seen, momentum, 0.0)[:, None]
        for m, v in h.items():
            c, mean = getattr(self, m), (one_hot.T @ v) / count.clamp(min=1)[:, None]      # (C, D_m)
            c.copy_(torch.where(count[:, None] > 0, keep * c + (1 - keep) * mean, c))
        self.seen |= count > 0

    def log_prob(self, m: str, h: torch.Tensor) -> torch.Tensor:
        """log p_m(k|x), (B, C); -inf for classes without prototype."""
        return (-torch.cdist(h, getattr(self, m))).masked_fill(~self.seen, -torch.inf).log_softmax(-1)

    def terms(self, h: dict, y: torch.Tensor):
        """-> PCE_m, H(p_m), beta_m, dicts of numbers, and the leading modality. Samples of a class without prototype count in none of them."""
        log_p = {m: self.log_prob(m, v)[self.seen[y]] for m, v in h.items()}
        y = y[self.seen[y]]
        s = {m: v.detach().exp().gather(1, y[:, None]).sum() for m, v in log_p.items()}
        leader = max(s, key=s.get)
        beta = {m: (s[leader] / v.clamp(min=1e-12) - 1).clamp(0, 1) for m, v in s.items()}
        pce = {m: F.nll_loss(v, y, reduction="sum") / max(len(y), 1) for m, v in log_p.items()}
        finite = {m: v[:, self.seen] for m, v in log_p.items()}                            # p log p has no gradient at p = 0
        return pce, {m: -(v.exp() * v).sum() / max(len(y), 1) for m, v in finite.items()}, beta, leader

    def loss(self, h: dict, y: torch.Tensor, alpha: float, mu: float):
        """What PMR adds to the cross-entropy, and beta_m."""
        pce, entropy, beta, leader = self.terms(h, y)
        return alpha * sum(beta[m] * pce[m] for m in h) - mu * max(beta.values()) * entropy[leader], beta


def a_share_of_every_class(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Indices: of every class that occurs, `share` of its samples, rounded up."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == k] for k in labels.unique()]
    return torch.cat([i[:max(1, round(share * len(i)))] for i in by_class]).sort().values


def train(args, seed):
    task = common.start(args, seed, "pmr", arguments(), "alpha", "mu", "per_epochs", "momentum", "share", one_label=True)
    if task.run.result:
        return task.run
    models, load = common.encoders(task)
    torch.manual_seed(seed)
    joint, prototypes = common.ConcatHead(models, len(task.info["classes"])), Prototypes(models, len(task.info["classes"]))
    models["joint"], models["prototypes"] = joint, prototypes
    models.to(args.device)
    optimizer = common.optimizer_for(task, models)
    per_epochs = round(task.run.settings["epochs"] / 10) if args.per_epochs is None else args.per_epochs
    labels = task.split("train").labels
    subset = a_share_of_every_class(labels, args.share, seed)

    def logits(x):
        h = common.features(task, models, x)
        return {"joint": joint(h), **joint.split(h)}

    for epoch in common.epochs(task, models, optimizer, logits, load):
        h = common.predict(task, models, lambda x: common.features(task, models, x), load, "train", subset)
        prototypes.update({m: v.to(args.device) for m, v in h.items()}, labels[subset].to(args.device), args.momentum)
        for batch in epoch:
            optimizer.zero_grad()
            for x, y, share in batch:
                h = common.features(task, models, x)
                z = joint(h)
                extra, beta = prototypes.loss(h, y, args.alpha, args.mu if epoch.number <= per_epochs else 0)      # --- PMR ---
                loss = common.cross_entropy(z, y) + extra
                (share * loss).backward()
                epoch.count(loss, z, y)
                epoch.note(**{f"beta_{m}": b for m, b in beta.items()})
            optimizer.step()
    return common.finish(task, models, logits, load)


def main():
    common.main(arguments(), train, "PMR")


if __name__ == "__main__":
    main()
