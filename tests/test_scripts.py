"""The training scripts as their users run them, and evaluate.py on what they leave behind."""
import contextlib
import io
import json
import math
import re
import shutil
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data
import evaluate
from encoders import UnimodalModel, build
from harness import arguments, fingerprint, metrics, report, runs
from lora import add_lora
from paper import settings
from prepare import toy
from pretrained.checkpoints import download, load_public
from running import (MMLORA, QUICK, SMALL, UMFT_EPOCHS, accuracy, call, error, everything, log_of,
                     process, result, table, tensors)
from test_parts import naive_f1

BOTH = ("audio", "visual")


WIDTH = {m: build(encoder).width for m, encoder in settings.encoders_for("toy").items()}


def whole(modality, classes=8):
    """How many parameters a uni-modal model of the toy has."""
    model = UnimodalModel(build(settings.encoders_for("toy")[modality]), classes)
    return sum(p.numel() for p in model.parameters())


def of_lora(*modalities, rank=1):
    """How many A and B of query, key and value have: D x r and r x D, in three blocks."""
    return sum(3 * 3 * 2 * WIDTH[m] * rank for m in modalities)


# ---- The whole chain ----

def test_closing_table(base):
    """Every modality alone, their ensemble under both averages, MMLoRA: the numbers of result.json,
    with the standard error of one run. (One temperature: test_compare.py.)"""
    rows, ume, test = table(base.printed), base.result["ume"]["test"], base.result["test"]
    wanted = {"audio alone (UMFT)": (ume["audio"], whole("audio")),
              "visual alone (UMFT)": (ume["visual"], whole("visual")),
              "UME, probabilities averaged": (ume["prob"], 0),
              "UME, logits averaged": (ume["logits"], 0),
              "MMLoRA, rank 1, audio+visual": (test["prob"], of_lora(*BOTH))}
    assert [label for label in rows if label != "UME, one temperature"] == list(wanted)
    for label, (scores, trained) in wanted.items():
        p = scores["accuracy"]
        assert rows[label][0] == f"{100 * p:.1f} +- {100 * math.sqrt(p * (1 - p) / 120):.1f}"
        groups = [f"{100 * scores['groups'][g]:.1f}"
                  for g in ("both fine", "sound off", "sight off")]
        assert rows[label][1:4] == groups
        assert rows[label][4].replace(",", "") == str(trained)
    assert "120 samples, 8 classes" in base.printed


@pytest.mark.parametrize("words", ["train_joint.py", "baselines.no_umft --rank 16 --lr 0.025",
                                   "baselines.logits --lora visual"])
def test_table_is_aligned(words, base, copied, root):
    printed = base.printed
    if words != "train_joint.py":
        script, *more = words.split()
        epochs = ["--epochs", 1] if "no_umft" in script else [*SMALL, "--epochs", 1]
        printed = call(script, *epochs, *more, out=copied, root=root)
    header = next(line for line in printed.splitlines() if " accuracy " in line)
    numbers = [line for line in printed.splitlines() if re.search(r"\d\.\d \+-", line)]
    assert len(numbers) == len(table(printed)) > 0
    for line in numbers:     # the end of the first number's column is the end of its heading
        assert re.search(r"\d \+- \d+\.\d$",
                         line[:header.index("accuracy") + len("accuracy")]), line
    for line in [header, *numbers]:
        assert len(line) == len(header) <= 80


def test_run_folders(base):
    unimodal = [(f"toy/unimodal-{m}-s0", "unimodal", UMFT_EPOCHS) for m in BOTH]
    for run, method, epochs in [*unimodal, (MMLORA, "mmlora", 4)]:
        folder, done, log = base.out / run, result(base.out, run), log_of(base.out, run)
        assert {f.name for f in folder.iterdir()} == {
            "config.json", "log.jsonl", "model.safetensors", "logits.safetensors", "result.json"}
        config = json.loads((folder / "config.json").read_text())
        told = config["settings"]
        assert told["method"] == done["method"] == method
        assert told["epochs"] == epochs and told["batch_size"] == 25
        assert "train_joint.py" in config["command"]
        assert config["versions"]["torch"] == torch.__version__
        assert [line["epoch"] for line in log] == list(range(epochs + 1)) and log[0]["loss"] is None
        assert all(line["loss"] > 0 and 0 <= line["train"] <= 1 for line in log[1:])
        assert all(line["seconds"] > 0 and line["samples_per_second"] > 0 for line in log[1:])
        chosen = "prob" if method == "mmlora" else told["modality"]
        val = [line["val"][chosen] for line in log]
        keys = [(scores["accuracy"], -scores["loss"]) for scores in val]
        best = done["best_epoch"]
        assert best == keys.index(max(keys))     # of the validation split; of equal ones the first
        assert {k: v["accuracy"] for k, v in done["val"].items()} == {
            k: v["accuracy"] for k, v in log[best]["val"].items()}
        assert done["seconds"] == pytest.approx(sum(line["seconds"] for line in log[1:]))
        assert done["peak_memory_mib"] > 0
        assert f"{base.out / run}: best epoch {best} of {epochs}, validation" in base.printed
    assert log[-1]["loss"] < log[1]["loss"]     # it does learn
    for split in ("val", "test"):
        assert set(base.result[split]) == {"audio", "visual", "prob", "logits"}
    for m, entry in told["unimodal"].items():
        model = base.out / "toy" / f"unimodal-{m}-s0" / "model.safetensors"
        assert entry == dict(run=f"unimodal-{m}-s0", sha256=fingerprint.sha256(model))


