"""The toy: generated worlds of creatures that one can hear and see.

    python -m prepare.toy --world toy --seed 0     # into data/toy-s0
    python -m prepare.toy --draw                   # a picture of the creatures
    python -m prepare.toy --listen                 # a WAV file of them
    python -m prepare.toy --pretrain               # the encoders, minutes

Each of eight creatures has its own call and its own silhouette. How loud the
noise is and how faint the silhouette is are drawn for each sample. Then,

    toy              in a fifth of the samples the sound, in another fifth the
                     picture, is of something that is no creature
    toy_mismatched   ... is of another creature
    toy_mimics       nothing is off; but four creatures more, mimics, have the
                     call of one and the silhouette of another creature

Every seed is a new world. The training scripts make it when they need it.

A mimic cannot be told from its models by one sense, but by both together.
One class of `toy_mimics`, in words:

    class 9 = (call 0: a flat tone, silhouette 3: a square frame)
    heard alone:   creature 0 with 1/2, mimic 8 with 1/4, mimic 9 with 1/4
    seen alone:    creature 3 with 1/2, mimic 9 with 1/4, mimic 11 with 1/4
    the average:   0, 3 and 9 are tied at 1/4
"""
import argparse
import json
import os
import shutil
import wave as wave_file
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import log_mel
from prepare import creatures, locks, options, toy_encoders

# off: the share of samples whose sound, and of others whose picture, is off the subject.
# decibel: how much louder a call is than the noise; contrast: of a silhouette.
VARYING = dict(mimics=[], weight=[1] * 8, off=0.2, decibel=(-16.0, 4.0), contrast=(0.1, 0.6))
WORLDS = {
    "toy": dict(VARYING, shows="other things"),
    "toy_mismatched": dict(VARYING, shows="other creatures"),
    # mimics: (whose call, whose silhouette); weight: how frequent a class is; spoilt: the chance
    # of a recording that one can hardly hear, or see. Only creatures without mimics can be spoilt.
    "toy_mimics": dict(mimics=[(0, 2), (0, 3), (1, 2), (1, 3)],
                       weight=[2] * 4 + [4] * 4 + [1] * 4,
                       spoilt=[0.0] * 4 + [0.1] * 4 + [0.0] * 4,
                       groups={"mimics": [8, 9, 10, 11], "clean": [0, 1, 2, 3],
                               "noisy": [4, 5, 6, 7]}),
}
SIZES = {
    "toy": {"train": 600, "val": 400, "test": 2000},
    "toy_mismatched": {"train": 300, "val": 400, "test": 2000},
    "toy_mimics": {"train": 1000, "val": 500, "test": 1500},
}
OFF = ["both fine", "sound off", "sight off"]     # groups of the samples, in this order


def sounds(call: torch.Tensor, decibel: torch.Tensor | None, spoilt: torch.Tensor | None,
           rng: torch.Generator) -> torch.Tensor:
    """Calls in noise, (n, 10240) float32 at 16 kHz.

    call: (n,) 0..7, contour call % 4, trilled from 4 on; decibel: (n,), or drawn here by `spoilt`,
    (n,) bool.
    """
    wave, _ = creatures.tones(call % 4, call >= 4, rng)
    noise = creatures.noises(len(call), rng)
    if decibel is None:
        quiet, loud = uniform(-25, -12, len(call), rng), uniform(0, 10, len(call), rng)
        decibel = torch.where(spoilt, quiet, loud)
    return creatures.mix(wave, noise, decibel[:, None])


def pictures(shape: torch.Tensor, contrast: torch.Tensor | None, spoilt: torch.Tensor | None,
             rng: torch.Generator) -> torch.Tensor:
    """Silhouettes, (n, 3, 36, 36) uint8. shape: (n,) 0..7; contrast: (n,), or drawn by `spoilt`."""
    mask, _ = creatures.masks(shape, rng)
    if contrast is None:
        faint, strong = uniform(0, 0.12, len(shape), rng), uniform(0.4, 0.9, len(shape), rng)
        contrast = torch.where(spoilt, faint, strong)
    return creatures.paint(mask, contrast, rng)


def uniform(low: float, high: float, n: int, rng: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=rng)


