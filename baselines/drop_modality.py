"""Modality dropout: MMLoRA that is trained for missing modalities.

    python -m baselines.drop_modality                         # the toy
    python -m baselines.drop_modality --drop-modality 0.5
    diff train_joint.py baselines/drop_modality.py            # one idea

Under Eq. 3 the models leave things to each other. That is missed when one of them is away. Here
each modality is drawn away from a batch with probability r, --drop-modality. If none with LoRA is
left, all stay. So of two with LoRA each is away with probability r (1 - r), and one that alone has
LoRA never. The loss is Eq. 3 of what is left: with two modalities a mix of Eq. 3 and of Eq. 1.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
import train_unimodal
from harness import arguments, metrics, optim, runs
from harness.models import load_unimodal
from lora import add_lora, lora_state_dict, mean_prob_loss

OPTIONS = ("drop_modality",)


def some_of(x: dict, lora: list, rate: float, rng: torch.Generator) -> dict:
    """The inputs, each left out with probability `rate`; all, if none with LoRA would stay."""
    away = torch.rand(len(x), generator=rng) < rate
    left = {m: v for (m, v), is_away in zip(x.items(), away) if not is_away}
    if not set(left) & set(lora):
        return x
    return left


def train(args, seed: int) -> runs.Run:
    """As train_joint.train, with modalities away from a batch at random."""
    folder, info = arguments.open_data(args, seed)
    modalities = list(info["modalities"])
    lora = arguments.lora_modalities(args, info)

    # ---- Step 1, Eq. 1: one encoder per modality, each fine-tuned alone (UMFT) ----
    unimodal = {}
    for m in modalities:
        unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)

    settings = arguments.joint_settings(args, seed, info, "drop_modality", unimodal,
                                        tune="lora", lora=lora, fusion="prob", options=OPTIONS)
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
            x, y = data.inputs(train_split, index, models, args.device, settings, rng)
            batch = some_of(x, lora, args.drop_modality, rng), y
            optimizer.zero_grad()
            for x, y, share in data.parts(batch, args.micro_batch):
                logits = forward(x)
                loss = mean_prob_loss(logits, y)              # Eq. 3, of those that are there
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
    p.add_argument("--drop-modality", type=arguments.rate, default=0.3, metavar="RATE",
                   help="how often each modality is drawn away from a batch; default: 0.3")
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