def test_mmlora_stores_A_and_B_only(base):
    stored = tensors(base.out, MMLORA)
    assert len(stored) == 2 * 3 * 6     # two encoders, three blocks, A and B of q, k, v
    assert all(name.endswith(("lora_A", "lora_B")) for name in stored)
    assert (sum(t.numel() for t in stored.values()) == base.result["trained_parameters"]
            == of_lora(*BOTH))
    # Else most tests of this file would compare B = 0.
    assert base.result["best_epoch"] > 0 and all(t.any() for t in stored.values())
    unimodal = tensors(base.out, "toy/unimodal-audio-s0")
    trained = result(base.out, "toy/unimodal-audio-s0")["trained_parameters"]
    assert trained == sum(t.numel() for t in unimodal.values())


def test_ume_is_the_fused_predictions_of_the_unimodal_runs(base, root):
    alone = {m: tensors(base.out, f"toy/unimodal-{m}-s0", "logits") for m in BOTH}
    for split in ("val", "test"):
        labels = np.load(root / "toy-s0" / split / "labels.npy")
        z = {m: alone[m][f"{split}.{m}"].double() for m in alone}
        ume = base.result["ume"][split]
        mean = sum(v.softmax(-1) for v in z.values()) / 2
        loss = float(-mean[range(len(labels)), labels].log().mean())
        assert ume["prob"]["accuracy"] == pytest.approx(accuracy(mean, labels), abs=1e-6)
        assert ume["prob"]["loss"] == pytest.approx(loss, rel=1e-5)
        product = accuracy(z["audio"] + z["visual"], labels)
        assert ume["logits"]["accuracy"] == pytest.approx(product, abs=1e-6)
        for m in z:
            assert ume[m]["accuracy"] == pytest.approx(accuracy(z[m], labels), abs=1e-6)
            assert ume[m] == result(base.out, f"toy/unimodal-{m}-s0")[split][m]


def test_epoch_0_is_the_unimodal_ensemble(base):
    """B = 0: not nearly, but exactly. So by validation MMLoRA can only stay or improve."""
    assert log_of(base.out, MMLORA)[0]["val"] == base.result["ume"]["val"]
    now, before = base.result["val"]["prob"], base.result["ume"]["val"]["prob"]
    assert (now["accuracy"], -now["loss"]) >= (before["accuracy"], -before["loss"])


@pytest.mark.parametrize("words", ["train_unimodal.py --modality audio", "train_joint.py --rank 2",
                                   "baselines.no_umft", "baselines.concat"])
def test_test_split_is_opened_after_training(words, copied, root, tmp_path, monkeypatch):
    order, log = [], runs.Run.log

    class Watched(data.Split):
        def __init__(self, folder, name, *settings):
            order.append(name)
            super().__init__(folder, name, *settings)

    def watched_log(self, line):
        order.append(line["epoch"])
        log(self, line)

    monkeypatch.setattr(data, "Split", Watched)
    monkeypatch.setattr(runs.Run, "log", watched_log)
    out = copied if "joint" in words else tmp_path / "new"
    call(*words.split(), "--epochs", 2, out=out, root=root)
    assert order.index("test") > order.index(2) and "train" in order[:order.index(0)]


# ---- Variants of the method ----

