"""Exercise 8: a folder of clips -> an index for prepare.custom.

    python lessons/solutions/own_data.py recordings        # writes recordings/index.jsonl
"""
import json
import sys
from pathlib import Path

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")


def rows(folder: Path) -> list[dict]:
    """One row for each clip `folder`/<class>/<name>: id, split, label, visual, audio."""
    found = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        clips = sorted(path for path in kind.iterdir() if path.suffix.lower() in SUFFIXES)
        tests = len(clips) // 5
        for i, clip in enumerate(clips):
            path = clip.relative_to(folder).as_posix()
            split = "test" if i >= len(clips) - tests else "train"
            found.append(dict(id=path, split=split, label=kind.name, visual=path, audio=path))
    return found


def write_index(folder: Path) -> Path:
    """Write the rows to `folder`/index.jsonl, one JSON object a line; -> that file."""
    file = folder / "index.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(folder)), encoding="utf-8")
    return file


if __name__ == "__main__":
    print(write_index(Path(sys.argv[1])))
