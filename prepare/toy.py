"""The toy menagerie: generated worlds that train in minutes on a laptop.

    python -m prepare.toy --world toy --seed 0

Every creature has a call and a silhouette. Eight common ones have their own
call and their own silhouette. A mimic has the call of one common creature and
the silhouette of another. One sense cannot tell it from its models, both
together can. That is the "paired feature", which two models that never meet
do not learn. One class of `toy`, in words:

    class 9 = (call 0: a flat tone, silhouette 3: a square frame)
    heard alone:   creature 0 with 1/2, mimic 8 with 1/4, mimic 9 with 1/4
    seen alone:    creature 3 with 1/2, mimic 9 with 1/4, mimic 11 with 1/4
    the average:   0, 3 and 9 are tied at 1/4

A bad recording is spoilt, with some chance for each sense independently: the
call drowns in noise, or the silhouette fades. Every seed is a new world.
"""
import argparse
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import log_mel
from prepare import options

# mimics: (whose call, whose silhouette); weight: how frequent a class is; spoilt: its chance.
WORLDS = {
    # Two calls x two silhouettes make four mimics. There is noise only where nothing is imitated.
    # It shows what Eq. 3 adds to an average.
    "toy": dict(mimics=[(0, 2), (0, 3), (1, 2), (1, 3)],
                weight=[2] * 4 + [4] * 4 + [1] * 4,
                spoilt=[0.0] * 4 + [0.1] * 4 + [0.0] * 4,
                groups={"mimics": [8, 9, 10, 11], "clean": [0, 1, 2, 3], "noisy": [4, 5, 6, 7]}),
    # Two mimics, and noise everywhere.
    # It shows an ensemble of separately trained models that beats joint training.
    "toy_noisy": dict(mimics=[(0, 1), (2, 3)],
                      weight=[3] * 8 + [2] * 2,
                      spoilt=[0.1] * 10,
                      groups={"mimics": [8, 9], "common": list(range(8))}),
}
SIZES = {"train": 1000, "val": 500, "test": 1500}

# How the pitch of a call moves; u goes from 0 to 1 while it lasts.
CONTOURS = {
    "flat": lambda u: 0 * u,
    "rise": lambda u: u - 0.5,
    "fall": lambda u: 0.5 - u,
    "arch": lambda u: 0.5 - (2 * u - 1).abs(),
}
# Signed distance to the edge, positive inside, in a frame of radius 1.
# r is the distance from the centre, a = |x|, b = |y|.
SILHOUETTES = {
    "disk": lambda x, y, r, a, b: 1 - r,
    "square": lambda x, y, r, a, b: 0.84 - torch.maximum(a, b),
    "ring": lambda x, y, r, a, b: 0.24 - (r - 0.74).abs(),
    "frame": lambda x, y, r, a, b: 0.2 - (torch.maximum(a, b) - 0.66).abs(),
    "triangle": lambda x, y, r, a, b: torch.minimum(0.6 - y, 0.6 * (y + 1) - a),
    "plus": lambda x, y, r, a, b: torch.maximum(torch.minimum(0.28 - a, 0.95 - b),
                                                torch.minimum(0.28 - b, 0.95 - a)),
    "crescent": lambda x, y, r, a, b: torch.minimum(
        0.95 - r, ((x - 0.45) ** 2 + y ** 2).sqrt() - 0.75),
    "bars": lambda x, y, r, a, b: torch.minimum(0.85 - b, 0.2 - (a - 0.55).abs()),
}


