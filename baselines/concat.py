"""The multi-modal baseline: features side by side, one linear layer, trained end to end; and the same layer on frozen features.

    python -m baselines.concat --dataset crema_d                # "Multi-Modal Baseline", Table 5
    python -m baselines.concat --dataset crema_d --freeze       # "Classifier on frozen features", Table 5

    z = W [h_1; ...; h_M] + b          loss: cross-entropy of z          any number of modalities M >= 2

The leftmost picture of Figure 1, late fusion as in OGM-GE (Peng et al., CVPR 2022; GeWu-Lab/OGM-GE_CVPR2022, `--modulation Normal`). Since W is
[W_1 ... W_M], the joint prediction is a sum of uni-modal ones, z = sum_m (W_m h_m + b/M): those are reported, too, and show a modality that
joint training left behind. With --freeze the encoders are the uni-modally fine-tuned ones (trained first where missing), and only W, b are trained.

Where we differ from the authors' code, and why:
 1. Of MMLoRA's authors there is no code. Learning rate: App. A.1; epochs, schedule and weight decay as in uni-modal training: paper silent.
 2. OGM-GE's re-initialises every convolution and linear layer after building the model, public weights included. We keep them.
 3. OGM-GE's has no validation split and reports the best epoch on test. We choose on validation, for all methods alike.
 4. --freeze: frozen features are constants up to augmentation. We leave augmentation out and compute them once: an epoch takes
    milliseconds. The learning rate is 1e-3 by default, because no pre-trained weight could be spoilt by it: paper silent.
"""
import functools

import torch

import checkpoints
import train_unimodal
from baselines import common

FROZEN_LR = 1e-3      # ours: paper silent


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--freeze", action="store_true", help="train the linear layer only, on features of frozen uni-modally fine-tuned encoders")
    a("--umft-epochs", type=int, help="with --freeze: epochs of uni-modal models that are missing")
    a("--umft-lr", type=float, help="with --freeze: their learning rate")
    return parser


def frozen_encoders(task, unimodal: dict):
    """As `common.encoders`, but the fine-tuned encoders, frozen; what is loaded are their features, computed once."""
    models = torch.nn.ModuleDict()
    for m, run in unimodal.items():
        models[m] = checkpoints.new_model(run.settings["encoder"], task.info, m)
        models[m].load_state_dict({k.removeprefix(f"{m}."): v for k, v in run.tensors("model.safetensors").items()})
        models[m].head = None
    models.requires_grad_(False).to(task.args.device)
    inputs = common.loader(task, models)

    @functools.cache
    def cached(split):
        h = common.predict(task, models, lambda x: common.features(task, models, x), inputs, split)
        return {m: v.to(task.args.device) for m, v in h.items()}                                          # modality -> (N, D_m)

    return models, lambda split, index, rng=None: {m: h[index] for m, h in cached(split).items()}


def train(args, seed):
    if args.freeze:
        folder, info = train_unimodal.open_data(args, seed)
        unimodal = {m: train_unimodal.train(args, m, seed, args.umft_epochs, args.umft_lr, reuse=True) for m in info["modalities"]}
        hashes = {m: dict(run=r.folder.name, sha256=checkpoints.sha256(r.folder / "model.safetensors")) for m, r in unimodal.items()}
        task = common.start(args, seed, "frozen", arguments(), lr=FROZEN_LR, unimodal=hashes)
    else:
        task = common.start(args, seed, "concat", arguments())
    if task.run.result:
        return task.run
    models, load = frozen_encoders(task, unimodal) if args.freeze else common.encoders(task)
    torch.manual_seed(seed)
    models["joint"] = common.ConcatHead(models, len(task.info["classes"])).to(args.device)
    optimizer = common.optimizer_for(task, models)

    def logits(x):
        h = x if args.freeze else common.features(task, models, x)
        return {"joint": models["joint"](h), **models["joint"].split(h)}

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
    title = lambda args: "Classifier on frozen features" if args.freeze else "Multi-modal baseline"
    common.main(arguments(), train, title)


if __name__ == "__main__":
    main()
