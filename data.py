"""Prepared data: memory-mapped arrays, batches of them, augmentation on the device; and a generated data set, the toy menagerie.

A prepared data set is a folder of plain arrays, made once by `prepare/` (or here, for the toy):

    dataset.json                    classes, multi-label or not, modality -> kind, counts, how it was made
    {train,val,test}/ids.txt        one id a line
    {train,val,test}/labels.npy     int64 (N,), or uint8 multi-hot (N, C)
    {train,val,test}/<modality>.npy
        frames, image   uint8    (N, F, 3, 256, 256)         flow   uint8  (N, S, 2L, 256, 256)
        audio           float16  (N, clips, 128, 204)        text   int32  (N, L), 0 = padding

The operating system pages in what a batch touches, so there are no worker processes and nothing is pickled. Pictures stay uint8 until they
are on the device (a quarter of the bytes to move); crop, flip and normalisation then happen there, once for the whole batch.

Shapes: B batch, V views (frames, clips or flow stacks of one sample), C channels, H x W pixels.
"""
import functools
import importlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------ reading
class Split:
    """One split of a prepared data set. Opening it reads nothing but the labels; `len()` is the number of samples.

    labels: int64 (N,) or uint8 (N, C); arrays: modality -> memory-mapped array; kinds: modality -> kind.
    """

    def __init__(self, folder: Path, name: str):
        info = json.loads((folder / "dataset.json").read_text())
        self.kinds = info["modalities"]
        self.labels = torch.from_numpy(np.load(folder / name / "labels.npy"))
        self.arrays = {m: np.load(folder / name / f"{m}.npy", mmap_mode="r") for m in self.kinds}
        for m, a in self.arrays.items():
            if len(a) != len(self.labels):
                raise ValueError(f"{folder / name}: {len(self.labels)} labels but {len(a)} rows in {m}.npy; prepare the data set again")

    @classmethod
    def of_one(cls, kinds: dict, row: dict) -> "Split":
        """A split of one sample that was never stored, its label unknown. row: modality -> array, as a row of the stored ones."""
        split = cls.__new__(cls)
        split.kinds, split.labels, split.arrays = kinds, torch.zeros(1, dtype=torch.int64), {m: a[None] for m, a in row.items()}
        return split

    def __len__(self):
        return len(self.labels)


def find(root: str, name: str, seed: int = 0) -> Path:
    """Folder of the prepared data set `name`. The toys are generated on the spot, a new world for every seed.

    Raises FileNotFoundError whose one line says how to get the data.
    """
    if name in WORLDS:
        torch.set_num_threads(1)      # so small a model is no faster on several, many times slower on a busy machine; and the bits do not depend on the cores
        folder = Path(root) / f"{name}-s{seed}"
        if not (folder / "dataset.json").exists():
            print(f"making {folder} (some seconds)", flush=True)
            make_toy(folder, name, seed)
        return folder
    folder = Path(root) / name
    if not (folder / "dataset.json").exists():
        try:
            how = importlib.import_module(f"prepare.{name}").HELP             # each prepare script says what to download and where to put it
        except (ModuleNotFoundError, AttributeError):
            how = f"make it with: python -m prepare.custom INDEX.jsonl --name {name} --data-root {root}"
        raise FileNotFoundError(f"no prepared data in {folder}. {how}")
    return folder


def batches(n: int, size: int, rng: torch.Generator | None = None) -> list[torch.Tensor]:
    """Indices 0..n-1 in batches of `size`, shuffled by `rng` (sorted inside a batch, which a disk likes), in order without it."""
    order = torch.arange(n) if rng is None else torch.randperm(n, generator=rng)
    return [b.sort().values for b in order.split(size)]


def epoch_rng(seed: int, epoch: int) -> torch.Generator:
    """All randomness of one epoch. Since it depends on nothing else, a run that was killed goes on exactly as it would have."""
    torch.manual_seed(seed * 1_000_003 + epoch)                              # dropout, drop path
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)           # order, frames, crops, flips: on the CPU, so the same on every device


