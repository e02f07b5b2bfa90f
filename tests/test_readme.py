"""The README is run: every command in its shell blocks, as it stands there, in a fresh copy of the project (training with tiny arguments)."""
import json
import os
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S) for line in block.splitlines() if line and not line.startswith("#")]
TINY = ["--epochs", "1", "--umft-epochs", "1", "--device", "cpu"]
NO_DATA = re.compile(r"--dataset (crema_d|ave|kinetics_sound|mm_imdb|food101|ucf101)|prepare\.(?!custom)")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the sources with a small toy, and the media that the section on one's own data talks about."""
    from torchvision.io import write_png
    folder = tmp_path_factory.mktemp("clone")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for package in ("prepare", "baselines"):
        if (ROOT / package).is_dir():
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "data.py").read_text()
    small = re.sub(r"TOY_SIZES = .*", 'TOY_SIZES = {"train": 60, "val": 36, "test": 36}', source)
    assert small != source
    (folder / "data.py").write_text(small)
    rows = []
    for i in range(8):
        with wave.open(str(folder / f"{i}.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
            f.writeframes((np.sin(np.arange(16000) * (0.1 + 0.1 * (i % 2))) * 9000).astype("<i2").tobytes())
        write_png(torch.full((3, 40, 40), 20 * i, dtype=torch.uint8), str(folder / f"{i}.png"))
        rows.append(dict(id=f"b{i}", split="train" if i < 6 else "test", label=["wren", "owl"][i % 2], visual=f"{i}.png", audio=f"{i}.wav"))
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(clone, command):
    words = command.removeprefix("pip install -r requirements.txt && ").split()
    assert words[0] == "python"
    if "train_joint.py" in words:
        words += TINY + (["--seeds", "0", "1"] if "--seeds" in words else [])
    elif "train_unimodal.py" in words:
        words += TINY[:2] + TINY[4:]
    elif words[1:3] == ["-m", "prepare.custom"]:
        words += ["--size", "40"]
    if "birds" in words and "train_joint.py" in words:
        words += ["--encoder", "resnet18", "--pretrained", "none"]          # the defaults are public weights, 5 GB of them
    return subprocess.run([sys.executable, *words[1:]], cwd=clone, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"})


def test_there_are_commands():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train_joint.py" and len(COMMANDS) > 5
    assert "`pip install -r requirements.txt && python -m pytest`" in README
    assert "pip install -r requirements.txt && python -m pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(clone, command):
    done = run(clone, command)
    if NO_DATA.search(command):                                             # nobody has these data here: one line says how to get them
        assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
        assert "python -m prepare." in done.stderr
        return
    assert done.returncode == 0, done.stderr
    if command.endswith("python train_joint.py"):                           # the first thing a reader does; the README shows the same rows
        shown = next(b for b in re.findall(r"^```\n(.*?)^```", README, re.M | re.S) if "test split" in b)
        label = lambda line: re.split(r"\s{2,}", line)[0]
        rows = lambda text: [label(line) for line in text.splitlines() if " +- " in line and "standard" not in line]
        assert rows(done.stdout) == rows(shown) != []


def test_the_table_of_equations_points_at_the_right_lines():
    rows = re.findall(r"^\| (.*?) \| \[`([\w.]+):(\d+)`\]\(([\w.]+)#L(\d+)\) \| `(.*?)` \|$", README, re.M)
    assert len(rows) >= 5
    for what, file, line, target, anchor, code in rows:
        lines = (ROOT / file).read_text().splitlines()
        at = [i for i, text in enumerate(lines, 1) if code in text]
        assert (file, line) == (target, anchor) and int(line) in at, f"{what}: `{code}` is on lines {at} of {file}, not {line}"


def test_every_file_is_in_the_map():
    listed = set(re.findall(r"^\| `([\w.]+?)/?` \|", README, re.M))
    there = {f.name for f in ROOT.glob("*.py")} | {f.name for f in ROOT.iterdir() if f.is_dir() and any(f.glob("*.py"))}
    assert there <= listed, f"not in the README: {there - listed}"
