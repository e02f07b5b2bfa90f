"""What holds for every test, in this process and in those it starts;
set before torch is imported."""
import os

# Models this small are slower on two threads, and many times so on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.fsync = lambda descriptor: None     # it takes 10 ms, and protects from power cuts only

import itertools     # noqa: E402  all of these after the three settings above
import json
import shutil
import subprocess
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

from harness import arguments
from prepare import toy
from running import MMLORA, SMALL, call, result


# ---- Two processes, so that the suite takes half the time ----

def pytest_runtestloop(session):
    """Two processes take the test files in turn. The first one reports for both, at the end."""
    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    files.sort(key=lambda items: -items[0].path.stat().st_size)     # the short ones fill up the end
    option = session.config.option
    alone = option.collectonly or option.usepdb or option.maxfail or len(session.items) < 200
    if alone or session.testsfailed or not hasattr(os, "fork"):
        return None                                   # pytest's own loop
    numbers, write = os.pipe()                        # of the files that nobody has taken yet
    os.write(write, bytes(range(len(files))))
    os.close(write)
    with tempfile.TemporaryFile("w+") as reports:
        second = os.fork()
        if second == 0:
            code = 1
            try:
                run_files(session, files, numbers, reports)
                code = 0
            finally:
                os._exit(code)
        run_files(session, files, numbers)
        died = os.waitpid(second, 0)[1]
        reports.seek(0)
        for line in reports:
            hook = session.config.hook
            report = hook.pytest_report_from_serializable(config=session.config,
                                                          data=json.loads(line))
            hook.pytest_runtest_logreport(report=report)
    assert not died, "the second process of the tests has died"
    return True


def run_files(session, files, numbers, reports=None):
    """Run one file after the other. With `reports` write the results there,
    and nothing on the screen."""
    if reports:
        class Writer:
            def pytest_runtest_logreport(self, report):
                data = session.config.hook.pytest_report_to_serializable(
                    config=session.config, report=report)
                reports.write(json.dumps(data) + "\n")
                reports.flush()
        session.config.pluginmanager.unregister(name="terminalreporter")
        session.config.pluginmanager.register(Writer())
    taken = os.read(numbers, 1)
    while taken:
        items, taken = files[taken[0]], os.read(numbers, 1)
        after = files[taken[0]][0] if taken else None     # so that fixtures of the session stay
        for item, following in zip(items, [*items[1:], after]):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


# ---- Fixtures ----

@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    """Whatever a test starts as a process of its own: its stderr is read here, too,
    and shows no traceback."""
    communicate = subprocess.Popen.communicate

    def read(self, *words, **options):
        out, err = communicate(self, *words, **options)
        told = err.decode(errors="replace") if isinstance(err, bytes) else err or ""
        assert "Traceback" not in told, told
        return out, err

    monkeypatch.setattr(subprocess.Popen, "communicate", read)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Folder of prepared data: toys of seeds 0 to 2 with 200 samples to train on, and `pairs`,
    the same with two labels a sample."""
    folder, sizes = tmp_path_factory.mktemp("data"), toy.SIZES
    toy.SIZES = dict.fromkeys(toy.WORLDS, {"train": 200, "val": 100, "test": 120})
    for seed in range(3):
        arguments.find(folder, "toy", seed)
    toy.SIZES = sizes
    shutil.copytree(folder / "toy-s0", folder / "pairs")
    info = json.loads((folder / "pairs" / "dataset.json").read_text())
    del info["made_by"], info["sample_groups"]      # a data set like anybody's own, not a toy
    info |= dict(name="pairs", classes=["flat or rise", "trilled", "hollow", "never"],
                 multilabel=True)
    (folder / "pairs" / "dataset.json").write_text(json.dumps(info))
    for split in ("train", "val", "test"):
        y = np.load(folder / "pairs" / split / "labels.npy")
        np.save(folder / "pairs" / split / "labels.npy",
                np.stack([y % 4 < 2, y % 8 >= 4, y % 3 == 0, y < 0], 1).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def base(root, tmp_path_factory):
    """A finished `train_joint.py` with all that it trains on the way: its folder, what it printed,
    its results."""
    out = tmp_path_factory.mktemp("base")
    printed = call("train_joint.py", *SMALL, out=out, root=root)
    return SimpleNamespace(out=out, printed=printed, run=out / MMLORA, result=result(out, MMLORA))


@pytest.fixture
def copied(base, tmp_path):
    """A copy of `base` to go on from, or to spoil."""
    return shutil.copytree(base.out, tmp_path / "runs")
