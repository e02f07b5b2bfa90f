"""MMBT: a picture as a few words of a sentence (Kiela et al., "Supervised Multimodal Bitransformers
for Classifying Images and Text", 2019; facebookresearch/mmbt).

    python -m baselines.mmbt --dataset food101                                # ViT-L/14, BERT-base
    python -m baselines.mmbt --dataset food101 --encoder visual=resnet152     # authors' encoders

BERT reads any sequence of vectors. MMBT pools the picture's last feature map to N cells, projects
them to BERT's width, and puts them in front of the text, as the first of two segments. So words can
attend to cells from the first block on:

    tokens       [CLS]  v_1 ... v_N  [SEP]  w_1 w_2 ... [SEP]      v_i = P cell_i + c
    positions      0     1  ...  N    N+1    0   1  ...            counted anew in each segment
    segments       0     0  ...  0     0     1   1  ...
    z = W tanh(pooler([CLS])) + b                                  loss: cross-entropy of z

P and W start at random and would send noise into two pre-trained networks. So these are frozen at
first: the image encoder for 3 epochs, BERT's blocks for 5. BERT's embeddings and pooler are trained
from the start. Two modalities, `visual` (ResNet or ViT) and `text` (BERT).

Where we differ from the authors' code, and why:
 1. Its text has no final [SEP]. Ours keeps it, as prepared, because BERT has never seen a segment
    without one. The picture's own [CLS] and [SEP] are the text's first and last token. Its text is
    cut to 512 - N - 1 tokens; ours keeps its 512, for which there are positions.
 2. Its image encoder is a ResNet. Ours may be a ViT: its patch tokens after the last norm, laid
    out as the map that they are.
 3. Several frames of a sample: every cell is averaged over them.
 4. What is frozen is in eval mode: no dropout in BERT, and BatchNorm's statistics stand still.
    There, only the gradients stop.
 5. AdamW and epochs are those of all methods here, instead of BertAdam and up to 100 epochs. So
    there is no warm-up and no linear decay, and the rate is halved after the second flat epoch,
    theirs after the third. The learning rate is 5e-5, as published. --freeze-image and
    --freeze-text count epochs, as published, but of the 10 that we train on these data sets.
 6. For several labels a sample, it weights the positives of a class by N / frequency. We do not,
    in any method.
 7. Pictures are cropped and flipped at random in training, as in all methods here. There, they are
    resized and cut at the centre.
"""
import math

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch
import torch.nn.functional as F
from torch import nn

import data
from baselines import parts
from encoders import BERT, ResNet, ViT, padding_mask
from harness import arguments, metrics, optim, runs
from harness.models import family_of

OPTIONS = ("image_tokens", "freeze_image", "freeze_text")
LR = 5e-5      # the authors' README