def test_full_ume(base, copied, root):
    """Beside it stands what it is compared with, MMLoRA, from the run that is there."""
    # At the default rate four epochs improve nothing on so few samples.
    printed = call("baselines.full_ume", *SMALL, "--lr", 1e-3, out=copied, root=root)
    full, stored = (read(copied, "toy/full-lr0.001-s0") for read in (result, tensors))
    assert full["method"] == "full"
    assert (full["trained_parameters"] == sum(t.numel() for t in stored.values())
            == whole("audio") + whole("visual"))
    assert full["ume"] == base.result["ume"]
    before = {}
    for m in BOTH:
        before |= tensors(base.out, f"toy/unimodal-{m}-s0")
    assert full["best_epoch"] > 0 and stored.keys() == before.keys()
    # Every tensor has moved.
    assert not [name for name in stored if torch.equal(stored[name], before[name])]

    shown, lora = table(printed), "MMLoRA, rank 1, audio+visual"
    assert list(shown)[-2:] == [lora, "Fully fine-tuned UME, lr 0.001"] and len(shown) == 7
    assert shown[lora] == table(base.printed)[lora]
    config = copied / MMLORA / "config.json"     # but not if that began from other uni-modal models
    told = config.read_text()
    sha256 = json.loads(told)["settings"]["unimodal"]["audio"]["sha256"]
    config.write_text(told.replace(sha256, "0"))
    assert lora not in table(call("baselines.full_ume", *SMALL, "--lr", 1e-3,
                                  out=copied, root=root))


def test_separate_losses_are_those_of_the_modalities_alone(base, copied, root, monkeypatch):
    """The control: the gradient of each modality's LoRA is that of its own cross-entropy, whatever
    the other one predicts. MMLoRA's is not. Asked of every batch, when its gradients are there."""
    seen, batch, inputs, count = [], [], data.inputs, runs.Run.count

    def watched_inputs(split, index, models, *rest):
        x, y = inputs(split, index, models, *rest)
        batch[:] = x, models
        return x, y

    def watched_count(self, loss, logits, y):
        x, models = batch
        alone, alike = {}, []
        for m in models:
            ours = [p for p in models[m].parameters() if p.requires_grad]
            alone[m] = nn.functional.cross_entropy(models[m](x[m]), y)
            for p, grad in zip(ours, torch.autograd.grad(alone[m] / 2, ours)):
                alike.append(torch.allclose(p.grad, grad, atol=1e-7))
        mean = sum(alone.values()).item() / 2
        seen.append((all(alike), loss.item() == pytest.approx(mean, rel=1e-5)))
        count(self, loss, logits, y)

    monkeypatch.setattr(data, "inputs", watched_inputs)
    monkeypatch.setattr(runs.Run, "count", watched_count)
    printed = call("baselines.separate", *QUICK, out=copied, root=root)
    steps = 4 * math.ceil(200 / 100)
    assert seen == [(True, True)] * steps
    seen.clear()
    call("train_joint.py", *QUICK, "--rank", 5, out=copied, root=root)
    assert seen == [(False, False)] * steps
    run = copied / "toy/separate-all-r1-s0"
    done = result(copied, run)
    assert done["method"] == "separate"     # A and B alone, as MMLoRA
    assert sum(t.numel() for t in tensors(copied, run).values()) == of_lora(*BOTH)
    assert list(table(printed))[-2:] == ["MMLoRA, rank 1, audio+visual",
                                         "Control: separate losses, rank 1, audio+visual"]
    again = evaluated(run, monkeypatch=monkeypatch, root=root)
    assert again["together, fusion prob"]["accuracy"] == done["test"]["prob"]["accuracy"]


def test_of_several_learning_rates_the_best_on_validation_is_shown(copied, root):
    for m in BOTH:     # of seed 1, too
        words = "--epochs 3 --batch-size 50 --seed 1".split()
        call("train_unimodal.py", "--modality", m, *words, out=copied, root=root)
    words = "--epochs 3 --batch-size 50 --rank 2 --seeds 0 1 --lr 1e-30 0.01 0.03".split()
    printed = call("train_joint.py", *words, out=copied, root=root)
    found, mean = {}, {}
    for lr, name in ((1e-30, "-lr1e-30"), (0.01, ""), (0.03, "-lr0.03")):
        found[lr] = [result(copied, f"toy/mmlora-all-r2{name}-s{seed}") for seed in (0, 1)]
        mean[lr] = sum(r["val"]["prob"]["accuracy"] for r in found[lr]) / 2
    told = re.search(r"learning rate (\S+), best on validation: (.*)", printed)
    best = float(told[1])
    assert told[2] == ", ".join(f"{lr:g} {100 * v:.1f}" for lr, v in mean.items())
    assert mean[1e-30] < mean[best] == max(mean.values())
    cells = list(table(printed).values())[-1]
    assert cells[0].startswith(
        f"{50 * sum(r['test']['prob']['accuracy'] for r in found[best]):.1f}")


