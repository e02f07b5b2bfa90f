"""Raw media -> prepared arrays: what every script of this folder shares.

Reading: `read_wave`, `audio_clips`, `read_frames`, `read_flow`, each one file or folder -> one array.
Writing: `write_dataset`, a list of items per split -> data/<name>/ in the format of `data.py`, whole or not at all.
A script only has to find its items: which ids, which labels, which files.

Shapes: F frames, S flow stacks of L flow frames, s pixels a side, n samples of sound at 16 kHz.
torchvision and torchaudio take seconds to import, so they are imported by the functions that use them.
"""
import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import log_mel

RATE = 16000                                        # samples a second
IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


# ------------------------------------------------------------------------------------------------ reading
def check_file(path: Path) -> None:
    """Raise one line for a source that cannot be what it should be; costs no decoding, so every file is looked at before hours of work."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_file() and (size := path.stat().st_size) < 1024:
        if path.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git-LFS pointer, not the file: run `git lfs pull` in {path.parent}")
        if size == 0:
            raise ValueError(f"{path} is an empty file")


def ffmpeg(path: Path, options: list[str], chunk: int, span=None):
    """Decode one file with the ffmpeg program: yields what it writes, `chunk` bytes at a time. span: (start, end) in seconds."""
    if not shutil.which("ffmpeg"):      # not a ValueError: this is no fault of the file, so it must not be counted as one unreadable item
        raise RuntimeError(f"{path} needs the ffmpeg program to be read: install ffmpeg (apt, brew and conda have it) and run this again")
    seek = ["-ss", str(span[0]), "-t", str(span[1] - span[0])] if span else []
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", *seek, "-i", f"file:{path}", *options, "-"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        while data := process.stdout.read(chunk):
            yield data
        if process.wait():
            log.seek(0)
            reason = log.read().decode(errors="replace").strip().split("\n")[0]
            raise ValueError(f"{path}: ffmpeg cannot read it ({reason})")


def read_wave(path, span=None) -> torch.Tensor:
    """Sound of a file, float32 (n,) in [-1, 1) at 16 kHz. Channel 0 and not a mix, as ImageBind takes it. PCM WAV needs no ffmpeg."""
    path = Path(path)
    check_file(path)
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError):                                                  # another format, or WAV of floats
        options = ["-map", "0:a:0", "-af", "pan=mono|c0=c0", "-ar", str(RATE), "-f", "f32le"]
        x = torch.from_numpy(np.frombuffer(b"".join(ffmpeg(path, options, 1 << 20, span)), "<f4").copy())
    else:
        data = np.frombuffer(data, np.uint8)
        data = data[:len(data) // (channels * width) * channels * width].reshape(-1, channels, width)[:, 0]       # (n, bytes), lowest first
        integers = np.zeros((len(data), 4), np.uint8)
        integers[:, 4 - width:] = data ^ 128 if width == 1 else data                # left-aligned in 32 bits; 8-bit WAV alone is unsigned
        x = torch.from_numpy((integers.view("<i4")[:, 0] / 2.0**31).astype(np.float32))
        if rate != RATE:
            import torchaudio
            x = torchaudio.functional.resample(x, rate, RATE)
        x = x[int(span[0] * RATE):int(span[1] * RATE)] if span else x
    if not len(x):
        raise ValueError(f"{path}: no sound in it")
    return x


def audio_clips(wave: torch.Tensor, clips: int = 3) -> torch.Tensor:
    """ImageBind's evenly placed 2 s clips: the first starts at 0, the last ends at the end. (n,) -> (clips, 128, 204) float32."""
    # ImageBind divides fractions, but of a duration that was a float: 2.9 s are a hair less than 2.9, and a clip starts one sample sooner.
    spare = max(Fraction(len(wave) / RATE) - 2, 0)
    starts = [int(i * spare / max(clips - 1, 1) * RATE) for i in range(clips)]
    # It also subtracts each clip's mean. Nothing comes of it, since every frame of the spectrogram loses its own mean: left out.
    return log_mel(torch.stack([wave[s:s + 2 * RATE] for s in starts]))


