"""The three scripts as their users run them, and evaluate.py on what they leave behind."""
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

import checkpoints
import data
import evaluate
import paper
import train_unimodal
from encoders import UnimodalModel, build
from lora import add_lora
from running import MMLORA, SMALL, accuracy, call, error, log_of, process, result, table, tensors
from test_parts import naive_f1


# ------------------------------------------------------------------------------------------------ the whole chain
def test_closing_table(base):
    """Every modality alone, their ensemble under both averages, MMLoRA: the numbers of result.json, with the standard error of one run."""
    rows, ume, test = table(base.printed), base.result["ume"]["test"], base.result["test"]
    wanted = {"audio alone (UMFT)": (ume["audio"], 22_412), "visual alone (UMFT)": (ume["visual"], 24_332),
              "UME, probabilities averaged": (ume["prob"], 0), "UME, logits averaged": (ume["logits"], 0),
              "MMLoRA, rank 1, LoRA on audio + visual": (test["prob"], 768)}
    assert list(rows) == list(wanted)
    for label, (scores, trained) in wanted.items():
        p = scores["accuracy"]
        assert rows[label][0] == f"{100 * p:.1f} +- {100 * math.sqrt(p * (1 - p) / 120):.1f}"
        assert rows[label][1:4] == [f"{100 * scores['groups'][g]:.1f}" for g in ("mimics", "clean", "noisy")]
        assert rows[label][4].replace(",", "") == str(trained)
    assert "120 samples, 12 classes" in base.printed


@pytest.mark.parametrize("words", ["", "--no-umft --fusion logits --rank 16", "--fusion logits --lora visual"])
def test_table_is_aligned(words, base, copied, root):
    printed = call("train_joint.py", *SMALL, "--epochs", 1, *words.split(), out=copied, root=root) if words else base.printed
    header = next(line for line in printed.splitlines() if " accuracy " in line)
    numbers = [line for line in printed.splitlines() if re.search(r"\d\.\d \+-", line)]
    assert len(numbers) == len(table(printed)) > 0
    for line in numbers:     # the end of the first number's column is the end of its heading
        assert re.search(r"\d \+- \d+\.\d$", line[:header.index("accuracy") + len("accuracy")]), line


def test_run_folders(base):
    for run, method, epochs in [(MMLORA, "mmlora", 4)] + [(f"toy/unimodal-{m}-s0", "unimodal", 15) for m in ("audio", "visual")]:
        folder, done, log = base.out / run, result(base.out, run), log_of(base.out, run)
        assert {f.name for f in folder.iterdir()} == {"config.json", "log.jsonl", "model.safetensors", "logits.safetensors", "result.json"}
        config = json.loads((folder / "config.json").read_text())
        settings = config["settings"]
        assert settings["method"] == done["method"] == method and settings["epochs"] == epochs and settings["batch_size"] == 16
        assert "train_joint.py" in config["command"] and config["versions"]["torch"] == torch.__version__
        assert [line["epoch"] for line in log] == list(range(epochs + 1)) and log[0]["loss"] is None
        assert all(line["loss"] > 0 and 0 <= line["train"] <= 1 for line in log[1:])
        assert all(line["seconds"] > 0 and line["samples_per_second"] > 0 for line in log[1:])
        chosen = "prob" if method == "mmlora" else settings["modality"]
        keys = [(line["val"][chosen]["accuracy"], -line["val"][chosen]["loss"]) for line in log]
        assert done["best_epoch"] == keys.index(max(keys))     # of the validation split; of equal ones the first
        assert {k: v["accuracy"] for k, v in done["val"].items()} == {k: v["accuracy"] for k, v in log[done["best_epoch"]]["val"].items()}
        assert done["seconds"] == pytest.approx(sum(line["seconds"] for line in log[1:])) and done["peak_memory_mib"] > 0
    assert log[-1]["loss"] < log[1]["loss"]     # it does learn
    assert [set(x) for x in (base.result["val"], base.result["test"])] == [{"audio", "visual", "prob", "logits"}] * 2
    for m, entry in json.loads((base.run / "config.json").read_text())["settings"]["unimodal"].items():
        assert entry == dict(run=f"unimodal-{m}-s0", sha256=checkpoints.sha256(base.out / "toy" / f"unimodal-{m}-s0" / "model.safetensors"))


