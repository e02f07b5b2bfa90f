"""The pre-trained encoders of the toy: its OpenCLIP and its ImageBind.

Each encoder learns alone, from sounds or pictures of things that are no creature. It answers
several questions about each: which contour, trilled or not, how high; which shape, how large, how
tilted. The heads that answer are thrown away. The files have the layout of the public families: the
very code that loads OpenCLIP and ImageBind loads them.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from encoders import UnimodalModel, build
from paper.settings import settings_for
from prepare import creatures
from pretrained import checkpoints

ENCODERS = {"audio": "audio_vit_toy", "visual": "vit_toy"}
KINDS = {"audio": "audio", "visual": "image"}
SAMPLES = {"audio": 30_000, "visual": 40_000}         # to train on
HELD_OUT = 1_000                                      # more, to see what was learnt
STEPS, BATCH, LR, WEIGHT_DECAY = 9_000, 64, 2e-3, 0.05


def pretrain(folder: Path, steps: int = STEPS, samples: dict = SAMPLES) -> dict[str, Path]:
    """Make the files; -> modality -> file. On one machine the same bits every time."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for modality, encoder in ENCODERS.items():
        files[modality] = folder / f"{encoder}.safetensors"
        model, told = train(modality, steps, samples[modality])
        checkpoints.export_public(model.encoder, files[modality])
        print(f"{files[modality]}: of the held-out {modality} samples right: {told}", flush=True)
    start = " ".join(f"{modality}={file}" for modality, file in files.items())
    print(f"use them with: python train_joint.py --pretrained {start}")
    return files


def train(modality: str, steps: int, n: int) -> tuple[UnimodalModel, str]:
    """-> the encoder with its heads, and what share of the answers is right."""
    rng = torch.Generator().manual_seed(777)
    array, answers = things(modality, n + HELD_OUT, rng)         # answers: question -> (n,)
    y = torch.stack(list(answers.values()), 1)                # (n, questions)
    heads = [int(k) + 1 for k in y.amax(0)]                   # how many answers each question has
    split = data.Split.of({modality: KINDS[modality]}, {modality: array.numpy()}, y)

    torch.manual_seed(0)
    model = UnimodalModel(build(ENCODERS[modality]), sum(heads))
    models, settings = torch.nn.ModuleDict({modality: model}), settings_for("toy")
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.05,
                                                   cycle_momentum=False)
    for _ in tqdm(range(steps), desc=f"pre-training {ENCODERS[modality]}", dynamic_ncols=True):
        index = torch.randint(n, (BATCH,), generator=rng)
        x, y = data.inputs(split, index, models, "cpu", settings, rng)
        logits = model(x[modality]).split(heads, 1)
        loss = sum(F.cross_entropy(z, y[:, i]) for i, z in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    x, y = data.inputs(split, torch.arange(n, n + HELD_OUT), models, "cpu", settings)
    with torch.no_grad():
        logits = model(x[modality]).split(heads, 1)
    told = []
    for i, question in enumerate(answers):
        right = (logits[i].argmax(1) == y[:, i]).float().mean()
        told.append(f"{question} {100 * right:.0f} %")
    return model, ", ".join(told)


def things(modality: str, n: int, rng: torch.Generator) -> tuple[torch.Tensor, dict]:
    """n sounds or pictures of no creature, in the prepared format, and the answers about them."""
    make = sounds if modality == "audio" else pictures
    arrays, answers = [], {}
    for _ in tqdm(range(n // 250), desc=f"{n} {modality} samples", dynamic_ncols=True):
        array, of_these = make(250, rng)
        arrays.append(array)
        for question, answer in of_these.items():
            answers.setdefault(question, []).append(answer)
    return torch.cat(arrays), {question: torch.cat(a) for question, a in answers.items()}


def sounds(n: int, rng: torch.Generator) -> tuple[torch.Tensor, dict]:
    table = creatures.OTHER_CONTOURS
    contour = torch.randint(len(table), (n,), generator=rng)
    trilled = torch.rand(n, generator=rng) < 0.5
    wave, drawn = creatures.tones(contour, trilled, rng, table, pitch=(-0.6, 0.6), timbres=True)
    decibel = -6 + 20 * torch.rand(n, 1, generator=rng)
    sound = creatures.mix(wave, creatures.noises(n, rng), decibel)
    mel = data.log_mel(sound, bins=32, frames=64).half()
    answers = dict(contour=contour, trilled=trilled.long(), timbre=drawn["timbre"],
                   pitch=bins(drawn["pitch"], -0.6, 0.6, 4),
                   duration=bins(drawn["duration"], 0.28, 0.50, 3))
    return mel[:, None], answers                              # (n, 1, 32, 64)


def pictures(n: int, rng: torch.Generator) -> tuple[torch.Tensor, dict]:
    table = creatures.OTHER_SHAPES
    shape = torch.randint(len(table), (n,), generator=rng)
    mask, drawn = creatures.masks(shape, rng, table=table, turn=0.6)
    hue = torch.randint(3, (n,), generator=rng)
    contrast = 0.1 + 0.6 * torch.rand(n, generator=rng)
    image = creatures.paint(mask, contrast, rng, hue)
    answers = dict(shape=shape, hue=hue, size=bins(drawn["size"], 0.5, 0.7, 3),
                   angle=bins(drawn["angle"], -0.6, 0.6, 4), x=bins(drawn["x"], -0.2, 0.2, 3),
                   y=bins(drawn["y"], -0.2, 0.2, 3))
    return image[:, None], answers                            # (n, 1, 3, 36, 36)


def bins(value: torch.Tensor, low: float, high: float, k: int) -> torch.Tensor:
    """Which of k equal parts of low .. high a value lies in."""
    return ((value - low) / (high - low) * k).long().clamp(0, k - 1)
