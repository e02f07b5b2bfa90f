"""The class kit keeps its word: the lesson runs from top to bottom, its text quotes its outputs,
and every check of an exercise fails on the stub, passes on our answer,
and notices a wrong answer."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import test_readme
from harness import linear
from prepare import toy
from running import ROOT

LESSONS = ROOT / "lessons"
NOTEBOOK = json.loads((LESSONS / "lesson.ipynb").read_text())
CELLS = [("".join(cell["source"]), cell) for cell in NOTEBOOK["cells"]]
CODE = [(source, cell) for source, cell in CELLS if cell["cell_type"] == "code"]
EXERCISES = sorted(path for path in LESSONS.iterdir() if re.match(r"\d_", path.name))
PAGES = [LESSONS / "README.md", *(path / "README.md" for path in EXERCISES)]


def stub_of(exercise: Path) -> Path:
    return next(file for file in exercise.glob("*.py") if not file.name.startswith("test_"))


# ---- The lesson ----

@pytest.mark.filterwarnings("ignore::DeprecationWarning")             # matplotlib, of tensors
def test_the_lesson_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """All code cells in order, in small worlds, without Jupyter."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the lesson draws with matplotlib")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr(toy, "SIZES", dict.fromkeys(toy.WORLDS, dict(train=72, val=48, test=60)))
    monkeypatch.setattr(linear, "STRENGTHS", (1.0,))
    monkeypatch.setitem(sys.modules, "IPython.display", None)         # as where it is absent
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(LESSONS)                                        # where Jupyter starts
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    small = dict(SEED=0, UMFT_EPOCHS=1, EPOCHS=1, EM_EPOCHS=2, OUT=f"{tmp_path}/runs",
                 DATA=f"{tmp_path}/data")
    names = {}
    for number, (source, _) in enumerate(CODE):
        exec(compile(source, f"lesson.ipynb, code cell {number + 1}", "exec"), names)
        if number == 0:
            assert small.keys() <= names.keys() and "# ---- Settings ----" in source
            names.update(small)
    printed = capsys.readouterr().out
    assert "a sound of 5.12 s" in printed and printed.count("linear evaluation") == 4 + 6
    assert len(list((tmp_path / "runs").glob("*/*/result.json"))) == 3 + 5 + 3
    assert Path.cwd() == ROOT


def outputs_of(cell: dict) -> str:
    return "".join("".join(out["text"]) for out in cell["outputs"]
                   if out["output_type"] == "stream")


def test_outputs_are_stored():
    assert (LESSONS / "lesson.ipynb").stat().st_size < 1.5e6
    kinds = [kind for _, cell in CODE for out in cell["outputs"] for kind in out.get("data", {})]
    assert kinds.count("image/png") >= 6 and kinds.count("text/html") >= 4      # pictures, players
    for source, cell in CODE:
        assert all(out["output_type"] != "error" and out.get("name") != "stderr"
                   for out in cell["outputs"]), source
        if re.search(r"print\(|plt\.show|^ *row\(", source, re.M) and "def " not in source:
            assert cell["outputs"], source
    everything = json.dumps(NOTEBOOK)
    assert str(ROOT) not in everything and "/tmp/" not in everything


def test_cells_are_short():
    assert NOTEBOOK["nbformat"] == 4
    for source, _ in CODE:
        lines = source.splitlines()
        assert len(lines) <= 40, source
        assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_the_text_quotes_the_outputs():
    """Every decimal number in the text stands in an output above it,
    or, where the text links it, in docs/toy.md."""
    study, above, quoted = (ROOT / "docs/toy.md").read_text(), "", 0
    for source, cell in CELLS:
        if cell["cell_type"] == "code":
            above += outputs_of(cell)
            continue
        there = above + study if "docs/toy.md" in source else above
        prose = re.sub(r"`.*?`", "", source)
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?!\.?\d)", prose):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", there), (number, source)
            quoted += 1
    assert quoted > 40


# ---- The exercises ----

