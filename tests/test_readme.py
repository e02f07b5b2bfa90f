"""README.md and docs/ keep their word: commands, quoted outputs, line numbers, links, Python.

The commands of the README are run, one after another, training with tiny arguments. Those of docs/
are parsed, each with the argparse of its own script.
"""
import argparse
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import runs
from prepare import toy
from running import MMLORA, SMALL
from test_fingerprint import Project

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text()
         for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
INSTALL = "pip install -r requirements.txt && "


def blocks(text, language=None):
    """The code blocks of a page, all or those of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for name, block in found if language is None or name == language]


def commands(text):
    """What a reader may type: the lines of the shell blocks, and those that an output proposes."""
    shell = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return shell + re.findall(r"^    (python .*?)(?: +#.*)?$", "\n".join(blocks(text, "")), re.M)


RUN = [line for block in blocks(README, "sh") for line in block.splitlines()]
PARSED = sorted({line for text in PAGES.values() for line in commands(text)} - {""})
# Nobody has these data here. And these commands would download public weights.
NO_DATA = re.compile(r"--dataset (crema_d|ave|kinetics_sound|mm_imdb|food101|ucf101)\b"
                     r"|prepare\.(?!custom)")
DOWNLOADS = "python train_joint.py --dataset birds"


# ---- Commands ----

class Parsed(Exception):
    """The command line was right."""


@pytest.mark.parametrize("command", [line for line in PARSED if not line.startswith("diff ")])
def test_command_is_parsed_by_its_script(command, monkeypatch):
    script, *words = words_of(command)
    if script == "-m":
        script = words.pop(0)
    module = importlib.import_module(script.removesuffix(".py"))

    def parse_only(parse):
        def parsed(self, args=None, namespace=None):
            raise Parsed(parse(self, args, namespace))
        return parsed

    if hasattr(module, "parser"):                     # training scripts, evaluate.py
        module.parser().parse_args(words)
        return
    monkeypatch.setattr(sys, "argv", [script, *words])
    if script == "paper.tables":                      # what it does not know must be for training
        args = module.parse()
        importlib.import_module("train_joint").parser().parse_args(args.training)
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        parse_only(argparse.ArgumentParser.parse_args))
    with pytest.raises(Parsed):
        module.main()


def words_of(command):
    """The words after "python"."""
    words = command.removeprefix(INSTALL).split()
    assert words[0] == "python", command
    return words[1:]


def tiny(command):
    """The words after "python", with tiny arguments where it trains or prepares."""
    words = words_of(command)
    if words[0] == "train_joint.py" or "baselines.separate" in words:
        words += ["--umft-epochs", "1"]
    if words[0].startswith("train_") or words[1].startswith("baselines."):
        words += ["--epochs", "1", "--device", "cpu"]
    if "--seeds" in words:
        words += ["--seeds", "0", "1"]
    if words[1] == "prepare.custom":
        words += ["--size", "40", "--clips", "1"]
    if "--clip" in words:                             # there are no public weights here
        name = "mmlora-all-r1-visual-resnet_small-audio-resnet_small-s0"
        words[words.index("--run") + 1] = f"runs/birds/{name}"
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are run, with the recordings that "Your own data" talks about."""
    from torchvision.io import write_png
    folder = tmp_path_factory.mktemp("readme")
    rows = []
    for i in range(8):
        with wave.open(str(folder / f"{i}.wav"), "wb") as f:
            f.setnchannels(1)
            f.setsampwidth(2)
            f.setframerate(16000)
            tone = np.sin(np.arange(16000) * (0.1 + 0.1 * (i % 2))) * 9000
            f.writeframes(tone.astype("<i2").tobytes())
        write_png(torch.full((3, 40, 40), 20 * i, dtype=torch.uint8), str(folder / f"{i}.png"))
        rows.append(dict(id=f"b{i}", split="train" if i < 6 else "test",
                         label=["wren", "owl"][i % 2], visual=f"{i}.png", audio=f"{i}.wav"))
    for suffix in ("wav", "png"):
        shutil.copy(folder / f"0.{suffix}", folder / f"new.{suffix}")
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(words, capsys):
    """As `python words` would, but in this process: -> (exit code, stdout, stderr)."""
    if words[0] == "-m":
        start, name, argv = runpy.run_module, words[1], words[2:]
    else:
        start, name, argv = runpy.run_path, str(ROOT / words[0]), words[1:]
    code, message = 0, ""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", [name, *argv])
        try:
            start(name, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    if isinstance(code, str):
        code, message = 1, code
    printed = capsys.readouterr()
    return code, printed.out, printed.err + message


def test_there_are_commands():
    assert RUN[0] == f"{INSTALL}python train_joint.py" and len(RUN) > 5
    assert f"`{INSTALL}python -m pytest`" in README
    assert f"{INSTALL}python -m pytest" in (ROOT / ".ci/run").read_text()
    assert DOWNLOADS in RUN and len(PAGES) >= 5 and len(PARSED) > 30


# Another test may have imported the module that is run here.
@pytest.mark.parametrize("command", [line for line in RUN if line != DOWNLOADS])
def test_command(folder, command, capsys, monkeypatch):
    if command.startswith("diff "):                   # both files are there, and differ
        done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and not done.stderr
        return
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    small = {"train": 60, "val": 36, "test": 36}
    monkeypatch.setattr(toy, "SIZES", dict.fromkeys(toy.WORLDS, small))
    code, out, err = run(tiny(command), capsys)
    if NO_DATA.search(command):                       # one line says how to get them
        assert code == 1 and err.startswith("error: ") and len(err.splitlines()) == 1, err
        assert "python -m prepare." in err
        return
    assert code == 0, err
    if command == RUN[0]:                             # the first thing that a reader sees
        shown = next(block for block in blocks(README, "") if "test split" in block)
        assert form(out) == form(shown) and len(form(out)) > 10


def form(printed):
    """The lines of an output without their numbers."""
    lines = []
    for line in printed.splitlines():
        numbers = r"\d[\d,.]*\d|\d"
        line = re.sub(r"\s+", " ", re.sub(numbers, "0", line)).strip()
        if line and not line.startswith("training did not improve"):
            lines.append(line)
    return lines


# ---- "Change one line and run again" ----

def test_change_one_line_and_run_again(copied, root, tmp_path):
    """The edit of the README, in a copy of the project; then the command prints what is quoted."""
    before, after = [block for block in blocks(README, "python") if block.startswith("    ")]
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "tests", "docs", "data", "runs", "checkpoints"))
    text = (project / "lora.py").read_text()
    assert text.count(before) == 1
    (project / "lora.py").write_text(text.replace(before, after))

    out = Project(project).run("train_joint.py", *SMALL, "--out", copied, "--data-root", root)
    out = out.replace(str(copied), "runs")
    shown = next(block for block in blocks(README, "") if "lora.py has changed: training" in block)
    # The page shows toy_mimics; here it is the toy that all tests have.
    assert form(out)[:4] == form(shown.replace("toy_mimics", "toy"))
    row = next(block for block in blocks(README, "") if block.startswith("MMLoRA, rank 1"))
    assert any(form(row)[0].startswith(line) for line in form(out) if line.startswith("MMLoRA"))


