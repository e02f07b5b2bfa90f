"""baselines/: for each method its formula against a naive one, and that training really uses it; the scripts as they are run, on a tiny toy."""
import itertools
import json
import math
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import checkpoints
import data
import encoders
import evaluate
from baselines import common, g_blending, mla, ogm_ge, pmr

METHODS = ("concat", "ogm_ge", "g_blending", "pmr", "mla")


# ------------------------------------------------------------------------------------------------ the real scripts
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared data: `toy`, but tiny; `tri` with three modalities; `multi`, several labels a sample; `mono`, one modality."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY_SIZES", {"train": 96, "val": 48, "test": 60})
        for seed in (0, 1):
            data.make_toy(folder / f"toy-s{seed}", "toy", seed)
    for name in ("tri", "multi", "mono"):
        shutil.copytree(folder / "toy-s0", folder / name)
        info = json.loads((folder / name / "dataset.json").read_text()) | dict(name=name)
        if name == "tri":
            info["modalities"]["visual2"], info["shapes"]["visual2"] = "image", info["shapes"]["visual"]
            for split in data.TOY_SIZES:
                np.save(folder / name / split / "visual2.npy", 255 - np.load(folder / name / split / "visual.npy"))
        if name == "multi":
            info.update(multilabel=True, groups={})
            for split in data.TOY_SIZES:
                y = np.load(folder / name / split / "labels.npy")
                np.save(folder / name / split / "labels.npy", (np.eye(12)[y] + np.eye(12)[(y + 1) % 12]).astype(np.uint8))
        if name == "mono":
            info["modalities"] = {"audio": "audio"}
        (folder / name / "dataset.json").write_text(json.dumps(info))
    return folder


TOWERS = ["--encoder", "audio=audio_vit_toy", "visual=vit_toy", "visual2=vit_toy"]      # of data sets that paper.py does not know


@pytest.fixture
def script(root, tmp_path, monkeypatch):
    """script("ogm_ge", "--alpha", 0) does what `python -m baselines.ogm_ge --alpha 0 ...` does; -> the folder of the run."""
    def run(method, *words, out=None, name=None):
        out = out or tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        dataset = words[words.index("--dataset") + 1] if "--dataset" in words else "toy"
        words = [str(w) for w in words] + ([] if "--epochs" in words else ["--epochs", "2"]) + ([] if "--batch-size" in words else ["--batch-size", "32"])
        monkeypatch.setattr(sys, "argv", [method, *words, "--device", "cpu", "--out", str(out), "--data-root", str(root)])
        import_module(f"baselines.{method}").main()
        folders = [f for f in (out / dataset).iterdir() if not f.name.startswith("unimodal")]
        return folders[0] if len(folders) == 1 else out / dataset / name
    return run


def tensors(folder, name="model"):
    return load_file(folder / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logged(folder):
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in (folder / "log.jsonl").read_text().splitlines()]


def training(folder):
    """Every number of the joint prediction in every epoch, as exact as JSON is: two runs with the same list trained alike, bit for bit."""
    return [(line["loss"], line["val"]["joint"]) for line in logged(folder)]


@pytest.fixture
def watch(monkeypatch):
    """watch(look): look(optimizer, names) is called before every step of a method's first optimiser; names: id of a parameter -> its name."""
    def install(look):
        real, made = common.optimizer_for, []

        def watched(task, models):
            optimizer = real(task, models)
            if not made:
                names = {id(p): n for n, p in models.named_parameters()}
                optimizer.register_step_pre_hook(lambda o, *_: look(o, names))
            made.append(optimizer)
            return optimizer
        monkeypatch.setattr(common, "optimizer_for", watched)
    return install