def test_mmlora_stores_A_and_B_only(base):
    stored = tensors(base.out, MMLORA)
    assert len(stored) == 2 * 2 * 6 and all(name.endswith(("lora_A", "lora_B")) for name in stored)     # two encoders, two blocks, q, k, v
    assert sum(t.numel() for t in stored.values()) == base.result["trained_parameters"] == 768
    assert base.result["best_epoch"] > 0 and all(t.any() for t in stored.values())     # else most tests of this file would compare B = 0
    unimodal = tensors(base.out, "toy/unimodal-audio-s0")
    assert result(base.out, "toy/unimodal-audio-s0")["trained_parameters"] == sum(t.numel() for t in unimodal.values())


def test_ume_is_the_fused_predictions_of_the_unimodal_runs(base, root):
    alone = {m: tensors(base.out, f"toy/unimodal-{m}-s0", "logits") for m in ("audio", "visual")}
    for split in ("val", "test"):
        labels = np.load(root / "toy-s0" / split / "labels.npy")
        z = {m: alone[m][f"{split}.{m}"].double() for m in alone}
        ume = base.result["ume"][split]
        mean = sum(v.softmax(-1) for v in z.values()) / 2
        assert ume["prob"]["accuracy"] == pytest.approx(accuracy(mean, labels), abs=1e-6)
        assert ume["prob"]["loss"] == pytest.approx(float(-mean[range(len(labels)), labels].log().mean()), rel=1e-5)
        assert ume["logits"]["accuracy"] == pytest.approx(accuracy(z["audio"] + z["visual"], labels), abs=1e-6)
        for m in z:
            assert ume[m]["accuracy"] == pytest.approx(accuracy(z[m], labels), abs=1e-6)
            assert ume[m] == result(base.out, f"toy/unimodal-{m}-s0")[split][m]


def test_epoch_0_is_the_unimodal_ensemble(base):
    """B = 0: not nearly, but exactly. So by the validation score MMLoRA can only stay or improve."""
    assert log_of(base.out, MMLORA)[0]["val"] == base.result["ume"]["val"]
    now, before = base.result["val"]["prob"], base.result["ume"]["val"]["prob"]
    assert (now["accuracy"], -now["loss"]) >= (before["accuracy"], -before["loss"])


def test_test_split_is_opened_after_training(root, tmp_path, monkeypatch):
    order, opened, logged = [], data.Split, checkpoints.Run.log
    monkeypatch.setattr(data, "Split", lambda folder, name: order.append(name) or opened(folder, name))
    monkeypatch.setattr(checkpoints.Run, "log", lambda self, line: order.append(line["epoch"]) or logged(self, line))
    call("train_joint.py", "--no-umft", "--epochs", 2, out=tmp_path, root=root)
    assert order.index("test") > order.index(2) and "train" in order[:order.index(0)]