def test_on_other_data_the_command_refuses(copied, root):
    """As quoted: a run of other code, on data that are no toy."""
    config = json.loads((copied / MMLORA / "config.json").read_text())
    config["fingerprint"]["code"]["lora.py"] = "of another lora.py"
    (copied / MMLORA / "config.json").write_text(json.dumps(config))
    args = SimpleNamespace(out=copied, dataset="toy", device="cpu", again=False)
    name, info = Path(MMLORA).name, dict(config["data"])
    del info["made_by"]
    with pytest.raises(ValueError) as refused:
        runs.Run(args, name, config["settings"], root / "toy-s0", info, ROOT / "train_joint.py")
    page = PAGES["docs/runs.md"]
    shown = next(block for block in blocks(page, "") if block.startswith("error: "))
    told = re.fullmatch(r"error: runs/\S+: (.*)\n", shown)[1]
    assert str(refused.value).split(": ", 1)[1] == told


# ---- Python ----

SNIPPETS = [(page, block) for page, text in PAGES.items() for block in blocks(text, "python")
            if not block.startswith("    ")]


@pytest.mark.parametrize("page, code", SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_python_runs(page, code, base, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").symlink_to(base.out)
    (tmp_path / "data").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    numbers = [float(number) for number in re.findall(r"\d\.\d{3,}", capsys.readouterr().out)]
    wanted = base.result["test"]["prob"]["accuracy"]              # which training has printed
    assert numbers[0] == pytest.approx(wanted, abs=6e-4)


def test_there_are_snippets():
    assert [page for page, _ in SNIPPETS] == ["docs/runs.md"]


# ---- Words, lines, files ----

def test_the_readme_is_short():
    assert len(README.split()) <= 1800


def test_the_table_of_equations_points_at_the_right_lines():
    row = r"^\| (.*?) \| \[`([\w.]+):(\d+)`\]\(([\w.]+)#L(\d+)\) \| `(.*?)` \|$"
    rows = re.findall(row, README, re.M)
    assert len(rows) >= 5
    for what, file, line, target, anchor, code in rows:
        lines = (ROOT / file).read_text().splitlines()
        at = [i for i, text in enumerate(lines, 1) if code in text]
        assert (file, line) == (target, anchor)
        assert int(line) in at, f"{what}: `{code}` is on lines {at} of {file}, not {line}"


def test_every_file_is_in_the_map():
    listed = set()
    for cell in re.findall(r"^\| (`.*?`) \|", README, re.M):
        listed |= {name.removesuffix("/") for name in re.findall(r"`([\w./]+)`", cell)}
    there = {file.name for file in ROOT.glob("*.py")}
    there |= {file.parent.name for file in ROOT.glob("[!.]*/*.py")}
    assert there <= listed, f"not in the README: {there - listed}"
    methods = {file.stem for file in ROOT.glob("baselines/[a-z]*.py")} - {"parts"}
    assert methods <= listed, f"not in the README: {methods - listed}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not link.startswith("https://"):
            file = (ROOT / page).parent / link.split("#")[0]
            assert file.exists(), f"{page} links to {link}"