def test_step_1_takes_one_learning_rate(root, tmp_path):
    words = "--modality audio --epochs 1 --lr 1e-3 2e-3".split()
    told = error("train_unimodal.py", *words, out=tmp_path, root=root)
    assert "one learning rate" in told and not list(tmp_path.iterdir())


def test_the_choice_of_a_learning_rate_never_looks_at_test(monkeypatch, capsys):
    # lr -> accuracy and loss on validation; test is the other way round.
    scores = {1: (0.9, 0.3), 2: (0.8, 0.1), 3: (0.9, 0.2), 4: (0.7, 0.0)}
    shown = []

    def train(args, seed):
        accuracy, loss = scores[args.lr]
        found = dict(val=dict(joint=dict(accuracy=accuracy, loss=loss)),
                     test=dict(joint=dict(accuracy=1 - accuracy)))
        return SimpleNamespace(lr=args.lr, seed=seed, result=found, settings=dict(fusion="joint"))

    def chosen(*words):
        monkeypatch.setattr(sys, "argv", ["train_joint.py", *words])
        arguments.train_all(arguments.parser("", "train_joint.py"), train)
        return [(run.lr, run.seed) for run in shown.pop()]

    monkeypatch.setattr(report, "closing_table", shown.append)
    monkeypatch.setattr(report, "next_steps", lambda *_: None)
    # Of equals the lower loss.
    assert chosen("--lr", "1", "2", "3", "4", "--seeds", "5", "6") == [(3, 5), (3, 6)]
    told = "learning rate 3, best on validation: 1 90.0, 2 80.0, 3 90.0, 4 70.0"
    assert capsys.readouterr().out.strip() == told
    scores[None] = (0, 0)
    assert chosen("--seed", "7") == [(None, 7)] and not capsys.readouterr().out


def test_no_umft(root, tmp_path):
    words = "--epochs 3 --batch-size 50".split()
    printed = call("baselines.no_umft", *words, out=tmp_path, root=root)
    run = "toy/no-umft-all-r1-s0"
    done, stored = result(tmp_path, run), tensors(tmp_path, run)
    assert [f.name for f in (tmp_path / "toy").iterdir()] == ["no-umft-all-r1-s0"]
    assert "ume" not in done
    assert list(table(printed)) == ["MMLoRA without UMFT, rank 1, audio+visual"]
    # LoRA and heads
    assert done["trained_parameters"] == of_lora(*BOTH) + sum(WIDTH[m] * 8 + 8 for m in BOTH)
    assert done["best_epoch"] > 0
    torch.manual_seed(0)
    for m, encoder in done["encoders"].items():     # the same draws as in the script
        fresh = UnimodalModel(build(encoder), 8)
        load_public(fresh.encoder, download(encoder))
        add_lora(fresh)
        for name, t in fresh.state_dict().items():
            trained = name.startswith("head.") or name.endswith(("lora_A", "lora_B"))
            assert torch.equal(t, stored[f"{m}.{name}"]) != trained, name


def test_lora_on_one_modality_leaves_the_other_alone(base, copied, root):
    call("train_joint.py", *SMALL, "--lora", "audio", out=copied, root=root)
    run = "toy/mmlora-audio-r1-s0"
    done = result(copied, run)
    assert done["trained_parameters"] == of_lora("audio") and done["best_epoch"] > 0
    assert all(name.startswith("audio.") for name in tensors(copied, run))
    logits = tensors(copied, run, "logits")
    for name in logits:     # val.audio, ...
        alone = tensors(base.out, f"toy/unimodal-{name.split('.')[1]}-s0", "logits")[name]
        assert torch.equal(logits[name], alone) == ("visual" in name)


@pytest.mark.parametrize("words, run", [("all", "all"), ("visual audio", "all"),
                                        ("audio visual audio", "all"), ("audio audio", "audio")])
def test_lora_takes_a_set_of_modalities(words, run, copied, root):
    """In any order, however often one is named: the same run, under the same name."""
    epochs = ["--epochs", 1] if run == "audio" else []     # the others are there
    call("train_joint.py", *SMALL, *epochs, "--lora", *words.split(), out=copied, root=root)
    there = {f.name for f in copied.glob("toy/mmlora-*")}
    assert there == {"mmlora-all-r1-s0", f"mmlora-{run}-r1-s0"}


