"""Step 1 of MMLoRA: fine-tune one encoder, with a linear head, on one modality alone (Eq. 1).

    python train_unimodal.py --modality audio                         # the toy: seconds on a laptop
    python train_unimodal.py --dataset crema_d --modality visual      # OpenCLIP ViT-B/16
    python train_unimodal.py --dataset crema_d --modality audio --encoder resnet18 --pretrained none

Encoder, learning rate, batch size, epochs and optimiser are the paper's (`paper/settings.py`). The
epoch with the best validation score is kept. The test split is used once, at the end.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch

import data
from harness import arguments, metrics, optim, runs
from harness.models import pretrained_model


def train(args, modality: str, seed: int) -> runs.Run:
    """Fine-tune the encoder of one modality; or return its run if that is finished already."""
    folder, info = arguments.open_data(args, seed)
    settings = arguments.unimodal_settings(args, modality, seed, info)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Model: a public encoder and a new linear head ----
    torch.manual_seed(seed)
    model = pretrained_model(settings, modality, info)
    models = torch.nn.ModuleDict({modality: model}).to(args.device)

    # ---- Optimiser ----
    optimizer = optim.make_optimizer(settings["optimizer"], models, settings["lr"],
                                     settings["weight_decay"], steps)

    def forward(x):                       # in training and in validation
        with metrics.autocast(args.device, settings):
            return {modality: model(x[modality])}             # P(y|x) = softmax(logits)

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- Training ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:
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
                loss = metrics.cross_entropy(logits[modality], y)     # Eq. 1: -log P(y|x)
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
    p.add_argument("--modality", required=True, help="audio, visual, text or flow")
    return p


if __name__ == "__main__":
    arguments.main(parser(), lambda args, seed: train(args, args.modality, seed))
