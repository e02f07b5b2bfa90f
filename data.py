"""Prepared data: from memory-mapped arrays to batches, to augmented inputs on the device.

A prepared data set is a folder of plain arrays. A script in `prepare/` makes it once:

    dataset.json                    classes, several labels or not, modality -> kind, counts, source
    {train,val,test}/ids.txt        one id a line
    {train,val,test}/labels.npy     int64 (N,), or uint8 multi-hot (N, C)
    {train,val,test}/<modality>.npy
        frames, image   uint8    (N, F, 3, 256, 256)         flow   uint8  (N, S, 2L, 256, 256)
        audio           float16  (N, clips, 128, 204)        text   int32  (N, L), 0 = padding
    {train,val,test}/groups.npy     int64 (N,), only where samples are of different kinds (the toy)

The operating system reads only the pages that a batch touches, so no worker processes are needed.
Pictures stay uint8 until they are on the device: that is a quarter of the bytes to move. There they
are cropped, flipped and normalised, the whole batch at once.

Shapes: N samples, B batch, V views of a sample (frames, clips, flow stacks), C channels,
H x W pixels.
"""
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


# ---- Reading ----

def read_json(file: Path) -> dict:
    """Raises ValueError where the file holds no object of JSON."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()    # half a character cannot be printed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it holds no object of JSON")
    return value


class Split:
    """One split of a prepared data set. `len()` is the number of samples.

    labels: int64 (N,) or uint8 (N, C); arrays: modality -> memory-mapped array; kinds: modality ->
    kind. Opening a split reads only the labels. Raises ValueError where an array has another N.

    settings: with a `share` in them, only that share of the samples, drawn with their `seed`. A
    smaller share is a part of a larger one. rows: which rows of the arrays these samples are, (N,).
    """

    def __init__(self, folder: Path, name: str, settings: dict | None = None):
        info = read_json(folder / "dataset.json")
        self.kinds = info["modalities"]
        self.groups = groups_of(folder / name, info)
        self.labels = torch.from_numpy(np.load(folder / name / "labels.npy"))
        keys = list(self.kinds)
        texts = [m for m, kind in self.kinds.items() if kind == "text"]
        for other in info.get("other_tokenizers") or []:
            # The same texts as ids of another vocabulary: text.wordpiece.npy, text.byte_bpe.npy.
            keys += [f"{m}.{other['kind']}" for m in texts]
        self.arrays = {}
        for key in keys:
            array = np.load(folder / name / f"{key}.npy", mmap_mode="r")
            if len(array) != len(self.labels):
                raise ValueError(f"{folder / name}: {len(self.labels)} labels, but {len(array)}"
                                 f" rows in {key}.npy; prepare the data set again")
            self.arrays[key] = array
        self.rows = torch.arange(len(self.labels))
        if settings and "share" in settings:
            self.keep(settings["share"], settings["seed"])

    def keep(self, share: float, seed: int) -> None:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        self.rows = order[:math.ceil(share * len(self))].sort().values
        self.labels = self.labels[self.rows]
        self.groups = {name: members[self.rows] for name, members in self.groups.items()}

    @classmethod
    def of(cls, kinds: dict, arrays: dict, labels: torch.Tensor) -> "Split":
        """A split that was never stored. kinds, arrays: modality -> kind, array (N, ...)."""
        split = cls.__new__(cls)
        split.kinds, split.arrays, split.labels, split.groups = kinds, arrays, labels, {}
        split.rows = torch.arange(len(labels))
        return split

    def __len__(self):
        return len(self.labels)


def groups_of(folder: Path, info: dict) -> dict[str, torch.Tensor]:
    """Group -> (N,) bool, which samples belong to it. Most data sets have no groups.

    dataset.json has "groups", name -> classes; or "sample_groups", the names of what groups.npy
    counts.
    """
    groups = {}
    if info.get("groups"):
        labels = torch.from_numpy(np.load(folder / "labels.npy"))
        for name, classes in info["groups"].items():
            groups[name] = torch.isin(labels, torch.tensor(classes))
    elif info.get("sample_groups"):
        number = torch.from_numpy(np.load(folder / "groups.npy"))
        for i, name in enumerate(info["sample_groups"]):
            groups[name] = number == i
    return groups


# ---- Batches ----

def epoch_rng(seed: int, epoch: int) -> torch.Generator:
    """All randomness of one epoch. So a run that was killed goes on as it would have.

    torch's own generator serves dropout and drop path. The generator that is returned serves order,
    frames, crops and flips: on the CPU, so that they are the same on every device.
    """
    torch.manual_seed(seed * 1_000_003 + epoch)
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def batches(n: int, size: int, rng: torch.Generator | None = None) -> list[torch.Tensor]:
    """Indices 0 .. n-1 in batches of `size`; shuffled with `rng`, in order without it."""
    order = torch.arange(n) if rng is None else torch.randperm(n, generator=rng)
    # Sorted inside a batch: a disk likes to be read forwards.
    return [batch.sort().values for batch in order.split(size)]


def inputs(split: Split, index: torch.Tensor, models, device, settings: dict, rng=None) -> tuple:
    """The samples `index`: -> x, modality -> what its encoder takes, and y, labels; on the device.

    models: modality -> UnimodalModel; a modality without a model is left out. With `rng` x is
    augmented; without it x is what validation and test use.
    """
    x = {}
    for m in split.kinds:
        if m in models:
            x[m] = model_input(split, m, index, models[m].encoder, device, settings, rng)
    return x, split.labels[index].to(device)


def parts(batch: tuple[dict, torch.Tensor], size: int | None) -> list[tuple]:
    """A batch in parts of `size` samples, [(x, y, share of the batch)]; one part when size is None.

    The sum of share * gradient over the parts is the gradient of the batch. BatchNorm is the
    exception: in training it takes its statistics from one part.
    """
    x, y = batch
    if size is None or size >= len(y):
        return [(x, y, 1.0)]
    out = []
    for i in torch.arange(len(y)).split(size):
        part = {m: v[i] for m, v in x.items()}
        out.append((part, y[i], len(i) / len(y)))
    return out


# ---- What an encoder takes ----

def model_input(split: Split, modality: str, index: torch.Tensor, encoder, device, settings: dict,
                rng=None) -> torch.Tensor:
    """What `encoder` takes of samples `index`: (B, V, C, H, W) float32, or (B, L) token ids.

    settings (from paper/settings.py): `frames` seen at once; `crop`, the range of the share of the
    area; `flip`; `audio_shift`, in frames of the spectrogram. With `rng` augmented.
    """
    kind = split.kinds[modality]
    rows = split.rows[index].numpy()
    if kind == "text":
        # text.npy has the ids of the data set's own vocabulary. The encoder may read another.
        other = f"{modality}.{encoder.tokenizer}"
        array = split.arrays[other if other in split.arrays else modality]
        ids = torch.from_numpy(array[rows]).long()
        longest = int((ids != 0).sum(1).max())
        return ids[:, :max(1, longest)].to(device)            # what is cut off is padding for all

    array = split.arrays[modality]
    if kind == "audio":
        x = to_device(torch.from_numpy(array[rows]), device).float()
        x = x.unsqueeze(2)                                    # (B, V, 1, mel bins, frames)
        reach = settings["audio_shift"]
        if rng is not None and reach:
            shift = torch.randint(-reach, reach + 1, (len(rows),), generator=rng)
            x = torch.stack([sample.roll(k, -1) for sample, k in zip(x, shift.tolist())])
        return x
    return picture_input(array, kind, rows, encoder, device, settings, rng)


def picture_input(array, kind: str, rows, encoder, device, settings: dict, rng) -> torch.Tensor:
    """Frames, pictures or flow: (N, V, C, H, W) uint8 -> (B, V, C, size, size) float32."""
    stored = array.shape[1]
    if kind == "flow":                                        # one stack in training, else all
        views = stored if rng is None else 1
    else:
        views = min(settings["frames"], stored)
    picked = pick_views(len(rows), stored, views, rng).numpy()               # (B, V)
    x = to_device(torch.from_numpy(array[rows[:, None], picked]), device)    # (B, V, C, H, W) uint8
    size = encoder.image_size or x.shape[-1] * 7 // 8         # a ResNet takes any size: 224 of 256
    if rng is None:
        x = centre_crop(x, size)
    else:
        x = random_crop(x, size, settings, kind, rng)
    if kind == "flow":
        # 128 is no motion. One deviation for all channels: temporal segment networks (2016).
        return (x / 255 - 0.5) / 0.226
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in encoder.pixels)
    return (x / 255 - mean) / std


def to_device(x: torch.Tensor, device) -> torch.Tensor:
    """From page-locked memory a GPU fetches the data by itself, while the program goes on."""
    if str(device).startswith("cuda"):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def pick_views(samples: int, stored: int, wanted: int, rng=None) -> torch.Tensor:
    """Which of the stored views to look at, (samples, wanted).

    With `rng` random ones, in their order; without it evenly spaced ones.
    """
    if rng is None:
        return ((torch.arange(wanted) + 0.5) * stored / wanted).long().expand(samples, -1)
    shuffled = torch.rand(samples, stored, generator=rng).argsort(1)
    return shuffled[:, :wanted].sort(1).values


def centre_crop(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, V, C, H, W) uint8 -> (B, V, C, size, size) float. Smaller pictures are enlarged first."""
    if x.shape[-1] < size:
        flat = x.flatten(0, 1).float()
        large = F.interpolate(flat, size=(size, size), mode="bilinear", antialias=True)
        return large.unflatten(0, x.shape[:2])
    edge = (x.shape[-1] - size) // 2
    return x[..., edge:edge + size, edge:edge + size].float()


