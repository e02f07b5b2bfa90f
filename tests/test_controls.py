"""The small controls: for each, that what makes it different is there and acts."""
import json

import numpy as np
import pytest
import torch

import data
from baselines import drop_modality, g_blending, small
from encoders import UnimodalModel, build
from harness import metrics, optim, runs
from harness.models import load_run
from running import QUICK, call, error, log_of, result, table, tensors

ONE = [*QUICK, "--epochs", 1]         # on the uni-modal models of `base`
STEPS = 2                             # so many they are


def predicted_again(out, run, root):
    """Test logits of a stored run, from its files: modality -> (N, C)."""
    info = json.loads((root / "toy-s0" / "dataset.json").read_text())
    settings, models = load_run(out / run, info)
    test = data.Split(root / "toy-s0", "test")
    return metrics.predict(lambda x: {m: models[m](x[m]) for m in x}, models, test, "cpu", settings)


def as_stored(out, run, root):
    stored = tensors(out, run, "logits")
    for m, z in predicted_again(out, run, root).items():
        assert torch.allclose(z, stored[f"test.{m}"], atol=1e-4), m


# ---------------------------------------------------------------------------- small.py
@pytest.mark.parametrize("what, wanted", [
    ("heads", lambda n: n.startswith("head.")),
    ("biases", lambda n: n.endswith("bias")),
    ("norms", lambda n: "norm" in n),
    ("temperatures", lambda n: n == "head.log_temperature")])
def test_small_trains_what_it_says(what, wanted):
    for encoder in ("audio_vit_toy", "vit_toy", "resnet_small"):
        model = UnimodalModel(build(encoder), 8).requires_grad_(False)
        small.unfreeze(model, what)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        if encoder == "resnet_small" and what == "norms":     # bn1, downsample.1
            wanted = lambda n: p_is_1d[n] and n != "head.bias"
            p_is_1d = {n: p.ndim == 1 for n, p in model.named_parameters()}
        assert trained == {n for n, _ in model.named_parameters() if wanted(n)} != set(), encoder
        assert not model.train().encoder.training             # dropout and drop path are off


def test_temperatures_are_learnt_and_kept(base, copied, root):
    printed = call("baselines.small", "--what", "temperatures", *ONE, "--lr", 0.3, out=copied,
                   root=root)
    run = "toy/small-what-temperatures-lr0.3-s0"
    stored, before = tensors(copied, run), tensors(copied, "toy/unimodal-audio-s0", "logits")
    assert stored.keys() == {f"{m}.head.log_temperature" for m in ("audio", "visual")}
    T = float(stored["audio.head.log_temperature"].exp())
    assert abs(T - 1) > 0.05 and result(copied, run)["trained_parameters"] == 2
    after = tensors(copied, run, "logits")["test.audio"]
    assert torch.allclose(after, before["test.audio"] / T, atol=1e-5)
    as_stored(copied, run, root)                  # the file is read into plain heads
    assert "Eq. 3 trains something else, temperatures, lr 0.3" in table(printed)


def test_eq_3_trains_the_norms(copied, root, monkeypatch):
    """Its loss is that of the averaged prediction."""
    seen, count = [], runs.Run.count

    def watched(self, loss, logits, y):
        seen.append((loss.item(), metrics.fused_loss(logits, y).item()))
        count(self, loss, logits, y)
    monkeypatch.setattr(runs.Run, "count", watched)
    call("baselines.small", "--what", "norms", *ONE, out=copied, root=root)
    assert len(seen) == STEPS and all(a == pytest.approx(b, rel=1e-5) for a, b in seen)
    assert all("norm" in name for name in tensors(copied, "toy/small-what-norms-s0"))
    as_stored(copied, "toy/small-what-norms-s0", root)


# ---------------------------------------------------------------------------- other copies
def test_all_linear_layers_have_lora(copied, root):
    call("baselines.all_linear", *ONE, "--lr", 0.1, out=copied, root=root)
    run = "toy/all_linear-all-r1-lr0.1-s0"
    names = {n.split(".", 2)[2].split(".")[-2] for n in tensors(copied, run)}
    assert names == {"query", "key", "value", "out", "fc1", "fc2"}
    as_stored(copied, run, root)


def test_a_finished_step_1_says_what_it_has_not(copied, root):
    words = [*ONE, "--batch-size", 100, "--precision", "fp32"]
    printed = call("baselines.full_ume", *words, out=copied, root=root)
    told = [line for line in printed.splitlines() if "taken as it is" in line]
    config = json.loads((copied / "toy/unimodal-audio-s0/config.json").read_text())
    before = config["settings"]["batch_size"]
    assert told == [f"{copied}/toy/unimodal-{m}-s0: taken as it is, its batch size is {before},"
                    " not 100" for m in ("audio", "visual")]


def test_longer_umft_trains_all_weights_each_on_its_own(copied, root, monkeypatch):
    seen, count = [], runs.Run.count

    def watched(self, loss, logits, y):
        own = [metrics.cross_entropy(z, y).item() for z in logits.values()]
        seen.append(loss.item() == pytest.approx(sum(own) / 2, rel=1e-5))
        count(self, loss, logits, y)
    monkeypatch.setattr(runs.Run, "count", watched)
    call("baselines.separate_full", *ONE, out=copied, root=root)
    done = result(copied, "toy/separate_full-s0")
    assert seen == [True] * STEPS
    assert done["trained_parameters"] == sum(
        t.numel() for m in ("audio", "visual")
        for t in tensors(copied, f"toy/unimodal-{m}-s0").values())


