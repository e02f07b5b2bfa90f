"""G-Blending: gradient blending (Wang, Tran, Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020;
facebookresearch/VMZ).

    python -m baselines.g_blending --dataset crema_d

Modalities overfit at different speeds, so no single moment is right to stop them all. Give every modality a head of its own beside the joint
one, K = M + 1 heads, and weigh their losses by how well each turns training into generalisation:

    L   = sum_k w_k CE(z_k, y)                                                     w_k >= 0, sum_k w_k = 1
    G_k = LV_k(before) - LV_k(after)                                               what head k gained on held-out data
    O_k = [LV_k(after) - LT_k(after)] - [LV_k(before) - LT_k(before)]              how much its gap to the training loss grew
    w_k ~ G_k / O_k^2                                                              minimises overfitting per generalisation

"Online" G-Blending, any number of modalities M >= 2: before every super-epoch the present model is copied K times, copy k is trained for a
super-epoch on loss k alone and then thrown away; it only tells w_k. Test: the joint head.

Where we differ from the authors' code, and why:
 1. It takes fixed weights (--audio_weight and so on) and contains no way to estimate them (issue 133); we estimate as the paper says.
 2. LV is measured on a tenth of train that is never trained on, by any copy or by the model: not on validation, which chooses the epoch, nor
    on test, as BalanceBenchmark does for most data sets. The model therefore sees a tenth fewer samples than the other methods' do.
 3. G_k < 0 (the held-out loss rose) counts as 0, and O_k^2 as at least 1e-4; other implementations (MultiBench, BalanceBenchmark) take
    absolute values, which rewards a head for getting worse. If no head gained, all weigh the same.
 4. Losses are means over samples, without augmentation and in eval mode, so those of sets of different size can be subtracted.
 5. A copy follows the learning rate of the epochs it looks ahead to and starts with a fresh AdamW. Super-epoch: 10 epochs, as
    BalanceBenchmark. Copies make training about three times as long with two modalities; `seconds` includes them.
"""
import copy
import math

import torch

from baselines import common


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--super-epoch", type=int, default=10, help="epochs between two estimates of the weights")
    a("--held-out", type=float, default=0.1, help="share of train that only measures generalisation")
    return parser


def blend_weights(train_before, train_after, held_before, held_after) -> torch.Tensor:
    """Weights (K,), sum 1, from the losses (K,) of K heads before and after training each alone, on the training and the held-out part."""
    gain = (held_before - held_after).clamp(min=0)                                         # G
    overfit = (held_after - train_after) - (held_before - train_before)                    # O
    weights = gain / overfit.square().clamp(min=1e-4)
    return weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))


def train(args, seed):
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out}: a share of the training samples, between 0 and 1")
    task = common.start(args, seed, "g_blending", arguments(), "super_epoch", "held_out")
    if task.run.result:
        return task.run
    models, load = common.encoders(task)
    torch.manual_seed(seed)
    classes, heads = len(task.info["classes"]), ["joint", *task.modalities]
    joint = common.ConcatHead(models, classes)
    for m in task.modalities:
        models[m].head = torch.nn.Linear(models[m].encoder.width, classes)
    models["joint"], models["blend"] = joint, torch.nn.Module()
    models["blend"].register_buffer("w", torch.full((len(heads),), 1 / len(heads)))        # a buffer, so that a resumed run has it
    models.to(args.device)
    optimizer = common.optimizer_for(task, models)
    samples, size = len(task.split("train")), math.ceil(args.held_out * len(task.split("train")))
    held, kept = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).split([size, samples - size])

    def logits(x, models=models):
        """Of the modalities in x; the joint head's, too, if x has them all."""
        h = common.features(task, models, x)
        z = {m: models[m].head(h[m]) for m in h}
        return {"joint": models["joint"](h), **z} if len(h) == len(task.modalities) else z

    def losses(model, index):
        """Of every head, (K,): mean over the samples `index` of train."""
        z, y = common.predict(task, model, lambda x: logits(x, model), load, "train", index), task.split("train").labels[index]
        return torch.stack([common.cross_entropy(z[head], y) for head in heads])

    def estimate(epoch):
        """Train K copies apart for the super-epoch to come; -> w (K,)."""
        before, after = [losses(models, index) for index in (kept, held)], []
        for k, head in enumerate(heads):
            model = copy.deepcopy(models).train()
            optimizer = common.optimizer_for(task, model)
            for number in range(epoch.number, min(epoch.number + args.super_epoch, task.run.settings["epochs"] + 1)):
                for batch in common.Epoch(task, optimizer, number, load, kept):
                    optimizer.zero_grad()
                    for x, y, share in batch:
                        x = x if head == "joint" else {head: x[head]}                      # an encoder without gradient stays as it is
                        (share * common.cross_entropy(logits(x, model)[head], y)).backward()
                    optimizer.step()
            after.append([losses(model, index)[k] for index in (kept, held)])
        train_after, held_after = torch.tensor(after).T
        return blend_weights(before[0], train_after, before[1], held_after)

    for epoch in common.epochs(task, models, optimizer, logits, load, subset=kept):
        if (epoch.number - 1) % args.super_epoch == 0:
            models["blend"].w.copy_(estimate(epoch))
        w = dict(zip(heads, models["blend"].w))
        epoch.note(**{f"w_{head}": value for head, value in w.items()})
        for batch in epoch:
            optimizer.zero_grad()
            for x, y, share in batch:
                z = logits(x)
                loss = sum(w[head] * common.cross_entropy(z[head], y) for head in heads)    # --- G-Blending ---
                (share * loss).backward()
                epoch.count(loss, z["joint"], y)
            optimizer.step()
    return common.finish(task, models, logits, load)


def main():
    common.main(arguments(), train, "G-Blending")


if __name__ == "__main__":
    main()
