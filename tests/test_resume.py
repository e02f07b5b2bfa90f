"""Runs that are started again, were interrupted, or find another setting in their folder; and that the loop is a plain loop."""
import itertools
import json
import os
import random
import shutil
import sys
import time

import pytest
import torch
from torch import nn

import checkpoints
import data
import paper
import train_unimodal
from encoders import UnimodalModel, build
from running import MMLORA, SMALL, UNIMODAL, call, error, everything, log_of, process, result, tensors
from train_unimodal import lr_factor, make_optimizer


def test_the_same_seed_gives_the_same_runs(base, root, tmp_path):
    """Step by step, as the README's three commands do it, in another folder: bit by bit what `train_joint.py` alone did."""
    for modality in ("audio", "visual"):
        assert f"{modality} alone" in call("train_unimodal.py", "--modality", modality, *UNIMODAL, out=tmp_path, root=root)
    again = call("train_joint.py", *SMALL, out=tmp_path, root=root)
    assert everything(tmp_path) == everything(base.out)
    cut = lambda printed: [line[:-9] for line in printed.splitlines()]     # without the seconds
    assert cut(again) == cut(base.printed)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.*")}
    assert cut(call("train_joint.py", *SMALL, out=tmp_path, root=root)) == cut(again)     # finished already: only the table
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.*")} == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("words", ["", "--tune full", "--no-umft"])
def test_a_killed_run_goes_on_where_it_was(words, base, root, tmp_path, monkeypatch):
    """Killed again and again, before, within and after the writing of an epoch: nothing is lost but the epoch that was under way."""
    if words:
        reference, out = (shutil.copytree(base.out, tmp_path / name) for name in ("whole", "killed"))
        call("train_joint.py", *SMALL, *words.split(), out=reference, root=root)
    else:
        reference, out = base.out, tmp_path / "killed"
    old = set(out.glob("toy/*"))
    chance, epochs, save, log, save_tensors = random.Random(1), [], checkpoints.Run.save, checkpoints.Run.log, checkpoints.Run.save_tensors
    often = 0.3 if words else 0.08

    def killed_save(self, *args):
        for moment in ("before", "after"):
            if chance.random() < often:
                raise Killed
            if moment == "before":
                save(self, *args)

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
    for name, function in (("save", killed_save), ("log", killed_log), ("save_tensors", killed_save_tensors)):
        monkeypatch.setattr(checkpoints.Run, name, function)
    for kills in itertools.count():
        try:
            call("train_joint.py", *SMALL, *words.split(), out=out, root=root)
            break
        except Killed:
            pass
    assert kills > (1 if words else 5)
    assert everything(out) == everything(reference)
    whole = sum(len(log_of(out, run)) for run in set(out.glob("toy/*")) - old)
    assert len(epochs) <= whole + 2 * kills     # no epoch that was whole is done again; before the first one is, epoch 0 is


def test_a_process_killed_at_any_moment(base, root, tmp_path):
    log = tmp_path / "toy" / "unimodal-visual-s0" / "log.jsonl"
    child = process("train_joint.py", *SMALL, out=tmp_path, root=root)
    while child.poll() is None and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.005)
    child.kill()
    child.communicate()
    assert child.returncode == -9 and not (log.parent / "result.json").exists()
    call("train_joint.py", *SMALL, out=tmp_path, root=root)
    assert everything(tmp_path) == everything(base.out)


def test_files_are_replaced_whole_or_not_at_all(copied, monkeypatch):
    """Killed before the new file has its name: the old one is still there, from the first byte to the last."""
    run = checkpoints.Run(copied / MMLORA, json.loads((copied / MMLORA / "config.json").read_text())["settings"])
    before = everything(copied)

    def kill(*_):
        raise Killed
    monkeypatch.setattr(os, "replace", kill)
    for write in (lambda: run.save_tensors("model.safetensors", {"x": torch.zeros(9)}), lambda: run.finish({"never": "mind"})):
        with pytest.raises(Killed):
            write()
        assert everything(copied) == before


