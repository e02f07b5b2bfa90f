"""Changing the code must show: what a run does that finds an earlier one, made by other code or on
other data. On a copy of the project, which is edited as a student edits it."""
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import fingerprint
from running import ROOT, everything, log_of, process, result, table

JOINT = "train_joint.py --umft-epochs 3 --epochs 2 --batch-size 30".split()
AUDIO, VISUAL, MMLORA = "unimodal-audio-s0", "unimodal-visual-s0", "mmlora-all-r1-s0"
LABEL = "MMLoRA, rank 1, audio+visual"
# The loss of Eq. 3, turned around.
LOSS = "F.nll_loss(mean_log_prob(logits), target)", "-F.nll_loss(mean_log_prob(logits), target)"
# The same data as if somebody had prepared them, and their runs.
BIRDS = ["--dataset", "birds", "--encoder", "audio=audio_vit_toy", "visual=vit_toy"]
AUDIO_OF_BIRDS, VISUAL_OF_BIRDS = "unimodal-audio-audio_vit_toy-s0", "unimodal-visual-vit_toy-s0"
MMLORA_OF_BIRDS = "mmlora-all-r{}-audio-audio_vit_toy-visual-vit_toy-s0"


# ---- A project of one's own ----

class Project:
    """A folder with the code, data and runs."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, folder / "runs"

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{file}: {old!r}"
        (self.folder / file).write_text(text.replace(old, new))

    def start(self, script: str, *words) -> tuple:
        """`python script words` in this folder, a process of its own.
        It is forked off this one, and so need not import torch again;
        what this one has imported of the project is forgotten."""
        out, err = (tempfile.TemporaryFile("w+") for _ in range(2))
        pid = os.fork()
        if pid:
            return pid, out, err
        code = 70
        try:
            for name, file in (("stdout", out), ("stderr", err)):
                os.dup2(file.fileno(), {"stdout": 1, "stderr": 2}[name])
                setattr(sys, name, file)
            code = in_child(self.folder, [script, *map(str, words)])
        except BaseException:
            traceback.print_exc()
        finally:
            out.flush()
            err.flush()
            os._exit(code)

    def finish(self, pid: int, out, err) -> SimpleNamespace:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0), err.seek(0)
        done = SimpleNamespace(code=code, out=out.read(), err=err.read())
        assert "Traceback" not in done.err, done.err
        return done

    def run(self, *words) -> str:
        """-> what it printed; it must have gone well."""
        done = self.finish(*self.start(*words))
        assert done.code == 0 and not done.err, done.err
        return done.out

    def error(self, *words) -> str:
        """-> the one line that it ended with."""
        done = self.finish(*self.start(*words))
        assert (done.code == 1 and done.err.startswith("error: ")
                and done.err.count("\n") == 1), done.err
        return done.err

    def bytes_of(self, *names) -> dict:
        """What the runs of the toy hold, file by file."""
        found = {}
        for name in names:
            for file in (self.runs / "toy" / name).iterdir():
                found[f"{name}/{file.name}"] = file.read_bytes()
        return found


def in_child(folder: Path, words: list) -> int:
    """Run a script as Python's own command line does; -> exit code."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if Path(file) in fingerprint.SOURCES and not file.startswith(f"{ROOT}/tests/"):
            del sys.modules[name]
    os.chdir(folder)
    sys.dont_write_bytecode = True     # two edits in one second look alike to Python's cache
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.argv = words
    try:
        import runpy
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A project with a toy, the same data under another name, and all runs of `JOINT` on both."""
    folder = tmp_path_factory.mktemp("project") / "original"
    for path, source in fingerprint.SOURCES.items():     # the code that made the toys of `root`
        copy = folder / path.relative_to(fingerprint.PROJECT)
        if copy.parent.name != "tests":
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source)
    # What the toy starts from.
    shutil.copytree(ROOT / "pretrained" / "toy", folder / "pretrained" / "toy")
    shutil.copytree(root / "toy-s0", folder / "data" / "toy-s0")
    shutil.copytree(root / "toy-s0", folder / "data" / "birds")
    file = folder / "data" / "birds" / "dataset.json"
    info = json.loads(file.read_text()) | dict(name="birds")
    del info["made_by"]     # prepared, not generated
    file.write_text(json.dumps(info))
    project = Project(folder)
    # A first optimiser imports much of torch; now all the processes below have it.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    project.printed = project.run(*JOINT)
    project.run(*JOINT, *BIRDS)
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy of `finished`, to edit."""
    project = Project(tmp_path / "project")
    shutil.copytree(finished.folder, project.folder)
    project.printed = finished.printed
    return project