def random_crop(x: torch.Tensor, size: int, settings: dict, kind: str, rng) -> torch.Tensor:
    """Random resized crop and horizontal flip, the same for all views of a sample.

    (B, V, C, H, W) uint8 -> (B, V, C, size, size) float.
    """
    n = len(x)
    u = torch.rand(6, n, generator=rng)
    low, high = settings["crop"]
    area = low + (high - low) * u[0]
    ratio = torch.ones(n)
    if low < high:
        ratio = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w = (area * ratio).sqrt().clamp(max=1)                    # width and height of the crop, as
    h = (area / ratio).sqrt().clamp(max=1)                    # shares of the stored picture
    flip = torch.ones(n)
    if settings["flip"]:
        flip = torch.where(u[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    across = torch.stack([w * flip, zero, (1 - w) * (2 * u[2] - 1)], 1)
    down = torch.stack([zero, h, (1 - h) * (2 * u[3] - 1)], 1)
    theta = torch.stack([across, down], 1).to(x.device)       # (B, 2, 3)
    # Bilinear sampling does not alias: at least half of the area is taken, of about `size` pixels.
    grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)     # (B, size, size, 2)
    flat = x.flatten(1, 2).float()                                           # (B, V C, H, W)
    out = F.grid_sample(flat, grid, align_corners=False, padding_mode="border")
    out = out.view(*x.shape[:3], size, size)
    if kind == "flow":
        # In a mirror left is right: the x component, in the even channels, changes its sign, too.
        mirrored = (flip < 0).view(-1, 1, 1, 1, 1).to(x.device)
        out[:, :, ::2] = torch.where(mirrored, 255 - out[:, :, ::2], out[:, :, ::2])
    return out


# ---- Sound -> log-mel spectrogram ----

@functools.lru_cache
def mel_filters(bins: int) -> torch.Tensor:
    """(257, bins): how much each bin of a 512-point FFT at 16 kHz counts in each mel bin.

    Triangles, with corners equally spaced in mel from 20 Hz to 8 kHz.
    """
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, 8000))
    corner = torch.linspace(low, high, bins + 2)
    at = 1127 * torch.log1p(torch.arange(257) * (16000 / 512) / 700)[:, None]        # (257, 1)
    rise = (at - corner[:-2]) / (corner[1:-1] - corner[:-2])
    fall = (corner[2:] - at) / (corner[2:] - corner[1:-1])
    filters = torch.minimum(rise, fall).clamp_min(0)
    filters[256] = 0                                          # Kaldi leaves the Nyquist bin out
    return filters