# ------------------------------------------------------------------------------------------------ variants of the method
def test_tune_full(base, copied, root):
    printed = call("train_joint.py", *SMALL, "--tune", "full", out=copied, root=root)
    full, stored = result(copied, "toy/full-s0"), tensors(copied, "toy/full-s0")
    assert full["method"] == "full" and full["trained_parameters"] == sum(t.numel() for t in stored.values()) == 22_412 + 24_332
    assert full["ume"] == base.result["ume"]
    shown, lora = table(printed), "MMLoRA, rank 1, LoRA on audio + visual"     # beside it what it is compared with, from the run that is there
    assert list(shown)[-2:] == [lora, "Fully fine-tuned UME"] and len(shown) == 6 and shown[lora] == table(base.printed)[lora]
    config = copied / MMLORA / "config.json"                                   # but not if that began from other uni-modal models
    config.write_text(config.read_text().replace(json.loads(config.read_text())["settings"]["unimodal"]["audio"]["sha256"], "0"))
    assert lora not in table(call("train_joint.py", *SMALL, "--tune", "full", out=copied, root=root))
    before = {**tensors(base.out, "toy/unimodal-audio-s0"), **tensors(base.out, "toy/unimodal-visual-s0")}
    assert full["best_epoch"] > 0 and stored.keys() == before.keys()
    assert not [name for name in stored if torch.equal(stored[name], before[name])]     # every tensor has moved


def test_separate_losses_are_those_of_the_modalities_alone(base, copied, root, monkeypatch):
    """The control: the gradient of each modality's LoRA is that of its own cross-entropy, whatever the other one predicts."""
    seen, fit = [], train_unimodal.fit

    def watched(args, run, models, objective, *rest):
        x = {m: torch.randn(8, 1, *shape) for m, shape in (("audio", (1, 32, 64)), ("visual", (3, 32, 32)))}
        y = torch.arange(8)
        loss, z = objective(x, y)
        loss.backward()
        for m in models:
            ours = [p.grad.clone() for p in models[m].parameters() if p.requires_grad]
            models[m].zero_grad()
            (nn.functional.cross_entropy(models[m](x[m]), y) / 2).backward()
            seen.append(all(torch.allclose(a, p.grad, atol=1e-7) for a, p in zip(ours, (p for p in models[m].parameters() if p.requires_grad))))
        models.zero_grad()
        assert args.rank == 5 or loss.item() == pytest.approx(sum(nn.functional.cross_entropy(z[m], y).item() for m in z) / 2, rel=1e-5)
        return fit(args, run, models, objective, *rest)

    monkeypatch.setattr(train_unimodal, "fit", watched)
    printed = call("train_joint.py", *SMALL, "--separate-losses", out=copied, root=root)
    assert seen == [True, True]
    call("train_joint.py", *SMALL, "--rank", 5, out=copied, root=root)
    assert seen[2:] == [False, False]                                          # MMLoRA's are not
    done, run = result(copied, "toy/separate-all-r1-s0"), copied / "toy/separate-all-r1-s0"
    assert done["method"] == "separate" and sum(t.numel() for t in tensors(copied, run).values()) == 768      # A and B alone, as MMLoRA
    assert list(table(printed))[-2:] == ["MMLoRA, rank 1, LoRA on audio + visual", "Control: LoRA, separate losses, rank 1, LoRA on audio + visual"]
    again = evaluated(run, monkeypatch=monkeypatch, root=root)
    assert again["together, fusion prob"]["accuracy"] == done["test"]["prob"]["accuracy"]
    assert "none of --tune full" in error("train_joint.py", "--separate-losses", "--fusion", "logits", out=copied, root=root)


def test_of_several_learning_rates_the_best_on_validation_is_shown(copied, root, monkeypatch):
    words = [*SMALL, "--rank", 2, "--seeds", 0, 1, "--lr"]
    printed = call("train_joint.py", *words, 1e-30, 0.05, 0.02, out=copied, root=root)
    runs = {lr: [result(copied, f"toy/mmlora-all-r2{name}-s{seed}") for seed in (0, 1)] for lr, name in ((1e-30, "-lr1e-30"), (0.05, ""), (0.02, "-lr0.02"))}
    mean = {lr: sum(r["val"]["prob"]["accuracy"] for r in rs) / 2 for lr, rs in runs.items()}
    told = re.search(r"learning rate (\S+), best on validation: (.*)", printed)
    assert told[2] == ", ".join(f"{lr:g} {100 * v:.1f}" for lr, v in mean.items()) and mean[1e-30] < mean[float(told[1])] == max(mean.values())
    label, cells = list(table(printed).items())[-1]
    assert cells[0].startswith(f"{50 * sum(r['test']['prob']['accuracy'] for r in runs[float(told[1])]):.1f}")
    assert "one learning rate" in error("train_unimodal.py", "--modality", "audio", "--lr", 1e-3, 2e-3, out=copied, root=root)


