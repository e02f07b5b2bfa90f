"""The scripts as their users run them, on toys small enough for a test: what test_scripts.py and
test_resume.py share.

Most tests run a script in this process (`call`), its command line, `__main__` block and all; where
the process itself matters (exit code, SIGKILL) it is a real one (`process`).
"""
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
UMFT_EPOCHS = 8
# Of `base`, where most tests start.
SMALL = f"--umft-epochs {UMFT_EPOCHS} --epochs 4 --batch-size 25".split()
# For others on its uni-modal runs: a third of the time.
QUICK = [*SMALL, "--batch-size", 100]
# Its uni-modal runs, on their own command line.
UNIMODAL = f"--epochs {UMFT_EPOCHS} --batch-size 25".split()
MMLORA = "toy/mmlora-all-r1-s0"


def call(script, *words, out=None, root=None):
    """Run a script as `python script words` does, a name without .py as `python -m name`;
    -> what it printed."""
    words = [*map(str, words), *(("--out", str(out)) if out else ()),
             *(("--data-root", str(root)) if root else ())]
    before, printed = sys.argv, io.StringIO()
    sys.argv = [script, *words]
    try:
        with contextlib.redirect_stdout(printed):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()


def error(script, *words, **where):
    """The one line that a script ends with."""
    with pytest.raises(SystemExit) as exit:
        call(script, *words, **where)
    assert (isinstance(exit.value.code, str) and exit.value.code.startswith("error: ")
            and "\n" not in exit.value.code), exit.value.code
    return exit.value.code


def process(script, *words, out, root, project=ROOT):
    """A process of its own, started. A name without .py as in `call`;
    project: where the code is."""
    program = [str(project / script)] if script.endswith(".py") else ["-m", script]
    words = [*map(str, words), "--out", str(out), "--data-root", str(root)]
    return subprocess.Popen([sys.executable, *program, *words], cwd=project, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "TQDM_DISABLE": "1"})


def result(out, run):
    return json.loads((out / run / "result.json").read_text())


def log_of(out, run):
    return [json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()]


def tensors(out, run, name="model"):
    return load_file(out / run / f"{name}.safetensors")


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items()
                if k not in ("seconds", "samples_per_second", "peak_memory_mib")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def everything(out):
    """All that a folder of runs says, but for how long it took: file -> bytes or parsed JSON."""
    read = {".safetensors": lambda f: f.read_bytes(),
            ".jsonl": lambda f: timeless([json.loads(line)
                                          for line in f.read_text().splitlines()]),
            # config or result
            ".json": lambda f: timeless(json.loads(f.read_text()).get("settings")
                                        or json.loads(f.read_text()))}
    return {str(f.relative_to(out)): read[f.suffix](f)
            for f in sorted(out.rglob("[!.]*")) if f.is_file()}


def table(printed):
    """Row label -> its cells, of the closing table.
    A label that is too long has a line of its own."""
    rows, left, long = {}, None, ""
    for line in printed.splitlines():
        heading = re.match(r" {20,}(accuracy|f1_micro) ", line)
        if heading:
            left = heading.end() - 1 - 13       # the first number takes 13 columns
        elif not line:
            left = None
        elif left and re.fullmatch(r" *\d+\.\d( \+- \d+\.\d)?", line[left:left + 13]):
            rows[long or line[:left].strip()] = re.split(r"  +", line[left:].strip())
            long = ""
        elif left:
            long = line.strip()
    return rows


def accuracy(p, labels):
    return sum(int(row.argmax()) == int(y) for row, y in zip(p, labels)) / len(labels)