def log_mel(wave: torch.Tensor, bins: int = 128, frames: int = 204) -> torch.Tensor:
    """Log-mel spectrogram as ImageBind makes it, with Kaldi's filter bank.

    wave: (..., n) float32 in [-1, 1) at 16 kHz; -> (..., bins, frames). A frame of 25 ms starts
    every 10 ms; only whole ones count. Zeros are added, or the end is cut, to get `frames` of them.
    ImageBind's mean and deviation normalise the result. Raises ValueError below 400 samples.
    """
    if wave.shape[-1] < 400:
        raise ValueError(f"{wave.shape[-1]} samples of sound, but one frame of the spectrogram"
                         " takes 400 (25 ms at 16 kHz)")
    x = wave.unfold(-1, 400, 160)                                            # (..., t, 400)
    x = x - x.mean(-1, keepdim=True)
    # Pre-emphasis: speech is weak at high frequencies.
    x = x - 0.97 * torch.cat([x[..., :1], x[..., :-1]], -1)
    window = torch.hann_window(400, periodic=False)
    power = torch.fft.rfft(x * window, 512).abs() ** 2                       # (..., t, 257)
    mel = power @ mel_filters(bins)                                          # (..., t, bins)
    mel = mel.clamp_min(torch.finfo(torch.float32).eps).log().mT             # (..., bins, t)
    mel = F.pad(mel, (0, frames - mel.shape[-1]))             # a negative pad cuts
    return (mel + 4.268) / 9.138