def test_the_choice_of_a_learning_rate_never_looks_at_test(monkeypatch, capsys):
    scores = {1: (0.9, 0.3), 2: (0.8, 0.1), 3: (0.9, 0.2), 4: (0.7, 0.0)}      # lr -> accuracy and loss on validation; test is the other way round
    def train(args, seed):
        accuracy, loss = scores[args.lr]
        return SimpleNamespace(lr=args.lr, seed=seed, result=dict(fusion="joint", val=dict(joint=dict(accuracy=accuracy, loss=loss)), test=dict(joint=dict(accuracy=1 - accuracy))))
    runs = train_unimodal.tuned(SimpleNamespace(lr=[1, 2, 3, 4], seeds=[5, 6], seed=0), train)
    assert [(r.lr, r.seed) for r in runs] == [(3, 5), (3, 6)]                  # of equals the lower loss
    assert capsys.readouterr().out.strip() == "learning rate 3, best on validation: 1 90.0, 2 80.0, 3 90.0, 4 70.0"
    scores[None] = (0, 0)
    assert [r.lr for r in train_unimodal.tuned(SimpleNamespace(lr=None, seeds=None, seed=7), train)] == [None] and not capsys.readouterr().out


def test_no_umft(root, tmp_path):
    printed = call("train_joint.py", "--no-umft", "--epochs", 3, "--batch-size", 16, out=tmp_path, root=root)
    run = "toy/no-umft-all-r1-s0"
    done, stored = result(tmp_path, run), tensors(tmp_path, run)
    assert [f.name for f in (tmp_path / "toy").iterdir()] == ["no-umft-all-r1-s0"] and "ume" not in done
    assert list(table(printed)) == ["MMLoRA without UMFT, rank 1, LoRA on audio + visual"]
    assert done["trained_parameters"] == 768 + 2 * (32 * 12 + 12) and done["best_epoch"] > 0     # LoRA and heads
    torch.manual_seed(0)
    for m, encoder in done["encoders"].items():     # the same draws as in the script
        fresh = UnimodalModel(build(encoder), 12)
        add_lora(fresh)
        for name, t in fresh.state_dict().items():
            assert torch.equal(t, stored[f"{m}.{name}"]) != (name.startswith("head.") or name.endswith(("lora_A", "lora_B"))), name


def test_lora_on_one_modality_leaves_the_other_alone(base, copied, root, monkeypatch):
    seen, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda model, split, m, *rest: seen.append(m) or predict(model, split, m, *rest))
    call("train_joint.py", *SMALL, "--lora", "audio", out=copied, root=root)
    run = "toy/mmlora-audio-r1-s0"
    assert result(copied, run)["trained_parameters"] == 384 and all(name.startswith("audio.") for name in tensors(copied, run))
    logits = tensors(copied, run, "logits")
    for name in logits:     # val.audio, ...
        alone = tensors(base.out, f"toy/unimodal-{name.split('.')[1]}-s0", "logits")[name]
        assert torch.equal(logits[name], alone) == ("visual" in name or result(copied, run)["best_epoch"] == 0)
    assert seen.count("visual") == 1 + 2 and seen.count("audio") == 1 + 4 + 2     # what can't change is predicted once; then val and test


@pytest.mark.parametrize("words, run", [("all", "all"), ("visual audio", "all"), ("audio visual audio", "all"), ("audio audio", "audio")])
def test_lora_takes_a_set_of_modalities(words, run, copied, root):
    """In any order, however often one is named: the same run, under the same name."""
    call("train_joint.py", *SMALL, "--lora", *words.split(), out=copied, root=root)
    assert {f.name for f in copied.glob("toy/mmlora-*")} == {"mmlora-all-r1-s0", f"mmlora-{run}-r1-s0"}