class Reports:
    """A pytest plugin: exercise -> what its tests ended with, [(passed, message)]."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            exercise = Path(report.nodeid).parts[1]
            self.of.setdefault(exercise, []).append((report.passed, str(report.longrepr or "")))


def checked(capsys, *options) -> dict[str, list]:
    """All checks, as `python -m pytest lessons` runs them, but in this process."""
    reports = Reports()
    words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(LESSONS), *options]
    pytest.main(words, plugins=[reports])
    capsys.readouterr()
    assert [*reports.of] == [path.name for path in EXERCISES]
    return reports.of


def test_every_check_fails_on_its_stub_and_says_why(capsys):
    for exercise, results in checked(capsys).items():
        assert len(results) >= 3, exercise
        for passed, message in results:
            assert not passed, exercise
            flat = " ".join(message.split())
            assert len(flat) > 40 and "Error" not in flat and "assert " not in flat, flat


def test_every_check_passes_on_our_answer(capsys):
    found = checked(capsys, "--answers", str(LESSONS / "solutions"))
    for exercise, results in found.items():
        assert all(passed for passed, _ in results), (exercise, results)


# Exercise -> a text of our answer, a wrong one for it, what the check says then.
WRONG = {
    "lora_linear": ("torch.zeros(base.out_features, rank)", "torch.ones(base.out_features, rank)",
                    "B must be zero"),
    "mimic": ("torch.where(sign == perceived, weight.float(), 0.0)", "(sign == perceived).float()",
              "how frequent each class is"),
    "gradient": ("r[m][:, None] * (", "1.0 * (", "r_m missing"),
    "random_b": ("p.normal_(0, std)", "model.get_submodule(name[:-7]).lora_B = "
                 "nn.Parameter(std * torch.randn_like(p))", "is a new tensor"),
    "control": ("statistics.stdev", "statistics.pstdev", "yours is 0.519"),
    "ogm_ge": ("weakest = min(scores.values())", "weakest = sum(scores.values()) / len(scores)",
               "compared with the WEAKEST"),
    "bf16": ("(W + BA).bfloat16()", "(W.bfloat16() + BA.bfloat16())",
             "on average it should be all"),
    "own_data": ("id=path", "id=clip.name", "Both classes may have a clip 1"),
}


def test_every_check_notices_a_common_wrong_answer(tmp_path, capsys):
    shutil.copytree(LESSONS / "solutions", tmp_path / "handed_in")
    for name, (right, wrong, _) in WRONG.items():
        file = tmp_path / "handed_in" / f"{name}.py"
        assert right in file.read_text()
        file.write_text(file.read_text().replace(right, wrong))
    found = checked(capsys, "--answers", str(tmp_path / "handed_in"))
    for exercise, results in found.items():
        said = WRONG[exercise[2:]][2]
        told = " ".join(" ".join(message.split()) for passed, message in results if not passed)
        assert said in told, (exercise, told)


def test_an_assert_in_the_answer_keeps_its_traceback(tmp_path, capsys):
    shutil.copytree(LESSONS / "solutions", tmp_path / "handed_in")
    file = tmp_path / "handed_in/control.py"
    file.write_text(file.read_text().replace("    return", "    assert 1 == 2\n    return"))
    failed = [message for passed, message in
              checked(capsys, "--answers", str(tmp_path / "handed_in"))["5_control"] if not passed]
    assert failed and all("assert 1 == 2" in message and "control.py" in message
                          for message in failed)


def test_each_exercise_has_a_text_a_stub_and_an_answer():
    assert len(EXERCISES) == len(WRONG) == 8
    answers = {file.name for file in (LESSONS / "solutions").glob("*.py")}
    assert answers == {stub_of(exercise).name for exercise in EXERCISES}
    for exercise in EXERCISES:
        text = (exercise / "README.md").read_text()
        assert re.search(r"^\*World", text, re.M) and len(text.splitlines()) <= 50
        assert f"python -m pytest lessons/{exercise.name}" in text


def test_the_suite_of_the_project_leaves_the_stubs_alone(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]


# ---- The pages ----

COMMANDS = sorted({line for page in PAGES for line in test_readme.commands(page.read_text())}
                  - {""})


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, monkeypatch):
    """Parsed by the argparse of its own script; what a script is not must at least be there."""
    words = command.split("#")[0].split()
    if words[0] == "diff" or words[1].startswith("lessons/"):
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).is_dir(), command
    else:
        test_readme.test_command_is_parsed_by_its_script(" ".join(words), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