def features(folder, root, dataset="toy-s0", split="test"):
    """h_m by hand: encoders rebuilt from the run's file, applied to the prepared arrays."""
    info, file = checkpoints.read_json(root / dataset / "dataset.json"), tensors(folder)
    settings, setting = checkpoints.read_json(folder / "config.json")["settings"], common.paper.settings_for("toy")
    h = {}
    for m, encoder in settings["encoders"].items():
        model = checkpoints.new_model(encoder, info, m).eval()
        model.load_state_dict({k.removeprefix(f"{m}."): v for k, v in file.items() if k.startswith(f"{m}.")})       # strict: encoder and head
        s = data.Split(root / dataset, split)
        with torch.no_grad():
            h[m] = model.features(data.model_input(s, m, torch.arange(len(s)), model.encoder, "cpu", setting))
    return h, file


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_holds_what_it_says(script, root, method, capsys):
    folder = script(method)
    result, z = checkpoints.read_json(folder / "result.json"), tensors(folder, "logits")
    settings = checkpoints.read_json(folder / "config.json")["settings"]
    assert folder.name == f"{method}-s0" and result["method"] == settings["method"] == method
    assert settings["encoders"] == {"audio": "audio_vit_toy", "visual": "vit_toy"} and settings["pretrained"] == {"audio": "none", "visual": "none"}
    assert settings["lr"] == common.paper.TOY_LR["joint"] and len(logged(folder)) == 3 and not (folder / "last.safetensors").exists()
    assert result["test"].keys() == {"joint", "audio", "visual"}
    labels = data.Split(root / "toy-s0", "test").labels
    for name, s in result["test"].items():
        assert s["accuracy"] == pytest.approx(float((z[f"test.{name}"].argmax(1) == labels).float().mean()))
    best = max(logged(folder), key=lambda line: [line["val"]["joint"]["accuracy"], -line["val"]["joint"]["loss"]])
    assert result["best_epoch"] == best["epoch"] and result["val"]["joint"]["loss"] == pytest.approx(best["val"]["joint"]["loss"], rel=1e-5)
    assert f"{100 * result['test']['joint']['accuracy']:.1f} +- " in capsys.readouterr().out

    h, file = features(folder, root)      # and the stored weights give the stored predictions
    if method == "mla":
        heads = {m: h[m] @ file[f"{m}.head.weight"].T + file[f"{m}.head.bias"] for m in h}
        joint = evaluate.fuse(heads, "entropy").log()
        assert torch.equal(file["audio.head.weight"], file["visual.head.weight"])
    else:
        joint = torch.cat([h["audio"], h["visual"]], 1) @ file["joint.linear.weight"].T + file["joint.linear.bias"]
        heads = {m: h[m] @ file[f"{m}.head.weight"].T + file[f"{m}.head.bias"] for m in h}
        if method != "g_blending":
            assert torch.allclose(sum(heads.values()), joint, atol=1e-5)
    for name, wanted in {"joint": joint, **heads}.items():
        assert torch.allclose(z[f"test.{name}"], wanted, atol=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_three_modalities(script, method):
    result = checkpoints.read_json(script(method, "--dataset", "tri", *TOWERS, "--epochs", 1) / "result.json")
    assert result["test"].keys() == {"joint", "audio", "visual", "visual2"}


def test_several_labels_a_sample(script):
    for method in ("concat", "g_blending", "mla"):
        result = checkpoints.read_json(script(method, "--dataset", "multi", *TOWERS[:-1], "--epochs", 1) / "result.json")
        assert 0 <= result["test"]["joint"]["f1_micro"] <= 1 and result["test"]["joint"]["loss"] < 1.5
    for method in ("ogm_ge", "pmr"):
        with pytest.raises(SystemExit, match="multi has several labels a sample"):
            script(method, "--dataset", "multi", *TOWERS[:-1])


def test_seeds_and_wrong_input(script, root, capsys):
    script("concat", "--seeds", 0, 1, "--epochs", 1, name="concat-s1")
    assert "Mean +- standard deviation of 2 seeds" in capsys.readouterr().out
    for words, message in ((("concat", "--dataset", "mono"), "mono has only audio: concat needs two"),
                           (("concat", "--dataset", "tri"), "--encoder visual2=NAME"),
                           (("mla", "--order", "audio"), "--order audio: toy has audio, visual"),
                           (("g_blending", "--held-out", 1), "--held-out 1.0")):
        with pytest.raises(SystemExit, match=message):
            script(*words)
    command = [sys.executable, "-m", "baselines.concat", "--dataset", "mono", "--data-root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and done.stderr == "error: mono has only audio: concat needs two modalities or more\n"


def test_options_are_settings_and_part_of_the_name(script):
    folder = script("ogm_ge", "--alpha", 0.5, "--no-ge", "--epochs", 1)
    assert folder.name == "ogm_ge-alpha-0.5-no-ge-s0"
    assert checkpoints.read_json(folder / "config.json")["settings"]["alpha"] == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(script, monkeypatch, tmp_path, method):
    words = ["--epochs", 4, *(["--super-epoch", 3] if method == "g_blending" else []), *(["--momentum", 0.5] if method == "pmr" else [])]
    whole = script(method, *words, out=tmp_path / "whole")
    save, count = checkpoints.Run.save, itertools.count(1)

    def save_and_die(*a):      # at the end of epoch 2: in the middle of a super-epoch, with prototypes and projection on their way
        save(*a)
        if next(count) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.Run, "save", save_and_die)
        script(method, *words, out=tmp_path / "killed")
    resumed = script(method, *words, out=tmp_path / "killed")
    assert len(logged(resumed)) == 5 and logged(resumed) == logged(whole)
    assert same(tensors(resumed), tensors(whole)) and same(tensors(resumed, "logits"), tensors(whole, "logits"))


# ------------------------------------------------------------------------------------------------ concat, frozen
def toy_models(widths):
    class Body(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.encoder = nn.Linear(3, width)
            self.encoder.width = width
    return nn.ModuleDict({m: Body(w) for m, w in widths.items()})


def test_the_parts_of_a_concat_head_sum_to_its_logits():
    head = common.ConcatHead(toy_models({"a": 3, "b": 5, "c": 2}), 4)
    h = {m: torch.randn(6, w) for m, w in head.widths.items()}
    parts = head.split(h)
    assert torch.allclose(sum(parts.values()), head(h), atol=1e-6)
    assert torch.allclose(parts["b"], h["b"] @ head.linear.weight[:, 3:8].T + head.linear.bias / 3, atol=1e-6)      # its own columns
    assert not torch.allclose(parts["a"], parts["b"])


def test_micro_batches_give_the_same_training(script, monkeypatch):
    seen, count = [], common.Epoch.count
    monkeypatch.setattr(common.Epoch, "count", lambda self, loss, z, y: seen.append(len(y)) or count(self, loss, z, y))
    whole = script("concat")
    assert seen == [32] * 6
    parts = script("concat", "--micro-batch", 12)
    assert seen[6:] == [12, 12, 8] * 6
    assert [line[0] for line in training(parts)[1:]] == pytest.approx([line[0] for line in training(whole)[1:]], rel=1e-3)
    whole, parts = tensors(whole), tensors(parts)
    assert not same(whole, parts) and all(torch.allclose(whole[k], parts[k], atol=1e-3) for k in whole)


def test_frozen_trains_the_layer_and_nothing_else(script, root):
    folder = script("concat", "--freeze", "--umft-epochs", 2, "--epochs", 5, "--lr", 0.05)
    file, result, log = tensors(folder), checkpoints.read_json(folder / "result.json"), logged(folder)
    assert folder.name == "frozen-lr0.05-s0" and result["method"] == "frozen"
    for m, base in checkpoints.read_json(folder / "config.json")["settings"]["unimodal"].items():
        alone = folder.parent / base["run"]
        assert base == dict(run=f"unimodal-{m}-s0", sha256=checkpoints.sha256(alone / "model.safetensors"))
        assert all(torch.equal(file[k], v) for k, v in tensors(alone).items() if ".encoder." in k)
    assert result["trained_parameters"] == 12 * (32 + 32) + 12
    assert log[-1]["loss"] < log[1]["loss"] - 0.1
    h, _ = features(folder, root)
    joint = torch.cat([h["audio"], h["visual"]], 1) @ file["joint.linear.weight"].T + file["joint.linear.bias"]
    assert torch.allclose(tensors(folder, "logits")["test.joint"], joint, atol=1e-4)


# ------------------------------------------------------------------------------------------------ OGM-GE
def test_ogm_coefficients_are_the_papers():
    k = ogm_ge.coefficients({"a": torch.tensor(30.0), "v": torch.tensor(20.0)}, 0.3)
    assert float(k["a"]) == pytest.approx(1 - math.tanh(0.3 * 1.5)) and float(k["v"]) == 1
    k = ogm_ge.coefficients({"a": torch.tensor(1.0), "v": torch.tensor(4.0), "t": torch.tensor(2.0)}, 0.1)
    assert [float(v) for v in k.values()] == pytest.approx([1, 1 - math.tanh(0.4), 1 - math.tanh(0.2)])


def test_ogm_shrinks_gradients_by_exactly_k():
    encoder = encoders.build("vit_toy")
    encoder(torch.randn(4, 3, 32, 32)).square().sum().backward()
    before = {n: p.grad.clone() for n, p in encoder.named_parameters()}
    k = torch.tensor(0.25)
    ogm_ge.modulate(encoder, k, noise=False, conv_only=True)
    assert {n for n, p in encoder.named_parameters() if not torch.equal(p.grad, before[n])} == {"patch.weight"}      # all that is 4-D in a ViT
    encoder.patch.weight.grad.copy_(before["patch.weight"])
    ogm_ge.modulate(encoder, k, noise=False, conv_only=False)
    for n, p in encoder.named_parameters():
        assert torch.equal(p.grad, before[n] * (k if p.ndim > 1 else 1)), n


def test_ge_noise_is_as_large_as_the_gradient():
    layer = nn.Linear(400, 300)
    layer.weight.grad = before = 0.7 * torch.randn(300, 400) + 2      # std 0.7 whatever the mean
    layer.weight.grad, layer.bias.grad = before.clone(), torch.ones(300)
    ogm_ge.modulate(layer, torch.tensor(0.5), noise=True, conv_only=False)
    noise = layer.weight.grad - 0.5 * before
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02) and abs(float(noise.mean())) < 0.02
    assert torch.equal(layer.bias.grad, torch.ones(300))


def test_ogm_is_concat_when_its_parts_are_off_and_not_when_on(script):
    concat = training(script("concat"))
    assert training(script("ogm_ge", "--alpha", 0, "--no-ge")) == concat                                     # 1 - tanh 0 = 1
    assert training(script("ogm_ge", "--modulated-epochs", 0)) == concat
    assert training(script("ogm_ge", "--alpha", 0)) != concat                                                # noise alone
    folder = script("ogm_ge", "--no-ge", "--modulated-epochs", 1)
    log = logged(folder)
    assert training(folder)[1:] != concat[1:] and "k_audio" not in log[2]
    assert 0.4 < min(log[1]["k_audio"], log[1]["k_visual"]) < 1 - math.tanh(0.3) / 3                          # the leader of 3 batches


# ------------------------------------------------------------------------------------------------ G-Blending
def test_blend_weights_follow_the_formula():
    t = torch.tensor
    # gains 1, 1, 0.5; gaps grew by 0.5, 1, 0.5  ->  1/0.25, 1/1, 0.5/0.25 = 4, 1, 2
    w = g_blending.blend_weights(t([2.0, 2.0, 2.0]), t([0.5, 0.0, 1.0]), t([2.0, 2.0, 2.0]), t([1.0, 1.0, 1.5]))
    assert w.tolist() == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    w = g_blending.blend_weights(t([2.0, 2.0]), t([0.1, 1.0]), t([2.0, 2.0]), t([2.5, 1.5]))                 # the first only overfits
    assert w.tolist() == [0, 1]
    w = g_blending.blend_weights(t([2.0, 2.0]), t([1.0, 0.9]), t([2.0, 2.0]), t([1.0, 1.0]))                 # O = 0 and 0.1: capped at 1e-4, 1e-2
    assert w.tolist() == pytest.approx([1e4 / (1e4 + 1e2), 1e2 / (1e4 + 1e2)], rel=1e-4)
    w = g_blending.blend_weights(t([1.0, 1.0]), t([0.5, 0.5]), t([1.0, 1.0]), t([1.1, 1.2]))
    assert w.tolist() == [0.5, 0.5]
    # what both had before counts: the same gap before and after is no overfitting
    w = g_blending.blend_weights(t([1.0, 2.0]), t([0.5, 1.0]), t([2.0, 2.0]), t([1.5, 1.5]))
    assert w[0] > 0.99


def test_g_blending_never_trains_on_what_measures_it(script, monkeypatch):
    trained, measured, real = set(), set(), data.model_input

    def spy(split, m, index, encoder, device, setting, rng=None):
        if len(split) == 96:
            (measured if rng is None else trained).update(index.tolist())
        return real(split, m, index, encoder, device, setting, rng)
    with monkeypatch.context() as patch:
        patch.setattr(data, "model_input", spy)
        folder = script("g_blending", "--super-epoch", 1)
    assert len(trained) == 96 - 10 and measured == set(range(96))
    w = [[line[k] for k in ("w_joint", "w_audio", "w_visual")] for line in logged(folder)[1:]]
    assert all(sum(v) == pytest.approx(1) for v in w) and w[0] != w[1] and w[0] != pytest.approx([1 / 3] * 3)
    assert tensors(folder)["blend.w"].tolist() == pytest.approx(w[checkpoints.read_json(folder / "result.json")["best_epoch"] - 1])


def test_g_blending_trains_with_its_weights(script, monkeypatch, watch):
    """All weight on the visual head: nothing but the visual model has a gradient, and that is the one of its cross-entropy."""
    moved = []
    watch(lambda optimizer, names: moved.append({names[id(p)].split(".")[0] for g in optimizer.param_groups for p in g["params"] if p.grad.any()}))
    monkeypatch.setattr(g_blending, "blend_weights", lambda *losses: torch.tensor([0.0, 0.0, 1.0]))          # joint, audio, visual
    log = logged(script("g_blending", "--epochs", 3))
    assert moved == [{"visual"}] * 9
    assert [log[3][k] for k in ("w_joint", "w_audio", "w_visual")] == [0, 0, 1]
    assert log[3]["val"]["visual"]["loss"] < log[1]["val"]["visual"]["loss"]


# ------------------------------------------------------------------------------------------------ PMR
def filled(momentum=0.0):
    torch.manual_seed(0)
    p = pmr.Prototypes(toy_models({"a": 3, "b": 5}), 4)
    h, y = {"a": torch.randn(9, 3), "b": torch.randn(9, 5)}, torch.tensor([0, 0, 1, 1, 1, 3, 3, 0, 1])      # class 2 is absent
    p.update(h, y, momentum)
    return p, h, y


def test_prototypes_are_class_means_with_momentum():
    p, h, y = filled(0.2)
    for k in (0, 1, 3):
        assert torch.allclose(p.a[k], h["a"][y == k].mean(0), atol=1e-6)      # the first time without momentum: there is nothing old
    assert p.seen.tolist() == [True, True, False, True] and p.b[2].tolist() == [0] * 5
    old = p.b.clone()
    p.update({"a": h["a"], "b": 2 * h["b"]}, torch.full_like(y, 2), 0.2)      # only class 2
    assert torch.equal(p.b[[0, 1, 3]], old[[0, 1, 3]]) and torch.allclose(p.b[2], 2 * h["b"].mean(0), atol=1e-6) and p.seen.all()
    p.update({"a": h["a"], "b": h["b"]}, y, 0.2)
    assert torch.allclose(p.b[1], 0.2 * old[1] + 0.8 * h["b"][y == 1].mean(0), atol=1e-6)


def test_pmr_terms_are_the_papers():
    p, h, y = filled()
    pce, entropy, beta, leader = p.terms(h, y)
    s = {}
    for m in h:      # naive: sample by sample, class by class
        s[m] = total = ent = 0
        for i in range(9):
            d = {k: math.exp(-math.dist(h[m][i].tolist(), getattr(p, m)[k].tolist())) for k in (0, 1, 3)}
            q = {k: v / sum(d.values()) for k, v in d.items()}
            s[m], total, ent = s[m] + q[int(y[i])], total - math.log(q[int(y[i])]), ent - sum(v * math.log(v) for v in q.values())
        assert float(pce[m]) == pytest.approx(total / 9, rel=1e-4) and float(entropy[m]) == pytest.approx(ent / 9, rel=1e-4)
    rho = s["a"] / s["b"]                                                     # the paper's two coefficients, for two modalities
    wanted = (min(max(1 / rho - 1, 0), 1), 0) if rho < 1 else (0, min(max(rho - 1, 0), 1))
    assert (float(beta["a"]), float(beta["b"])) == pytest.approx(wanted, rel=1e-3) and leader == ("b" if rho < 1 else "a")
    assert max(wanted) > 0.01
    extra, _ = p.loss(h, y, 2.0, 0.5)                                         # the slow one is pulled, the other one's entropy kept up
    slow = "a" if rho < 1 else "b"
    assert float(extra) == pytest.approx(max(wanted) * (2 * float(pce[slow]) - 0.5 * float(entropy[leader])), rel=1e-3)


def test_pmr_terms_pull_features_and_never_give_nan():
    p, h, y = filled()
    y = y.clone()
    y[0] = 2                                                                  # a sample of the class without prototype
    h = {m: v.requires_grad_() for m, v in h.items()}
    pce, entropy, _, _ = p.terms(h, y)
    pull, spread = torch.autograd.grad(pce["a"], h["a"], retain_graph=True)[0], torch.autograd.grad(entropy["a"], h["a"])[0]
    assert pull.isfinite().all() and spread.isfinite().all() and pull[1:].any() and spread[1:].any()
    assert not pull[0].any() and not spread[0].any()
    nearer = {"a": (h["a"] - 0.1 * pull).detach(), "b": h["b"]}
    assert p.terms(nearer, y)[0]["a"] < pce["a"]
    nobody = p.terms({m: v[:1] for m, v in h.items()}, y[:1])
    assert all(torch.as_tensor(v).isfinite() for part in nobody[:3] for v in part.values())


def test_prototypes_come_from_a_share_of_every_class():
    y = torch.tensor([0] * 50 + [1] * 30 + [2])
    i = pmr.a_share_of_every_class(y, 0.1, 0)
    assert y[i].tolist() == [0] * 5 + [1] * 3 + [2] and len(set(i.tolist())) == 9
    assert not torch.equal(i, pmr.a_share_of_every_class(y, 0.1, 1))


def test_pmr_is_concat_when_its_terms_are_off_and_not_when_on(script):
    concat = training(script("concat"))
    assert training(script("pmr", "--alpha", 0, "--mu", 0)) == concat
    assert training(script("pmr", "--alpha", 0, "--per-epochs", 0)) == concat
    assert training(script("pmr", "--alpha", 1, "--mu", 0)) != concat                                        # the prototype loss alone
    assert training(script("pmr", "--alpha", 0, "--mu", 1, "--per-epochs", 2)) != concat                     # the entropy term alone


# ------------------------------------------------------------------------------------------------ MLA
def test_projection_is_recursive_least_squares():
    torch.manual_seed(0)
    projection, seen = mla.Projection(32, 0.1), torch.randn(5, 32)
    for h in seen:
        projection.update(h)
    P = projection.P
    wanted = torch.linalg.inv(torch.eye(32, dtype=torch.float64) + seen.T.double() @ seen.double() / 0.1)    # what the recursion computes
    assert torch.allclose(P.double(), wanted, atol=1e-5) and P.dtype == torch.float32
    assert ((seen @ P).norm(dim=1) < 0.02 * seen.norm(dim=1)).all()                                          # seen: almost nothing is left
    other = torch.linalg.qr(torch.cat([seen, torch.randn(1, 32)]).T)[0][:, 5]
    assert float((P @ other).norm()) == pytest.approx(1, abs=1e-4)                                           # at right angles to them: all of it
    for h in torch.randn(2000, 32) + 3:
        projection.update(h)
    assert torch.equal(P, P.T)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert eigenvalues.min() > -1e-5 and eigenvalues.max() < 1 + 1e-5


def test_projection_replaces_the_gradient():
    torch.manual_seed(0)
    projection, head, h = mla.Projection(8, 0.1), nn.Linear(8, 3), torch.randn(8)
    projection.update(h)
    head.weight.grad, head.bias.grad = torch.randn(3, 8), torch.ones(3)
    before, moved = head.weight.grad.clone(), head.weight.grad @ h
    projection.project(head)
    assert torch.allclose(head.weight.grad, before @ projection.P) and torch.equal(head.bias.grad, torch.ones(3))
    assert (head.weight.grad @ h).norm() < 0.02 * moved.norm()                # a step along it leaves the logits of h alone


def test_mla_takes_turns(script, watch):
    turns, part = [], lambda name: name.split(".encoder")[0]
    watch(lambda optimizer, names: turns.append(({part(names[id(p)]) for g in optimizer.param_groups for p in g["params"] if p.grad is not None},
                                                 {part(names[id(p)]) for p in optimizer.state if optimizer.state[p]})))
    script("mla", "--epochs", 1, "--order", "visual", "audio")
    head = {"audio.head.weight", "audio.head.bias"}                           # the shared one goes by the name it has first
    assert [t[0] for t in turns] == [{"visual"} | head, {"audio"} | head] * 3                     # 96 samples in batches of 32
    assert turns[1][1] == {"visual"} | head                                   # the first step left no moments for the audio encoder


def test_mla_projects_with_what_came_before(script, monkeypatch, watch):
    """In the loop: the gradient that the optimiser gets is the original one times P, and P was made of the turns before this one."""
    before, steps, means, real = [], [], [], (mla.Projection.project, mla.Projection.update)
    monkeypatch.setattr(mla.Projection, "project", lambda self, head: (before.append(head.weight.grad.clone()), real[0](self, head)))
    monkeypatch.setattr(mla.Projection, "update", lambda self, h: (means.append(h.clone()), real[1](self, h)))
    watch(lambda optimizer, names: steps.append(next(p.grad.clone() for g in optimizer.param_groups for p in g["params"] if "head.weight" in names[id(p)])))
    script("mla", "--epochs", 1)
    assert len(before) == len(steps) == len(means) == 6
    P = mla.Projection(32, 0.1)
    for original, used, mean in zip(before, steps, means):
        assert torch.allclose(used, original @ P.P, atol=1e-6)
        P.update(mean)
    assert torch.equal(before[0], steps[0]) and (steps[1] @ means[0]).norm() < 0.02 * (before[1] @ means[0]).norm()


def test_mla_without_projection_and_in_another_order(script):
    plain, default = script("mla", "--no-projection"), script("mla")
    assert "projection.P" not in tensors(plain) and "projection.P" in tensors(default)
    assert training(script("mla", "--alpha", 1e30)) == training(plain)       # P = I
    assert training(default)[1:] != training(plain)[1:]
    assert training(script("mla", "--order", "visual", "audio"))[1:] != training(default)[1:]


def test_mla_heads_of_their_own(script, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(encoders.BUILD, "vit_toy", (encoders.ViT, encoders.BUILD["vit_toy"][1] | dict(width=16)))
        with pytest.raises(SystemExit, match="audio 32, visual 16.*--separate-heads"):
            script("mla")
        file = tensors(script("mla", "--separate-heads"))
    assert file["audio.head.weight"].shape == (12, 32) and file["visual.head.weight"].shape == (12, 16)


def test_mla_prediction_of_a_sample_is_its_own(script):
    z = tensors(script("mla"), "logits")
    alone = torch.cat([evaluate.fuse({m: z[f"test.{m}"][i:i + 1] for m in ("audio", "visual")}, "entropy") for i in range(60)])
    assert torch.allclose(z["test.joint"].exp(), alone, atol=1e-6)