def test_rank_and_fusion(base, copied, root):
    printed = call("train_joint.py", *SMALL, "--rank", 2, "--fusion", "logits", out=copied, root=root)
    run = "toy/mmlora-all-r2-logits-s0"
    done, stored = result(copied, run), tensors(copied, run)
    assert done["fusion"] == "logits" and done["trained_parameters"] == 2 * 768 == sum(t.numel() for t in stored.values())
    assert {min(t.shape) for t in stored.values()} == {2}
    assert done["val"]["logits"]["accuracy"] >= done["ume"]["val"]["logits"]["accuracy"]     # selected by what is averaged
    label, cells = list(table(printed).items())[-1]
    assert label == "MMLoRA, rank 2, LoRA on audio + visual, logits"
    assert cells[0].startswith(f"{100 * done['test']['logits']['accuracy']:.1f}")
    other = shutil.copytree(base.out, copied.parent / "prob")
    call("train_joint.py", *SMALL, "--rank", 2, out=other, root=root)
    losses = [log_of(folder, run)[1]["loss"] for folder, run in ((copied, run), (other, "toy/mmlora-all-r2-s0"))]
    assert losses[0] != losses[1]     # the loss is of what is averaged, too


def test_seeds(root, tmp_path):
    words = "--umft-epochs 3 --epochs 1 --batch-size 16 --seeds 1 2 0".split()
    printed = call("train_joint.py", *words, out=tmp_path, root=root)
    assert "Mean +- standard deviation of 3 seeds" in printed
    results = [result(tmp_path, f"toy/mmlora-all-r1-s{seed}") for seed in (1, 2, 0)]
    for label, pick in [("UME, probabilities averaged", lambda r: r["ume"]["test"]["prob"]),
                        ("MMLoRA, rank 1, LoRA on audio + visual", lambda r: r["test"]["prob"]),
                        ("audio alone (UMFT)", lambda r: result(tmp_path, f"toy/unimodal-audio-s{r['seed']}")["test"]["audio"])]:
        values = [100 * pick(r)["accuracy"] for r in results]
        assert table(printed)[label][0] == f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}" and len(set(values)) > 1
        values = [100 * pick(r)["groups"]["noisy"] for r in results]
        assert table(printed)[label][3] == f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}"


def test_other_encoders_for_one_modality_or_all(root, tmp_path):
    words = "--epochs 1 --umft-epochs 1 --encoder visual=resnet18 --pretrained visual=none".split()
    call("train_joint.py", *words, out=tmp_path, root=root)
    run, = tmp_path.glob("toy/mmlora-*")
    assert result(tmp_path, run)["encoders"] == {"audio": "audio_vit_toy", "visual": "resnet18"}
    assert {f.name for f in tmp_path.glob("toy/unimodal-*")} == {"unimodal-audio-s0", "unimodal-visual-resnet18-s0"}
    stored = load_file(run / "model.safetensors")
    assert sum("lora_A" in name for name in stored) == 6 + 20 and len(stored) == 2 * 26     # no BatchNorm statistics among them
    assert train_unimodal.of_modality(["audio=resnet18", "vit_b32"], "audio") == "resnet18"
    assert train_unimodal.of_modality(["audio=resnet18", "vit_b32"], "visual") == "vit_b32"
    assert train_unimodal.of_modality(["audio=resnet18"], "visual", "vit_b16") == "vit_b16"
    assert train_unimodal.of_modality(["none"], "visual", "vit_b16") == "none" and train_unimodal.of_modality([], "visual") is None


