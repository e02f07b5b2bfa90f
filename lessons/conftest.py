"""What all checks share: where the answers are.

    python -m pytest lessons/1_lora_linear                  # your file in that folder
    python -m pytest lessons --answers lessons/solutions    # our answers
    python -m pytest lessons --answers handed_in/anna       # somebody's, all in a folder
"""
import importlib.util
import textwrap
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--answers", type=Path, metavar="FOLDER",
                     help="check the answers in this folder; default: the file beside the check")


@pytest.fixture
def answer(request):
    """The answer as a module: test_lora_linear.py checks lora_linear.py."""
    folder = request.config.getoption("--answers") or request.path.parent
    file = folder / f"{request.path.stem.removeprefix('test_')}.py"
    if not file.exists():
        pytest.fail(f"there is no {file}", pytrace=False)
    spec = importlib.util.spec_from_file_location(f"answer_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Of a check that failed only its message. An error in the answer keeps its traceback."""
    report = yield
    if call.excinfo is None or not call.excinfo.errisinstance(AssertionError):
        return report
    answer = item.path.name.removeprefix("test_")
    if not any(entry.path.name == answer for entry in call.excinfo.traceback):
        message = str(call.excinfo.value).split("\nassert ")[0]
        report.longrepr = textwrap.fill(message, 88)
    return report
