"""The classifier on frozen features: the layer of `concat.py` on uni-modally fine-tuned encoders.

    python -m baselines.frozen --dataset crema_d       # "Classifier on frozen features", Table 5

    z = W [h_1; ...; h_M] + b          only W and b are trained          M >= 2 modalities

The encoders are those of step 1; they are trained first where they are missing.

Where we differ from the paper, and why:
 1. Frozen features are constants up to augmentation. We leave augmentation out and compute them
    once: an epoch takes milliseconds.
 2. The learning rate is 1e-3, since it can't spoil any pre-trained weight: paper silent.
 3. The linear layer trains as long as step 1, on top of step 1: on the toy 40 + 40 epochs.
    MMLoRA has 40 + 15 there, and the joint baselines have 40.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
import train_unimodal
from baselines import parts
from harness import arguments, metrics, optim, runs

LR = 1e-3      # ours: paper silent


def train(args, seed: int) -> runs.Run:
    folder, info = arguments.open_data(args, seed)

    # ---- Step 1, Eq. 1: one encoder per modality, each fine-tuned alone (UMFT) ----
    unimodal = {}
    for m in info["modalities"]:
        unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)

    settings = arguments.joint_settings(args, seed, info, "frozen", unimodal, lr=LR)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: frozen encoders, one linear layer on all their features ----
    models = parts.frozen_encoders(unimodal, info)
    torch.manual_seed(seed)
    joint = parts.ConcatHead(models, len(info["classes"]))
    models["joint"] = joint
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    # ---- Features: the encoders are frozen, so they are computed once ----
    def features(split):
        def encode(x):
            return parts.features(models, x, args.device, settings)
        h = metrics.predict(encode, models, split, args.device, settings)
        return {m: v.to(args.device) for m, v in h.items()}   # modality -> (N, D_m)

    train_features, val_features = features(train_split), features(val_split)

    def forward(h):                       # in training and in validation
        return {"joint": joint(h), **joint.split(h)}

    @torch.no_grad()
    def predict(h):
        return {name: z.cpu() for name, z in forward(h).items()}

    # ---- Training ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:
        run.end_of_epoch(0, predict(val_features), parts.trained(models, optimizer))
        first_epoch = 1

    for epoch in range(first_epoch, settings["epochs"] + 1):
        models.train()
        rng = data.epoch_rng(seed, epoch)                     # all randomness of this epoch
        batches = data.batches(len(train_split), settings["batch_size"], rng)
        step = (epoch - 1) * steps_per_epoch
        for index in run.progress(batches, epoch):
            optim.set_lr(optimizer, settings, step, steps, run.history)
            x = {m: h[index] for m, h in train_features.items()}
            batch = x, train_split.labels[index].to(args.device)
            optimizer.zero_grad()
            for x, y, share in data.parts(batch, args.micro_batch):
                logits = forward(x)
                loss = metrics.cross_entropy(logits["joint"], y)
                (share * loss).backward()
                run.count(loss, logits, y)
            optimizer.step()
            step += 1
        run.end_of_epoch(epoch, predict(val_features), parts.trained(models, optimizer))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    run.save_tensors("model.safetensors", parts.whole(models))
    test_features = features(data.Split(folder, "test"))
    return run.finish({"val": predict(val_features), "test": predict(test_features)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    arguments.add_step_1(p)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