def test_bf16(root, tmp_path):
    call("train_joint.py", "--no-umft", "--epochs", 1, "--precision", "bf16", out=tmp_path, root=root)
    call("train_joint.py", "--no-umft", "--epochs", 1, out=tmp_path / "fp32", root=root)
    ours, exact = (tensors(folder, "toy/no-umft-all-r1-s0", "logits")["test.audio"] for folder in (tmp_path, tmp_path / "fp32"))
    assert ours.dtype == torch.float32 and not torch.equal(ours, exact) and (ours - exact).abs().max() < 0.1


def test_several_labels_a_sample(root, tmp_path):
    """The same scripts where a sample has several labels: binary losses, F1 instead of accuracy."""
    words = "--dataset pairs --encoder audio=audio_vit_toy visual=vit_toy --umft-epochs 4 --epochs 2 --batch-size 16".split()
    printed = call("train_joint.py", *words, out=tmp_path, root=root)
    run, = tmp_path.glob("pairs/mmlora-*")
    done, logits, labels = result(tmp_path, run), tensors(tmp_path, run, "logits"), np.load(root / "pairs/test/labels.npy")
    p = (logits["test.audio"].double().sigmoid() + logits["test.visual"].double().sigmoid()) / 2
    y = torch.from_numpy(labels)
    micro, macro = naive_f1((p > 0.5).tolist(), labels.tolist())
    scores = done["test"]["prob"]
    assert scores["f1_micro"] == pytest.approx(micro) and scores["f1_macro"] == pytest.approx(macro) and 0 < macro < micro
    assert scores["loss"] == pytest.approx(float(-torch.where(y.bool(), p, 1 - p).log().mean()), rel=1e-5)
    assert list(table(printed).values())[-1][:2] == [f"{100 * micro:.1f}", f"{100 * macro:.1f}"]
    log = log_of(tmp_path, run)
    assert done["best_epoch"] == max(range(3), key=lambda e: (log[e]["val"]["prob"]["f1_micro"], -log[e]["val"]["prob"]["loss"]))


# ------------------------------------------------------------------------------------------------ evaluate.py
def evaluated(*words, monkeypatch, root):
    """Row label -> scores, unrounded, of one `evaluate.py --run words`."""
    seen = {}
    monkeypatch.setattr(evaluate, "print_table", lambda rows, *_: seen.update((label, per_seed[0][0]) for label, per_seed in rows))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", *map(str, words), "--data-root", str(root)])
    evaluate.main()
    return seen


def test_evaluate_reproduces_the_stored_scores(base, copied, root, monkeypatch):
    call("train_joint.py", *SMALL, "--tune", "full", out=copied, root=root)
    call("train_joint.py", *SMALL, "--no-umft", "--rank", 2, "--lora", "visual", out=copied, root=root)
    call("train_joint.py", *SMALL, "--lora", "visual", out=copied, root=root)
    for run in sorted((copied / "toy").iterdir()):
        done, seen = result(copied, run), evaluated(run, monkeypatch=monkeypatch, root=root)
        assert len(seen) == (1 if run.name.startswith("unimodal") else 3 if run.name.startswith("no-umft") else 6)
        for label, scores in seen.items():     # "audio alone", "audio alone (UMFT)", "UME, fusion prob", "together, fusion prob"
            test = done["ume"]["test"] if "UM" in label else done["test"]
            assert scores == test[label.split()[0] if "alone" in label else label.split()[-1]]
    seen = evaluated(base.run, "--fusion", "logits", monkeypatch=monkeypatch, root=root)
    assert seen["together, fusion logits"] == base.result["test"]["logits"]


def test_evaluate_averages_as_the_run_did(copied, root, monkeypatch):
    call("train_joint.py", *SMALL, "--fusion", "logits", out=copied, root=root)
    run = copied / "toy/mmlora-all-r1-logits-s0"
    assert evaluated(run, monkeypatch=monkeypatch, root=root)["together, fusion logits"] == result(copied, run)["test"]["logits"]