def said(printed: str) -> list[str]:
    """The lines above the table."""
    return printed[:printed.index("\n\n")].splitlines()


def old_runs(project, dataset="toy") -> list[str]:
    """The runs that were moved aside, without their dates."""
    return sorted(re.sub(r"-20\d{6}-\d{6}(-\d+)?$", "", f.name)
                  for f in project.runs.glob(f"{dataset}/old/*"))


# ---- The toy: trained anew, and said ----

def test_an_edited_loss_trains_lora_anew_and_nothing_else(project):
    before = project.bytes_of(AUDIO, VISUAL)
    project.edit("lora.py", *LOSS)
    printed = project.run(*JOINT)
    audio, visual, changed, best = said(printed)
    assert re.fullmatch(f"runs/toy/{AUDIO}: trained on .*, nothing to do", audio)
    assert re.fullmatch(f"runs/toy/{VISUAL}: trained on .*, nothing to do", visual)
    aside = re.fullmatch(f"lora.py has changed: training runs/toy/{MMLORA} anew"
                         r" \(the old run is now (runs/toy/old/.*)\)", changed)[1]
    assert best.startswith(f"runs/toy/{MMLORA}: best epoch 0 of 2")
    assert project.bytes_of(AUDIO, VISUAL) == before
    # Other numbers; and whoever looks for the cause is told.
    rows, rows_before = table(printed), table(project.printed)
    assert rows[LABEL][:4] != rows_before[LABEL][:4]
    assert rows[LABEL][:4] == rows["UME, probabilities averaged"][:4]
    assert "training did not improve on UME (epoch 0 was the best): seed 0" in printed
    # The old run is whole, and no table shows it.
    assert (project.folder / aside / "result.json").exists() and old_runs(project) == [MMLORA]
    # The edit undone: the old numbers, trained once more.
    project.edit("lora.py", *LOSS[::-1])
    printed = project.run(*JOINT)
    assert "lora.py has changed: training" in printed and old_runs(project) == [MMLORA] * 2
    assert table(printed)[LABEL][:4] == rows_before[LABEL][:4]
    assert log_of(project.runs, f"toy/{MMLORA}")[1]["loss"] == log_of(
        project.folder, aside)[1]["loss"]
    assert project.run(*JOINT).count("nothing to do") == 3


def test_comments_and_what_only_shows_change_nothing(project):
    before = project.bytes_of(AUDIO, VISUAL, MMLORA)
    for file, old, new in [
            ("lora.py", LOSS[0], f"(  # a comment\n            {LOSS[0]})"),
            ("lora.py", '"""Eq. 3 as a loss:', '"""Another docstring:'),
            ("train_joint.py", '"""Train the uni-modal models', '"""Another docstring'),
            ("data.py", '"""Prepared data: ', '"""Another docstring. '),
            ("harness/report.py", '"accuracy"', '"accuracy" + ""'),
            ("harness/runs.py", "nothing to do", "nothing to do at all"),
            ("evaluate.py", "def score_rows(", "A_NEW_NAME = 1\n\n\ndef score_rows("),
            ("paper/tables.py", "def rows_of(", "A_NEW_NAME = 1\n\n\ndef rows_of("),
            ("pretrained/tokenizer.py", "import re", "import math\nimport re"),
            ("baselines/concat.py", "def train(", "A_NEW_NAME = 1\n\n\ndef train(")]:
        text = (project.folder / file).read_text()
        assert old in text, file
        (project.folder / file).write_text(text.replace(old, new, 1))
    printed = project.run(*JOINT)
    assert [line.endswith("nothing to do at all") for line in said(printed)] == [True] * 3
    assert table(printed) == table(project.printed)
    assert project.bytes_of(AUDIO, VISUAL, MMLORA) == before
    shown = project.run("evaluate.py", "--run", f"runs/toy/{MMLORA}")
    assert "changed" not in shown