def test_rank_and_averaged_logits(base, copied, root):
    printed = call("baselines.logits", *QUICK, "--rank", 2, out=copied, root=root)
    run = "toy/logits-all-r2-s0"
    done, stored = result(copied, run), tensors(copied, run)
    assert done["fusion"] == "logits"
    assert (done["trained_parameters"] == of_lora(*BOTH, rank=2) == 2 * of_lora(*BOTH)
            == sum(t.numel() for t in stored.values()))
    assert {min(t.shape) for t in stored.values()} == {2}
    # Selected by what is averaged.
    ours = [line["val"]["logits"] for line in log_of(copied, run)]
    keys = [(scores["accuracy"], -scores["loss"]) for scores in ours]
    assert done["best_epoch"] == keys.index(max(keys))
    assert done["val"]["logits"]["accuracy"] >= done["ume"]["val"]["logits"]["accuracy"]
    label, cells = list(table(printed).items())[-1]
    assert label == "LoRA on averaged logits, rank 2, audio+visual"
    assert cells[0].startswith(f"{100 * done['test']['logits']['accuracy']:.1f}")
    call("train_joint.py", *QUICK, "--rank", 2, out=copied, root=root)
    prob = "toy/mmlora-all-r2-s0"
    assert {min(t.shape) for t in tensors(copied, prob).values()} == {2}
    # The loss is of what is averaged, too.
    assert log_of(copied, run)[1]["loss"] != log_of(copied, prob)[1]["loss"]


def test_seeds(root, tmp_path):
    words = "--umft-epochs 2 --epochs 1 --batch-size 50 --seeds 1 2 0".split()
    printed = call("train_joint.py", *words, out=tmp_path, root=root)
    assert "Mean +- standard deviation of 3 seeds" in printed
    ours = [result(tmp_path, f"toy/mmlora-all-r1-s{seed}") for seed in (1, 2, 0)]
    audio = [result(tmp_path, f"toy/unimodal-audio-s{seed}") for seed in (1, 2, 0)]
    for label, scores in [("UME, probabilities averaged", [r["ume"]["test"]["prob"] for r in ours]),
                          ("MMLoRA, rank 1, audio+visual", [r["test"]["prob"] for r in ours]),
                          ("audio alone (UMFT)", [r["test"]["audio"] for r in audio])]:
        values = [100 * s["accuracy"] for s in scores]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert table(printed)[label][0] == f"{mean:.1f} +- {deviation:.1f}"
        off = statistics.mean(100 * s["groups"]["sight off"] for s in scores)
        assert table(printed)[label][3] == f"{off:.1f}"


def test_each_seed_once(root, tmp_path):
    assert "each seed once" in error("train_joint.py", "--seeds", 1, 1, out=tmp_path, root=root)


def test_other_encoders_for_one_modality_or_all(tmp_path, monkeypatch):
    # Or it takes long.
    monkeypatch.setattr(toy, "SIZES", {"toy": {"train": 30, "val": 20, "test": 20}})
    words = "--epochs 1 --umft-epochs 1 --encoder visual=resnet18 --pretrained visual=none".split()
    call("train_joint.py", *words, out=tmp_path, root=tmp_path / "data")
    run, = tmp_path.glob("toy/mmlora-*")
    encoders = {"audio": "audio_vit_toy", "visual": "resnet18"}
    assert result(tmp_path, run)["encoders"] == encoders
    there = {f.name for f in tmp_path.glob("toy/unimodal-*")}
    assert there == {"unimodal-audio-s0", "unimodal-visual-resnet18-s0"}
    stored = load_file(run / "model.safetensors")     # no BatchNorm statistics among them
    assert sum("lora_A" in name for name in stored) == 9 + 20 and len(stored) == 2 * 29
    of = arguments.of_modality
    assert of(["audio=resnet18", "vit_b32"], "audio") == "resnet18"
    assert of(["audio=resnet18", "vit_b32"], "visual") == "vit_b32"
    assert of(["audio=resnet18"], "visual", "vit_b16") == "vit_b16"
    assert of(["none"], "visual", "vit_b16") == "none" and of([], "visual") is None


def test_bf16(root, tmp_path):
    logits = {}
    for precision in ("bf16", "fp32"):
        words = ["--epochs", 1, "--precision", precision]
        call("baselines.no_umft", *words, out=tmp_path / precision, root=root)
        run = "toy/no-umft-all-r1-s0"
        logits[precision] = tensors(tmp_path / precision, run, "logits")["test.audio"]
    ours, exact = logits["bf16"], logits["fp32"]
    assert ours.dtype == torch.float32 and not torch.equal(ours, exact)
    assert (ours - exact).abs().max() < 0.1