def calls(call: torch.Tensor, spoilt: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Sounds of 0.64 s, (n, 10240) float32 at 16 kHz.

    call: (n,) 0..7, contour call % 4, trilled from 4 on; spoilt: (n,) bool.
    """
    n = len(call)

    def uniform(low, high):     # (n, 1): a number for each call
        return low + (high - low) * torch.rand(n, 1, generator=rng)

    # The tone: where it begins, how its pitch moves, how loud it is.
    t = torch.arange(10240) / 16000
    duration = uniform(0.28, 0.50)
    begin = uniform(0, 1) * (0.60 - duration)
    s = (t - 0.02 - begin) / duration                               # (n, samples)
    inside = (s >= 0) & (s <= 1)
    s = s.clamp(0, 1)
    contour = torch.stack([g(s) for g in CONTOURS.values()])[call % 4, torch.arange(n)]
    hertz = 700 * 2 ** (uniform(-0.3, 0.3) + uniform(0.6, 1.4) * contour)
    # In double precision, because the sum runs over 10,240 steps.
    phase = torch.cumsum(hertz.double(), 1) * (2 * math.pi / 16000) % (2 * math.pi)
    phase = phase.float()
    wave = phase.sin()
    wave = wave + uniform(0.2, 0.8) * (2 * phase).sin()
    wave = wave + uniform(0.2, 0.8) * (3 * phase).sin()
    trill = torch.cos(2 * math.pi * uniform(14, 22) * t + uniform(0, 2 * math.pi))
    trill = 1 - 0.9 * (0.5 + 0.5 * trill)
    loudness = (math.pi * s).sin().clamp_min(0).sqrt() * inside
    wave = wave * loudness * torch.where(call[:, None] >= 4, trill, 1.0)

    # The noise: anything from white to pink, loud in a bad recording.
    noise = torch.fft.rfft(torch.randn(n, 10240, generator=rng))
    frequency = torch.fft.rfftfreq(10240, 1 / 16000).clamp_min(80)
    noise = torch.fft.irfft(noise / frequency ** (0.9 * uniform(0, 1)), 10240)
    quiet_tone, loud_tone = uniform(-25, -12), uniform(0, 10)
    decibel = torch.where(spoilt[:, None], quiet_tone, loud_tone)
    wave = wave / rms(wave) + noise / rms(noise) * 10 ** (-decibel / 20)
    return 0.1 * wave / rms(wave)


def rms(x: torch.Tensor) -> torch.Tensor:
    """(n, samples) -> (n, 1), the root of the mean square."""
    return x.square().mean(1, keepdim=True).sqrt()


def pictures(shape: torch.Tensor, spoilt: torch.Tensor, rng: torch.Generator,
             size: int = 36) -> torch.Tensor:
    """Silhouettes, (n, 3, size, size) uint8. A centre crop sees the middle 8/9 of them.

    shape: (n,) 0..7; spoilt: (n,) bool.
    """
    n = len(shape)

    def uniform(low, high, *dims):     # (n, *dims), or (n, 1, 1)
        return low + (high - low) * torch.rand(n, *dims or (1, 1), generator=rng)

    # The silhouette: how large, how tilted, where.
    grid = ((torch.arange(size) + 0.5) / size * 2 - 1) * 9 / 8      # the inner 8/9 is [-1, 1]
    half, angle = uniform(0.5, 0.7), uniform(-0.25, 0.25)
    x = (grid[None, :] - uniform(-0.2, 0.2)) / half                 # (n, 1, size)
    y = (grid[:, None] - uniform(-0.2, 0.2)) / half                 # (n, size, 1)
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    r = (x ** 2 + y ** 2).sqrt()                                    # (n, size, size)
    distances = [edge(x, y, r, x.abs(), y.abs()) for edge in SILHOUETTES.values()]
    distance = torch.stack(distances)[shape, torch.arange(n)]
    mask = (24 * half * distance).sigmoid()[:, None]                # (n, 1, size, size)

    # The colours: of the ground, of the creature; then clutter and the noise of the camera.
    faint, strong = uniform(0, 0.12, 1)[:, 0], uniform(0.4, 0.9, 1)[:, 0]
    contrast = torch.where(spoilt, faint, strong).view(n, 1, 1, 1)
    image = uniform(0.1, 0.4, 3, 1, 1) + mask * contrast * uniform(0.3, 1, 3, 1, 1)
    clutter = torch.randn(n, 3, 6, 6, generator=rng)
    image = image + 0.06 * F.interpolate(clutter, size=size, mode="bilinear")
    noise = uniform(0.05, 0.15, 1, 1, 1) * torch.randn(n, 3, size, size, generator=rng)
    image = image + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def make(folder: Path, name: str, seed: int, made_by=None) -> None:
    """Generate the world `name` in the prepared format. The same seed gives the same files.

    made_by: fingerprints of the code that generates it; dataset.json keeps them.
    """
    world = WORLDS[name]
    call = torch.tensor(list(range(8)) + [caller for caller, _ in world["mimics"]])
    shape = torch.tensor(list(range(8)) + [lookalike for _, lookalike in world["mimics"]])
    spoilt = torch.tensor(world["spoilt"])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for k, (split, n) in enumerate(SIZES.items()):
        rng = torch.Generator().manual_seed(10 * seed + k + 1)
        count = class_counts(world["weight"], n)
        label = torch.arange(len(count)).repeat_interleave(count)
        label = label[torch.randperm(n, generator=rng)]
        audio, visual = [], []
        for y in label.split(250):     # small pieces stay in the processor's cache
            bad = torch.rand(2, len(y), generator=rng) < spoilt[y]
            sound = calls(call[y], bad[0], rng)
            audio.append(log_mel(sound, bins=32, frames=64).half())
            visual.append(pictures(shape[y], bad[1], rng))
        audio = torch.cat(audio).unsqueeze(1)                       # (N, 1, 32, 64)
        visual = torch.cat(visual).unsqueeze(1)                     # (N, 1, 3, 36, 36)
        (temporary / split).mkdir(parents=True, exist_ok=True)
        np.save(temporary / split / "labels.npy", label.numpy())
        np.save(temporary / split / "audio.npy", audio.numpy())
        np.save(temporary / split / "visual.npy", visual.numpy())
        ids = "".join(f"{split}{i:04d}\n" for i in range(n))
        (temporary / split / "ids.txt").write_text(ids)
    classes = [class_name(c, s) for c, s in zip(call.tolist(), shape.tolist())]
    info = dict(name=name, classes=classes, multilabel=False,
                modalities={"audio": "audio", "visual": "image"}, counts=SIZES,
                shapes={"audio": [1, 32, 64], "visual": [1, 3, 36, 36]}, tokenizer=None,
                groups=world["groups"], source=f"generated by prepare/toy.py, seed {seed}")
    if made_by is not None:
        info["made_by"] = made_by
    (temporary / "dataset.json").write_text(json.dumps(info, indent=1))
    try:
        os.replace(temporary, folder)
    except OSError:
        # Another process has made the same files meanwhile. We keep those: it may read them now.
        if not (folder / "dataset.json").exists():
            raise
        shutil.rmtree(temporary)


def class_counts(weight: list[int], n: int) -> torch.Tensor:
    """How many of n samples each class gets: exact, not drawn. The largest remainders round up."""
    weight = torch.tensor(weight, dtype=torch.float64)
    share = n * weight / weight.sum()
    count = share.long()
    missing = n - int(count.sum())
    count[(share - count).argsort(descending=True)[:missing]] += 1
    return count


def class_name(call: int, shape: int) -> str:
    trilled = "trilled " if call >= 4 else ""
    return f"{trilled}{list(CONTOURS)[call % 4]} call, {list(SILHOUETTES)[shape]}"


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m prepare.toy", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--world", choices=WORLDS, default="toy", help="which menagerie")
    p.add_argument("--seed", type=int, default=0, help="every seed is a new world")
    p.add_argument("--data-root", default="data", help="prepared data sets live here")
    args = p.parse_args(argv)
    torch.set_num_threads(1)     # the same bits on any number of cores; and not slower
    folder = Path(args.data_root) / f"{args.world}-s{args.seed}"
    if (folder / "dataset.json").exists():
        print(f"{folder} is already there")
    else:
        make(folder, args.world, args.seed)
        print(f"made {folder}")


if __name__ == "__main__":
    options.run(main)