def centres(n: int, k: int) -> list[int]:
    """Centres of k equal segments of 0..n-1: evenly spaced, symmetric, and repeating when there are fewer than k."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def images(folder: Path, pattern: str = "*") -> list[Path]:
    """The pictures of a folder in the order of their numbers (frame_2 before frame_10). Whatever else lies there is no picture."""
    files = [f for f in folder.glob(pattern) if f.suffix.lower() in IMAGES]
    if not files:
        raise ValueError(f"{folder}: no .jpg or .png ({pattern}) in this folder")
    return sorted(files, key=lambda f: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", f.name)])


def read_image(path: Path, size: int, mode: str = "RGB") -> torch.Tensor:
    """One picture, uint8 (3, s, s), or (1, s, s) for mode GRAY: shorter side to `size` (bicubic, antialiased), then the central square."""
    from torchvision.io import decode_image
    check_file(path)
    try:
        x = decode_image(str(path), mode=mode, apply_exif_orientation=True)
        x = x[0] if x.ndim == 4 else x                                              # a GIF under another name: its first frame
        h, w = (side * size // min(x.shape[-2:]) for side in x.shape[-2:])
        x = F.interpolate(x[None], (h, w), mode="bicubic", antialias=True)[0]
    except RuntimeError as error:
        raise ValueError(f"{path}: no picture that can be read ({str(error).splitlines()[0]})") from None
    return x[:, round((h - size) / 2):, round((w - size) / 2):][:, :size, :size]


def read_frames(path, frames: int, size: int, span=None) -> np.ndarray:
    """Evenly spaced frames, uint8 (F, 3, s, s), of a folder of pictures, of one picture (repeated), or of a video (in `span`, seconds).

    A video is decoded once, from beginning to end, and not sought in, because headers lie about durations (.flv often has none). Memory
    stays bounded all the same: at 16 F frames every second one is dropped, and from there on every second one is skipped; and so on.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in IMAGES:
        files = images(path) if path.is_dir() else [path]
        return torch.stack([read_image(files[i], size) for i in centres(len(files), frames)]).numpy()
    check_file(path)
    fit = f"fps=25,scale={size}:{size}:force_original_aspect_ratio=increase:flags=bicubic,crop={size}:{size}"
    kept, stride, bytes_each = [], 1, 3 * size * size
    for n, frame in enumerate(ffmpeg(path, ["-map", "0:v:0", "-vf", fit, "-f", "rawvideo", "-pix_fmt", "rgb24"], bytes_each, span), 1):
        if (n - 1) % stride == 0 and len(frame) == bytes_each:
            kept.append(frame)
            if len(kept) == 16 * frames:
                kept, stride = kept[::2], 2 * stride
    if not kept:
        raise ValueError(f"{path}: no picture in it" + (f" between {span[0]} and {span[1]} s" if span else ""))
    picked = [kept[min(round(c / stride), len(kept) - 1)] for c in centres(n, frames)]
    return np.frombuffer(b"".join(picked), np.uint8).reshape(frames, size, size, 3).transpose(0, 3, 1, 2)


def read_flow(path, stacks: int, length: int, size: int) -> np.ndarray:
    """Optical flow, uint8 (S, 2L, s, s): S evenly spaced stacks of L consecutive flow frames, channels x1 y1 x2 y2 ... (two-stream order).

    path: a folder with u/ and v/, or with flow_x* and flow_y* pictures, or a pair of folders (u, v). A clip of fewer than L flow frames
    repeats its last one. Cropped as `read_frames` crops; the two components are cut to the shorter (their counts differ on disk).
    """
    if isinstance(path, (tuple, list)):
        u, v = images(path[0]), images(path[1])
    elif (path / "u").is_dir():
        u, v = images(path / "u"), images(path / "v")
    else:
        u, v = images(path, "flow_x*"), images(path, "flow_y*")
    n = min(len(u), len(v))
    rows = [[min(start + i, n - 1) for i in range(length)] for start in centres(max(n - length + 1, 1), stacks)]
    pairs = {i: torch.cat([read_image(u[i], size, "GRAY"), read_image(v[i], size, "GRAY")]) for i in set(sum(rows, []))}     # (2, s, s)
    return torch.stack([torch.cat([pairs[i] for i in row]) for row in rows]).numpy()


