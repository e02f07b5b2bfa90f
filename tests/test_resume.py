"""Runs that are started again, were interrupted, or find another setting in their folder;
and that the loop is a plain loop."""
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import data
from encoders import UnimodalModel, build
from harness import files, optim, runs
from harness.optim import lr_factor, make_optimizer
from paper import settings
from pretrained.checkpoints import download, load_public
from running import (MMLORA, QUICK, ROOT, SMALL, UMFT_EPOCHS, UNIMODAL, call, error, everything,
                     log_of, process, result, table, tensors)
from test_fingerprint import Project


def lines_of(printed, out):
    """What was printed of the training itself, without the folder of the runs and the seconds."""
    kept = []
    for line in printed.replace(str(out), "OUT").splitlines():
        kept.append(line[:-6] if " +- " in line else line)
    return kept


def test_the_same_seed_gives_the_same_runs(base, root, tmp_path):
    """Step by step, as the README's three commands do it, in another folder: bit by bit what
    `train_joint.py` alone did."""
    for m in ("audio", "visual"):
        printed = call("train_unimodal.py", "--modality", m, *UNIMODAL, out=tmp_path, root=root)
        assert f"{m} alone" in printed
    again = call("train_joint.py", *SMALL, out=tmp_path, root=root)
    assert everything(tmp_path) == everything(base.out)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.*")}
    third = call("train_joint.py", *SMALL, out=tmp_path, root=root)     # finished already
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.*")} == before
    # The first three lines say what became of the three runs, the rest is the table.
    whole = lines_of(base.printed, base.out)
    assert lines_of(again, tmp_path)[2:] == whole[2:] and lines_of(third, tmp_path)[3:] == whole[3:]
    for printed, done in ((again, 2), (third, 3)):
        for line in printed.splitlines()[:done]:
            assert re.search(r"-s0: trained on 20\d\d-\d\d-\d\d \d\d:\d\d, nothing to do$", line)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(base, root, tmp_path, monkeypatch):
    """Killed again and again, before, within and after the writing of an epoch: nothing is lost but
    the epoch that was under way. Of the baselines: test_baselines.py."""
    out, often = tmp_path / "killed", 0.1
    chance, epochs = random.Random(1), []
    save_last, log, save_tensors = runs.Run.save_last, runs.Run.log, runs.Run.save_tensors

    def killed_save_last(self, *what):
        for moment in ("before", "after"):
            if chance.random() < often:
                raise Killed
            if moment == "before":
                save_last(self, *what)

    def killed_save_tensors(self, name, content):
        save_tensors(self, name, content)
        if chance.random() < often:     # a new model.safetensors, but the state of the epoch before
            raise Killed

    def killed_log(self, line):
        epochs.append(line["epoch"])
        if chance.random() < often:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(line)[:30])     # half a line
            raise Killed
        log(self, line)

    monkeypatch.setattr(runs.Run, "save_last", killed_save_last)
    monkeypatch.setattr(runs.Run, "log", killed_log)
    monkeypatch.setattr(runs.Run, "save_tensors", killed_save_tensors)
    for kills in itertools.count():
        try:
            call("train_joint.py", *SMALL, out=out, root=root)
            break
        except Killed:
            pass
    assert kills > 5
    assert everything(out) == everything(base.out)
    whole = sum(len(log_of(out, run)) for run in out.glob("toy/*"))
    # No epoch that was whole is done again; before the first one is, epoch 0 is.
    assert len(epochs) <= whole + 2 * kills


VISUAL = "toy/unimodal-visual-s0"


def wait_until_saved(out, lines):
    """Until a process has saved its state behind so many lines of the log."""
    file, began, saved = out / VISUAL / "last.safetensors", time.time(), 0
    while saved < lines:
        assert time.time() - began < 120
        time.sleep(0.02)
        if file.exists():
            with safe_open(file, "pt") as f:
                saved = json.loads(f.metadata()["state"])["lines"]