# ---- Checking: is a prepared data set what it says it is? ----

PLAIN_NAME = re.compile(r"\w[\w.-]*")                 # the name of one file or folder, never a path
KEYS = dict(name=str, classes=list, multilabel=bool, modalities=dict, shapes=dict)
OPTIONAL = dict(counts=dict, tokenizer=dict, other_tokenizers=list, groups=dict, sample_groups=list,
                sha256=dict, made_by=dict)
FORMATS = {     # kind -> types and axes of its arrays
    "frames": ("uint8", "(N, F, 3, S, S)"), "image": ("uint8", "(N, F, 3, S, S)"),
    "flow": ("uint8", "(N, S, 2L, S, S)"), "text": ("int32 or int64", "(N, L)"),
    "audio": ("float16 or float32", "(N, clips, bins, frames)"),
}
MOST_IDS = 2 ** 24                                    # far more than any vocabulary has
CHECKED = {}                                          # folder -> its files when all was right


def check(folder: Path) -> dict:
    """Is a prepared data set what the top of this file says? -> its dataset.json.

    dataset.json, labels, ids and the headers of all arrays are looked at each time. Sound and token
    ids are read whole, a block at a time, but only once: checked.json keeps sizes and times of the
    files that were right. Pictures need no reading: every uint8 is a brightness.
    Raises ValueError: one line that names the file and says what to do.
    """
    file = folder / "dataset.json"
    try:
        info = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; prepare the data set again") from None
    check_info(file, info)
    arrays, used = {file: None}, set()                    # file -> array; class numbers in train
    for split in ("train", "val", "test"):
        labels = check_labels(folder / split, info)
        if split == "train":
            numbers = labels.any(0).nonzero()[0] if info["multilabel"] else np.unique(labels)
            used.update(numbers.tolist())
        for name, (kind, shape, _) in stored(info).items():
            array = mapped(folder / split / f"{name}.npy")
            check_format(folder / split / f"{name}.npy", array, kind, [len(labels), *shape])
            arrays[folder / split / f"{name}.npy"] = array
    need(used, folder / "train/labels.npy", "no sample has any class")

    state, memory = {"version": 1}, folder / "checked.json"
    for file in arrays:
        state[str(file.relative_to(folder))] = [file.stat().st_size, file.stat().st_mtime_ns]
    if CHECKED.get(folder) != state and remembered(memory) != state:
        for file, array in arrays.items():
            if array is not None:
                kind, _, vocabulary = stored(info)[file.name.removesuffix(".npy")]
                check_values(file, array, kind, vocabulary)
        absent = [name for i, name in enumerate(info["classes"]) if i not in used]
        if absent:
            print(f"{folder}: {len(absent)} classes have no train sample, nothing can learn them:"
                  f" {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}")
        try:
            memory.unlink(missing_ok=True)                # a link could lead out of the folder
            with open(memory, "x") as f:
                json.dump(state, f, indent=1)
        except OSError:
            pass                                          # a folder that we may only read
    CHECKED[folder] = state
    return info