@pytest.mark.parametrize("file, old, new, step_1", [
    ("encoders.py", "class ViT(", "A_NEW_NAME = 1\n\n\nclass ViT(", [AUDIO, VISUAL]),
    ("harness/optim.py", "class BertAdam(", "A_NEW_NAME = 1\n\n\nclass BertAdam(", [AUDIO, VISUAL]),
    ("train_unimodal.py", "            step += 1\n", "            step += 1 + 0\n",
     [AUDIO, VISUAL]),
    ("train_joint.py", "            step += 1\n", "            step += 1 + 0\n", [])])
def test_which_steps_an_edit_trains_anew(file, old, new, step_1, project):
    """Here the numbers stay, so step 3 starts from the same models; its code has changed or not."""
    project.edit(file, old, new)
    printed = project.run(*JOINT)
    expected = [*step_1] if file == "train_unimodal.py" else [*step_1, MMLORA]
    told = re.findall(f"^{file} has changed: training runs/toy/(\\S+) anew", printed, re.M)
    assert told == expected and old_runs(project) == sorted(expected)
    assert printed.count("nothing to do") == 3 - len(expected)
    assert table(printed)[LABEL][:4] == table(project.printed)[LABEL][:4]


def test_a_students_own_file_counts(project):
    (project.folder / "mine.py").write_text("FACTOR = 1\n")
    project.edit("train_joint.py", "import train_unimodal\n",
                 "import mine\nimport train_unimodal\n")
    project.edit("train_joint.py", "loss = mean_prob_loss(logits, y)",
                 "loss = mine.FACTOR * mean_prob_loss(logits, y)")
    printed = project.run(*JOINT)
    assert printed.count("nothing to do") == 2
    assert f"mine.py and train_joint.py have changed: training runs/toy/{MMLORA} anew" in printed
    assert table(printed)[LABEL][:4] == table(project.printed)[LABEL][:4]
    (project.folder / "mine.py").write_text("FACTOR = -1\n")
    printed = project.run(*JOINT)
    assert f"mine.py has changed: training runs/toy/{MMLORA} anew" in printed
    assert "did not improve" in printed and old_runs(project) == [MMLORA] * 2


def test_a_students_own_copy_of_the_script(project):
    """`cp train_joint.py my_joint.py`: its runs are its own code's, under the same name."""
    shutil.copy(project.folder / "train_joint.py", project.folder / "my_joint.py")
    project.edit("my_joint.py", '"mmlora"', '"separate"')     # a method that can be shown
    words = ["my_joint.py", *JOINT[1:]]
    assert project.run(*words).count("nothing to do") == 2
    project.edit("my_joint.py", "run.count(loss, logits, y)", "run.count(2 * loss, logits, y)")
    printed = project.run(*words)
    assert "my_joint.py has changed: training runs/toy/separate-all-r1-s0 anew" in printed


def test_evaluate_says_that_a_run_is_of_other_code(project):
    words = ["evaluate.py", "--run", f"runs/toy/{MMLORA}", f"runs/toy/{AUDIO}"]
    assert "changed" not in project.run(*words)
    project.edit("lora.py", *LOSS)
    told = [line for line in project.run(*words).splitlines() if "changed" in line]
    assert told == [f"runs/toy/{MMLORA}: lora.py has changed since it was trained"]


def test_no_run_of_other_code_stands_beside_a_new_one(project):
    words = JOINT[1:]
    printed = project.run("baselines.separate", *words)
    assert LABEL in table(printed)
    project.edit("lora.py", *LOSS)
    printed = project.run("baselines.separate", *words)
    assert LABEL not in table(printed) or re.search(f"{MMLORA}.*lora.py has changed", printed)