def goes_on(base, out, root):
    """The same command, and the bits of a run that nobody stopped; -> what it printed."""
    printed = call("train_unimodal.py", "--modality", "visual", *UNIMODAL, out=out, root=root)
    stopped, whole = everything(out), everything(base.out)
    assert stopped == {name: whole[name] for name in whole if name.startswith(VISUAL)} != {}
    return printed


def test_a_process_killed_at_any_moment(base, root, tmp_path):
    words = ["--modality", "visual", *UNIMODAL, "--out", tmp_path, "--data-root", root]
    project = Project(ROOT)
    child = project.start("train_unimodal.py", *words)
    wait_until_saved(tmp_path, 2)
    os.kill(child[0], signal.SIGKILL)
    done = project.finish(*child)
    assert done.code == -signal.SIGKILL and not (tmp_path / VISUAL / "result.json").exists()
    goes_on(base, tmp_path, root)


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(base, root, tmp_path):
    folder = tmp_path / VISUAL
    words = ["--modality", "visual", *UNIMODAL]
    child = process("train_unimodal.py", *words, out=tmp_path, root=root)
    wait_until_saved(tmp_path, 2)
    child.send_signal(signal.SIGINT)
    printed, complaint = child.communicate()
    assert child.returncode == 130 and not printed and not (folder / "result.json").exists()
    whole = re.fullmatch(f"stopped after epoch (\\d+) of {folder}; the same command goes on",
                         complaint.strip())
    assert whole, complaint
    epoch = int(whole[1])
    assert 1 <= epoch < UMFT_EPOCHS     # the log is written before the epoch is saved
    again = goes_on(base, tmp_path, root)
    assert f"{folder}: going on from epoch {epoch + 1}\n" in again


