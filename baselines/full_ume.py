"""Fully fine-tuned UME: all weights of the uni-modal models are trained on Eq. 3, not only A and B.

    python -m baselines.full_ume --dataset ave                # "Fully Fine-tuned UME", Table 5
    diff train_joint.py baselines/full_ume.py                 # one idea

The learning rate is that of joint training, 1e-5 (ours: the paper does not say). As many epochs as
MMLoRA.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
import train_unimodal
from harness import arguments, metrics, optim, runs
from harness.models import load_unimodal, set_drop_path
from lora import mean_prob_loss


def train(args, seed: int) -> runs.Run:
    """As train_joint.train, without LoRA."""
    folder, info = arguments.open_data(args, seed)
    modalities = list(info["modalities"])

    # ---- Step 1, Eq. 1: one encoder per modality, each fine-tuned alone (UMFT) ----
    unimodal = {}
    for m in modalities:
        unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)

    settings = arguments.joint_settings(args, seed, info, "full", unimodal, tune="full",
                                        fusion="prob")
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- No step 2: nothing is frozen ----
    torch.manual_seed(seed)
    models = torch.nn.ModuleDict()
    for m in modalities:
        models[m] = load_unimodal(unimodal[m], info)
        set_drop_path(models[m], settings)                    # it acts again: nothing is frozen
    models.to(args.device)

    # ---- Optimiser: of all weights ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x):                       # in training and in validation
        with metrics.autocast(args.device, settings):
            return {m: models[m](x[m]) for m in x}            # P_m(y|x) = softmax(logits[m])

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- Step 3, Eq. 3: train all weights on the averaged prediction ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:                                      # epoch 0 is UME
        run.end_of_epoch(0, predict(val_split), models.state_dict())
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
                loss = mean_prob_loss(logits, y)              # Eq. 3: -log (1/M) sum_m P_m(y|x)
                (share * loss).backward()
                run.count(loss, logits, y)
            optimizer.step()
            step += 1
        run.end_of_epoch(epoch, predict(val_split), models.state_dict())

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    arguments.add_step_1(p)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