def test_modalities_are_dropped_but_never_all_of_lora():
    rng, x = torch.Generator().manual_seed(0), dict(audio=1, visual=2)
    seen = [tuple(drop_modality.some_of(x, ["audio", "visual"], 0.3, rng)) for _ in range(4000)]
    share = {kept: seen.count(kept) / 4000 for kept in set(seen)}
    assert share.keys() == {("audio",), ("visual",), ("audio", "visual")}
    assert share["audio",] == pytest.approx(0.21, abs=0.03)       # 0.7 * 0.3
    assert share["audio", "visual"] == pytest.approx(0.58, abs=0.03)      # 0.49, and 0.09 lost both
    seen = {tuple(drop_modality.some_of(x, ["audio"], 0.9, rng)) for _ in range(100)}
    assert seen == {("audio",), ("audio", "visual")}              # or nothing would have a gradient
    assert drop_modality.some_of(x, ["audio"], 0.0, rng) == x


def test_the_loss_is_of_what_is_left(copied, root, monkeypatch):
    seen, count = [], runs.Run.count
    monkeypatch.setattr(runs.Run, "count", lambda self, loss, z, y: (seen.append(tuple(z)),
                                                                     count(self, loss, z, y)))
    call("baselines.drop_modality", *ONE, "--batch-size", 50, "--drop-modality", 0.6,
         out=copied, root=root)
    assert len(seen) == 4 and {len(kept) for kept in seen} == {1, 2}
    as_stored(copied, "toy/drop_modality-all-r1-drop-modality-0.6-s0", root)


# ---------------------------------------------------------------------------- --share
def test_a_share_of_train_is_drawn_with_the_seed(root):
    where = root / "toy-s0"
    whole = data.Split(where, "train")
    small_, large, other = (data.Split(where, "train", dict(share=share, seed=seed))
                            for share, seed in ((0.1, 5), (0.3, 5), (0.3, 6)))
    assert (len(whole), len(small_), len(large)) == (200, 20, 60)
    assert set(small_.rows.tolist()) < set(large.rows.tolist()) != set(other.rows.tolist())
    assert torch.equal(large.labels, whole.labels[large.rows])
    assert all(torch.equal(v, whole.groups[k][large.rows]) for k, v in large.groups.items())
    models = torch.nn.ModuleDict({"audio": UnimodalModel(build("audio_vit_toy"), 8)})
    index = torch.tensor([0, 7, 59])
    x, y = data.inputs(large, index, models, "cpu", dict(audio_shift=0))
    rows = large.rows[index]
    assert np.array_equal(x["audio"][:, :, 0].numpy(),
                          whole.arrays["audio"][rows].astype(np.float32))
    assert torch.equal(y, whole.labels[rows])


def test_step_1_and_step_3_get_the_same_share(root, tmp_path, monkeypatch):
    seen, inputs = {}, data.inputs

    def watched(split, index, models, device, settings, rng=None):
        if rng is not None:                       # in training
            seen.setdefault(settings["method"] + settings.get("modality", ""), set()).update(
                split.rows[index].tolist())
        return inputs(split, index, models, device, settings, rng)
    monkeypatch.setattr(data, "inputs", watched)
    printed = call("train_joint.py", "--share", 0.2, "--umft-epochs", 1, "--epochs", 1,
                   out=tmp_path, root=root)
    assert seen.keys() == {"unimodalaudio", "unimodalvisual", "mmlora"}
    assert seen["unimodalaudio"] == seen["unimodalvisual"] == seen["mmlora"]
    assert len(seen["mmlora"]) == 40
    assert {f.name for f in tmp_path.glob("toy/*")} == {
        "mmlora-all-r1-share0.2-s0", "unimodal-audio-share0.2-s0", "unimodal-visual-share0.2-s0"}
    assert "MMLoRA, rank 1, audio+visual, 20 % of train" in table(printed)
    with pytest.raises(SystemExit):
        call("train_joint.py", "--share", 1.2, out=tmp_path, root=root)


# ---------------------------------------------------------------------------- options of baselines
@pytest.mark.parametrize("method", ["concat", "ogm_ge", "pmr", "mla"])
def test_sgd(method, root, tmp_path, monkeypatch):
    def stop(name, models, lr, weight_decay):
        optimizer = real(name, models, lr, weight_decay)
        decay = optimizer.param_groups[0]["weight_decay"]
        raise ValueError(f"{type(optimizer).__name__} {lr:g} {decay:g}")
    real = optim.make_optimizer
    monkeypatch.setattr(optim, "make_optimizer", stop)
    where = dict(out=tmp_path, root=root)
    assert error(f"baselines.{method}", "--optimizer", "sgd", **where) == "error: SGD 0.03 0.0001"
    assert error(f"baselines.{method}", **where) == "error: AdamW 0.003 0.05"


def test_fixed_blending_weights(root, tmp_path, monkeypatch):
    monkeypatch.setattr(g_blending, "blend_weights", None)        # nothing is estimated
    seen, count = [], runs.Run.count
    monkeypatch.setattr(runs.Run, "count", lambda self, loss, z, y: (seen.append(len(y)),
                                                                     count(self, loss, z, y)))
    words = ["--epochs", 1, "--batch-size", 64]
    call("baselines.g_blending", "--weights", 2, 1, 1, *words, out=tmp_path, root=root)
    run = "toy/g_blending-weights-2-1-1-s0"
    line = log_of(tmp_path, run)[1]
    assert [line[f"w_{head}"] for head in ("joint", "audio", "visual")] == [0.5, 0.25, 0.25]
    assert sum(seen) == 200                                       # nothing is held out
    told = error("baselines.g_blending", "--weights", 1, 1, *words, out=tmp_path, root=root)
    assert "one for each of audio, visual" in told
