"""Writing: a list of items per split -> data/<name>/ in the format of `data.py`.

A script of this folder finds its items: which ids, which labels, which files. Then
`check_counts` compares them with what is published, `carve_val` makes a validation split, and
`write_dataset` decodes them and writes all arrays, or nothing at all.
"""
import csv
import hashlib
import io
import json
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from prepare import locks, media
from prepare.media import Item


# ---- Lists ----

def read_list(path: Path, newline=None) -> str:
    """A list file as text. Raises ValueError, with its name, where it is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except ValueError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from None


def csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line, fields) of a CSV file."""
    rows = csv.reader(io.StringIO(read_list(path, newline=""), newline=""))
    try:
        return [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: no CSV ({error})") from None


def below(folder: Path, *names: str) -> Path:
    """folder/names; a list of files may not name any outside of its folder.

    Raises ValueError for an absolute path and for one with "..".
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name} leads out of {folder}: copy or link (ln -s) the files into"
                             " that folder, and write paths relative to it")
    return folder.joinpath(*names)


# ---- Splits and classes ----

def class_names(item: Item) -> list[str]:
    return item.label if isinstance(item.label, list) else [item.label]


def all_classes(splits: dict[str, list[Item]]) -> list[str]:
    """The names of all classes, in alphabetical order."""
    names = set()
    for items in splits.values():
        for item in items:
            names.update(class_names(item))
    return sorted(names)


def number_repeats(items: list[Item]) -> list[Item]:
    """Published lists repeat ids, and every line is a sample. Ids b, b, b become b, b_1, b_2."""
    times, numbered = Counter(), []
    for item in items:
        n = times[item.id]
        numbered.append(item._replace(id=f"{item.id}_{n}") if n else item)
        times[item.id] += 1
    return numbered


def carve_val(items: list[Item], fraction: float = 0.1, seed: int = 0) -> tuple[list, list]:
    """Split into (train, val), the same share of every class, both sorted by id.

    A hash of the id decides who goes. So the order of a list does not matter, and a missing file
    does not shuffle the others anew. Multi-label items count as one class.
    """
    def draw(item):
        return hashlib.sha256(f"{seed} {item.id}".encode()).digest()

    groups = {}     # class -> its items
    for item in sorted(items, key=draw):
        group = item.label if isinstance(item.label, str) else ""
        groups.setdefault(group, []).append(item)
    val = []
    for group in groups.values():
        at_least = min(len(group) - 1, 1)     # one, but never the only one
        val += group[:max(round(fraction * len(group)), at_least)]
    val_ids = {item.id for item in val}
    train = [item for item in items if item.id not in val_ids]
    return sorted(train, key=lambda item: item.id), sorted(val, key=lambda item: item.id)


def check_counts(found: dict[str, int], published: dict[str, int], allow_missing: float) -> None:
    """Print the counts beside the published ones.

    Raises ValueError when they differ by more than the share `allow_missing`.
    """
    counts = [f"{split} {n:,} (published {published[split]:,})" for split, n in found.items()]
    print("items  " + ", ".join(counts))
    for split, n in found.items():
        if abs(n - published[split]) > allow_missing * published[split]:
            raise ValueError(
                f"{split}: {n:,} items, but {published[split]:,} are published; is the download "
                "whole? If you mean to go on, --allow-missing says up to which share "
                f"(now {allow_missing:g}; 1 is anything)")


# ---- Before the work ----

class Unreadable(dict):
    """The items of one split that cannot be read and are left out: id -> what is wrong."""

    def __init__(self, split: str, total: int, allow_missing: float):
        self.split, self.total, self.allow_missing = split, total, allow_missing

    def check(self) -> None:
        """Raise ValueError when there are too many."""
        if len(self) > self.allow_missing * self.total or len(self) == self.total:
            first = "; ".join(list(self.values())[:3])
            raise ValueError(f"{len(self):,} of {self.total:,} {self.split} items cannot be read, "
                             f"more than --allow-missing {self.allow_missing:g} lets pass; "
                             f"the first: {first}")


def look_at_files(split: str, items: list[Item], allow_missing: float) -> Unreadable:
    """Look at every file, before hours of decoding. -> the items with a bad one."""
    if not items:
        raise ValueError(f"no {split} items")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"an id appears twice in {split}: ids must be unique")
    bad = Unreadable(split, len(items), allow_missing)
    for item in items:
        try:
            for source in item.source.values():
                check_source(source)
        except (ValueError, OSError) as error:     # a name may be too long, or hold a zero byte
            bad[item.id] = str(error)
    bad.check()
    return bad


def check_source(source) -> None:
    """source: a path, a pair of paths, a text (which needs no check), or why there is none."""
    if isinstance(source, Exception):
        raise source
    paths = source if isinstance(source, (tuple, list)) else [source]
    for path in paths:
        if isinstance(path, Path):
            media.check_file(path)


def first_row(items: list[Item], attempt) -> dict[str, np.ndarray]:
    """The arrays of the first item that can be read: all others have the same shapes."""
    for item in items[:20]:
        row = attempt(item)
        if isinstance(row, dict):
            return row
    raise ValueError(f"none of the first train items can be read: {attempt(items[0])}")


def check_disk(folder: Path, rows: int, row: dict[str, np.ndarray]) -> None:
    """Raise ValueError when the disk has no room for `rows` rows like this one."""
    need = rows * sum(array.nbytes for array in row.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise ValueError(f"{folder} needs {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB "
                         "free: free some, choose another --data-root, or store less "
                         "(--frames, --size)")
    print(f"writing {folder}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB are free")


# ---- The work ----

def write_dataset(args, splits: dict[str, list[Item]], kinds: dict[str, str], classes: list[str],
                  source: str, tokenizer=None, others=()) -> None:
    """Decode every item of {"train", "val", "test"} and write data/<name>/.

    kinds: modality -> frames, image, flow, audio or text. Labels that are lists make the data set
    multi-label. Each tokenizer of `others` adds arrays text.<kind>.npy (see `media.read_item`).

    Raises ValueError when a split is empty, when more than --allow-missing of it cannot be read,
    or when the disk is too small. Then nothing is left behind. Up to that share, items that
    cannot be read are left out, counted, and listed in dataset.json.
    """
    folder = Path(args.data_root) / args.name

    def attempt(item):     # -> the item's arrays, or the exception why not
        try:
            return media.read_item(item, kinds, args, tokenizer, others)
        except ValueError as error:
            return error

    unreadable, todo = {}, {}
    for split, items in splits.items():
        bad = look_at_files(split, items, args.allow_missing)
        unreadable[split] = bad
        todo[split] = [item for item in items if item.id not in bad]
    with new_folder(folder, args.overwrite) as partial:
        row = first_row(todo["train"], attempt)
        check_disk(folder, sum(len(items) for items in todo.values()), row)
        for split, items in todo.items():
            write_split(partial / split, items, attempt, unreadable[split], classes, args.workers)
        info = dict(
            name=args.name, classes=classes,
            multilabel=not isinstance(todo["train"][0].label, str),
            modalities=kinds, shapes={modality: row[modality].shape for modality in kinds},
            counts={split: len(items) - len(unreadable[split]) for split, items in splits.items()},
            unreadable={split: list(bad) for split, bad in unreadable.items()},
            tokenizer=describe(tokenizer) if tokenizer else None)
        if tokenizer:
            info["other_tokenizers"] = [describe(other) for other in others]
        packages = ("torch", "torchvision", "torchaudio", "numpy")
        info.update(
            command=args.command, source=source, date=time.strftime("%Y-%m-%d %H:%M"),
            versions={package: version(package) for package in packages},
            sha256=hashes(partial))
        (partial / "dataset.json").write_text(json.dumps(info, indent=1))
        data.check(partial)
    for split, bad in unreadable.items():
        left_out = f", {len(bad)} left out, the first: {next(iter(bad.values()))}" if bad else ""
        print(f"{split}: {len(splits[split]) - len(bad):,} items{left_out}")


@contextmanager
def new_folder(folder: Path, overwrite: bool):
    """A new folder to write to, which becomes `folder` at the end, or nothing after any trouble.

    Raises ValueError where another process is at it. What a killed process left is cleared away.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    old = folder.with_name(f"{partial.name}-old")
    locks.lock(folder)
    try:
        clear(partial, old, folder)
        if folder.exists() and not overwrite:
            raise ValueError(f"{folder} is already there; --overwrite makes it again")
        yield partial
        if folder.exists():
            folder.rename(old)     # it stays until the new one is whole
        partial.rename(folder)
    except OSError as error:
        if error.filename is None:     # as a full disk says it
            raise OSError(f"{folder}: {error.strerror or error}; nothing was written") from None
        raise
    finally:     # after an error or Ctrl-C, too: nothing half-written stays
        clear(partial, old, folder)
        locks.unlock(folder)


def clear(partial: Path, old: Path, folder: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_split(folder: Path, items: list[Item], attempt, unreadable: Unreadable,
                classes: list[str], workers: int) -> None:
    """Write the arrays of one split, row by row. Only a few rows per worker are in memory.

    attempt: item -> its arrays, or an exception, which goes to `unreadable`.
    We know the number of rows only at the end. So every header is written twice: numpy pads it
    for any number of rows, and the second fits over the first.
    """
    folder.mkdir(parents=True)
    files, kept = {}, []     # files: name of an array -> its file
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        bar = stack.enter_context(tqdm(total=len(items), desc=folder.name, unit="item"))
        for start in range(0, len(items), 4 * workers):
            chunk = items[start:start + 4 * workers]
            for item, row in zip(chunk, pool.map(attempt, chunk)):
                bar.update()
                if not isinstance(row, dict):
                    unreadable[item.id] = str(row)
                    unreadable.check()
                    continue
                for name, array in row.items():
                    if name not in files:
                        files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                        write_header(files[name], array, 0)
                    files[name].write(array.tobytes())
                kept.append(item)
                last = row
        for name, file in files.items():
            write_header(file, last[name], len(kept))
    ids = "".join(f"{item.id}\n" for item in kept)
    (folder / "ids.txt").write_text(ids, encoding="utf-8")
    np.save(folder / "labels.npy", label_array(kept, classes))


def write_header(file, row: np.ndarray, n: int) -> None:
    """Write the .npy header of n rows like this one at the beginning of a file."""
    file.seek(0)
    header = dict(descr=row.dtype.str, fortran_order=False, shape=(n, *row.shape))
    np.lib.format.write_array_header_1_0(file, header)


def label_array(items: list[Item], classes: list[str]) -> np.ndarray:
    """Class numbers, int64 (N,); for multi-label items zeros and ones, uint8 (N, C)."""
    if isinstance(items[0].label, str):
        return np.array([classes.index(item.label) for item in items], np.int64)
    labels = np.zeros((len(items), len(classes)), np.uint8)
    for row, item in zip(labels, items):
        row[:] = [name in item.label for name in classes]
    return labels


def describe(tokenizer) -> dict:
    """What dataset.json says about a tokenizer: an encoder must have the same vocabulary."""
    return dict(kind=tokenizer.kind, fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the splits: "train/visual.npy" -> 64 hexadecimal digits."""
    found = {}
    for path in tqdm(sorted(folder.glob("*/*")), desc="sha256", unit="file"):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found