def test_several_labels_a_sample(root, tmp_path):
    """The same scripts where a sample has several labels: binary losses, F1 instead of accuracy."""
    words = "--dataset pairs --encoder audio=audio_vit_toy visual=vit_toy".split()
    words += "--umft-epochs 4 --epochs 2 --batch-size 50".split()
    printed = call("train_joint.py", *words, out=tmp_path, root=root)
    run, = tmp_path.glob("pairs/mmlora-*")
    done, logits = result(tmp_path, run), tensors(tmp_path, run, "logits")
    labels = np.load(root / "pairs/test/labels.npy")
    y = torch.from_numpy(labels)
    p = sum(logits[f"test.{m}"].double().sigmoid() for m in BOTH) / 2
    micro, macro = naive_f1((p > 0.5).tolist(), labels.tolist())
    scores = done["test"]["prob"]
    assert scores["f1_micro"] == pytest.approx(micro) and 0 < macro < micro
    assert scores["f1_macro"] == pytest.approx(macro)
    loss = float(-torch.where(y.bool(), p, 1 - p).log().mean())
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    cells = list(table(printed).values())[-1]
    assert cells[:2] == [f"{100 * micro:.1f}", f"{100 * macro:.1f}"]
    assert "UME, one temperature: not defined for several labels a sample" in printed
    for more in (["--run", run, "--temperature"], ["--compare", run, "ume"]):
        assert "several labels a sample" in error("evaluate.py", *more, "--data-root", root)
    val = [line["val"]["prob"] for line in log_of(tmp_path, run)]
    keys = [(scores["f1_micro"], -scores["loss"]) for scores in val]
    assert done["best_epoch"] == keys.index(max(keys))


# ---- evaluate.py ----

def evaluated(*words, monkeypatch, root):
    """Row label -> scores, unrounded, of one `evaluate.py --run words`."""
    seen = {}

    def print_table(rows, *_):
        for label, found in rows:
            seen[label] = found[0][0]

    monkeypatch.setattr(report, "print_table", print_table)
    argv = ["evaluate.py", "--run", *map(str, words), "--data-root", str(root)]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    return seen


def test_evaluate_reproduces_the_stored_scores(base, copied, root, monkeypatch):
    call("baselines.full_ume", *QUICK, out=copied, root=root)
    call("baselines.no_umft", "--epochs", 2, "--rank", 2, "--lora", "visual", out=copied, root=root)
    call("train_joint.py", *QUICK, "--lora", "visual", out=copied, root=root)
    number = {"unimodal": 1, "no": 3}
    for run in sorted((copied / "toy").iterdir()):
        done, seen = result(copied, run), evaluated(run, monkeypatch=monkeypatch, root=root)
        assert len(seen) == number.get(run.name.split("-")[0], 6)
        # "audio alone", "audio alone (UMFT)", "UME, fusion prob", "together, fusion prob"
        for label, scores in seen.items():
            test = done["ume"]["test"] if "UM" in label else done["test"]
            assert scores == test[label.split()[0] if "alone" in label else label.split()[-1]]
    seen = evaluated(base.run, "--fusion", "logits", monkeypatch=monkeypatch, root=root)
    assert seen["together, fusion logits"] == base.result["test"]["logits"]


def test_evaluate_averages_as_the_run_did(copied, root, monkeypatch):
    call("baselines.logits", *QUICK, out=copied, root=root)
    run = copied / "toy/logits-all-r1-s0"
    seen = evaluated(run, monkeypatch=monkeypatch, root=root)
    assert seen["together, fusion logits"] == result(copied, run)["test"]["logits"]


def test_evaluate_without_a_modality_and_by_entropy(base, root, monkeypatch):
    seen = evaluated(base.run, "--drop", "audio", monkeypatch=monkeypatch, root=root)
    assert seen == {"visual alone (UMFT)": base.result["ume"]["test"]["visual"],
                    "visual alone": base.result["test"]["visual"]}
    stored = tensors(base.out, MMLORA, "logits")
    labels = np.load(root / "toy-s0/test/labels.npy")
    z = {m: stored[f"test.{m}"] for m in BOTH}
    fused = []
    for i in range(len(labels)):     # a sure modality counts more, sample by sample
        p = [z[m][i].double().softmax(-1) for m in BOTH]
        weight = [math.exp(sum(float(q) * math.log(float(q)) for q in one)) for one in p]
        fused.append((weight[0] * p[0] + weight[1] * p[1]) / sum(weight))
    fused = torch.stack(fused)
    ours = metrics.fuse(z, "entropy")
    torch.testing.assert_close(ours.double(), fused, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, metrics.fuse(z), atol=1e-3)
    seen = evaluated(base.run, "--fusion", "entropy", monkeypatch=monkeypatch, root=root)
    right = seen["together, fusion entropy"]["accuracy"]
    assert right == pytest.approx(accuracy(fused, labels), abs=1e-6)


