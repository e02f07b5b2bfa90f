"""MLA: alternating uni-modal adaptation (Zhang et al., "Multimodal Representation Learning by Alternating Unimodal Adaptation", CVPR 2024;
Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation).

    python -m baselines.mla --dataset crema_d
    python -m baselines.mla --dataset crema_d --order visual audio --separate-heads

No joint loss, so nobody can be lazy: in every batch the modalities take turns, each with its own loss, and meet only in one shared head.

    for m in order:   L_m = CE(W h_m + b, y), updates encoder m and the head (W, b)

What one modality does to the head should not undo what it learnt from the one before. So W's gradient is projected away from the mean
features seen so far (orthogonal weight modification, by recursive least squares):

    grad_W <- grad_W P            P_0 = I,    q = P hbar / (alpha + hbar^T P hbar),    P <- P - q (P hbar)^T       hbar: mean of h_m over the batch

P is updated after the step, and so, when m has its turn, knows the modalities before it, of this batch and all earlier ones. A gradient step
G P then moves the logits of a seen mean by G P hbar, almost nothing. At test each sample is fused by how sure each modality is:
p = sum_m lambda_m p_m, lambda = softmax over m of minus the entropy of p_m. Any number of modalities M >= 2.

Where we differ from the authors' code, and why:
 1. As released it never projects: it asks an nn.Linear for a parameter "module.weight", and its name is "weight". --no-projection is what it does.
 2. There P would be updated with the present modality first, divided elementwise by the matrix alpha + P h h^T where the formula
    has the number alpha + h^T P h, and normalised at each step: not symmetric any more, with negative eigenvalues. Ours is the formula.
 3. alpha is 0.1 for good; there it falls from 0.1 to 0.01 inside each epoch.
 4. Entropy is that of one sample; there the softmax runs over the batch, so that a prediction depends on who else is in the batch.
    Probabilities are weighted, as MMLoRA averages them; there logits are.
 5. Other encoders' gradients are None, so neither momentum nor decay moves them; with the torch it was written for they were zeros.
 6. AdamW instead of SGD. It divides the projected gradient by its running size, element by element, which turns a small step into a full one,
    slightly off its direction: the protection of seen features is weaker than with SGD.
 7. --separate-heads: no shared head, hence no projection: uni-modal training with entropy fusion, the control its reviewers asked for.
"""
import torch

import evaluate
import train_unimodal
from baselines import common


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--order", nargs="+", metavar="MODALITY", help="whose turn is first; default: as in dataset.json")
    a("--alpha", type=float, default=0.1, help="regulariser of the projection: the larger, the less is projected away")
    a("--no-projection", action="store_true", help="leave the head's gradient as it is")
    a("--separate-heads", action="store_true", help="a head for every modality, also where encoders have different widths")
    return parser


class Projection(torch.nn.Module):
    """P (D, D) float32, a buffer, so that a resumed run has it: about I - (projector onto all features seen)."""

    def __init__(self, width: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.register_buffer("P", torch.eye(width))

    def project(self, head: torch.nn.Linear) -> None:
        """Replace the gradient of the weight, (C, D), by its part away from what was seen."""
        head.weight.grad = head.weight.grad @ self.P

    @torch.no_grad()
    def update(self, h: torch.Tensor) -> None:
        """h: a mean feature (D,). P stays symmetric, with eigenvalues in [0, 1]: it is the inverse of I + sum h h^T / alpha."""
        Ph = self.P @ h
        self.P -= torch.outer(Ph, Ph) / (self.alpha + h @ Ph)


def train(args, seed):
    modalities = list(train_unimodal.open_data(args, seed)[1]["modalities"])
    order = args.order or modalities
    if sorted(order) != sorted(modalities):
        raise ValueError(f"--order {' '.join(order)}: {args.dataset} has {', '.join(modalities)}, each takes one turn")
    task = common.start(args, seed, "mla", arguments(), "order", "alpha", "no_projection", "separate_heads")
    if task.run.result:
        return task.run
    models, load = common.encoders(task)
    torch.manual_seed(seed)
    widths, classes = {m: models[m].encoder.width for m in modalities}, len(task.info["classes"])
    if not args.separate_heads and len(set(widths.values())) > 1:
        told = ", ".join(f"{m} {w}" for m, w in widths.items())
        raise ValueError(f"encoders of different widths ({told}) cannot share a head: use --separate-heads")
    shared = torch.nn.Linear(widths[order[0]], classes)
    for m in modalities:
        models[m].head = torch.nn.Linear(widths[m], classes) if args.separate_heads else shared
    project = not (args.no_projection or args.separate_heads)
    if project:
        projection = models["projection"] = Projection(widths[order[0]], args.alpha)
    models.to(args.device)
    optimizer = common.optimizer_for(task, models)

    def logits(x):
        h = common.features(task, models, x)
        z = {m: models[m].head(h[m]) for m in modalities}
        p = evaluate.fuse(z, "entropy", task.info["multilabel"])
        return {"joint": p.logit(1e-6) if task.info["multilabel"] else p.clamp(min=1e-30).log(), **z}      # logits of which p are the probabilities

    for epoch in common.epochs(task, models, optimizer, logits, load):
        for batch in epoch:
            for m in order:                                                                # --- MLA: each modality in turn ---
                optimizer.zero_grad()                                                      # to None: the others' encoders are left alone
                mean = 0
                for x, y, share in batch:
                    h = common.features(task, models, {m: x[m]})[m]
                    z = models[m].head(h)
                    loss = common.cross_entropy(z, y)
                    (share * loss).backward()
                    mean = mean + share * h.detach().mean(0)                               # hbar (D,)
                    epoch.count(loss, z, y)
                if project:
                    projection.project(shared)
                optimizer.step()
                if project:
                    projection.update(mean)
    return common.finish(task, models, logits, load)


def main():
    common.main(arguments(), train, "MLA")


if __name__ == "__main__":
    main()