# ------------------------------------------------------------------------------------------------ items and splits
class Item(NamedTuple):
    """One sample. label: a class name, or a list of them (multi-label); source: modality -> path, pair of paths, or a text itself."""
    id: str
    label: str | list[str]
    source: dict
    span: tuple | None = None                       # (start, end) in seconds: only this part of the recording


def number_repeats(items: list[Item]) -> list[Item]:
    """Published lists repeat ids; every line stays a sample of its own, with ids b, b, b -> b, b_1, b_2."""
    times, numbered = Counter(), []
    for item in items:
        numbered.append(item._replace(id=f"{item.id}_{times[item.id]}") if times[item.id] else item)
        times[item.id] += 1
    return numbered


def carve_val(items: list[Item], fraction: float = 0.1, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Split into (train, val), the same share of every class, both sorted by id. Multi-label items count as one class.

    Who goes is decided by a hash of the id, so neither the order of a list nor a missing file shuffles the others anew.
    """
    groups = {}
    for item in sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item.id}".encode()).digest()):
        groups.setdefault(item.label if isinstance(item.label, str) else "", []).append(item)
    val = [item for group in groups.values() for item in group[:max(round(fraction * len(group)), min(len(group) - 1, 1))]]
    ids = {item.id for item in val}
    return tuple(sorted(side, key=lambda item: item.id) for side in ([item for item in items if item.id not in ids], val))


def check_counts(found: dict[str, int], published: dict[str, int], allow_missing: float) -> None:
    """Print counts beside the published ones; raise ValueError when they differ by more than the share `allow_missing`."""
    print("items  " + ", ".join(f"{split} {n:,} (published {published[split]:,})" for split, n in found.items()))
    for split, n in found.items():
        if abs(n - published[split]) > allow_missing * published[split]:
            raise ValueError(f"{split}: {n:,} items, but {published[split]:,} are published; is the download whole? "
                             f"If you mean to go on, --allow-missing says up to which share (now {allow_missing:g}; 1 is anything)")


# ------------------------------------------------------------------------------------------------ command line
def parser(doc: str, name: str | None = None, frames: int = 3, text: bool = False, flow: bool = False) -> argparse.ArgumentParser:
    """The options all prepare scripts have; a script adds its own. name: the data set's, None when the user chooses it."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-root", default="data", help="prepared data sets live here, one folder each")
    p.add_argument("--name", default=name, required=name is None, help="folder to make, and what --dataset then says")
    p.add_argument("--size", type=int, default=256, help="stored pictures are squares of this many pixels; training crops from them")
    p.add_argument("--frames", type=int, default=frames, help="frames stored per video, evenly spaced; training draws some of them")
    p.add_argument("--clips", type=int, default=3, help="2 s clips of sound, evenly placed; 1 is enough for recordings under 2 s")
    if flow:
        p.add_argument("--stacks", type=int, default=3, help="flow stacks stored per video, evenly spaced")
        p.add_argument("--flow-length", type=int, default=10, help="consecutive flow frames in a stack, two channels each")
    if text:
        p.add_argument("--tokenizer", nargs="+", metavar="FILE",
                       help="the text encoder's vocab.txt (BERT), vocab.json merges.txt, or bpe_encoder.bin (DeBERTa)")
        p.add_argument("--max-length", type=int, default=512, help="tokens; longer texts are cut")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="files decoded at the same time")
    p.add_argument("--allow-missing", type=float, default=0.01, metavar="SHARE", help="stop when more of a split than this is unreadable")
    p.add_argument("--overwrite", action="store_true", help="make it again although it is already there")
    return p


