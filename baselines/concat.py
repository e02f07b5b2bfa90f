"""The multi-modal baseline: features side by side, one linear layer, trained end to end.

    python -m baselines.concat --dataset crema_d                # "Multi-Modal Baseline", Table 5

    z = W [h_1; ...; h_M] + b          loss: cross-entropy of z          M >= 2 modalities

The leftmost picture of Figure 1; late fusion as in OGM-GE (Peng et al., CVPR 2022;
GeWu-Lab/OGM-GE_CVPR2022, `--modulation Normal`). W is [W_1 ... W_M], so the joint prediction is a
sum of uni-modal ones, z = sum_m (W_m h_m + b/M). Those are reported, too: they show a modality that
joint training left behind.

Where we differ from the authors' code, and why:
 1. Of MMLoRA's authors there is no code. The learning rate is that of App. A.1; of ResNets it is
    ours. Epochs, schedule and weight decay are those of uni-modal training: paper silent.
 2. OGM-GE's re-initialises every convolution and linear layer after it has built the model, public
    weights included. We keep them.
 3. OGM-GE's has no validation split and reports the best epoch on test. We choose the epoch on
    validation, for all methods alike.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
from baselines import parts
from harness import arguments, metrics, optim, runs

OPTIONS = ("optimizer",)


def train(args, seed: int) -> runs.Run:
    folder, info = arguments.open_data(args, seed)
    lr = parts.lr_of(args.optimizer)
    settings = arguments.joint_settings(args, seed, info, "concat", lr=lr, options=OPTIONS)
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
    models["joint"] = joint
    models.to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer(args.optimizer, models, settings["lr"],
                                     settings["weight_decay"])

    def forward(x):                       # in training and in validation
        h = parts.features(models, x, args.device, settings)
        return {"joint": joint(h), **joint.split(h)}

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
            optimizer.zero_grad()
            for x, y, share in data.parts(batch, args.micro_batch):
                logits = forward(x)
                loss = metrics.cross_entropy(logits["joint"], y)
                (share * loss).backward()
                run.count(loss, logits, y)
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
    parts.add_optimizer(p)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