def remembered(memory: Path) -> dict:
    """What checked.json holds; {} where it is not there, or damaged: then we look again."""
    if not memory.is_file():
        return {}
    try:
        return read_json(memory)
    except (ValueError, OSError):
        return {}


def need(right, file: Path, problem: str) -> None:
    if not right:
        raise ValueError(f"{file}: {problem}; correct it, or prepare the data set again")


def check_info(file: Path, info) -> None:
    """dataset.json: all that the program uses has the right type, and no name is a path."""
    need(isinstance(info, dict), file, "no object {...}")
    for key, kind in {**KEYS, **OPTIONAL}.items():
        there = info.get(key) is not None or key in KEYS
        what = {str: "a text", bool: "true or false", list: "a list"}.get(kind, "an object {...}")
        need(not there or isinstance(info.get(key), kind), file, f"{key!r} must be {what}")
    classes, modalities = info["classes"], info["modalities"]
    need(PLAIN_NAME.fullmatch(info["name"]), file, "'name' may have letters, digits, _ - . only")
    need(classes and modalities, file, "'classes' and 'modalities' must not be empty")
    for key in ("classes", "sample_groups"):
        names = info.get(key) or []
        need(all(isinstance(name, str) for name in names) and len(set(names)) == len(names), file,
             f"{key!r} must be different texts")
    for m, kind in modalities.items():
        # Models are kept by modality in a ModuleDict, whose keys may not be its own methods.
        taken = m in ("labels", "groups") or hasattr(torch.nn.ModuleDict(), m)
        need(re.fullmatch(r"\w[\w-]*", m) and not taken, file, f"'modalities': choose a name of"
             f" letters, digits, _ and - that is not in use, instead of {m!r}")
        need(kind in [*FORMATS], file, f"'modalities': {m} must be one of {', '.join(FORMATS)}")
        need(kind != "text" or info.get("tokenizer"), file,
             f"'tokenizer' must say kind and vocab_size of the token ids in {m}")
        shape = info["shapes"].get(m)
        need(isinstance(shape, list) and all(type(n) is int for n in shape), file,
             f"'shapes' must have a list of numbers for {m}")
    own = [info["tokenizer"]] if info.get("tokenizer") else []
    for known in own + (info.get("other_tokenizers") or []):
        size = known.get("vocab_size") if isinstance(known, dict) else None
        right = type(size) is int and 1 <= size <= MOST_IDS
        need(right and re.fullmatch(r"\w+", str(known.get("kind", ""))), file,
             f"a tokenizer must say kind (a name) and vocab_size (a number, {MOST_IDS} at most)")
    for name, members in (info.get("groups") or {}).items():
        need(isinstance(members, list) and all(c in range(len(classes)) for c in members)
             and not info["multilabel"], file,
             f"'groups': {name!r} must list class numbers 0 to {len(classes) - 1}, no multilabel")
    for path in info.get("made_by") or {}:
        need(re.fullmatch(r"(\w+/)*\w+\.py", path), file, f"'made_by': no project file {path!r}")


def stored(info: dict) -> dict[str, tuple]:
    """Name of an array -> its kind, the shape of a sample, and the vocabulary of token ids."""
    names = {}
    for m, kind in info["modalities"].items():
        names[m] = (kind, info["shapes"][m], info.get("tokenizer"))
        for other in info.get("other_tokenizers") or []:
            if kind == "text":                            # the same texts as other ids
                names[f"{m}.{other['kind']}"] = (kind, info["shapes"][m], other)
    return names