def parse(p: argparse.ArgumentParser, script: str, argv=None) -> argparse.Namespace:
    """Parse and check. A data set that is already there ends the program in peace; a folder that is not ours is never touched."""
    args = p.parse_args(argv)
    for option in ("size", "frames", "clips", "stacks", "flow_length", "max_length", "workers"):
        if getattr(args, option, 1) < 1:
            p.error(f"--{option.replace('_', '-')} must be at least 1")
    if not 0 <= args.allow_missing <= 1 or Path(args.name).name != args.name:
        p.error("--allow-missing is a share between 0 and 1, and --name the name of one folder")
    args.command = f"python -m prepare.{script} " + shlex.join(sys.argv[1:] if argv is None else argv)
    folder = Path(args.data_root) / args.name
    if folder.exists() and not (folder / "dataset.json").exists():
        raise ValueError(f"{folder} exists but is no prepared data set: choose another --name or --data-root, or move it away")
    if folder.exists() and not args.overwrite:
        print(f"{folder} is already there (--overwrite makes it again)")
        raise SystemExit(0)
    return args


def tokenizer(args, public: str | None = None):
    """The tokenizer that --tokenizer names, or the one `checkpoints.py` downloads as `public`."""
    from checkpoints import download
    from tokenizer import load_tokenizer
    if not args.tokenizer and not public:
        raise ValueError("text needs --tokenizer: the vocab.txt of BERT, or vocab.json and merges.txt, or bpe_encoder.bin, of DeBERTa")
    return load_tokenizer(*(args.tokenizer or [download(public)]))


def run(main) -> None:
    """main(), with expected troubles as one line on stderr and exit code 1."""
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")


# ------------------------------------------------------------------------------------------------ writing
def read_item(item: Item, kinds: dict[str, str], args, tokenizer=None) -> dict[str, np.ndarray]:
    """All modalities of one item, as their rows are stored. ValueError or OSError: this item cannot be read."""
    row = {}
    for modality, kind in kinds.items():
        source = item.source[modality]
        if kind in ("frames", "image"):
            row[modality] = read_frames(source, 1 if kind == "image" else args.frames, args.size, item.span)
        elif kind == "flow":
            row[modality] = read_flow(source, args.stacks, args.flow_length, args.size)
        elif kind == "audio":
            wave = read_wave(source, item.span)
            try:
                row[modality] = audio_clips(wave, args.clips).half().numpy()
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        else:
            text = source.read_text(encoding="utf-8", errors="replace") if isinstance(source, Path) else source
            ids = tokenizer.encode(text, args.max_length)
            row[modality] = np.array(ids + [0] * (args.max_length - len(ids)), np.int32)
    return row


def first_problem(item: Item) -> str | None:
    """What is wrong with the files of an item, as far as can be seen without decoding them."""
    try:
        for source in item.source.values():
            for path in source if isinstance(source, (tuple, list)) else [source]:
                if isinstance(path, Path):
                    check_file(path)
    except (ValueError, OSError) as error:
        return str(error)