def test_another_world_is_made_anew_and_said(project):
    data = project.folder / "data" / "toy-s0"
    before = np.load(data / "test" / "groups.npy")
    project.edit("prepare/toy.py", "off=0.2", "off=0.4")
    # As small as the one before.
    counts = json.loads((data / "dataset.json").read_text())["counts"]
    sizes = '"toy": {"train": 600, "val": 400, "test": 2000}'
    project.edit("prepare/toy.py", sizes, f'"toy": {counts}')
    printed = project.run(*JOINT)
    assert "prepare/toy.py has changed: making data/toy-s0 anew\n" in printed
    for run in (AUDIO, VISUAL):
        assert f"the data have changed: training runs/toy/{run} anew" in printed
    told = f"the data and its uni-modal models have changed: training runs/toy/{MMLORA} anew"
    assert told in printed and old_runs(project) == sorted([AUDIO, VISUAL, MMLORA])
    assert (np.load(data / "test" / "groups.npy") != before).any()
    assert sorted(f.name for f in data.parent.iterdir()) == ["birds", "toy-s0"]     # nothing else
    assert project.run(*JOINT).count("nothing to do") == 3


# ---- Prepared data: one line, and --again ----

def test_mistakes_get_one_line_on_stderr(project):
    words = "--modality smell --dataset nosuch".split()
    done = project.finish(*project.start("train_unimodal.py", *words))
    assert done.code == 1 and not done.out and done.err.count("\n") == 1
    assert done.err.startswith("error: no prepared data")
    done = project.finish(*project.start("train_joint.py", "--epochs", "none"))     # argparse's own
    assert done.code == 2 and not done.out and "argument --epochs: invalid" in done.err


def test_other_code_is_refused_on_prepared_data(project):
    before = everything(project.runs)
    project.edit("lora.py", *LOSS)
    told = process(JOINT[0], *JOINT[1:], *BIRDS, out="runs", root="data", project=project.folder)
    printed, complaint = told.communicate()     # not forked: exit code and streams are Python's own
    assert told.returncode == 1 and printed.count("nothing to do") == 2
    run = f"runs/birds/{MMLORA_OF_BIRDS.format(1)}"
    assert complaint == (f"error: {run}: lora.py has changed since it was trained; --again moves it"
                         " aside and trains anew\n")
    assert everything(project.runs) == before and not old_runs(project, "birds")
    printed = project.run(*JOINT, *BIRDS, "--again")
    assert printed.count("nothing to do") == 2
    assert f"lora.py has changed: training {run} anew" in printed
    log = log_of(project.runs, f"birds/{MMLORA_OF_BIRDS.format(1)}")
    assert log[1]["loss"] < 0     # LOSS turned it around
    assert old_runs(project, "birds") == [MMLORA_OF_BIRDS.format(1)]
    # Done: --again trains what has changed, and nothing has.
    assert project.run(*JOINT, *BIRDS, "--again").count("nothing to do") == 3


def test_data_prepared_anew_are_not_answered_with_old_results(project):
    before = everything(project.runs)
    file = project.folder / "data" / "birds" / "train" / "labels.npy"
    labels = np.load(file)
    labels[:5] = (labels[:5] + 1) % 8
    np.save(file, labels)
    told = project.error(*JOINT, *BIRDS)
    assert told == (f"error: runs/birds/{AUDIO_OF_BIRDS}: the data have changed since it was"
                    " trained; --again moves it aside and trains anew\n")
    assert everything(project.runs) == before
    shown = project.run("evaluate.py", "--run", f"runs/birds/{AUDIO_OF_BIRDS}")
    # `evaluate.py` compares with the data where the run found them: those of `finished`.
    assert "changed" not in shown
    config = project.runs / "birds" / AUDIO_OF_BIRDS / "config.json"
    where = json.loads(config.read_text())["fingerprint"]["data_folder"]
    config.write_text(config.read_text().replace(where, str(file.parents[1])))
    shown = project.run("evaluate.py", "--run", f"runs/birds/{AUDIO_OF_BIRDS}")
    assert f"runs/birds/{AUDIO_OF_BIRDS}: the data have changed since it was trained" in shown
    printed = project.run(*JOINT, *BIRDS, "--again")
    for run in (AUDIO_OF_BIRDS, VISUAL_OF_BIRDS):
        assert f"the data have changed: training runs/birds/{run} anew" in printed
    assert "the data and its uni-modal models have changed: training" in printed or (
        "its uni-modal models and the data have changed: training" in printed)
    assert old_runs(project, "birds") == sorted([AUDIO_OF_BIRDS, VISUAL_OF_BIRDS,
                                                     MMLORA_OF_BIRDS.format(1)])
    mmlora = f"birds/{MMLORA_OF_BIRDS.format(1)}"
    assert result(project.runs, mmlora) != before[f"{mmlora}/result.json"]