def test_predictions_do_not_depend_on_the_batch(root):
    torch.manual_seed(0)
    split, recipe = data.Split(root / "toy-s0", "test"), settings.settings_for("toy")
    logits, seen = {}, []
    for m, encoder in (("audio", "audio_vit_toy"), ("visual", "resnet18")):     # BatchNorm, too
        models = nn.ModuleDict({m: UnimodalModel(build(encoder), 8)}).train()

        def forward(x):
            assert not models[m].training
            seen.append(len(x[m]))
            return {m: models[m](x[m])}

        def predict(index=None):
            return metrics.predict(forward, models, split, "cpu", recipe, index)[m]
        whole = predict()
        assert whole.shape == (120, 8) and models.training     # as they were
        for size in (1, 17):
            apart = torch.cat([predict(index) for index in torch.arange(40).split(size)])
            torch.testing.assert_close(apart, whole[:40], rtol=1e-4, atol=1e-4)
        recipe = settings.settings_for("toy") | dict(micro_batch=16)
        seen.clear()
        torch.testing.assert_close(predict(), whole, rtol=1e-4, atol=1e-4)
        assert max(seen) == 16                                 # a small memory stays small
        logits[m] = whole
    for rule in metrics.FUSIONS:
        for multilabel in (False, True):
            whole, apart = metrics.fuse(logits, rule, multilabel), []
            for i in range(120):
                one = {m: z[i:i + 1] for m, z in logits.items()}
                apart.append(metrics.fuse(one, rule, multilabel))
            torch.testing.assert_close(whole, torch.cat(apart))
            assert multilabel or torch.allclose(whole.sum(-1), torch.ones(120))


def test_a_changed_unimodal_model_is_noticed(copied, root):
    file = copied / "toy/unimodal-audio-s0/model.safetensors"
    changed = load_file(file)
    changed["audio.head.bias"][0] += 1
    save_file(changed, file)
    told = error("evaluate.py", "--run", copied / MMLORA, root=root)
    assert "unimodal-audio-s0/model.safetensors is not the model" in told
    printed = call("train_joint.py", *SMALL, out=copied, root=root)
    assert f"its uni-modal models have changed: training {copied / MMLORA} anew" in printed
    assert len(list(copied.glob("toy/old/mmlora-all-r1-s0-*/result.json"))) == 1
    file.unlink()
    assert "unimodal-audio-s0" in error("evaluate.py", "--run", copied / MMLORA, root=root)


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "other rank", "cut short"])
def test_a_model_that_does_not_fit_is_refused(spoil, copied, root):
    file = copied / MMLORA / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("lora_B"))
    if spoil == "missing":
        del stored[name]     # would pass for B = 0
    if spoil == "unexpected":
        stored[name + "x"] = torch.zeros(1)
    if spoil == "other rank":
        stored[name] = torch.zeros(32, 2)
    save_file(stored, file)
    if spoil == "cut short":
        file.write_bytes(file.read_bytes()[:-8])
    assert "model.safetensors" in error("evaluate.py", "--run", copied / MMLORA, root=root)


