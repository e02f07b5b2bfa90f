"""Runs that are damaged, foreign, interrupted or started twice, and command lines with mistakes:
one line that names the file and says what to do."""
import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from harness import arguments, files, runs, stored
from harness.optim import make_optimizer
from prepare import locks, toy
from running import MMLORA, ROOT, SMALL, call, error, log_of

AUDIO = "toy/unimodal-audio-s0"
STEP_1 = ["train_unimodal.py", "--modality", "audio", "--epochs", 15, "--batch-size", 16]


@pytest.fixture(autouse=True)
def locks_end_with_the_test():
    yield
    locks.unlock()


@contextlib.contextmanager
def locked_by_another(file):
    """As another process locks it: the system tells descriptors apart, not processes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("process 4711 on elsewhere")
    with open(file, "r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield


# ---- One process at a time ----

def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(base, root, tmp_path):
    folder, lock = tmp_path / AUDIO, tmp_path / "toy/.unimodal-audio-s0.lock"
    with locked_by_another(lock):
        told = error(*STEP_1, out=tmp_path, root=root)
        by = "process 4711 on elsewhere"
        assert told == f"error: {folder} is in use by {by}: wait until it is done"
        assert not folder.exists()
        call("train_joint.py", *SMALL, out=base.out, root=root)     # elsewhere: none in its way
    assert lock.exists()                                      # as a killed process leaves it
    run = new_run(tmp_path, root)
    assert lock.read_text().startswith(f"process {os.getpid()} on ")
    with pytest.raises(BlockingIOError), open(lock) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    locks.lock(run.folder)                                    # its own: not in its own way
    locks.unlock()
    assert not list(tmp_path.rglob("*.lock"))


def test_no_lock_stays(base, root, tmp_path):
    """After a finished run, a mistake, and Ctrl-C."""
    error(*STEP_1, "--pretrained", "gone", out=tmp_path, root=root)
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        arguments.guard(lambda: (new_run(tmp_path, root), exec("raise KeyboardInterrupt")))
    assert not [f for f in [*base.out.rglob("*"), *tmp_path.rglob("*")] if f.name.endswith("lock")]
    assert not locks.HELD


def test_a_lock_whose_file_was_just_removed_is_none(tmp_path, monkeypatch):
    """Between our opening of the file and our lock its owner has ended, and removed it."""
    take, file = locks.take, tmp_path / ".x.lock"

    def removed_meanwhile(opened):
        monkeypatch.setattr(locks, "take", take)
        file.unlink()
        take(opened)

    monkeypatch.setattr(locks, "take", removed_meanwhile)
    locks.lock(tmp_path / "x")
    assert os.path.samestat(os.fstat(locks.HELD[tmp_path / "x"][0]), file.stat())


def test_a_drive_without_locks_and_windows(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    locks.lock(tmp_path / "x")
    assert "knows no locks" in capsys.readouterr().out
    monkeypatch.undo()
    locked = []
    windows = SimpleNamespace(LK_NBLCK=2, locking=lambda *words: locked.append(words[1:]))
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", windows, raising=False)
    locks.lock(tmp_path / "y")
    assert locked == [(2, 1)] and (tmp_path / ".y.lock").read_text().startswith("process ")
    locks.unlock()


def test_one_process_makes_a_world_and_sweeps_up_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SIZES", {"toy": {"train": 8, "val": 8, "test": 8}})
    (tmp_path / ".toy-s0.99").mkdir()
    with locked_by_another(tmp_path / ".toy-s0.lock"):
        with pytest.raises(ValueError, match="toy-s0 is in use by process 4711"):
            arguments.find(tmp_path, "toy")
    arguments.find(tmp_path, "toy")
    assert [f.name for f in tmp_path.iterdir()] == ["toy-s0"]


# ---- Files are on the disk before they have their name ----

def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace

    def name_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(("sync", name_of(fd))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("name", b.name)), replace(a, b)))
    files.write_json(tmp_path / "a.json", {})
    files.write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    files.append_line(tmp_path / "log.jsonl", {"epoch": 0})
    half = os.getpid()
    assert order == [("sync", f".a.json.{half}"), ("name", "a.json"),
                     ("sync", f".b.safetensors.{half}"), ("name", "b.safetensors"),
                     ("sync", "log.jsonl")]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(_, temporary, *__):
        Path(temporary).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(files, "save_file", full_in_rust)
    for work, name in ((lambda: files.write_json(tmp_path / "a.json", {}), "a.json"),
                       (lambda: files.write_tensors(tmp_path / "b", {}), "b")):
        with pytest.raises(SystemExit) as exit:
            arguments.guard(work)
        assert exit.value.code.startswith(f"error: cannot write {tmp_path / name}: ")
        assert "No space left on device" in exit.value.code and not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem, told", [
    (torch.OutOfMemoryError("CUDA out of memory."), "the GPU's memory; try --device cpu"),
    (MemoryError(), "does not fit into memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "fit into memory"),
    (PermissionError(13, "Permission denied", "runs/toy"), "Permission denied: 'runs/toy'"),
    (ValueError("two\nlines"), "two lines"),
])
def test_full_memory_and_the_like_end_in_one_line(problem, told):
    def work():
        raise problem

    with pytest.raises(SystemExit) as exit:
        arguments.guard(work)
    assert told in exit.value.code and "\n" not in exit.value.code


def test_a_students_own_mistake_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        arguments.guard(lambda: torch.zeros(2) @ torch.zeros(3))


# ---- A run that is gone on with ----

def new_run(out, root, **changed):
    """A run of step 1 on the toy, as its script opens it."""
    again = changed.pop("again", False)
    args = SimpleNamespace(out=str(out), dataset="toy", device="cpu", again=again)
    told = dict(method="unimodal", modality="audio", encoder="audio_vit_toy", dataset="toy", seed=0,
                epochs=4, precision="fp32", frames=3, audio_shift=4)
    folder = root / "toy-s0"
    info = json.loads((folder / "dataset.json").read_text())
    script = ROOT / "train_unimodal.py"
    return runs.Run(args, "unimodal-audio-s0", told | changed, folder, info, script)


def small_model(width=2):
    torch.manual_seed(0)
    models = nn.ModuleDict({"audio": nn.Linear(width, 2)})
    optimizer = make_optimizer("adamw", models, 0.1, 0.1)
    models["audio"](torch.ones(1, width)).sum().backward()
    return models, optimizer


@pytest.fixture
def stopped(root, tmp_path):
    """The folder of a run that was killed behind epoch 2."""
    models, optimizer = small_model()
    run, logits = new_run(tmp_path, root), {"audio": torch.randn(100, 8)}
    run.resume(models, optimizer)
    for epoch in range(3):
        if epoch:
            optimizer.step()
        run.end_of_epoch(epoch, logits, models.state_dict())
    locks.unlock()
    return tmp_path / AUDIO


def spoil(file, how):
    whole = file.read_bytes()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(whole[:len(whole) // 2])
    elif how == "text":
        file.write_text("hello")
    elif how == "other tensors":
        save_file({"video.weight": torch.zeros(2, 2)}, file, {"state": state_of(file)})
    elif how == "other shapes":
        save_file({k: torch.zeros(7) for k in load_file(file)}, file, {"state": state_of(file)})
    elif how == "not finite":
        save_file({k: t / 0 for k, t in load_file(file).items()}, file, {"state": state_of(file)})
    elif how == "no state":
        save_file(load_file(file), file)
    elif how == "broken state":
        save_file(load_file(file), file, {"state": state_of(file)[:-9]})
    elif how == "whole numbers":
        save_file({k: t.view(torch.int32) for k, t in load_file(file).items()}, file,
                  {"state": state_of(file)})
    elif how == "other moments":
        tensors = load_file(file)
        tensors["optimizer/0/exp_avg"] = torch.zeros(7)
        save_file(tensors, file, {"state": state_of(file)})
    elif how == "impossible scores":
        state = json.loads(state_of(file)) | {"best": [1.5, -1]}
        save_file(load_file(file), file, {"state": json.dumps(state)})
    elif how == "of another run":
        state = json.loads(state_of(file))
        state["settings"]["seed"] = 1
        save_file(load_file(file), file, {"state": json.dumps(state)})


def state_of(file):
    return files.read_tensors(file)[1].get("state", "{}")


@pytest.mark.parametrize("name, how", [
    ("last", how) for how in ("empty", "cut", "text", "other tensors", "other shapes", "not finite",
                              "no state", "broken state", "of another run", "whole numbers",
                              "other moments", "impossible scores")
] + [("model", how) for how in ("empty", "cut", "other tensors", "other shapes", "gone")])
def test_a_damaged_or_foreign_state_begins_again_and_says_so(name, how, stopped, root, capsys):
    file = stopped / f"{name}.safetensors"
    file.unlink() if how == "gone" else spoil(file, how)
    models, optimizer = small_model()
    before = {k: t.clone() for k, t in models.state_dict().items()}
    assert new_run(stopped.parents[1], root).resume(models, optimizer) == 0
    told = capsys.readouterr().out
    assert str(file) in told and told.endswith(f": {stopped} begins again\n")
    assert told.count("\n") == 1
    assert {f.name for f in stopped.iterdir()} - {"model.safetensors"} == {"config.json"}
    assert all(torch.equal(t, before[k]) for k, t in models.state_dict().items())
    assert not optimizer.state


def test_nobody_goes_on_with_a_state_without_its_config(stopped, root):
    """Which code made it, and of what data?"""
    (stopped / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json.*--again"):
        new_run(stopped.parents[1], root)


def test_an_undamaged_state_goes_on(stopped, root, capsys):
    (stopped / ".last.safetensors.99").write_text("of a dead process")
    models, optimizer = small_model()
    run = new_run(stopped.parents[1], root)
    assert run.resume(models, optimizer) == 3 and len(optimizer.state) == 2
    assert capsys.readouterr().out == f"{stopped}: going on from epoch 3\n"
    assert not list(stopped.glob(".*"))


@pytest.mark.parametrize("content", [b"", b'{"epoch": 0}\n', b"\xff\n\n\n", b"[]\n" * 3, None])
def test_a_log_without_its_epochs_is_refused(content, stopped, root):
    """The weights are whole: nothing is thrown away without being asked."""
    (stopped / "log.jsonl").unlink()
    if content is not None:
        (stopped / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="log.jsonl is damaged: it lacks some of .* 0 to 2"):
        new_run(stopped.parents[1], root).resume(*small_model())
    assert (stopped / "last.safetensors").exists()


def test_the_state_behind_a_result_is_removed(copied, root):
    """Killed between result.json and the removal of last.safetensors."""
    (copied / AUDIO / "last.safetensors").write_text("")
    call("train_joint.py", *SMALL, out=copied, root=root)
    assert not list(copied.rglob("last.safetensors"))


# ---- Clocks, and losses that are not finite ----

def test_clocks_that_stand_still_or_go_back(root, tmp_path, monkeypatch):
    models, optimizer = small_model()
    run = new_run(tmp_path, root)
    run.resume(models, optimizer)
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    back = iter(range(10 ** 6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(back))
    logits = {"audio": torch.randn(100, 8)}
    run.end_of_epoch(0, logits, models.state_dict())
    for _ in run.progress([0], 1):
        run.count(torch.tensor(1.0), {"audio": torch.randn(2, 8)}, torch.tensor([0, 1]))
    run.end_of_epoch(1, logits, models.state_dict())
    monkeypatch.undo()
    line = log_of(tmp_path, AUDIO)[1]
    assert line["seconds"] == 0 and np.isfinite(line["samples_per_second"])


@pytest.mark.parametrize("bad_data", [False, True])
def test_a_loss_that_is_not_finite_says_when_and_whose_fault(bad_data, root, tmp_path):
    shutil.copytree(root / "toy-s0", tmp_path / "toy-s0")
    if bad_data:
        array = np.load(root / "toy-s0/train/audio.npy")
        array[130, 0, 3, 3] = np.inf
        np.save(tmp_path / "toy-s0/train/audio.npy", array)
    run = new_run(tmp_path / "runs", tmp_path)
    models, optimizer = small_model()
    run.resume(models, optimizer)
    with pytest.raises(ValueError) as problem:
        for i in run.progress(list(range(20)), 2):            # found while the epoch is under way
            assert i <= 10
            loss = torch.tensor(float("nan") if i >= 4 else 1.0)
            run.count(loss, {"audio": torch.randn(2, 8)}, torch.tensor([0, 1]))
    assert f"{run.folder}: the loss of epoch 2, step 5, is nan" in str(problem.value)
    told = "The data are finite, so the weights are not: training diverged; try a smaller --lr, "
    if bad_data:
        told = "audio.npy, samples 0 to 199; prepare them again"
    assert told in str(problem.value)
    with pytest.raises(ValueError, match="the validation loss of epoch 0 is nan"):
        run.end_of_epoch(0, {"audio": torch.full((100, 8), float("nan"))}, models.state_dict())


# ---- Finished runs whose files are damaged or foreign ----

def foreign(**changed):
    """An edit of a JSON file: keys of the top level or, with a dot in them, of the one below."""
    def edit(value):
        for key, new in changed.items():
            *above, key = key.split("__")
            inner = value[above[0]] if above else value
            if new is None:
                inner.pop(key, None)
            else:
                inner[key] = new
        return value
    return edit


DAMAGED = [("config.json", b""), ("config.json", b"[]"), ("config.json", b"\xff\xfe"),
           ("config.json", b"[" * 100_000), ("config.json", foreign(settings=None)),
           ("config.json", foreign(settings__encoders={"../x": "vit_toy"})),
           ("config.json", foreign(settings__unimodal={"audio": {"run": "../../x"}})),
           ("config.json", foreign(settings__lora=["smell"])),
           ("config.json", foreign(settings__fusion="nosuch")),
           ("config.json", foreign(settings__fusion=None)),
           ("config.json", foreign(settings__rank=10 ** 30)),
           ("config.json", foreign(settings__encoders={"audio": "nosuch", "visual": "vit_toy"})),
           ("config.json", foreign(data__classes=["one", "two"])),
           ("config.json", foreign(fingerprint__python="\ud800")),
           ("result.json", foreign(seconds=10 ** 400)), ("result.json", foreign(best_epoch=-1)),
           ("result.json", foreign(test__audio={"loss": 1, "accuracy": 1.5})),
           ("config.json", foreign(settings__rank=0)), ("config.json", foreign(settings__seed="a")),
           ("config.json", foreign(settings__precision=None)),
           ("config.json", foreign(settings__dataset="..")),
           ("config.json", foreign(fingerprint={"version": 1})), ("config.json", foreign(data=[])),
           ("result.json", b'{"test": '), ("result.json", foreign(test=[])),
           ("result.json", foreign(ume={})), ("result.json", foreign(seconds=float("nan"))),
           ("result.json", foreign(seed=1)), ("result.json", foreign(best_epoch=None)),
           ("result.json", foreign(test={"audio": {"loss": 1}}))]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_damaged_json_is_named_everywhere(number, base, root, tmp_path):
    name, how = DAMAGED[number]
    out = tmp_path / "runs"
    shutil.copytree(base.out, out)
    file = out / MMLORA / name
    if not isinstance(how, bytes):
        how = json.dumps(how(json.loads(file.read_text()))).encode()
    file.write_bytes(how)
    with pytest.raises((ValueError, OSError)) as problem:
        stored.read_result(file.parent, stored.read_config(file.parent)["settings"])
    assert str(file) in str(problem.value) and "\n" not in str(problem.value)
    told = error("train_joint.py", *SMALL, out=out, root=root)
    assert str(file) in told and told.endswith("; --again moves the run aside and trains anew")
    printed = call("paper.tables", 10, "--dataset", "toy", out=out, root=root)
    [left_out] = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert str(file) in left_out
    if name == "config.json":
        told = error("evaluate.py", "--run", file.parent, root=root)
        assert str(file) in told and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model", "logits"])
def test_damaged_tensors_of_a_finished_run(name, copied, root):
    file, whole = copied / AUDIO / f"{name}.safetensors", {}
    whole = file.read_bytes()
    for how in ("empty", "cut", "text", "not finite", "gone"):
        file.write_bytes(whole)
        file.unlink() if how == "gone" else spoil(file, how)
        told = error("train_joint.py", *SMALL, out=copied, root=root)
        assert str(file) in told and "--again" in told
        assert str(file) in error("evaluate.py", "--run", copied / MMLORA, root=root)
    for how in ("other tensors", "whole numbers"):
        file.write_bytes(whole)
        spoil(file, how)
        run = copied / (AUDIO if name == "model" else MMLORA)
        assert str(file) in error("evaluate.py", "--run", run, root=root)
        if name == "logits":
            assert str(file) in error("evaluate.py", "--run", run, "--temperature", root=root)


def test_again_trains_a_damaged_run_anew(stopped, root, capsys):
    (stopped / "config.json").write_text("{")
    out = stopped.parents[1]
    with pytest.raises(ValueError, match="config.json is damaged.*--again"):
        new_run(out, root)
    new_run(out, root, again=True)
    assert "training anew (the old run is now" in capsys.readouterr().out
    assert not stopped.exists() and len(list(out.glob("toy/old/*"))) == 1


@pytest.mark.parametrize("content", [b"", b"[]\n", b'{"epoch": 0}\n', b"\xff\n",
                                     b'{"epoch": 0, "val": {"audio": {"accuracy": "x"}}}\n'])
def test_plot_of_a_damaged_log(content, copied, root):
    pytest.importorskip("matplotlib")
    file = copied / AUDIO / "log.jsonl"
    file.write_bytes(content)
    told = error("evaluate.py", "--run", file.parent, "--plot", root=root)
    assert f"{file} is damaged" in told


def test_a_damaged_probe_is_named(base, copied, root, monkeypatch):
    file = copied / MMLORA / "probe.json"
    for content in ("[]", '{"audio": 1}', '{"audio": {"test": 3}}',
                    '{"audio": {"test": {"accuracy": "high"}}}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="probe.json is damaged"):
            stored.read_probe(file.parent)
        printed = call("paper.tables", 8, "--dataset", "toy", out=copied, root=root)
        assert f"left out: {file}" in printed


# ---- Typing mistakes ----

@pytest.mark.parametrize("script, words, told", [
    ("train_joint.py", "--dataset ../x", "--dataset '../x' is no plain name"),
    ("train_joint.py", "--dataset ..", "--dataset '..' is no plain name"),
    ("train_joint.py", "--dataset toy_mimic", "There are toy_mimics, "),
    ("train_joint.py", "--dataset creme_d", "There are crema_d, "),
    ("train_joint.py", "--dataset crema_d", "Without any download: --dataset toy"),
    ("train_joint.py", "--encoder visual=vit_b61", "is called vit_b61; there are vit_b16, "),
    ("train_joint.py", "--lora visul", "--lora visul: toy has visual, audio, or all"),
    ("train_unimodal.py", "--modality visul", "--modality visul: toy has visual, audio"),
    ("evaluate.py", "--probe --dataset toy --modality visul", "visul: toy has visual, audio"),
    ("evaluate.py", "--probe --dataset toy --modality audio --seeds 1 1", "each seed once"),
    ("evaluate.py", "--run a ./a", "each run once"),
    ("paper.tables", "10 --seeds 3 3", "seed 3 3: each seed once"),
])
def test_typing_mistakes(script, words, told, root, tmp_path):
    where = {} if script in ("evaluate.py", "paper.tables") else dict(out=tmp_path)
    assert told in error(script, *words.split(), root=root, **where)


@pytest.mark.parametrize("script, words, told", [
    ("train_joint.py", "--seed -1", "-1 is not from 0 to"),
    ("train_joint.py", f"--seed {10 ** 30}", "is not from 0 to"),
    ("train_joint.py", f"--epochs {10 ** 30}", "is too large"),
    ("train_joint.py", "--seeds 1 x", "invalid seed value: 'x'"),
    ("baselines.pmr", "--mu nan", "nan is not above zero"),
    ("baselines.g_blending", "--super-epoch 0", "0 is not above zero"),
])
def test_numbers_that_nobody_means(script, words, told, root, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(script, *words.split(), out=tmp_path, root=root)
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_baselines_lists_the_methods():
    printed = call("baselines", "ogm").splitlines()
    assert printed[0].startswith("python -m baselines.ogm_ge ") and len(printed) == 17


# ---- --help ----

TRAINING = ["train_unimodal.py", "train_joint.py",
            *(f"baselines.{f.stem}" for f in sorted((ROOT / "baselines").glob("[a-z]*.py"))
              if f.stem != "parts")]
PREPARE = [f"prepare.{name}" for name in (*arguments.PREPARED, "custom", "toy")]


@pytest.mark.parametrize("script", [*TRAINING, *PREPARE, "evaluate.py", "paper.tables"])
def test_help_fits_the_terminal_and_names_what_there_is(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(printed):
        # `call` throws away what was printed before the exit.
        monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: contextlib.nullcontext())
        call(script, "--help")
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 20
    typed = f"python {script}" if script.endswith(".py") else f"python -m {script}"
    assert lines[0].startswith(f"usage: {typed} [-h] ")
    words = " ".join(printed.getvalue().split())
    if script in TRAINING or script == "evaluate.py":
        for name in (*toy.WORLDS, *arguments.PREPARED, *arguments.BUILD):
            assert f" {name}" in words, name
    for option in printed.getvalue().split("\n  --")[1:]:
        if option.split()[0] in ("seed", "out", "data-root", "device", "epochs", "lr", "size",
                                 "frames", "clips", "workers", "source", "alpha", "rank",
                                 "encoder"):
            assert "default:" in option, option


# ---- No traceback ----

def test_the_suite_reads_the_errors_of_what_it_starts():
    with pytest.raises(AssertionError, match="Traceback"):
        subprocess.run([sys.executable, "-c", "1 / 0"], capture_output=True)


# ---- Ctrl-C before there is a run ----

def test_ctrl_c_while_torch_loads():
    """The first import of a script catches it; torch is not there yet."""
    code = "import harness, sys; assert 'torch' not in sys.modules; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (-2, 130) and done.stderr == "\nstopped\n"


@pytest.mark.parametrize("script", [
    "train_unimodal.py", "train_joint.py", "evaluate.py",
    *(f"baselines/{f.name}" for f in (ROOT / "baselines").glob("[a-z]*.py") if f.stem != "parts")])
def test_scripts_import_it_before_torch(script):
    lines = (ROOT / script).read_text().splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("import harness ")]
    assert at and at[0] < lines.index("import torch")