@pytest.mark.parametrize("dataset", ["toy", "birds"])
def test_a_half_finished_run_is_not_continued_by_other_code(dataset, project):
    """Killed in the middle, then the loss is edited: the epochs before and after would not fit."""
    words, name = [*JOINT, "--epochs", 9, "--rank", 2], "mmlora-all-r2-s0"
    if dataset == "birds":
        words, name = [*words, *BIRDS], MMLORA_OF_BIRDS.format(2)
    run, where = project.runs / dataset / name, f"runs/{dataset}/{name}"
    # It stops itself, at a moment of which nobody needs to know how fast the machine is.
    kill = "if epoch == 3: import os; os.kill(os.getpid(), 9)"
    project.edit("train_joint.py", "            step += 1\n",
                 f"            step += 1\n            {kill}\n")
    assert project.finish(*project.start(*words)).code == -signal.SIGKILL
    config = (run / "config.json").read_bytes()
    assert len(log_of(project.runs, run)) == 3 and (run / "last.safetensors").exists()
    project.edit("train_joint.py", kill, "pass")
    if dataset == "birds":
        told = project.error(*words)
        assert f"{where}: train_joint.py has changed since it was trained; --again moves it" in told
        assert (run / "config.json").read_bytes() == config and (run / "last.safetensors").exists()
        words.append("--again")
    printed = project.run(*words)
    assert "going on" not in printed and old_runs(project, dataset) == [name]
    assert f"train_joint.py has changed: training {where} anew" in printed
    assert [line["epoch"] for line in log_of(project.runs, run)] == list(range(10))


def test_a_run_without_fingerprint_is_not_trusted(project):
    """As one of an earlier version of this project."""
    file = project.runs / "birds" / AUDIO_OF_BIRDS / "config.json"
    config = json.loads(file.read_text())
    del config["fingerprint"]
    file.write_text(json.dumps(config))
    assert "this project (the run has no fingerprint)" in project.error(*JOINT, *BIRDS)
    shown = project.run("evaluate.py", "--run", f"runs/birds/{AUDIO_OF_BIRDS}")
    assert "the run has no fingerprint" in shown


def test_an_edit_while_it_trains_is_caught(project):
    """A run is the work of the code that was there when it began."""
    edit = ("__import__('pathlib').Path('lora.py')"
            f".write_text(open('lora.py').read().replace(*{LOSS!r}))")
    project.edit("train_joint.py", "    # ---- Data ----\n", f"    {edit}\n")
    project.run(*JOINT, "--rank", 2)
    assert LOSS[1] in (project.folder / "lora.py").read_text()
    shown = project.run("evaluate.py", "--run", "runs/toy/mmlora-all-r2-s0")
    assert "mmlora-all-r2-s0: lora.py has changed since it was trained" in shown


# ---- harness.fingerprint itself ----

def names_of(script):
    """What counts, but for the docstrings of the packages."""
    return {name for name in fingerprint.of_code(ROOT / script) if not name.endswith("__init__.py")}


def test_which_files_count():
    common = {"data.py", "encoders.py", "harness/metrics.py", "harness/optim.py"}
    # lora.py is not there.
    assert names_of("train_unimodal.py") == common | {"train_unimodal.py"}
    assert names_of("train_joint.py") == common | {"train_joint.py", "lora.py"}
    assert names_of("baselines/full_ume.py") == common | {"baselines/full_ume.py", "lora.py"}
    assert names_of("baselines/separate.py") == common | {"baselines/separate.py", "lora.py"}
    assert names_of("baselines/concat.py") == common | {"baselines/concat.py", "baselines/parts.py"}
    assert names_of("baselines/frozen.py") == common | {"baselines/frozen.py", "baselines/parts.py"}