def test_plot(base, copied, root):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    call("train_joint.py", *SMALL, "--plot", out=copied, root=root)
    assert (copied / MMLORA / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(base, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = error("train_joint.py", *SMALL, "--plot", out=base.out, root=root)
    assert "pip install matplotlib" in told


# ---- Mistakes ----

@pytest.mark.parametrize("script, words, message", [
    ("train_unimodal.py", "--modality audio --dataset nosuch",
     "no prepared data in .*nosuch. .* python -m prepare.custom INDEX.jsonl --name nosuch"),
    ("train_joint.py", "--dataset nosuch", "no prepared data"),
    ("train_unimodal.py", "--modality smell", "--modality smell: toy has audio, visual"),
    ("train_joint.py", "--lora smell", "--lora smell: toy has audio, visual, or all"),
    ("train_unimodal.py", "--modality audio --encoder vit_toy",
     "vit_toy reads frames or image, but audio of toy is audio"),
    ("train_unimodal.py", "--modality audio --encoder audio_vit_b --pretrained none",
     r"takes spectrograms of \(128, 204\), .* \(32, 64\)"),
    ("train_unimodal.py", "--modality audio --encoder resnt18", "resnt18"),
    ("train_unimodal.py", "--modality audio --pretrained nowhere.pth",
     "no checkpoint at nowhere.pth"),
    ("baselines.no_umft", "--pretrained audio=nowhere.pth", "no checkpoint at nowhere.pth"),
    ("train_unimodal.py", "--modality audio --encoder smell=resnet18 --epochs 1", "smell"),
    ("train_unimodal.py", "--modality audio --pretrained smell=none --epochs 1", "smell"),
    ("train_unimodal.py", "--modality audio --device abacus", "abacus"),
])
def test_mistakes_get_one_line_and_leave_nothing_behind(script, words, message, root, tmp_path):
    assert re.search(message, error(script, *words.split(), out=tmp_path, root=root))
    # Or the corrected command would find a run with other settings.
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


@pytest.mark.parametrize("words", [
    "--epochs 0", "--epochs -1", "--batch-size 0", "--batch-size -1", "--micro-batch -3", "--lr 0",
    "--lr -1", "--lr nan", "--lr inf", "--rank 0", "--rank -1"])
def test_impossible_numbers_are_refused(words, root, tmp_path):
    script = ["train_unimodal.py", "--modality", "audio"]
    if "rank" in words:
        script = ["baselines.no_umft"]
    if "epochs" not in words:
        script += ["--epochs", 1]
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stderr(io.StringIO()) as said:
        call(*script, *words.split(), out=tmp_path, root=root)
    assert exit.value.code not in (None, 0) and "is not above zero" in said.getvalue()
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_a_corrected_command_runs(root, tmp_path):
    """Nobody should have to delete a folder because of a typing mistake."""
    words = "--modality audio --epochs 1".split()
    error("train_unimodal.py", *words, "--pretrained", "nowhere.pth", out=tmp_path, root=root)
    call("train_unimodal.py", *words, out=tmp_path, root=root)


def test_mistakes_in_evaluate(base, root, tmp_path):
    told = error("evaluate.py", "--run", tmp_path / "nowhere", root=root)
    assert "nowhere holds no finished run" in told
    assert "--drop smell" in error("evaluate.py", "--run", base.run, "--drop", "smell", root=root)
    told = error("evaluate.py", "--run", base.run, "--drop", "audio", "visual", root=root)
    assert "no modality" in told


def test_a_diverged_run_is_no_result(root, tmp_path):
    """NaN has an argmax, too: it may well beat epoch 0. (And NaN is not JSON.)"""
    words = "--modality audio --lr 1e6 --epochs 2".split()
    message = error("train_unimodal.py", *words, out=tmp_path, root=root)
    assert re.search("--lr|learning rate", message)
    assert not list(tmp_path.rglob("result.json"))


def test_git_is_not_needed(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    runs.commit.cache_clear()
    words = "--modality audio --epochs 1".split()
    call("train_unimodal.py", *words, out=tmp_path, root=root)
    runs.commit.cache_clear()
    config = json.loads((tmp_path / "toy/unimodal-audio-s0/config.json").read_text())
    assert config["commit"] is None


def test_exit_codes_and_streams(base, root, tmp_path):
    """Of a process of its own. One that ends with an error is in test_fingerprint.py."""
    good = process("train_joint.py", *SMALL, out=base.out, root=root)     # finished: only the table
    printed, complaint = good.communicate()
    assert good.returncode == 0 and not complaint and table(printed) == table(base.printed)
    told = [line for line in printed.splitlines() if "nothing to do" in line]
    assert len(told) == 3 and re.fullmatch(
        f"{base.run}: trained on 20..-..-.. ..:.., nothing to do", told[-1])


def test_what_to_type_next_is_told_and_runs(base, root):
    """The commands under the table, as they stand there; the picture is test_plot's."""
    told = [line.strip() for line in base.printed.splitlines() if line.startswith("    python ")]
    assert len(told) >= 3 and any("--drop audio" in line for line in told)
    assert any(line.startswith("python -m paper.tables 5 --dataset toy ") for line in told)
    before = everything(base.out)
    for line in told:
        _, script, *words = line.split("#")[0].replace("-m ", "").split()
        assert str(base.run) in words or str(base.out) in words
        assert "paper.tables" in script or str(root) in words     # where the data are
        if "--plot" not in words:
            assert re.search(r"\d\.\d", call(script, *words))
    assert everything(base.out) == before


def test_data_of_another_size_are_not_answered_with_old_results(base, root, tmp_path):
    shutil.copytree(root / "toy-s0", tmp_path / "toy-s0")
    file = tmp_path / "toy-s0" / "dataset.json"
    counts = {"train": 1, "val": 1, "test": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(counts=counts)))
    assert "samples" in error("train_joint.py", *SMALL, out=base.out, root=tmp_path)