def model_input(split: Split, modality: str, index: torch.Tensor, encoder, device, setting: dict, rng: torch.Generator | None = None):
    """What `encoder` takes of samples `index`: (B, V, C, H, W) float32, or (B, L) token ids. With `rng` augmented, without as in evaluation.

    setting: `frames` seen at once, `crop` (range of the cropped share of the area), `flip`, `audio_shift` (spectrogram frames); see paper.py.
    """
    kind, array, rows = split.kinds[modality], split.arrays[modality], index.numpy()
    if kind == "text":
        ids = torch.from_numpy(array[rows]).long()
        return ids[:, :max(1, int((ids != 0).sum(1).max()))].to(device)       # the batch's longest text; the rest is padding for all
    if kind == "audio":
        x = to_device(torch.from_numpy(array[rows]), device).float().unsqueeze(2)     # (B, V, 1, mel, frames)
        if rng is not None and setting["audio_shift"]:
            shift = torch.randint(-setting["audio_shift"], setting["audio_shift"] + 1, (len(rows),), generator=rng).tolist()
            x = torch.stack([s.roll(k, -1) for s, k in zip(x, shift)])
        return x
    views = 1 if kind == "flow" and rng is not None else array.shape[1] if kind == "flow" else min(setting["frames"], array.shape[1])
    picked = pick_views(len(rows), array.shape[1], views, rng)                # (B, V)
    x = to_device(torch.from_numpy(array[rows[:, None], picked.numpy()]), device)     # (B, V, C, H, W) uint8
    size = encoder.image_size or x.shape[-1] * 7 // 8                         # a ResNet takes any size: 224 of 256
    x = random_crop(x, size, setting, kind, rng) if rng is not None else centre_crop(x, size)
    if kind == "flow":                                                        # TSN's cross-modality start: 128 is no motion, one deviation for all
        return (x / 255 - 0.5) / 0.226
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in encoder.pixels)
    return (x / 255 - mean) / std


def to_device(x: torch.Tensor, device) -> torch.Tensor:
    """From page-locked memory a GPU fetches the data by itself, while the program goes on."""
    return x.pin_memory().to(device, non_blocking=True) if str(device).startswith("cuda") else x.to(device)


def pick_views(samples: int, stored: int, wanted: int, rng: torch.Generator | None = None) -> torch.Tensor:
    """Which of the stored views to look at, (samples, wanted): random ones in their order, or, without rng, evenly spaced ones."""
    if rng is None:
        return ((torch.arange(wanted) + 0.5) * stored / wanted).long().expand(samples, -1)
    return torch.rand(samples, stored, generator=rng).argsort(1)[:, :wanted].sort(1).values