def written(folder, text, name="some.py"):
    (folder / name).write_text(text)
    # Both are cached, as a file is read once a program.
    fingerprint.tree_of.cache_clear()
    fingerprint.hash_of_code.cache_clear()
    return fingerprint.hash_of_code(folder / name)


def test_comments_docstrings_and_spaces_do_not_count(tmp_path):
    one = written(tmp_path, 'import math\n\n\ndef f(x):\n    return math.exp(x) + 1\n')
    for text in ('"""What it is."""\nimport math\n\n\ndef f(x):\n    return math.exp(x) + 1\n',
                 'import math\n# a comment\ndef f(x):\n    """What\n    it does."""\n'
                 '    return math.exp(x) + 1   # and why\n',
                 'import math\ndef f(x):\n    return (math.exp(x)\n            + 1)\n'):
        assert written(tmp_path, text) == one
    for text in ('import math\n\n\ndef f(x):\n    return math.exp(x) + 1.0\n',
                 'import math\n\n\ndef f(y):\n    return math.exp(y) + 1\n',
                 'import math\n\n\ndef f(x):\n    x = "not a docstring"\n'
                 '    return math.exp(x) + 1\n',
                 'import math\n\n\n\ndef f(x):\n    return math.exp(x) - 1\n'):
        assert written(tmp_path, text) != one
    docstring = ('class A:\n    """A."""\n\n'
                 '    async def f(self):\n        """f"""\n        return 1\n')
    other = re.sub('""".*?"""', '"""Other."""', docstring)
    assert written(tmp_path, docstring) == written(tmp_path, other)


def test_a_broken_or_missing_file_has_a_fingerprint_too(tmp_path):
    """A student's syntax error is told by Python, in the file where it is; not by this one."""
    assert (written(tmp_path, "def f(:\n") == "none"
            == fingerprint.hash_of_code(tmp_path / "gone.py"))
    assert fingerprint.imports(tmp_path / "gone.py") == []


def test_imports_are_followed_wherever_they_stand(tmp_path):
    text = ("import lora, os.path\nfrom harness import optim as o\n"
            "from baselines.parts import ConcatHead\n"
            "def f():\n    if True:\n        import data\n    from encoders import build\n")
    written(tmp_path, text)
    found = {path.relative_to(ROOT).as_posix()
             for path in fingerprint.imports(tmp_path / "some.py")}
    assert found - {"harness/__init__.py", "baselines/__init__.py"} == {
        "lora.py", "harness/optim.py", "baselines/parts.py", "data.py", "encoders.py"}


def test_other_ways_to_import(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    sources = {}
    for name, text in (("mine/__init__.py", "from .loss import f\n"), ("mine/loss.py", "f = 1\n"),
                       ("script.py", "from mine import f\n")):
        (tmp_path / name).write_text(text)
        sources[tmp_path / name] = text.encode()
    monkeypatch.setattr(fingerprint, "PROJECT", tmp_path)
    monkeypatch.setattr(fingerprint, "SOURCES", sources)
    monkeypatch.setattr(fingerprint, "ALWAYS", [])
    fingerprint.tree_of.cache_clear()
    found = set(fingerprint.of_code(tmp_path / "script.py"))
    assert found == {"script.py", "mine/__init__.py", "mine/loss.py"}


def test_what_differs_is_named():
    now = dict(version=1, python="3.11", code={"lora.py": "a", "data.py": "b"}, data="d")
    assert fingerprint.differences(now, now) == []
    assert fingerprint.differences(dict(now, data="e"), now) == ["the data"]
    assert (fingerprint.differences(dict(now, code={"lora.py": "c", "data.py": "b"}), now)
            == ["lora.py"])
    assert fingerprint.differences(dict(now, code={"lora.py": "a"}), now) == ["data.py"]
    told, = fingerprint.differences(dict(now, python="3.12"), now)
    assert "3.12" in told and "3.11" in told
    assert fingerprint.differences(dict(now, version=0), now)
    assert fingerprint.sentence(["lora.py"]) == "lora.py has changed"
    assert fingerprint.sentence(["data.py", "lora.py"]) == "data.py and lora.py have changed"
    assert fingerprint.sentence(["the data"]) == "the data have changed"


@pytest.mark.parametrize("words", ["its uni-modal models", "settings"])
def test_plurals(words):
    assert fingerprint.sentence([words]) == f"{words} have changed"


def hash_of(folder):
    return fingerprint.of_data.__wrapped__(folder)     # without its cache


@pytest.fixture
def prepared(tmp_path):
    """A data set of three arrays, the pictures 3 MiB."""
    folder = tmp_path / "birds"
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "ids.txt").write_text("a\nb\nc\n")
        np.save(folder / split / "labels.npy", np.arange(3))
    np.save(folder / "train" / "visual.npy", np.zeros(3 * 2 ** 20, np.uint8))
    info = dict(classes=["x"], multilabel=False, modalities={"visual": "image"}, date="today")
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def change_a_byte(file, where):
    with open(file, "r+b") as f:
        f.seek(where, 0 if where >= 0 else 2)
        byte = f.read(1)
        f.seek(where, 0 if where >= 0 else 2)
        f.write(bytes([byte[0] ^ 1]))


