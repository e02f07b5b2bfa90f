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
import torch

from baselines import common


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--alpha", type=float, default=0.3, help="how strongly the leader is slowed down, tanh(alpha rho)")
    a("--no-ge", action="store_true", help="OGM without the noise")
    a("--conv-only", action="store_true", help="modulate convolutions only, as the authors' code does")
    a("--modulated-epochs", type=int, help="modulate in the first so many epochs; default: half of them")
    return parser


def coefficients(scores: dict, alpha: float) -> dict:
    """k_m of every modality from its score s_m (tensors without axes): 1 for the weakest, the smaller the further ahead."""
    weakest = torch.stack(list(scores.values())).min()
    rho = {m: s / weakest for m, s in scores.items()}
    return {m: torch.where(r > 1, 1 - torch.tanh(alpha * r), 1.0) for m, r in rho.items()}


@torch.no_grad()
def modulate(encoder, k, noise: bool, conv_only: bool) -> None:
    """Change the gradients of an encoder in place. The noise comes from the device's generator, which every epoch seeds anew."""
    for p in encoder.parameters():
        if p.grad is not None and (p.ndim == 4 if conv_only else p.ndim > 1):
            std = p.grad.std() + 1e-8                                                      # of the gradient as it was
            p.grad.mul_(k)
            if noise:
                p.grad.add_(torch.randn_like(p.grad) * std)


def train(args, seed):
    task = common.start(args, seed, "ogm_ge", arguments(), "alpha", "no_ge", "conv_only", "modulated_epochs", one_label=True)
    if task.run.result:
        return task.run
    models, load = common.encoders(task)
    torch.manual_seed(seed)
    models["joint"] = common.ConcatHead(models, len(task.info["classes"])).to(args.device)
    optimizer = common.optimizer_for(task, models)
    modulated_epochs = (task.run.settings["epochs"] + 1) // 2 if args.modulated_epochs is None else args.modulated_epochs

    def logits(x):
        h = common.features(task, models, x)
        return {"joint": models["joint"](h), **models["joint"].split(h)}

    for epoch in common.epochs(task, models, optimizer, logits, load):
        for batch in epoch:
            optimizer.zero_grad()
            scores = dict.fromkeys(task.modalities, 0.0)
            for x, y, share in batch:
                z = logits(x)
                loss = common.cross_entropy(z["joint"], y)
                (share * loss).backward()
                epoch.count(loss, z["joint"], y)
                for m in task.modalities:
                    scores[m] += z[m].detach().softmax(-1).gather(1, y[:, None]).sum()     # s_m
            if epoch.number <= modulated_epochs:                                           # --- OGM-GE ---
                for m, k in coefficients(scores, args.alpha).items():
                    modulate(models[m].encoder, k, not args.no_ge, args.conv_only)
                    epoch.note(**{f"k_{m}": k})
            optimizer.step()
    return common.finish(task, models, logits, load)


def main():
    common.main(arguments(), train, "OGM-GE")


if __name__ == "__main__":
    main()
