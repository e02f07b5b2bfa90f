"""MMBT: a picture as a few words of a sentence (Kiela et al., "Supervised Multimodal Bitransformers for Classifying Images and Text", 2019;
facebookresearch/mmbt).

    python -m baselines.mmbt --dataset food101                                      # ViT-L/14 and BERT-base
    python -m baselines.mmbt --dataset food101 --encoder visual=resnet152           # the authors' encoders

BERT reads any sequence of vectors. So cut the picture's last feature map into N cells, project them to BERT's width, and put them in front of
the text as the first of two segments, whose words can then attend to the cells from the first block on:

    tokens       [CLS]  v_1 ... v_N  [SEP]  w_1 w_2 ... [SEP]              v_i = P cell_i + c
    positions      0     1  ...  N    N+1    0   1  ...                    counted anew in each segment
    segments       0     0  ...  0     0     1   1  ...
    z = W tanh(pooler([CLS])) + b          loss: cross-entropy of z

P and W start at random and would send noise into two pre-trained networks. So these are frozen at first: the image encoder for 3 epochs, BERT's
blocks for 5; BERT's embeddings and pooler are trained from the start. Two modalities, `visual` (ResNet or ViT) and `text` (BERT).

Where we differ from the authors' code, and why:
 1. Its text has no final [SEP]. Ours keeps it, as prepared, because BERT has never seen a segment without one; the picture's own [CLS] and [SEP]
    are the text's first and last token. Its text is cut to 512 - N - 1 tokens; ours keeps its 512, for which there are positions.
 2. A ViT, its image encoder not, gives its patch tokens after the last norm, laid out as the map that they are.
 3. Several frames of a sample: every cell is averaged over them.
 4. What is frozen is in eval mode: no dropout in BERT, and BatchNorm's statistics stand still. There only the gradients stop.
 5. AdamW and the batch size and epochs of all methods here, for BertAdam and up to 100 epochs; learning rate 5e-5 as published. --freeze-image
    and --freeze-text are in epochs, as published, out of our 10 on these data sets.
 6. For several labels a sample it weights the positives of a class by N / frequency. We do not, as with all methods here.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import train_unimodal
from baselines import common
from encoders import BERT, BUILD, ResNet, ViT, padding_mask

LR = 5e-5      # the authors' README


def arguments():
    parser = common.arguments(__doc__)
    a = parser.add_argument
    a("--image-tokens", type=int, default=3, help="N, cells that the picture is pooled to")
    a("--freeze-image", type=int, default=3, metavar="EPOCHS", help="train without the image encoder for so long")
    a("--freeze-text", type=int, default=5, metavar="EPOCHS", help="train without BERT's blocks for so long")
    return parser


class MMBT(nn.Module):
    """All that is neither the image encoder nor BERT: the projection P of the cells and the classifier W."""

    def __init__(self, image, text, image_tokens: int, classes: int):
        super().__init__()
        columns = max(c for c in range(1, math.isqrt(image_tokens) + 1) if image_tokens % c == 0)
        self.grid = image_tokens // columns, columns                                       # as square as N allows: 3 x 1, 2 x 2, 3 x 2
        self.project = nn.Linear(image.width, text.width)
        self.classifier = nn.Linear(text.width, classes)

    def cells(self, image, x):
        """Pictures (B, V, 3, h, w) -> image tokens (B, N, D)."""
        views = x.flatten(0, 1)                                                            # (B V, 3, h, w)
        if isinstance(image, ViT):
            patches = image.tokens(views)[:, 1:]                                           # (B V, T, D_v), row by row, without the class token
            feature_map = patches.mT.unflatten(2, (math.isqrt(patches.shape[1]), -1))      # (B V, D_v, rows, columns)
        else:
            feature_map = image.feature_map(views)
        pooled = F.adaptive_avg_pool2d(feature_map, self.grid).flatten(2).mT               # (B V, N, D_v)
        return self.project(pooled.unflatten(0, x.shape[:2]).mean(1))

    def sequence(self, bert, v, ids):
        """Image tokens v (B, N, D), token ids (B, T) -> what BERT's blocks read, (B, N + 1 + T, D), and which of it is there, (B, N + 1 + T) bool."""
        n, last = v.shape[1] + 2, (ids != 0).sum(1, keepdim=True).sub(1).clamp(min=0)
        picture = torch.cat([bert.words(ids[:, :1]), v, bert.words(ids.gather(1, last))], dim=1)      # [CLS] v_1 .. v_N [SEP], (B, N + 2, D)
        picture = bert.dropout(bert.norm_embed(picture + bert.positions.weight[:n] + bert.segments.weight[0]))
        text = bert.embed(ids[:, 1:], segments=torch.ones_like(ids[:, 1:]))                           # without its [CLS], (B, T - 1, D)
        return torch.cat([picture, text], dim=1), F.pad(padding_mask(ids)[:, 1:], (n, 0), value=True)

    def forward(self, image, bert, x: dict):
        """Pictures and token ids, x["visual"], x["text"] -> feature (B, D) float32."""
        tokens, there = self.sequence(bert, self.cells(image, x["visual"]), x["text"])
        cls = bert.encode(tokens, keep=1, mask=there[:, None, None])[:, 0]
        return bert.pooler(cls).tanh().float()


def check(names: dict) -> None:
    kinds = {m: BUILD[name][0] if name in BUILD else None for m, name in names.items()}
    if kinds.keys() != {"visual", "text"} or kinds["text"] is not BERT or kinds["visual"] not in (ResNet, ViT):
        told = ", ".join(f"{m}={name}" for m, name in names.items())
        raise ValueError(f"mmbt takes visual, a ResNet or a ViT, with text, a BERT (see --encoder), not {told}")


def train(args, seed):
    if args.image_tokens < 1:
        raise ValueError(f"--image-tokens {args.image_tokens}: 1 or more")
    check(common.encoder_names(args, train_unimodal.open_data(args, seed)[1]))
    task = common.start(args, seed, "mmbt", arguments(), "image_tokens", "freeze_image", "freeze_text", lr=LR)
    if task.run.result:
        return task.run
    models, load = common.encoders(task)
    image, bert = models["visual"].encoder, models["text"].encoder
    torch.manual_seed(seed)
    models["joint"] = MMBT(image, bert, args.image_tokens, len(task.info["classes"])).to(args.device)
    optimizer = common.optimizer_for(task, models)                                         # of all weights: frozen ones have no gradient, so it skips them

    def logits(x):
        with common.autocast(task):
            h = models["joint"](image, bert, x)
        return {"joint": models["joint"].classifier(h)}

    def thaw(epoch):
        image.requires_grad_(epoch > args.freeze_image)
        bert.blocks.requires_grad_(epoch > args.freeze_text)
        models.train()                                                                     # what is frozen goes to eval mode: see Encoder.train

    for epoch in common.epochs(task, models, optimizer, logits, load):
        thaw(epoch.number)                                                                 # --- MMBT: gradual unfreezing ---
        for batch in epoch:
            optimizer.zero_grad()
            for x, y, share in batch:
                z = logits(x)["joint"]
                loss = common.cross_entropy(z, y)
                (share * loss).backward()
                epoch.count(loss, z, y)
            optimizer.step()
    thaw(task.run.settings["epochs"])                                                      # a run killed after its last epoch has not been in the loop
    return common.finish(task, models, logits, load)


def main():
    common.main(arguments(), train, "MMBT")


if __name__ == "__main__":
    main()