def other_sounds(decibel: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """What is heard when the creature is off the screen: a contour that no creature has."""
    n = len(decibel)
    contour = torch.randint(len(creatures.OTHER_CONTOURS), (n,), generator=rng)
    trilled = torch.rand(n, generator=rng) < 0.5
    wave, _ = creatures.tones(contour, trilled, rng, creatures.OTHER_CONTOURS, timbres=True)
    return creatures.mix(wave, creatures.noises(n, rng), decibel[:, None])


def other_pictures(contrast: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    shape = torch.randint(len(creatures.OTHER_SHAPES), (len(contrast),), generator=rng)
    mask, _ = creatures.masks(shape, rng, table=creatures.OTHER_SHAPES)
    return creatures.paint(mask, contrast, rng)


# ---- One world ----

def samples(world: dict, y: torch.Tensor, rng: torch.Generator) -> tuple:
    """-> sounds, pictures and groups, (n,) index into OFF, of creatures y (n,)."""
    n, classes = len(y), len(world["weight"])
    call = torch.tensor(list(range(8)) + [caller for caller, _ in world["mimics"]])
    shape = torch.tensor(list(range(8)) + [lookalike for _, lookalike in world["mimics"]])
    if "spoilt" in world:
        spoilt = torch.rand(2, n, generator=rng) < torch.tensor(world["spoilt"])[y]
        sound = sounds(call[y], None, spoilt[0], rng)
        return sound, pictures(shape[y], None, spoilt[1], rng), torch.zeros(n, dtype=torch.int64)

    decibel, contrast = uniform(*world["decibel"], n, rng), uniform(*world["contrast"], n, rng)
    luck = torch.rand(n, generator=rng)
    sound_off, picture_off = luck < world["off"], luck > 1 - world["off"]
    other = (y + torch.randint(1, classes, (n,), generator=rng)) % classes
    heard, seen = torch.where(sound_off, other, y), torch.where(picture_off, other, y)
    sound, picture = sounds(heard, decibel, None, rng), pictures(seen, contrast, None, rng)
    if world["shows"] == "other things":
        thing, figure = other_sounds(decibel, rng), other_pictures(contrast, rng)
        sound = torch.where(sound_off[:, None], thing, sound)
        picture = torch.where(picture_off[:, None, None, None], figure, picture)
    return sound, picture, sound_off.long() + 2 * picture_off.long()


def make(folder: Path, name: str, seed: int, made_by=None) -> None:
    """Generate the world `name` in the prepared format. The same seed gives the same files.

    made_by: fingerprints of the code that generates it; dataset.json keeps them. Raises ValueError
    while another process makes it.
    """
    locks.lock(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        generate(temporary, name, seed)
        write_info(temporary, folder, name, seed, made_by)
    finally:     # after a full disk or Ctrl-C; also what a killed process has left
        for half in folder.parent.glob(f".{folder.name}.[0-9]*"):
            shutil.rmtree(half, ignore_errors=True)
        locks.unlock(folder)


def recordings(name: str, seed: int, split: str, n: int):
    """The n samples of a split of the world `name`, in their order, some at a time: classes (b,),
    and sounds, pictures and groups as in `samples`. Nobody stores the sounds; this makes them
    again."""
    world, order = WORLDS[name], list(SIZES[name])
    rng = torch.Generator().manual_seed(10 * seed + order.index(split) + 1)
    count = class_counts(world["weight"], n)
    label = torch.arange(len(count)).repeat_interleave(count)
    label = label[torch.randperm(n, generator=rng)]
    for y in label.split(250):     # small pieces stay in the processor's cache
        yield y, *samples(world, y, rng)


def generate(temporary: Path, name: str, seed: int) -> None:
    """The arrays of `make`."""
    world = WORLDS[name]
    for split, n in SIZES[name].items():
        label, audio, visual, group = [], [], [], []
        for y, sound, picture, off in recordings(name, seed, split, n):
            label.append(y)
            audio.append(log_mel(sound, bins=32, frames=64).half())
            visual.append(picture)
            group.append(off)
        audio = torch.cat(audio).unsqueeze(1)                       # (N, 1, 32, 64)
        visual = torch.cat(visual).unsqueeze(1)                     # (N, 1, 3, 36, 36)
        (temporary / split).mkdir(parents=True, exist_ok=True)
        np.save(temporary / split / "labels.npy", torch.cat(label).numpy())
        np.save(temporary / split / "audio.npy", audio.numpy())
        np.save(temporary / split / "visual.npy", visual.numpy())
        if "groups" not in world:
            np.save(temporary / split / "groups.npy", torch.cat(group).numpy())
        ids = "".join(f"{split}{i:04d}\n" for i in range(n))
        (temporary / split / "ids.txt").write_text(ids)


def write_info(temporary: Path, folder: Path, name: str, seed: int, made_by) -> None:
    """dataset.json; with it the data set is whole and gets its name."""
    world, names = WORLDS[name], [class_name(k, k) for k in range(8)]
    names += [class_name(caller, lookalike) for caller, lookalike in world["mimics"]]
    info = dict(name=name, classes=names, multilabel=False,
                modalities={"audio": "audio", "visual": "image"}, counts=SIZES[name],
                shapes={"audio": [1, 32, 64], "visual": [1, 3, 36, 36]}, tokenizer=None,
                source=f"generated by prepare/toy.py, seed {seed}")
    if "groups" in world:
        info["groups"] = world["groups"]
    else:
        info["sample_groups"] = OFF
    if made_by is not None:
        info["made_by"] = made_by
    (temporary / "dataset.json").write_text(json.dumps(info, indent=1))
    try:
        os.replace(temporary, folder)
    except OSError:
        # Another process has made the same files meanwhile. We keep those: it may read them now.
        if not (folder / "dataset.json").exists():
            raise


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
    contour = list(creatures.CONTOURS)[call % 4]
    return f"{trilled}{contour} call, {list(creatures.SILHOUETTES)[shape]}"


# ---- Look and listen ----

def gallery(rng: torch.Generator) -> torch.Tensor:
    """A picture (3, h, w) uint8 of rows of eight: the creatures, clear; as they are seen in `toy`,
    from the best to the worst; other things; two mimics, each between its models."""
    low, high = VARYING["contrast"]
    everyone = torch.arange(8)
    rows = [pictures(everyone, torch.full((8,), 0.9), None, rng),
            pictures(everyone, torch.linspace(high, low, 8), None, rng),
            other_pictures(torch.full((8,), 0.5), rng)]
    family = []
    for caller, lookalike in [(0, 2), (1, 3)]:                      # two mimics of toy_mimics
        family += [caller, lookalike, lookalike]                    # a model, the mimic, a model
    mimics = pictures(torch.tensor(family), torch.full((6,), 0.9), None, rng)
    rows.append(F.pad(mimics, (0, 0, 0, 0, 0, 0, 0, 2), value=255)) # two empty places
    rows = [F.pad(row, (2, 2, 2, 2), value=255) for row in rows]
    strips = [torch.cat(list(row), dim=2) for row in rows]          # (3, 40, 320) each
    return torch.cat(strips, dim=1)


def draw(file: Path) -> None:
    image = gallery(torch.Generator().manual_seed(0))
    image = F.interpolate(image[None].float(), scale_factor=3, mode="nearest")[0]
    from torchvision.io import write_png     # it takes seconds to import

    write_png(image.to(torch.uint8), str(file))
    print(f"wrote {file}. Rows: the eight creatures; the same from the clearest to the faintest of"
          " `toy`;\nthings that are no creature; two mimics of `toy_mimics`, each between its"
          " models:\nit has the call of the left one and the silhouette of the right one")


def listen(file: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    everyone, (low, high) = torch.arange(8), VARYING["decibel"]
    clear = sounds(everyone, torch.full((8,), 20.0), None, rng)
    noisy = sounds(everyone, torch.linspace(high, low, 8), None, rng)
    others = other_sounds(torch.full((4,), 10.0), rng)
    wave = torch.cat([clear, noisy, others]).flatten().clamp(-1, 1)
    with wave_file.open(str(file), "wb") as f:
        f.setparams((1, 2, creatures.RATE, 0, "NONE", ""))
        f.writeframes((wave * 32767).to(torch.int16).numpy().tobytes())
    print(f"wrote {file}: the eight calls, clear; the same, from the loudest to the faintest of"
          " `toy`;\nfour sounds of no creature; 0.64 s each")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m prepare.toy", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--world", choices=WORLDS, default="toy", help="which world; default: toy")
    p.add_argument("--seed", type=int, default=0, help="every seed is a new world; default: 0")
    p.add_argument("--data-root", default="data", metavar="FOLDER",
                   help="prepared data sets live here; default: data")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--draw", nargs="?", type=Path, const="toy.png", metavar="FILE",
                     help="a picture of the creatures, PNG")
    one.add_argument("--listen", nargs="?", type=Path, const="toy.wav", metavar="FILE",
                     help="a sound of them, WAV")
    one.add_argument("--pretrain", nargs="?", type=Path, const="checkpoints/toy", metavar="FOLDER",
                     help="pre-train the encoders of the toy (some minutes)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)     # the same bits on any number of cores; and not slower
    if args.draw:
        return draw(args.draw)
    if args.listen:
        return listen(args.listen)
    if args.pretrain:
        return toy_encoders.pretrain(args.pretrain)
    folder = Path(args.data_root) / f"{args.world}-s{args.seed}"
    if (folder / "dataset.json").exists():
        print(f"{folder} is already there")
    else:
        make(folder, args.world, args.seed)
        print(f"made {folder}")


if __name__ == "__main__":
    options.run(main)