def centre_crop(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, V, C, H, W) uint8 -> (B, V, C, size, size) float; smaller pictures are enlarged first."""
    if x.shape[-1] < size:
        return F.interpolate(x.flatten(0, 1).float(), size=(size, size), mode="bilinear", antialias=True).unflatten(0, x.shape[:2])
    edge = (x.shape[-1] - size) // 2
    return x[..., edge:edge + size, edge:edge + size].float()


def random_crop(x: torch.Tensor, size: int, setting: dict, kind: str, rng: torch.Generator) -> torch.Tensor:
    """Random resized crop and horizontal flip, one for all views of a sample. (B, V, C, H, W) uint8 -> (B, V, C, size, size) float."""
    n = len(x)
    u = torch.rand(6, n, generator=rng)
    area = setting["crop"][0] + (setting["crop"][1] - setting["crop"][0]) * u[0]
    ratio = torch.exp((2 * u[1] - 1) * math.log(4 / 3)) if setting["crop"][0] < setting["crop"][1] else torch.ones(n)
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)            # shares of the stored picture
    flip = torch.where(u[4] < 0.5, -1.0, 1.0) if setting["flip"] else torch.ones(n)
    zero = torch.zeros(n)
    theta = torch.stack([w * flip, zero, (1 - w) * (2 * u[2] - 1), zero, h, (1 - h) * (2 * u[3] - 1)], 1).view(n, 2, 3)
    # The source is stored near the size wanted and at least half of its area is taken, so plain bilinear sampling does not alias.
    grid = F.affine_grid(theta.to(x.device), (n, 1, size, size), align_corners=False)        # (B, size, size, 2)
    out = F.grid_sample(x.flatten(1, 2).float(), grid, align_corners=False, padding_mode="border").view(*x.shape[:3], size, size)
    if kind == "flow":      # in a mirror, left is right: the x component (even channels) changes its sign too
        out[:, :, ::2] = torch.where((flip < 0).view(-1, 1, 1, 1, 1).to(x.device), 255 - out[:, :, ::2], out[:, :, ::2])
    return out


# ------------------------------------------------------------------------------------------------ sound -> log-mel
@functools.lru_cache
def _mel_filters(bins: int) -> torch.Tensor:
    """(257, bins): triangles whose corners are equally spaced in mel, 20 Hz to 8 kHz, over the bins of a 512-point FFT at 16 kHz."""
    mel = lambda hertz: 1127 * math.log(1 + hertz / 700)
    corner = torch.linspace(mel(20), mel(8000), bins + 2)
    at = 1127 * torch.log1p(torch.arange(257) * (16000 / 512) / 700)[:, None]                    # (257, 1): each FFT bin in mel
    rise, fall = (at - corner[:-2]) / (corner[1:-1] - corner[:-2]), (corner[2:] - at) / (corner[2:] - corner[1:-1])
    filters = torch.minimum(rise, fall).clamp_min(0)
    filters[256] = 0                                                                              # Kaldi leaves the Nyquist bin out
    return filters


def log_mel(wave: torch.Tensor, bins: int = 128, frames: int = 204) -> torch.Tensor:
    """Log-mel spectrogram as ImageBind makes it (Kaldi's filter bank). wave: (..., n) float32 in [-1, 1) at 16 kHz; -> (..., bins, frames).

    25 ms frames every 10 ms, only whole ones; padded with zeros or cut to `frames`, then normalised with ImageBind's mean and deviation.
    Raises ValueError for less than one frame (400 samples).
    """
    if wave.shape[-1] < 400:
        raise ValueError(f"{wave.shape[-1]} samples of sound, but one frame of the spectrogram takes 400 (25 ms at 16 kHz)")
    x = wave.unfold(-1, 400, 160)                                                                 # (..., t, 400)
    x = x - x.mean(-1, keepdim=True)
    x = x - 0.97 * torch.cat([x[..., :1], x[..., :-1]], -1)                                       # pre-emphasis: speech falls off with frequency
    power = torch.fft.rfft(x * torch.hann_window(400, periodic=False), 512).abs() ** 2            # (..., t, 257)
    mel = (power @ _mel_filters(bins)).clamp_min(torch.finfo(torch.float32).eps).log().mT         # (..., bins, t)
    mel = F.pad(mel, (0, frames - mel.shape[-1]))                                                 # a negative pad cuts
    return (mel + 4.268) / 9.138


# ------------------------------------------------------------------------------------------------ the toy menagerie
# Every creature has a call and a silhouette. Eight common ones have their own call and their own silhouette. A mimic has the call of one
# common creature and the silhouette of another: no single sense can tell it from its models, both together can. That is the "paired
# feature" which two models that never meet do not learn. One sample of `toy`, in words:
#
#     class 9 = (call 0: a flat tone, silhouette 3: a square frame).  Heard alone it is creature 0 with probability 1/2, or mimic 8 or 9 with
#     1/4 each; seen alone it is creature 3 with 1/2, or mimic 9 or 11 with 1/4 each. The average of the two leaves 0, 3 and 9 tied at 1/4.
#
# In a bad recording (`spoilt`, the chance for each sense independently) the call drowns in noise, or the silhouette fades.
WORLDS = {
    # Design F: two calls x two silhouettes make four mimics; noise only where nothing is imitated. Shows what Eq. 3 adds to an average.
    "toy": dict(mimics=[(0, 2), (0, 3), (1, 2), (1, 3)], weight=[2] * 4 + [4] * 4 + [1] * 4, spoilt=[0.0] * 4 + [0.1] * 4 + [0.0] * 4,
                groups={"mimics": [8, 9, 10, 11], "clean": [0, 1, 2, 3], "noisy": [4, 5, 6, 7]}),
    # Design C: two mimics, noise everywhere. Shows an ensemble of separately trained models beating joint training.
    "toy_noisy": dict(mimics=[(0, 1), (2, 3)], weight=[3] * 8 + [2] * 2, spoilt=[0.1] * 10,
                      groups={"mimics": [8, 9], "common": list(range(8))}),
}
TOY_SIZES = {"train": 1000, "val": 500, "test": 1500}
CONTOURS = {"flat": lambda u: 0 * u, "rise": lambda u: u - 0.5, "fall": lambda u: 0.5 - u, "arch": lambda u: 0.5 - (2 * u - 1).abs()}
SILHOUETTES = {     # signed distance to the edge, positive inside, in a frame of radius 1; r = distance from the centre, a = |x|, b = |y|
    "disk": lambda x, y, r, a, b: 1 - r,
    "square": lambda x, y, r, a, b: 0.84 - torch.maximum(a, b),
    "ring": lambda x, y, r, a, b: 0.24 - (r - 0.74).abs(),
    "frame": lambda x, y, r, a, b: 0.2 - (torch.maximum(a, b) - 0.66).abs(),
    "triangle": lambda x, y, r, a, b: torch.minimum(0.6 - y, 0.6 * (y + 1) - a),
    "plus": lambda x, y, r, a, b: torch.maximum(torch.minimum(0.28 - a, 0.95 - b), torch.minimum(0.28 - b, 0.95 - a)),
    "crescent": lambda x, y, r, a, b: torch.minimum(0.95 - r, ((x - 0.45) ** 2 + y ** 2).sqrt() - 0.75),
    "bars": lambda x, y, r, a, b: torch.minimum(0.85 - b, 0.2 - (a - 0.55).abs()),
}


def toy_calls(call: torch.Tensor, spoilt: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Sounds of 0.64 s. call: (n,) 0..7, contour call % 4, trilled if call >= 4; spoilt: (n,) bool; -> (n, 10240) float32 at 16 kHz."""
    n = len(call)
    u = lambda low, high: low + (high - low) * torch.rand(n, 1, generator=rng)
    t = torch.arange(10240) / 16000
    duration = u(0.28, 0.50)
    s = ((t - 0.02 - u(0, 1) * (0.60 - duration)) / duration)                                     # (n, samples): 0..1 inside the call
    inside, s = (s >= 0) & (s <= 1), s.clamp(0, 1)
    contour = torch.stack([g(s) for g in CONTOURS.values()])[call % 4, torch.arange(n)]
    hertz = 700 * 2 ** (u(-0.3, 0.3) + u(0.6, 1.4) * contour)
    phase = (torch.cumsum(hertz.double(), 1) * (2 * math.pi / 16000) % (2 * math.pi)).float()     # double: the sum runs over 10,240 steps
    wave = phase.sin() + u(0.2, 0.8) * (2 * phase).sin() + u(0.2, 0.8) * (3 * phase).sin()
    trill = 1 - 0.9 * (0.5 + 0.5 * torch.cos(2 * math.pi * u(14, 22) * t + u(0, 2 * math.pi)))
    wave = wave * (math.pi * s).sin().clamp_min(0).sqrt() * inside * torch.where(call[:, None] >= 4, trill, 1.0)
    rms = lambda x: x.square().mean(1, keepdim=True).sqrt()
    noise = torch.fft.rfft(torch.randn(n, 10240, generator=rng))
    noise = torch.fft.irfft(noise / torch.fft.rfftfreq(10240, 1 / 16000).clamp_min(80) ** (0.9 * u(0, 1)), 10240)      # white to pink
    decibel = torch.where(spoilt[:, None], u(-25, -12), u(0, 10))
    wave = wave / rms(wave) + noise / rms(noise) * 10 ** (-decibel / 20)
    return 0.1 * wave / rms(wave)


def toy_pictures(shape: torch.Tensor, spoilt: torch.Tensor, rng: torch.Generator, size: int = 36) -> torch.Tensor:
    """Silhouettes. shape: (n,) 0..7; spoilt: (n,) bool; -> (n, 3, size, size) uint8; the middle 8/9 is what a centre crop sees."""
    n = len(shape)
    u = lambda low, high, *dims: low + (high - low) * torch.rand(n, *dims or (1, 1), generator=rng)
    grid = ((torch.arange(size) + 0.5) / size * 2 - 1) * 9 / 8                                    # the inner 8/9 is [-1, 1]
    half, angle = u(0.5, 0.7), u(-0.25, 0.25)
    x, y = (grid[None, :] - u(-0.2, 0.2)) / half, (grid[:, None] - u(-0.2, 0.2)) / half           # (n, size, size)
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    r = (x ** 2 + y ** 2).sqrt()
    distance = torch.stack([d(x, y, r, x.abs(), y.abs()) for d in SILHOUETTES.values()])[shape, torch.arange(n)]
    mask = (24 * half * distance).sigmoid()[:, None]                                              # (n, 1, size, size)
    contrast = torch.where(spoilt, u(0, 0.12, 1)[:, 0], u(0.4, 0.9, 1)[:, 0]).view(n, 1, 1, 1)
    image = u(0.1, 0.4, 3, 1, 1) + mask * contrast * u(0.3, 1, 3, 1, 1)
    image = image + 0.06 * F.interpolate(torch.randn(n, 3, 6, 6, generator=rng), size=size, mode="bilinear")           # clutter
    image = image + u(0.05, 0.15, 1, 1, 1) * torch.randn(n, 3, size, size, generator=rng)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def make_toy(folder: Path, name: str, seed: int) -> None:
    """Generate the world `name` in the prepared format. The same seed gives the same files."""
    world = WORLDS[name]
    call, shape = (torch.tensor(list(range(8)) + [m[i] for m in world["mimics"]]) for i in (0, 1))
    weight, spoilt = torch.tensor(world["weight"], dtype=torch.float64), torch.tensor(world["spoilt"])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for k, (split, n) in enumerate(TOY_SIZES.items()):
        rng = torch.Generator().manual_seed(10 * seed + k + 1)
        share = n * weight / weight.sum()                                     # class counts are exact, not drawn: largest remainders round up
        count = share.long()
        count[(share - count).argsort(descending=True)[:n - int(count.sum())]] += 1
        label = torch.arange(len(weight)).repeat_interleave(count)[torch.randperm(n, generator=rng)]
        audio, visual = [], []
        for y in label.split(250):                                            # small pieces stay in the processor's cache
            bad = torch.rand(2, len(y), generator=rng) < spoilt[y]
            audio.append(log_mel(toy_calls(call[y], bad[0], rng), bins=32, frames=64).half())
            visual.append(toy_pictures(shape[y], bad[1], rng))
        (temporary / split).mkdir(parents=True, exist_ok=True)
        np.save(temporary / split / "labels.npy", label.numpy())
        np.save(temporary / split / "audio.npy", torch.cat(audio).unsqueeze(1).numpy())      # (N, 1, 32, 64)
        np.save(temporary / split / "visual.npy", torch.cat(visual).unsqueeze(1).numpy())    # (N, 1, 3, 36, 36)
        (temporary / split / "ids.txt").write_text("".join(f"{split}{i:04d}\n" for i in range(n)))
    contours, figures = list(CONTOURS), list(SILHOUETTES)
    classes = [f"{'trilled ' if c >= 4 else ''}{contours[c % 4]} call, {figures[s]}" for c, s in zip(call.tolist(), shape.tolist())]
    (temporary / "dataset.json").write_text(json.dumps(dict(
        name=name, classes=classes, multilabel=False, modalities={"audio": "audio", "visual": "image"}, counts=TOY_SIZES,
        shapes={"audio": [1, 32, 64], "visual": [1, 3, 36, 36]}, tokenizer=None, groups=world["groups"], source=f"generated by data.py, seed {seed}"), indent=1))
    try:
        os.replace(temporary, folder)
    except OSError:      # another process has made the same files meanwhile: keep those, somebody may be reading them
        if not (folder / "dataset.json").exists():
            raise
        shutil.rmtree(temporary)
