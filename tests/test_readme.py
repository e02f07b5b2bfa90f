"""The README is run: every command in its shell blocks, as it stands there, one after another (training with tiny arguments)."""
import json
import re
import runpy
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from test_tables import in_this_process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)             # (language, text)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line and not line.startswith("#")]
NO_DATA = re.compile(r"--dataset (crema_d|ave|kinetics_sound|mm_imdb|food101|ucf101)|prepare\.(?!custom)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are run, one after another: with the media that the section on one's own data talks about."""
    from torchvision.io import write_png
    folder = tmp_path_factory.mktemp("readme")
    rows = []
    for i in range(8):
        with wave.open(str(folder / f"{i}.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
            f.writeframes((np.sin(np.arange(16000) * (0.1 + 0.1 * (i % 2))) * 9000).astype("<i2").tobytes())
        write_png(torch.full((3, 40, 40), 20 * i, dtype=torch.uint8), str(folder / f"{i}.png"))
        rows.append(dict(id=f"b{i}", split="train" if i < 6 else "test", label=["wren", "owl"][i % 2], visual=f"{i}.png", audio=f"{i}.wav"))
    for suffix in ("wav", "png"):
        (folder / f"new.{suffix}").write_bytes((folder / f"0.{suffix}").read_bytes())
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny(command):
    """The words of a command after "python", with tiny arguments appended where it trains."""
    words = command.removeprefix("pip install -r requirements.txt && ").split()
    assert words.pop(0) == "python"
    if words[0].startswith("train_") or words[1].startswith("baselines."):
        words += ["--epochs", "1", "--device", "cpu"]
    if words[0] == "train_joint.py" or "--freeze" in words:
        words += ["--umft-epochs", "1"]
    if "--lr" in words:                                                     # one of them will do, but for joint training
        words += ["--lr", *words[words.index("--lr") + 1:][:2 if words[0] == "train_joint.py" else 1]]
    if "--fill" in words:
        return [*words[:words.index("--fill")], "--seeds", "0", "1", "--fill", "--epochs", "1"]
    if "--seeds" in words:
        words += ["--seeds", "0", "1"]
    if words[1] == "prepare.custom":
        words += ["--size", "40", "--clips", "1"]
    elif "--clip" in words:                                                 # the run is called after its encoders, where they are not the defaults
        words[words.index("--run") + 1] = "runs/birds/mmlora-audio-r1-visual-resnet18-audio-resnet18-s0"
    elif "birds" in words:
        words += ["--encoder", "resnet18", "--pretrained", "none"]          # the defaults are public weights, 5 GB of them
    return words


def run(words, capsys):
    """As `python words` would, but in this process (torch takes seconds to import): -> (exit code, stdout, stderr)."""
    if words[0] == "-m":
        start, name, argv = runpy.run_module, words[1], words[2:]
    else:
        start, name, argv = runpy.run_path, str(ROOT / words[0]), words[1:]
    code = 0
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", [name, *argv])
        try:
            start(name, run_name="__main__")
        except SystemExit as e:
            code = 1 if isinstance(e.code, str) else e.code or 0
            print(e.code if isinstance(e.code, str) else "", file=sys.stderr, end="")
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_there_are_commands():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train_joint.py" and len(COMMANDS) > 5
    assert "`pip install -r requirements.txt && python -m pytest`" in README
    assert "pip install -r requirements.txt && python -m pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")     # of running a module that another test has imported
@pytest.mark.parametrize("command", COMMANDS)
def test_command(folder, command, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "val": 36, "test": 36})
    if "--fill" in command:
        monkeypatch.setattr(subprocess, "run", in_this_process)
    code, out, err = run(tiny(command), capsys)
    if NO_DATA.search(command):                                             # nobody has these data here: one line says how to get them
        assert code == 1 and err.startswith("error: ") and len(err.splitlines()) == 1 and "python -m prepare." in err, err
        return
    assert code == 0, err
    if command.endswith("python train_joint.py"):                           # the first thing a reader does: the README shows the same rows
        shown = next(text for language, text in BLOCKS if not language and "test split" in text)
        rows = lambda text: [re.split(r"\s{2,}", line)[0] for line in text.splitlines() if " +- " in line and "test split" not in line]
        assert rows(out) == rows(shown) != []


def test_a_command_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, "train_joint.py", "--dataset", "crema_d", "--lora", "audio", "--data-root", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no prepared data in ") and len(done.stderr.splitlines()) == 1 and not done.stdout


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