@pytest.mark.parametrize("name", ["adamw", "bertadam", "sgd"])
def test_optimisers_survive_a_stop(name, tmp_path):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        return model, make_optimizer(name, model, 0.05, 0.1, steps=10)

    def steps(model, optimizer, numbers):
        for n in numbers:
            optimizer.zero_grad()
            model(torch.randn(6, 5, generator=torch.Generator().manual_seed(n))).square().sum().backward()
            optimizer.step()
    whole, optimizer = start()
    steps(whole, optimizer, range(6))
    model, optimizer = start()
    steps(model, optimizer, range(3))
    run = checkpoints.Run(tmp_path / "run", {})
    assert run.resume(optimizer) == ({}, {})     # nothing to go on from
    for epoch in range(2):
        run.log(dict(epoch=epoch))
    run.save(model.state_dict(), optimizer, dict(lines=1), best=True)
    model, optimizer = start()
    loaded, state = checkpoints.Run(tmp_path / "run", {}).resume(optimizer)
    model.load_state_dict(loaded)
    assert state == dict(lines=1) and log_of(tmp_path, "run") == [dict(epoch=0)]     # a line without its state is cut off
    steps(model, optimizer, range(3, 6))
    assert all(torch.equal(t, whole.state_dict()[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("words, named", [("--epochs 5", "epochs 4 (now 5)"), ("--batch-size 8", "batch_size 16 (now 8)"),
                                          ("--precision bf16", "precision fp32 (now bf16)"),
                                          ("--umft-epochs 21", "epochs 15 (now 21)"), ("--umft-lr 0.5", "(now 0.5)")])
def test_a_folder_keeps_one_setting(words, named, base, root):
    before = everything(base.out)
    message = error("train_joint.py", *SMALL, *words.split(), out=base.out, root=root)
    assert named in message and "--out" in message and str(base.out / "toy") in message
    assert everything(base.out) == before


def test_settings_of_the_paper_file_count_too(base, root, monkeypatch):
    """A student changes the weight decay in paper.py and runs again: the old result must not pass for the new one."""
    monkeypatch.setitem(paper.SETTINGS, "toy", paper.SETTINGS["toy"] | dict(weight_decay=0.5))
    assert "weight_decay" in error("train_joint.py", *SMALL, out=base.out, root=root)


@pytest.mark.parametrize("modality, encoder", [("audio", "audio_vit_toy"), ("visual", "vit_toy")])
def test_training_is_a_plain_loop_whatever_the_micro_batch(modality, encoder, root, tmp_path, monkeypatch):
    """Eq. 1 with SGD (linear in the gradient) against a few lines of PyTorch; parts of a batch see the augmentation of the whole."""
    last, save, setting = {}, checkpoints.Run.save, paper.settings_for("toy")

    def spy(self, stored, *rest):
        last.update({k: v.clone() for k, v in stored.items()})
        save(self, stored, *rest)
    torch.manual_seed(0)
    model, split = UnimodalModel(build(encoder), 12), data.Split(root / "toy-s0", "train")
    for step in range(8):     # 200 samples are 64 + 64 + 64 + 8, twice
        if step % 4 == 0:
            generator = data.epoch_rng(0, 1 + step // 4)
            order = data.batches(200, 64, generator)
        x = data.model_input(split, modality, order[step % 4], model.encoder, "cpu", setting, generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), split.labels[order[step % 4]]).backward()
        for p in model.parameters():
            p.data -= 0.2 * lr_factor("cosine", step, 8, []) * p.grad
    monkeypatch.setattr(checkpoints.Run, "save", spy)
    monkeypatch.setattr(train_unimodal, "make_optimizer", lambda name, models, *_: torch.optim.SGD(models.parameters(), lr=1e9))
    for size in ("64", "24", "7"):
        words = f"--modality {modality} --epochs 2 --lr 0.2 --micro-batch {size} --out {tmp_path / size} --data-root {root}"
        monkeypatch.setattr(sys, "argv", ["train_unimodal.py", *words.split()])
        train_unimodal.main()
        for name, p in model.named_parameters():
            torch.testing.assert_close(last[f"{modality}.{name}"], p.data, rtol=0, atol=2e-6)


def test_the_best_epoch_is_the_first_of_equal_ones_and_may_be_epoch_0(base, copied, root):
    for lr in ("1e-30", "2"):     # nothing changes; everything breaks
        call("train_joint.py", *SMALL, "--lr", lr, out=copied, root=root)
        run = f"toy/mmlora-all-r1-lr{lr}-s0"
        done = result(copied, run)
        assert done["best_epoch"] == 0 and done["test"] == done["ume"]["test"]
        assert not any(t.any() for name, t in tensors(copied, run).items() if name.endswith("lora_B"))     # that epoch's weights
    assert log_of(copied, run)[-1]["val"]["prob"]["accuracy"] < log_of(copied, run)[0]["val"]["prob"]["accuracy"]     # it did break


def test_unimodal_runs_serve_any_joint_run(base, copied, root):
    """Whatever they were trained with: only what is asked for on the command line has to agree."""
    before = {f: f.stat().st_mtime_ns for f in copied.glob("toy/unimodal-*/*")}
    call("train_joint.py", "--rank", 2, "--epochs", 1, "--batch-size", 40, out=copied, root=root)
    call("train_joint.py", *"--rank 3 --epochs 1 --umft-epochs 15 --umft-lr 2e-3 --pretrained none".split(), out=copied, root=root)
    assert {f: f.stat().st_mtime_ns for f in copied.glob("toy/unimodal-*/*")} == before
    assert "epochs 15 (now 7)" in error("train_joint.py", "--rank", 4, "--epochs", 1, "--umft-epochs", 7, out=copied, root=root)
