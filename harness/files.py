"""Files and folders of runs: written whole or not at all, and checked when they are read.

Whatever is wrong with a file ends in a ValueError or an OSError that names it.
"""
import contextlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import PLAIN_NAME


# ---- Writing ----

@contextlib.contextmanager
def replacing(file: Path):
    """Yields another name. What is written under it becomes `file` at the end of the block.

    Whoever opens `file` sees the old content or the new one, never a part.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with naming(file):
            yield temporary
            to_disk(temporary)
            os.replace(temporary, file)
    finally:
        if temporary.exists():
            temporary.unlink()


@contextlib.contextmanager
def naming(file: Path):
    """A full disk says no file's name, and safetensors raises an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {file}: {why}") from None


def to_disk(file: Path) -> None:
    """Wait until the disk has the content. Else a power cut may keep the new name and lose it."""
    with open(file, "rb+") as f:
        os.fsync(f.fileno())


def write_text(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_tensors(file: Path, tensors: dict, metadata: dict | None = None) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as temporary:
        save_file(whole, temporary, metadata)


def append_line(file: Path, value) -> None:
    """One more line of JSON."""
    with naming(file):
        with open(file, "a", encoding="utf-8") as f:
            f.write(json.dumps(value) + "\n")
        to_disk(file)


# ---- Reading ----

def read_lines(file: Path) -> list[dict]:
    """One object of JSON a line. Raises ValueError for any other line."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            found.append(json.loads(line))
            found[-1].keys()
        except (ValueError, RecursionError, AttributeError) as error:
            raise ValueError(f"{file} is damaged in line {number}: {error}") from None
    return found


def read_tensors(file: Path) -> tuple[dict, dict]:
    """-> name -> tensor, and the metadata. Raises ValueError for a file that is cut or foreign, and
    for numbers that are not finite."""
    try:
        with safe_open(file, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            metadata = f.metadata() or {}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file} is damaged: {name} is not finite")
    return tensors, metadata


def read_metadata(file: Path) -> dict:
    with safe_open(file, "pt") as f:
        return f.metadata()


def check_plain(name, what: str) -> None:
    """Raises ValueError where a name is a path, or nothing: it would lead out of its folder."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} is no plain name")
