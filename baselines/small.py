"""What else with few parameters does what LoRA does? The same loss, Eq. 3, trains something else.

    python -m baselines.small --what heads                    # the two linear classifiers
    python -m baselines.small --what biases                   # all biases: BitFit (Zaken, 2022)
    python -m baselines.small --what norms                    # gains and biases of all norms
    python -m baselines.small --what temperatures             # one number a modality
    diff train_joint.py baselines/small.py                    # one idea

A temperature T_m divides the logits of modality m: P_m(y|x) = softmax(z_m / T_m). It is learnt as
log T_m, from 0. `evaluate.py --temperature` chooses one on validation, without any training.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
import train_unimodal
from baselines import parts
from harness import arguments, metrics, optim, runs
from harness.models import load_unimodal
from lora import mean_prob_loss

OPTIONS = ("what",)
LR = dict(heads=3e-3, biases=3e-3, norms=1e-2, temperatures=3e-2)      # ours


class Tempered(torch.nn.Linear):
    """A head whose logits are divided by a temperature T = exp(log_temperature)."""

    def __init__(self, head: torch.nn.Linear):
        super().__init__(head.in_features, head.out_features)
        self.load_state_dict(head.state_dict())
        self.log_temperature = torch.nn.Parameter(torch.zeros(()))

    def forward(self, h):
        return super().forward(h) / self.log_temperature.exp()


def unfreeze(model, what: str) -> None:
    """Let the parameters that `what` names require a gradient, in a model that is frozen."""
    if what == "temperatures":
        model.head = Tempered(model.head).requires_grad_(False)
        model.head.log_temperature.requires_grad_(True)
    if what == "heads":
        model.head.requires_grad_(True)
    if what == "biases":
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.requires_grad_(True)
    if what == "norms":
        for layer in model.modules():
            if isinstance(layer, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
                layer.requires_grad_(True)


def train(args, seed: int) -> runs.Run:
    """As train_joint.train, without LoRA."""
    folder, info = arguments.open_data(args, seed)
    modalities = list(info["modalities"])

    # ---- Step 1, Eq. 1: one encoder per modality, each fine-tuned alone (UMFT) ----
    unimodal = {}
    for m in modalities:
        unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)

    settings = arguments.joint_settings(args, seed, info, "small", unimodal, tune="lora",
                                        lr=LR[args.what], fusion="prob", options=OPTIONS)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Step 2 without Eq. 2: freeze everything but a little ----
    torch.manual_seed(seed)
    models = torch.nn.ModuleDict()
    for m in modalities:
        models[m] = load_unimodal(unimodal[m], info)
        models[m].requires_grad_(False)
        unfreeze(models[m], args.what)
    models.to(args.device)

    # ---- Optimiser: of that little ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x):                       # in training and in validation
        with metrics.autocast(args.device, settings):
            return {m: models[m](x[m]) for m in x}            # P_m(y|x) = softmax(logits[m])

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- Step 3, Eq. 3: train it on the averaged prediction ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:                                      # epoch 0 is UME
        run.end_of_epoch(0, predict(val_split), parts.trained(models, optimizer))
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
        run.end_of_epoch(epoch, predict(val_split), parts.trained(models, optimizer))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    arguments.add_step_1(p)
    p.add_argument("--what", choices=tuple(LR), required=True, help="what is trained on Eq. 3")
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