def test_evaluate_without_a_modality_and_by_entropy(base, root, monkeypatch):
    seen = evaluated(base.run, "--drop", "audio", monkeypatch=monkeypatch, root=root)
    assert seen == {"visual alone (UMFT)": base.result["ume"]["test"]["visual"], "visual alone": base.result["test"]["visual"]}
    z, labels = tensors(base.out, MMLORA, "logits"), np.load(root / "toy-s0/test/labels.npy")
    fused = []
    for i in range(len(labels)):     # a sure modality counts more, sample by sample
        p = [z[f"test.{m}"][i].double().softmax(-1) for m in ("audio", "visual")]
        weight = [math.exp(sum(float(q) * math.log(float(q)) for q in probabilities)) for probabilities in p]
        fused.append((weight[0] * p[0] + weight[1] * p[1]) / sum(weight))
    ours = evaluate.fuse({m: z[f"test.{m}"] for m in ("audio", "visual")}, "entropy")
    torch.testing.assert_close(ours.double(), torch.stack(fused), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, evaluate.fuse({m: z[f"test.{m}"] for m in ("audio", "visual")}), atol=1e-3)
    seen = evaluated(base.run, "--fusion", "entropy", monkeypatch=monkeypatch, root=root)
    assert seen["together, fusion entropy"]["accuracy"] == pytest.approx(accuracy(torch.stack(fused), labels), abs=1e-6)


def test_predictions_do_not_depend_on_the_batch(base, root):
    torch.manual_seed(0)
    split, setting = data.Split(root / "toy-s0", "test"), paper.settings_for("toy")
    logits = {}
    for m, encoder in (("audio", "audio_vit_toy"), ("visual", "resnet18")):     # BatchNorm, too
        model = UnimodalModel(build(encoder), 12)
        one, some, all_ = (evaluate.predict(model, split, m, "cpu", setting, batch_size=size) for size in (1, 50, 1000))
        assert one.shape == (120, 12) and not model.training
        torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(some, all_, rtol=1e-4, atol=1e-4)
        logits[m] = all_
    for rule in evaluate.FUSIONS:
        for multilabel in (False, True):
            whole = evaluate.fuse(logits, rule, multilabel)
            apart = torch.cat([evaluate.fuse({m: z[i:i + 1] for m, z in logits.items()}, rule, multilabel) for i in range(120)])
            torch.testing.assert_close(whole, apart)
            assert multilabel or torch.allclose(whole.sum(-1), torch.ones(120))


def test_a_changed_unimodal_model_is_noticed(copied, root):
    file = copied / "toy/unimodal-audio-s0/model.safetensors"
    changed = load_file(file)
    changed["audio.head.bias"][0] += 1
    save_file(changed, file)
    assert "unimodal-audio-s0/model.safetensors is not the model" in error("evaluate.py", "--run", copied / MMLORA, root=root)
    assert "unimodal" in error("train_joint.py", *SMALL, out=copied, root=root)
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