class MMBT(nn.Module):
    """What is neither image encoder nor BERT: the projection P of the cells, the classifier W."""

    def __init__(self, image, text, image_tokens: int, classes: int):
        super().__init__()
        # The grid is as square as N allows: 3 x 1, 2 x 2, 3 x 2.
        columns = math.isqrt(image_tokens)
        while image_tokens % columns > 0:
            columns -= 1
        self.grid = (image_tokens // columns, columns)
        self.project = nn.Linear(image.width, text.width)
        self.classifier = nn.Linear(text.width, classes)

    def cells(self, image, x):
        """Pictures (B, V, 3, h, w) -> image tokens (B, N, D)."""
        views = x.flatten(0, 1)                                       # (B V, 3, h, w)
        if isinstance(image, ViT):
            patches = image.tokens(views)[:, 1:]                      # all but the class token
            rows = math.isqrt(patches.shape[1])
            feature_map = patches.mT.unflatten(2, (rows, -1))         # (B V, D_v, rows, columns)
        else:
            feature_map = image.feature_map(views)
        cells = F.adaptive_avg_pool2d(feature_map, self.grid)
        cells = cells.flatten(2).mT                                   # (B V, N, D_v)
        cells = cells.unflatten(0, x.shape[:2]).mean(1)               # (B, N, D_v)
        return self.project(cells)

    def sequence(self, bert, v, ids):
        """-> what BERT's blocks read, (B, N + 1 + T, D), and which of it counts, bool.

        v: image tokens (B, N, D); ids: token ids (B, T), [CLS] w_1 w_2 ... [SEP] and padding.
        """
        # Segment 0: the picture between the [CLS] and the [SEP] of the text.
        last = (ids != 0).sum(1, keepdim=True) - 1                    # where [SEP] is, (B, 1)
        cls = bert.words(ids[:, :1])
        sep = bert.words(ids.gather(1, last.clamp(min=0)))
        picture = torch.cat([cls, v, sep], dim=1)                     # (B, N + 2, D)
        n = picture.shape[1]
        picture = picture + bert.positions.weight[:n] + bert.segments.weight[0]
        picture = bert.dropout(bert.norm_embed(picture))
        # Segment 1: the text without its [CLS].
        words = ids[:, 1:]
        text = bert.embed(words, segments=torch.ones_like(words))     # (B, T - 1, D)
        counts = F.pad(padding_mask(ids)[:, 1:], (n, 0), value=True)  # no picture is padding
        return torch.cat([picture, text], dim=1), counts

    def forward(self, image, bert, x: dict):
        """x["visual"], pictures, and x["text"], token ids -> the feature (B, D) float32."""
        v = self.cells(image, x["visual"])
        tokens, counts = self.sequence(bert, v, x["text"])
        cls = bert.encode(tokens, keep=1, mask=counts[:, None, None])[:, 0]
        return bert.pooler(cls).tanh().float()


def check(encoders: dict) -> None:
    """ValueError unless the modalities and their encoders are those that MMBT can take."""
    family = {m: family_of(name) for m, name in encoders.items()}
    if family.keys() == {"visual", "text"}:
        if family["visual"] in (ResNet, ViT) and family["text"] is BERT:
            return
    told = ", ".join(f"{m}={name}" for m, name in encoders.items())
    raise ValueError("mmbt takes visual, a ResNet or a ViT, with text, a BERT (see --encoder),"
                     f" not {told}")


def train(args, seed: int) -> runs.Run:
    if args.image_tokens < 1:
        raise ValueError(f"--image-tokens {args.image_tokens}: 1 or more")
    folder, info = arguments.open_data(args, seed)
    check(arguments.encoders_of(args, info))
    settings = arguments.joint_settings(args, seed, info, "mmbt", lr=LR, options=OPTIONS)
    run = runs.Run(args, arguments.run_name(args, settings), settings, folder, info, __file__)
    if run.finished:
        return run

    # ---- Data ----
    train_split, val_split = data.Split(folder, "train", settings), data.Split(folder, "val")
    steps_per_epoch = math.ceil(len(train_split) / settings["batch_size"])
    steps = settings["epochs"] * steps_per_epoch

    # ---- Models: pre-trained encoders, the projection between them, the classifier ----
    models = parts.pretrained_encoders(settings, info)
    image, bert = models["visual"].encoder, models["text"].encoder
    torch.manual_seed(seed)
    joint = MMBT(image, bert, args.image_tokens, len(info["classes"]))
    models["joint"] = joint
    models.to(args.device)

    # ---- Optimiser: of all weights; it skips those without gradient ----
    optimizer = optim.make_optimizer("adamw", models, settings["lr"], settings["weight_decay"])

    def forward(x):                       # in training and in validation
        with metrics.autocast(args.device, settings):
            h = joint(image, bert, x)
        return {"joint": joint.classifier(h)}

    def predict(split):
        return metrics.predict(forward, models, split, args.device, settings)

    # ---- MMBT: what is frozen at first ----
    def thaw(epoch):
        image.requires_grad_(epoch > args.freeze_image)
        bert.blocks.requires_grad_(epoch > args.freeze_text)

    # ---- Training ----
    first_epoch = run.resume(models, optimizer)               # 0 for a new run
    if first_epoch == 0:
        run.end_of_epoch(0, predict(val_split), parts.trained(models, optimizer))
        first_epoch = 1

    for epoch in range(first_epoch, settings["epochs"] + 1):
        thaw(epoch)
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
                loss = metrics.cross_entropy(logits["joint"], y)
                (share * loss).backward()
                run.count(loss, logits, y)
            optimizer.step()
            step += 1
        run.end_of_epoch(epoch, predict(val_split), parts.trained(models, optimizer))

    # ---- The best epoch, once, on test ----
    run.load_best(models)
    thaw(settings["epochs"])              # a resumed run may not have entered the loop
    run.save_tensors("model.safetensors", parts.whole(models))
    test_split = data.Split(folder, "test")
    return run.finish({"val": predict(val_split), "test": predict(test_split)}, models)


def parser():
    p = arguments.parser(__doc__, __file__)
    own = p.add_argument_group("MMBT")
    own.add_argument("--image-tokens", type=int, default=3,
                     help="N, cells that the picture is pooled to; default: 3")
    own.add_argument("--freeze-image", type=arguments.from_zero(int), default=3,
                     metavar="EPOCHS",
                     help="train without the image encoder for so long; default: 3")
    own.add_argument("--freeze-text", type=arguments.from_zero(int), default=5, metavar="EPOCHS",
                     help="train without BERT's blocks for so long; default: 5")
    return p


if __name__ == "__main__":
    arguments.main(parser(), train)