def write_dataset(args, splits: dict[str, list[Item]], kinds: dict[str, str], classes: list[str], source: str, tokenizer=None) -> None:
    """Decode every item of {"train", "val", "test"} and write data/<name>/. kinds: modality -> frames, image, flow, audio or text.

    Raises ValueError, with nothing left behind, when a split is empty, when more than `--allow-missing` of it cannot be read, or when the
    disk is too small. Unreadable items are left out, counted and listed in dataset.json. Labels that are lists make it multi-label.
    """
    folder, unreadable = Path(args.data_root) / args.name, {}                       # unreadable: split -> id -> what is wrong with it

    def check_share(split):
        bad, n = unreadable[split], len(splits[split])
        if len(bad) > args.allow_missing * n or len(bad) == n:
            raise ValueError(f"{len(bad):,} of {n:,} {split} items cannot be read, more than --allow-missing {args.allow_missing:g} lets "
                             "pass; the first: " + "; ".join(list(bad.values())[:3]))

    def attempt(item):
        try:
            return read_item(item, kinds, args, tokenizer)
        except (ValueError, OSError) as error:
            return error

    for split, items in splits.items():                                             # a look at every file before hours of decoding
        if not items or len({item.id for item in items}) < len(items):
            raise ValueError(f"an id appears twice in {split}: ids must be unique" if items else f"no {split} items")
        unreadable[split] = {item.id: problem for item in items if (problem := first_problem(item))}
        check_share(split)
    todo = {split: [item for item in items if item.id not in unreadable[split]] for split, items in splits.items()}

    sample = next((row for row in map(attempt, todo["train"][:20]) if isinstance(row, dict)), None)
    if sample is None:
        raise ValueError(f"none of the first train items can be read: {attempt(todo['train'][0])}")
    need = sum(map(len, todo.values())) * sum(array.nbytes for array in sample.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    if need > (free := shutil.disk_usage(folder.parent).free):
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free: free some, choose another "
                         "--data-root, or store less (--frames, --size)")
    print(f"writing {folder}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB are free")

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    old = partial.with_name(partial.name + "-old")
    try:
        for split, items in todo.items():
            def leave_out(item, problem):
                unreadable[split][item.id] = str(problem)
                check_share(split)
            write_split(partial / split, items, attempt, leave_out, classes, args.workers)
        (partial / "dataset.json").write_text(json.dumps(dict(
            name=args.name, classes=classes, multilabel=not isinstance(todo["train"][0].label, str), modalities=kinds,
            shapes={modality: array.shape for modality, array in sample.items()},
            counts={split: len(items) - len(unreadable[split]) for split, items in splits.items()},
            unreadable={split: list(bad) for split, bad in unreadable.items()},
            tokenizer=tokenizer and dict(kind=tokenizer.kind, fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size),
            command=args.command, source=source, date=time.strftime("%Y-%m-%d %H:%M"),
            versions={package: version(package) for package in ("torch", "torchvision", "torchaudio", "numpy")}), indent=1))
        if args.overwrite and folder.exists():                                      # the old one stays until the new one is whole
            folder.rename(old)
        partial.rename(folder)
    finally:                                                                        # error and Ctrl-C: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    for split, bad in unreadable.items():
        left_out = f", {len(bad)} left out, the first: {next(iter(bad.values()))}" if bad else ""
        print(f"{split}: {len(splits[split]) - len(bad):,} items{left_out}")


def write_split(folder: Path, items: list[Item], attempt, leave_out, classes: list[str], workers: int) -> None:
    """Rows go to disk as they are decoded, a few per worker in memory at a time.

    attempt: item -> its row, or the exception why not, which goes to leave_out(item, exception). How many rows there are is known only at
    the end, so every .npy header is written twice: numpy pads it for any number of rows, and the second fits over the first.
    """
    def header(file, row, n):
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, dict(descr=row.dtype.str, fortran_order=False, shape=(n, *row.shape)))

    folder.mkdir(parents=True)
    files, kept = {}, []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        bar = stack.enter_context(tqdm(total=len(items), desc=folder.name, unit="item"))
        for start in range(0, len(items), 4 * workers):
            chunk = items[start:start + 4 * workers]
            for item, row in zip(chunk, pool.map(attempt, chunk)):
                bar.update()
                if not isinstance(row, dict):
                    leave_out(item, row)
                    continue
                for modality, array in row.items():
                    if modality not in files:
                        files[modality] = stack.enter_context(open(folder / f"{modality}.npy", "wb"))
                        header(files[modality], array, 0)
                    files[modality].write(array.tobytes())
                kept.append(item)
                last = row
        for modality, file in files.items():
            header(file, last[modality], len(kept))
    (folder / "ids.txt").write_text("".join(f"{item.id}\n" for item in kept), encoding="utf-8")
    if isinstance(kept[0].label, str):
        labels = np.array([classes.index(item.label) for item in kept], np.int64)
    else:
        labels = np.array([[c in item.label for c in classes] for item in kept], np.uint8)
    np.save(folder / "labels.npy", labels)