def test_plot(base, copied, root, monkeypatch):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    call("train_joint.py", *SMALL, "--plot", out=copied, root=root)
    assert (copied / MMLORA / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(base, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in error("train_joint.py", *SMALL, "--plot", out=base.out, root=root)


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize("script, words, message", [
    ("train_unimodal.py", "--modality audio --dataset nosuch", "no prepared data in .*nosuch. make it with: python -m prepare.custom"),
    ("train_joint.py", "--dataset nosuch", "no prepared data"),
    ("train_unimodal.py", "--modality smell", "--modality smell: toy has audio, visual"),
    ("train_joint.py", "--lora smell", "--lora smell: toy has audio, visual, or all"),
    ("train_joint.py", "--tune full --lora audio", "--tune full .* neither --lora nor --no-umft"),
    ("train_unimodal.py", "--modality audio --encoder vit_toy", "vit_toy reads frames or image, but audio of toy is audio"),
    ("train_unimodal.py", "--modality audio --encoder audio_vit_b --pretrained none", r"takes spectrograms of \(128, 204\), .* \(32, 64\)"),
    ("train_unimodal.py", "--modality audio --encoder resnt18", "resnt18"),
    ("train_unimodal.py", "--modality audio --pretrained nowhere.pth", "no checkpoint at nowhere.pth"),
    ("train_joint.py", "--no-umft --pretrained audio=nowhere.pth", "no checkpoint at nowhere.pth"),
    ("train_unimodal.py", "--modality audio --encoder smell=resnet18 --epochs 1", "smell"),
    ("train_unimodal.py", "--modality audio --pretrained smell=none --epochs 1", "smell"),
    ("train_unimodal.py", "--modality audio --device abacus", "abacus"),
])
def test_mistakes_get_one_line_and_leave_nothing_behind(script, words, message, root, tmp_path):
    assert re.search(message, error(script, *words.split(), out=tmp_path, root=root))
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]     # or the corrected command would find a run with other settings


@pytest.mark.parametrize("words", ["--epochs 0", "--epochs -1", "--batch-size 0", "--batch-size -1", "--micro-batch -3",
                                   "--lr 0", "--lr -1", "--rank 0", "--rank -1"])
def test_impossible_numbers_are_refused(words, root, tmp_path):
    script = ["train_joint.py", "--no-umft"] if "rank" in words else ["train_unimodal.py", "--modality", "audio"]
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stderr(io.StringIO()):
        call(*script, *(() if "epochs" in words else ("--epochs", 1)), *words.split(), out=tmp_path, root=root)
    assert exit.value.code not in (None, 0) and not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_a_corrected_command_runs(root, tmp_path):
    """Nobody should have to delete a folder because of a typing mistake."""
    words = "--modality audio --epochs 1".split()
    error("train_unimodal.py", *words, "--pretrained", "nowhere.pth", out=tmp_path, root=root)
    call("train_unimodal.py", *words, out=tmp_path, root=root)


def test_mistakes_in_evaluate(base, root, tmp_path):
    assert "nowhere holds no finished run" in error("evaluate.py", "--run", tmp_path / "nowhere", root=root)
    assert "--drop smell" in error("evaluate.py", "--run", base.run, "--drop", "smell", root=root)
    assert "no modality" in error("evaluate.py", "--run", base.run, "--drop", "audio", "visual", root=root)


def test_a_diverged_run_is_no_result(root, tmp_path):
    """NaN has an argmax, too: it may well beat epoch 0. (And NaN is not JSON.)"""
    message = error("train_unimodal.py", *"--modality audio --lr 1e6 --epochs 2".split(), out=tmp_path, root=root)
    assert re.search("--lr|learning rate", message)
    assert not list(tmp_path.rglob("result.json"))


def test_git_is_not_needed(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    call("train_unimodal.py", "--modality", "audio", "--epochs", 1, out=tmp_path, root=root)
    assert json.loads((tmp_path / "toy/unimodal-audio-s0/config.json").read_text())["commit"] is None


def test_exit_codes_and_streams(base, root, tmp_path):
    bad = process("train_unimodal.py", "--modality", "smell", "--dataset", "nosuch", out=tmp_path / "runs", root=tmp_path)
    good = process("train_joint.py", *SMALL, out=base.out, root=root)     # finished: only the table
    printed, complaint = bad.communicate()
    assert bad.returncode == 1 and not printed and complaint.startswith("error: no prepared data") and complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())
    printed, complaint = good.communicate()
    assert good.returncode == 0 and not complaint and table(printed) == table(base.printed)


def test_data_prepared_anew_are_not_answered_with_old_results(base, root, tmp_path):
    shutil.copytree(root / "toy-s0", tmp_path / "toy-s0")
    info = json.loads((tmp_path / "toy-s0" / "dataset.json").read_text())
    (tmp_path / "toy-s0" / "dataset.json").write_text(json.dumps(info | dict(counts={"train": 1, "val": 1, "test": 1})))
    assert "samples" in error("train_joint.py", *SMALL, out=base.out, root=tmp_path)
