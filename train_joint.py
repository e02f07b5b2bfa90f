"""MMLoRA: step 1 (Eq. 1), then steps 2 and 3. Freeze the fine-tuned uni-modal models, add rank-r
matrices (Eq. 2), and train only those on the averaged prediction (Eq. 3).

    python train_joint.py                                    # the toy: the whole method in a minute
    python train_joint.py --dataset crema_d --lora audio     # the paper's setting for CREMA-D
    python train_joint.py --dataset ave --rank 4             # Table 10

Uni-modal models that are missing are trained first, by `train_unimodal.py`. Epoch 0 of step 3 is
the Uni-Modal Ensemble (UME): B is zero, so the adapted models are still the uni-modal ones.
Validation can only choose to stay there or to improve. The test split is used once, at the end.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
import train_unimodal
from harness import arguments, metrics, optim, runs
from harness.models import load_unimodal
from lora import add_lora, lora_state_dict, mean_prob_loss


def train(args, seed: int) -> runs.Run:
    """Train the uni-modal models that are missing, then A and B; or return the finished run."""
    folder, info = arguments.open_data(args, seed)
    modalities = list(info["modalities"])
    lora = arguments.lora_modalities(args, info)

    # ---- Step 1, Eq. 1: one encoder per modality, each fine-tuned alone (UMFT) ----
    unimodal = {}
    for m in modalities:
        unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)

    settings = arguments.joint_settings(args, seed, info, "mmlora", unimodal, tune="lora",
                                        lora=lora, fusion="prob")
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Step 2, Eq. 2: freeze everything, add rank-r matrices BA ----
    torch.manual_seed(seed)
    models = torch.nn.ModuleDict()
    for m in modalities:
        models[m] = load_unimodal(unimodal[m], info)
        models[m].requires_grad_(False)
        if m in lora:
            add_lora(models[m], args.rank)                    # W0 + BA
    models.to(args.device)

    # ---- Optimiser: of A and B alone ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x):                       # in training and in validation
        with metrics.autocast(args.device, settings):
            return {m: models[m](x[m]) for m in x}            # P_m(y|x) = softmax(logits[m])

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- Step 3, Eq. 3: train A and B on the averaged prediction ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:                                      # epoch 0 is UME: B is still zero
        run.end_of_epoch(0, predict(val_split), lora_state_dict(models))
        first_epoch = 1

    for epoch in range(first_epoch, settings["epochs"] + 1):
        models.train()                                        # what is frozen stays in eval mode
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
        run.end_of_epoch(epoch, predict(val_split), lora_state_dict(models))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    arguments.add_lora_arguments(p)
    arguments.add_step_1(p)
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