def mapped(file: Path) -> np.ndarray:
    """An .npy file, mapped into memory. Raises ValueError where it is none, or cut short."""
    need(file.is_file(), file, "no such file")
    try:
        array = np.lib.format.open_memmap(file, mode="r")     # it never reads a pickle
    except Exception as error:                            # numpy raises many kinds on a bad header
        need(False, file, f"empty, cut short, or no .npy file of numbers ({error!r:.90})")
    need(array.ndim and array.offset + array.nbytes == file.stat().st_size, file,
         "another size than its header says")
    return array


def check_labels(folder: Path, info: dict) -> np.ndarray:
    """-> the labels of a split. Its ids, groups and count in dataset.json must go with them."""
    file, labels = folder / "labels.npy", mapped(folder / "labels.npy")
    n, classes, groups = len(labels), len(info["classes"]), len(info.get("sample_groups") or [])
    if info["multilabel"]:
        check_numbers(file, labels, "uint8", (n, classes), 1)
    else:
        check_numbers(file, labels, "int64", (n,), classes - 1)
    need((folder / "ids.txt").is_file(), folder / "ids.txt", "no such file (one id a line)")
    try:
        ids = (folder / "ids.txt").read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        need(False, folder / "ids.txt", f"no UTF-8 text ({error})")
    need(len(ids) == n, folder / "ids.txt", f"{len(ids)} ids, but {n} labels in labels.npy")
    told = (info.get("counts") or {}).get(folder.name, n)
    need(told == n, folder.parent / "dataset.json",
         f"'counts' says {told!r:.40} {folder.name} samples, but there are {n} labels")
    if groups and not info.get("groups"):
        file = folder / "groups.npy"
        check_numbers(file, mapped(file), "int64", (n,), groups - 1)
    return labels


def check_numbers(file: Path, array: np.ndarray, dtype: str, shape: tuple, top: int) -> None:
    need(str(array.dtype) == dtype and array.shape == shape, file,
         f"{array.dtype} {array.shape}, but it must be {dtype} {shape} of numbers 0 to {top}")
    need(len(array), file, "no samples, but every split needs some")
    need(array.min() >= 0 and array.max() <= top, file,
         f"numbers {array.min()} to {array.max()}, but dataset.json allows 0 to {top}")


def check_format(file: Path, array: np.ndarray, kind: str, shape: list) -> None:
    dtypes, axes = FORMATS[kind]
    right = str(array.dtype) in dtypes.split(" or ") and array.ndim == axes.count(",") + 1
    if right and kind in ("frames", "image", "flow"):
        channels, height, width = array.shape[2:]
        right = height == width and (channels % 2 == 0 if kind == "flow" else channels == 3)
    need(right and array.size, file, f"{array.dtype} {array.shape}, but {kind} is {dtypes} {axes}")
    need(list(array.shape) == shape, file,
         f"shape {list(array.shape)}, but labels and dataset.json ('shapes') say {shape}")


def check_values(file: Path, array: np.ndarray, kind: str, vocabulary: dict | None) -> None:
    """Sound must be finite, token ids in their vocabulary."""
    if kind == "audio":
        bad = not_finite(array)
        need(not bad, file, f"NaN or infinity in {bad}")
    if kind == "text":
        for samples, block in blocks(array):
            need(0 <= block.min() and block.max() < vocabulary["vocab_size"], file,
                 f"token ids not below the vocab_size of dataset.json in {samples}")


def not_finite(array: np.ndarray) -> str:
    """Where an array holds NaN or infinity: "samples 0 to 255"; "" where it does not."""
    if array.dtype.kind == "f":                           # whole numbers are finite
        for samples, block in blocks(array):
            if not np.isfinite(block).all():
                return samples
    return ""


def blocks(array: np.ndarray):
    """About 16 MiB at a time: ("samples 0 to 255", the block)."""
    rows = max(1, 2 ** 24 // array[0].nbytes)
    for start in range(0, len(array), rows):
        block = array[start:start + rows]
        yield f"samples {start} to {start + len(block) - 1}", block
