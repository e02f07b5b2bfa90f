"""PMF: prompt-based multimodal fusion (Li et al., "Efficient Multimodal Fusion via Interactive Prompting", CVPR 2023; yaoweilee/PMF).

    python -m baselines.pmf --dataset food101
    python -m baselines.pmf --umft                           # towers fine-tuned uni-modally first, then frozen: where MMLoRA starts
    python -m baselines.pmf --dataset crema_d --fusion-layers 4 --prompts 8

Two frozen towers talk through prompts: learnt tokens that are put beside a tower's own in its last F blocks. Each of these runs twice, first to
ask a tower what the other one should know, then to tell it. With other(a) = b and T_m the same frozen block in both passes:

    query     [.. ; .. ; q_m] <- T_m([z_m ; qc_m ; qp_m])                  query-context and query prompts; q_m: what the latter became
              t_m = MLP_m(q_m)                                             translated into the width of the other tower
    fusion    [z_m ; .. ; ..] <- T_m([z_m ; fc_m ; t_other(m)])            fusion-context prompts; all that was added is cut off again
    f_m = W_m h_m + c_m, h_m the class token after the last norm (BERT: [CLS] as it is);      prediction: softmax of (f_a + f_b) / 2

Trained are the prompts, the MLPs (linear, ReLU, linear) and the two heads, under 3 % of all parameters. In the blocks before the last F no
gradient flows at all, which is where the memory is saved. Two modalities, on ViT, AudioViT and BERT.

Where we differ from the authors' code, and why:
 1. It never trains the fusion-context prompts: the routine that freezes asks for an attribute "fcp", and they are called vision_fcp and
    text_fcp. Ours are trained, as the paper says.
 2. It fails when all blocks fuse (it uses the variable of a loop that then never ran). Here F may be the whole tower; a tower with fewer
    than F blocks makes both fuse in as many as it has.
 3. Only the model was released. Optimiser and epochs are those of all methods here; learning rate 1e-3, because nothing pre-trained is
    trained: ours.
 4. Its ViT was pre-trained on ImageNet-21k. Ours are the encoders and public weights of all methods here, also audio with visual.
 5. Several views of a sample: each is a sequence of its own with the same prompts, q_m is averaged over them.
 6. Frozen towers stay in eval mode, without dropout.
 7. --umft is ours. Without public weights (the toy) a frozen tower is a random one, and the prompts have little to work with.
"""
import torch
from torch import nn

import checkpoints
import train_unimodal
from baselines import common, concat

LR = 1e-3      # ours: paper silent


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--prompts", type=int, default=4, help="tokens of each of the three kinds, in each tower and fusion layer")
    a("--fusion-layers", type=int, default=2, help="how many blocks, the last ones, have them; all of the shallower tower at most")
    a("--umft", action="store_true", help="start from uni-modally fine-tuned towers (trained first where missing), not from public weights")
    return parser


class FusionLayer(nn.Module):
    """What one block gets beside its tokens. widths: of the two towers, modality -> D_m."""

    def __init__(self, widths: dict, prompts: int):
        super().__init__()
        new = lambda: nn.ParameterDict({m: nn.Parameter(torch.randn(prompts, w) * 0.02) for m, w in widths.items()})
        self.query_context, self.query, self.fusion_context = new(), new(), new()          # (n, D_m) each
        (a, b), hidden = widths, max(widths.values()) // 2
        self.other = {a: b, b: a}
        self.translate = nn.ModuleDict({m: nn.Sequential(nn.Linear(widths[m], hidden), nn.ReLU(), nn.Linear(hidden, widths[self.other[m]])) for m in widths})

    def forward(self, towers: dict, i: int) -> None:
        """Run block i of both towers (modality -> common.Tower)."""
        n, told = len(next(iter(self.query.values()))), {}
        for m, tower in towers.items():                                                    # both are asked before either is told anything
            prompts = torch.cat([self.query_context[m], self.query[m]])
            _, out = tower.block(i, prompts.expand(len(tower.x) // tower.views, -1, -1))
            told[self.other[m]] = self.translate[m](out[:, -n:])                           # (B, n, D_m) -> (B, n, D_other)
        for m, tower in towers.items():
            context = self.fusion_context[m].expand(len(told[m]), -1, -1)
            tower.x, _ = tower.block(i, torch.cat([context, told[m]], dim=1))


def train(args, seed):
    if min(args.prompts, args.fusion_layers) < 1:
        raise ValueError(f"--prompts {args.prompts} --fusion-layers {args.fusion_layers}: both are 1 or more")
    info = train_unimodal.open_data(args, seed)[1]
    if len(info["modalities"]) != 2:
        raise ValueError(f"{args.dataset} has {', '.join(info['modalities'])}: pmf is defined for two modalities")
    common.only_transformers(common.encoder_names(args, info))
    unimodal = {m: train_unimodal.train(args, m, seed, reuse=True) for m in info["modalities"]} if args.umft else {}
    hashes = {m: dict(run=r.folder.name, sha256=checkpoints.sha256(r.folder / "model.safetensors")) for m, r in unimodal.items()}
    task = common.start(args, seed, "pmf", arguments(), "prompts", "fusion_layers", "umft", lr=LR, **(dict(unimodal=hashes) if hashes else {}))
    if task.run.result:
        return task.run
    models = concat.frozen_encoders(task, unimodal)[0] if args.umft else common.encoders(task)[0].requires_grad_(False)
    load = common.loader(task, models)
    torch.manual_seed(seed)
    widths = {m: models[m].encoder.width for m in task.modalities}
    layers = min(args.fusion_layers, *(len(models[m].encoder.blocks) for m in widths))
    for m, width in widths.items():
        models[m].head = nn.Linear(width, len(task.info["classes"]))
    models["fusion"] = nn.ModuleList(FusionLayer(widths, args.prompts) for _ in range(layers))
    models.to(args.device)
    optimizer = common.optimizer_for(task, models)

    def logits(x):
        with common.autocast(task):
            towers = {m: common.Tower(models[m].encoder, x[m], layers) for m in x}
            for i, layer in enumerate(models["fusion"]):                                   # --- PMF ---
                layer(towers, i)
            h = {m: tower.feature() for m, tower in towers.items()}
        return {"joint": sum(models[m].head(h[m]) for m in h) / 2}                         # neither is alone any more: each knows of the other

    for epoch in common.epochs(task, models, optimizer, logits, load):
        for batch in epoch:
            optimizer.zero_grad()
            for x, y, share in batch:
                z = logits(x)
                loss = common.cross_entropy(z["joint"], y)
                (share * loss).backward()
                epoch.count(loss, z["joint"], y)
            optimizer.step()
    return common.finish(task, models, logits, load)


def main():
    common.main(arguments(), train, lambda args: f"PMF{', uni-modally fine-tuned towers' if args.umft else ''}")


if __name__ == "__main__":
    main()