def test_ctrl_c_while_an_epoch_is_saved(root, tmp_path, monkeypatch):
    """What the line says is where the next start goes on."""
    def interrupted(self, tensors, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        save_last(self, tensors, epoch)

    save_last = runs.Run.save_last
    monkeypatch.setattr(runs.Run, "save_last", interrupted)
    errors = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(errors):
        call("baselines.no_umft", "--epochs", 3, out=tmp_path, root=root)
    monkeypatch.undo()
    epoch = int(re.search(r"stopped after epoch (\d+)", errors.getvalue())[1])
    printed = call("baselines.no_umft", "--epochs", 3, out=tmp_path, root=root)
    assert f"going on from epoch {epoch + 1}\n" in printed


def test_ctrl_c_with_nothing_under_way(base, root, monkeypatch, capsys):
    """Before training, and between two runs: no epoch is named."""
    for current in (None, SimpleNamespace(finished=True)):
        monkeypatch.setattr(runs, "current", current)
        monkeypatch.setattr(data, "Split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as exit:
            call("baselines.no_umft", "--epochs", 9, out=base.out, root=root)
        assert exit.value.code == 130
        assert capsys.readouterr().err.strip() == "stopped; the same command goes on"


def new_run(out, root, **changed):
    """A run of step 1 on the toy, as its script opens it."""
    args = SimpleNamespace(out=str(out), dataset="toy", device="cpu", again=False)
    told = dict(method="unimodal", modality="audio", encoder="audio_vit_toy", dataset="toy", seed=0,
                epochs=4, precision="fp32", frames=3, audio_shift=4) | changed
    folder = root / "toy-s0"
    info = json.loads((folder / "dataset.json").read_text())
    return runs.Run(args, "some-run", told, folder, info, ROOT / "train_unimodal.py")


def test_files_are_replaced_whole_or_not_at_all(base, root, copied, monkeypatch):
    """Killed before the new file has its name: the old one is there,
    from the first to the last byte."""
    run = new_run(copied, root)
    models = nn.ModuleDict({"audio": nn.Linear(2, 2)})
    run.resume(models, make_optimizer("adamw", models, 0.1, 0.1))
    logits = {"audio": torch.randn(100, 8)}
    run.end_of_epoch(0, logits, models.state_dict())
    run.end_of_epoch(1, logits, models.state_dict())
    files.write_json(run.folder / "result.json", {"before": 1})
    before = everything(copied)

    def kill(*_):
        raise Killed

    monkeypatch.setattr(os, "replace", kill)
    zeros = {"x": torch.zeros(9)}
    both = {"val": logits, "test": {"audio": torch.randn(120, 8)}}
    for write in (lambda: run.save_tensors("model.safetensors", zeros),
                  lambda: run.save_last(zeros, 2),
                  lambda: run.finish(both, models),
                  lambda: files.write_json(run.folder / "result.json", {"never": "mind"}),
                  lambda: files.write_json(run.folder / "config.json", {"never": "mind"})):
        with pytest.raises(Killed):
            write()
        assert everything(copied) == before


@pytest.mark.parametrize("name", ["adamw", "bertadam", "sgd"])
def test_optimisers_survive_a_stop(name, root, tmp_path):
    logits = {"audio": torch.zeros(100, 8)}

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        models = nn.ModuleDict({"audio": model})
        return models, make_optimizer(name, models, 0.05, 0.1, steps=10)

    def steps(models, optimizer, numbers):
        for n in numbers:
            optimizer.zero_grad()
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(n))
            models["audio"](x).square().sum().backward()
            optimizer.step()

    whole, optimizer = start()
    steps(whole, optimizer, range(6))
    models, optimizer = start()
    run = new_run(tmp_path, root)
    assert run.resume(models, optimizer) == 0     # nothing to go on from
    run.end_of_epoch(0, logits, models.state_dict())
    steps(models, optimizer, range(3))
    run.end_of_epoch(1, logits, models.state_dict())
    run.log(dict(epoch=2))     # a line without its state
    models, optimizer = start()
    again = new_run(tmp_path, root)
    assert again.resume(models, optimizer) == 2
    assert [line["epoch"] for line in log_of(tmp_path, run.folder)] == [0, 1]     # it is cut off
    assert (again.best, again.best_epoch, again.history) == (run.best, run.best_epoch, run.history)
    steps(models, optimizer, range(3, 6))
    for key, t in models.state_dict().items():
        assert torch.equal(t, whole.state_dict()[key])


@pytest.mark.parametrize("words, named", [
    ("--epochs 5", "epochs 4 (now 5)"), ("--batch-size 8", "batch_size 25 (now 8)"),
    ("--precision bf16", "precision fp32 (now bf16)"),
    ("--umft-epochs 21", f"epochs {UMFT_EPOCHS} (now 21)"),
    ("--umft-lr 0.5", "(now 0.5)")])
def test_a_folder_keeps_one_setting(words, named, base, root):
    before = everything(base.out)
    message = error("train_joint.py", *SMALL, *words.split(), out=base.out, root=root)
    assert named in message and "--out" in message and "--again" in message
    assert str(base.out / "toy") in message and everything(base.out) == before


def test_again_trains_anew_what_has_changed(base, copied, root):
    """And nothing else: step 1 is as it was. What has not changed is not trained again, either."""
    words = [*SMALL, "--epochs", 2, "--again"]
    printed = call("train_joint.py", *words, out=copied, root=root)
    assert printed.count("nothing to do") == 2 and f"training {copied / MMLORA} anew" in printed
    old, = copied.glob("toy/old/mmlora-all-r1-s0-*")
    assert (old / "model.safetensors").read_bytes() == (base.run / "model.safetensors").read_bytes()
    assert len(log_of(copied, MMLORA)) == 3 and str(old) in printed
    for m in ("audio", "visual"):
        name = f"toy/unimodal-{m}-s0/model.safetensors"
        assert (copied / name).read_bytes() == (base.out / name).read_bytes()
    printed = call("train_joint.py", *words, out=copied, root=root)
    assert printed.count("nothing to do") == 3 and len(list(copied.glob("toy/old/*"))) == 1
    # Twice in a second, perhaps.
    call("train_joint.py", *SMALL, "--again", out=copied, root=root)
    assert len(list(copied.glob("toy/old/*/result.json"))) == 2
    for name in ("model.safetensors", "logits.safetensors"):
        assert (copied / MMLORA / name).read_bytes() == (base.run / name).read_bytes()


def test_settings_of_the_paper_file_count_too(base, root, monkeypatch):
    """A student changes the weight decay in paper/settings.py and runs again:
    the old result must not pass for the new one."""
    changed = settings.SETTINGS["toy"] | dict(weight_decay=0.5)
    monkeypatch.setitem(settings.SETTINGS, "toy", changed)
    assert "weight_decay" in error("train_joint.py", *SMALL, out=base.out, root=root)


@pytest.mark.parametrize("modality, encoder", [("audio", "audio_vit_toy"), ("visual", "vit_toy")])
def test_training_is_a_plain_loop_whatever_the_micro_batch(modality, encoder, root, tmp_path,
                                                           monkeypatch):
    """Eq. 1 with SGD (linear in the gradient) against a few lines of PyTorch;
    parts of a batch see the augmentation of the whole."""
    last, save_last, recipe = {}, runs.Run.save_last, settings.settings_for("toy")

    def spy(self, stored, *rest):
        last.update({k: v.clone() for k, v in stored.items()})
        save_last(self, stored, *rest)

    torch.manual_seed(0)
    model, split = UnimodalModel(build(encoder), 8), data.Split(root / "toy-s0", "train")
    load_public(model.encoder, download(encoder))
    for step in range(8):     # 200 samples are 64 + 64 + 64 + 8, twice
        if step % 4 == 0:
            generator = data.epoch_rng(0, 1 + step // 4)
            order = data.batches(200, 64, generator)
        index = order[step % 4]
        x = data.model_input(split, modality, index, model.encoder, "cpu", recipe, generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), split.labels[index]).backward()
        for p in model.parameters():
            p.data -= 0.2 * lr_factor("cosine", step, 8, []) * p.grad

    def sgd(name, models, *_):
        return torch.optim.SGD(models.parameters(), lr=1e9)

    monkeypatch.setattr(runs.Run, "save_last", spy)
    monkeypatch.setattr(optim, "make_optimizer", sgd)
    for size in (64, 24, 7):
        words = f"--modality {modality} --epochs 2 --lr 0.2 --batch-size 64 --micro-batch {size}"
        last.clear()
        call("train_unimodal.py", *words.split(), out=tmp_path / str(size), root=root)
        for name, p in model.named_parameters():
            torch.testing.assert_close(last[f"{modality}.{name}"], p.data, rtol=0, atol=2e-6)


@pytest.mark.parametrize("script, run", [("train_joint.py", MMLORA),
                                         ("baselines.full_ume", "toy/full-s0")])
def test_the_best_epoch_is_the_first_of_equal_ones_and_may_be_epoch_0(script, run, base, copied,
                                                                      root):
    name = run.removesuffix("-s0")
    for lr in ("1e-30", "2"):     # nothing changes; everything breaks
        printed = call(script, *QUICK, "--lr", lr, out=copied, root=root)
        run = f"{name}-lr{lr}-s0"
        done = result(copied, run)
        assert done["best_epoch"] == 0 and done["test"] == done["ume"]["test"]
        told = "training did not improve on UME (epoch 0 was the best): seed 0"
        assert told in printed.splitlines()     # or an edit that spoils all would look like none
        rows = table(printed)
        assert list(rows.values())[-1][:4] == rows["UME, probabilities averaged"][:4]
        stored = tensors(copied, run)     # the weights of that epoch
        assert not any(t.any() for key, t in stored.items() if key.endswith("lora_B"))
        if script == "baselines.full_ume":
            before = tensors(base.out, "toy/unimodal-audio-s0")
            assert all(torch.equal(stored[key], before[key]) for key in before)
    log = log_of(copied, run)     # it did break
    assert log[-1]["val"]["prob"]["accuracy"] < log[0]["val"]["prob"]["accuracy"]
    assert "did not improve" not in base.printed


def test_unimodal_runs_serve_any_joint_run(base, copied, root):
    """Whatever they were trained with: only what is asked for on the command line has to agree."""
    before = {f: f.stat().st_mtime_ns for f in copied.glob("toy/unimodal-*/*")}
    words = "--rank 2 --epochs 1 --batch-size 40".split()
    call("train_joint.py", *words, out=copied, root=root)
    words = ("--rank 3 --epochs 1 --umft-lr 1e-3"
             " --pretrained audio=audio_vit_toy visual=vit_toy").split()
    call("train_joint.py", *words, "--umft-epochs", UMFT_EPOCHS, out=copied, root=root)
    assert {f: f.stat().st_mtime_ns for f in copied.glob("toy/unimodal-*/*")} == before
    words = "--rank 4 --epochs 1 --umft-epochs 7".split()
    assert f"epochs {UMFT_EPOCHS} (now 7)" in error("train_joint.py", *words, out=copied, root=root)


def test_a_joint_run_that_needs_less_memory_takes_the_unimodal_runs_as_they_are(base, copied, root):
    """`try --micro-batch 16`, says the line that full memory ends with,
    also when step 1 is done."""
    before = {f: f.stat().st_mtime_ns for f in copied.glob("toy/unimodal-*/*")}
    words = "--rank 2 --epochs 1 --micro-batch 8".split()
    printed = call("train_joint.py", *words, out=copied, root=root)
    assert printed.count("nothing to do") == 2
    assert {f: f.stat().st_mtime_ns for f in copied.glob("toy/unimodal-*/*")} == before


# ---- `break`, in a copy of the script ----

BREAKS = {     # where it stands, and the epochs and steps of a run of 3 epochs, 4 batches each
    "before the first batch": ("            optim.set_lr(", "            break\n", [0, 0, 0]),
    "after the first batch": ("        run.end_of_epoch(epoch,", "            break\n", [1, 1, 1]),
    "in the middle": ("        run.end_of_epoch(epoch,",
                      "            if epoch == 2 and step == 6:\n                break\n",
                      [4, 2, 4]),
    "out of both loops": ("        run.end_of_epoch(epoch,",
                          "            if step == 6:\n                break\n"
                          "        if epoch == 2:\n            break\n", [4]),
    "out of both loops in epoch 1": ("        run.end_of_epoch(epoch,",
                                     "            break\n        break\n", []),
}


@pytest.mark.parametrize("where", BREAKS)
def test_break_ends_in_a_finished_run(where, base, copied, root, tmp_path, monkeypatch):
    """`if step == 6: break` is what one types to try something: the run it leaves is whole."""
    line, added, steps = BREAKS[where]
    text = (ROOT / "train_joint.py").read_text()
    assert text.count(line) == 1
    script = tmp_path / "train_joint.py"
    script.write_text(text.replace(line, added + line))
    seen, count = [], runs.Run.count

    def watched(self, loss, logits, y):
        seen.append(loss.item())
        count(self, loss, logits, y)

    monkeypatch.setattr(runs.Run, "count", watched)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    words = "--epochs 3 --batch-size 64 --rank 2".split()
    printed = call(str(script), *words, out=copied, root=root)
    run = "toy/mmlora-all-r2-s0"
    done, log = result(copied, run), log_of(copied, run)
    assert [line["epoch"] for line in log] == list(range(len(steps) + 1))
    begin = 0
    for line, number in zip(log[1:], steps):
        losses = seen[begin:begin + number]
        begin += number
        assert math.isfinite(line["seconds"]) and line["seconds"] >= 0
        if not number:
            assert line["loss"] is None and "train" not in line
        elif number < 4:     # whole batches of 64
            assert line["loss"] == pytest.approx(sum(losses) / number, rel=1e-5)
            assert 0 <= line["train"] <= 1 and line["samples_per_second"] > 0
    assert done["best_epoch"] <= len(steps) and not (copied / run / "last.safetensors").exists()
    chosen = log[done["best_epoch"]]["val"]["prob"]
    assert done["val"]["prob"]["accuracy"] == chosen["accuracy"]
    assert ("did not improve" in printed) == (done["best_epoch"] == 0)
    assert list(table(printed))[-1] == "MMLoRA, rank 2, audio+visual"
    if sum(steps) == 0:
        assert not seen or not steps
        assert done["best_epoch"] == 0 and done["test"] == done["ume"]["test"]
    again = call(str(script), *words, out=copied, root=root)     # a finished run, as any other
    assert f"{copied / run}: trained on" in again and log_of(copied, run) == log