def test_data_are_known_by_their_arrays(prepared, tmp_path):
    before = hash_of(prepared)
    assert hash_of(shutil.copytree(prepared, tmp_path / "moved")) == before     # not by their place
    info = json.loads((prepared / "dataset.json").read_text())
    (prepared / "dataset.json").write_text(json.dumps(info | dict(date="tomorrow")))
    assert hash_of(prepared) == before     # nor by when they were made
    (prepared / "dataset.json").write_text(json.dumps(info | dict(classes=["y"])))
    assert hash_of(prepared) != before
    (prepared / "dataset.json").write_text(json.dumps(info))
    for name, where in (("train/visual.npy", -1), ("train/visual.npy", 2 ** 20),
                        ("val/labels.npy", -8), ("test/ids.txt", 0)):
        change_a_byte(prepared / name, where)
        assert hash_of(prepared) != before
        change_a_byte(prepared / name, where)
        assert hash_of(prepared) == before
    (prepared / "test" / "labels.npy").rename(prepared / "test" / "audio.npy")
    assert hash_of(prepared) != before


def test_large_arrays_are_known_by_the_hash_that_prepare_wrote(prepared, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE", 2 ** 20)
    file, read, sha256 = prepared / "train" / "visual.npy", [], fingerprint.sha256
    monkeypatch.setattr(fingerprint, "sha256", lambda file: read.append(file.name) or sha256(file))
    blocks = hash_of(prepared)     # nobody wrote one: 64 blocks of 1 MiB, first and last among them
    assert "labels.npy" in read and "visual.npy" not in read
    for where in (-1, 0, 2 ** 20 + 5):
        change_a_byte(file, where)
        assert hash_of(prepared) != blocks
        change_a_byte(file, where)
    info = json.loads((prepared / "dataset.json").read_text())

    def with_hash(value):
        told = info | dict(sha256={"train/visual.npy": value})
        (prepared / "dataset.json").write_text(json.dumps(told))
        return hash_of(prepared)

    one = with_hash("1" * 64)
    assert one != with_hash("2" * 64) and one != blocks
    change_a_byte(file, -1)
    assert with_hash("1" * 64) == one and "visual.npy" not in read     # not read at all
    np.save(file, np.zeros(3 * 2 ** 20 + 1, np.uint8))
    assert with_hash("1" * 64) != one     # but its size is looked at
    monkeypatch.setattr(fingerprint, "WHOLE", 2 ** 30)
    assert with_hash("1" * 64) == with_hash("1" * 64) and "visual.npy" in read


def test_commit_and_fingerprint_stand_in_the_config(finished):
    config = json.loads((finished.runs / "toy" / MMLORA / "config.json").read_text())
    told = config["fingerprint"]
    assert set(told) == {"version", "python", "code", "data", "data_folder"}
    assert told["python"] == "{}.{}".format(*sys.version_info[:2])
    assert told["data_folder"] == str(finished.folder / "data" / "toy-s0")
    assert set(told["code"]) >= names_of("train_joint.py")
    assert "train_joint.py --umft-epochs 3" in config["command"]
