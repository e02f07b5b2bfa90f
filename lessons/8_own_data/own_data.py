"""Exercise 8: a folder of clips -> an index for prepare.custom.

    python lessons/8_own_data/own_data.py recordings        # writes recordings/index.jsonl
"""
import json
import sys
from pathlib import Path

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")


def rows(folder: Path) -> list[dict]:
    """One row for each clip `folder`/<class>/<name>: id, split, label, visual, audio."""
    return []                                           # your turn


def write_index(folder: Path) -> Path:
    """Write the rows to `folder`/index.jsonl, one JSON object a line; -> that file."""
    return folder / "index.jsonl"                       # your turn


if __name__ == "__main__":
    print(write_index(Path(sys.argv[1])))
