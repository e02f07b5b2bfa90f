"""What holds for every test, in this process and in those it starts; set before torch is imported."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")     # models this small are slower on two threads, and many times so on a busy machine
os.environ.setdefault("TQDM_DISABLE", "1")
os.fsync = lambda descriptor: None     # it takes 10 ms, and protects from power cuts only

import json      # noqa: E402  all of these after the two lines above
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from harness import arguments
from prepare import toy
from running import MMLORA, SMALL, call, result


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    """Whatever a test starts as a process of its own: its stderr is read here, too, and shows no traceback."""
    communicate = subprocess.Popen.communicate

    def read(self, *words, **options):
        out, err = communicate(self, *words, **options)
        told = err.decode(errors="replace") if isinstance(err, bytes) else err or ""
        assert "Traceback" not in told, told
        return out, err

    monkeypatch.setattr(subprocess.Popen, "communicate", read)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Folder of prepared data: toys of seeds 0 to 2 with 200 samples to train on, and `pairs`, the same with two labels a sample."""
    folder, sizes = tmp_path_factory.mktemp("data"), toy.SIZES
    toy.SIZES = dict.fromkeys(toy.WORLDS, {"train": 200, "val": 100, "test": 120})
    for seed in range(3):
        arguments.find(folder, "toy", seed)
    toy.SIZES = sizes
    shutil.copytree(folder / "toy-s0", folder / "pairs")
    info = json.loads((folder / "pairs" / "dataset.json").read_text())
    del info["made_by"], info["sample_groups"]      # a data set like anybody's own, not a toy
    info |= dict(name="pairs", classes=["flat or rise", "trilled", "hollow", "never"], multilabel=True)
    (folder / "pairs" / "dataset.json").write_text(json.dumps(info))
    for split in ("train", "val", "test"):
        y = np.load(folder / "pairs" / split / "labels.npy")
        np.save(folder / "pairs" / split / "labels.npy", np.stack([y % 4 < 2, y % 8 >= 4, y % 3 == 0, y < 0], 1).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def base(root, tmp_path_factory):
    """A finished `train_joint.py` with all that it trains on the way: its folder, what it printed, its results."""
    out = tmp_path_factory.mktemp("base")
    printed = call("train_joint.py", *SMALL, out=out, root=root)
    return SimpleNamespace(out=out, printed=printed, run=out / MMLORA, result=result(out, MMLORA))


@pytest.fixture
def copied(base, tmp_path):
    """A copy of `base` to go on from, or to spoil."""
    return shutil.copytree(base.out, tmp_path / "runs")
