"""`evaluate.py` on finished runs: missing modalities, linear evaluation, export, and the paper's tables.

The tables are asked of small folders of hand-made results; everything else of one real chain on a small toy, two seeds of one epoch.
"""
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoints
import data
import evaluate
import paper
import train_joint
import train_unimodal
from encoders import BUILD, ResNet, UnimodalModel, ViT, build
from lora import merge_lora

FIXTURES = Path(__file__).parent / "fixtures" / "encoders"
CLIP = FIXTURES / "openclip" / "open_clip_pytorch_model.bin"
JOINT = "runs/toy/mmlora-all-r1-s0"


def call(script, *words):
    """Run a script's main, as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, words), "--device", "cpu"])
        script.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/ and runs/ of two seeds, where B is not zero any more."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "TOY_SIZES", {"train": 120, "val": 60, "test": 90})
        call(train_joint, "--seeds", 0, 1, "--umft-epochs", 1, "--epochs", 1)
        for seed in (0, 1):
            file = folder / f"runs/toy/mmlora-all-r1-s{seed}/model.safetensors"
            torch.manual_seed(seed)
            save_file({k: t + 0.3 * torch.randn(t.shape) for k, t in load_file(file).items()}, file)
    return folder


@pytest.fixture
def chain(trained, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(run):
    """(settings, models, info, folder of the data) of a run in the chain."""
    where = Path("data") / f"toy-s{run[-1]}"
    info = json.loads((where / "dataset.json").read_text())
    return *checkpoints.load_run(Path(run), info), info, where


def features(model, where, split, modality):
    """By the shortest way: what evaluation shows of every sample, all at once."""
    split = data.Split(where, split)
    with torch.no_grad():
        return model.features(data.model_input(split, modality, torch.arange(len(split)), model.encoder, "cpu", paper.settings_for("toy")))


def rows(text):
    """Printed lines -> {label: accuracy}."""
    return {line[:40].strip(): float(line[40:].split()[0]) for line in text.splitlines() if re.match(r".{40} *\d", line)}


# ------------------------------------------------------------------------------------------------ missing modalities
@pytest.mark.parametrize("rule", evaluate.FUSIONS)
@pytest.mark.parametrize("multilabel", [False, True])
def test_missing_samples_are_predicted_from_what_is_left(rule, multilabel):
    torch.manual_seed(0)
    logits = {m: 3 * torch.randn(50, 4) for m in "abc"}
    full, left = evaluate.fuse(logits, rule, multilabel), evaluate.fuse({m: logits[m] for m in "bc"}, rule, multilabel)
    fuse = lambda share: evaluate.fuse_missing(logits, ["a"], share, rule, multilabel)
    assert torch.equal(fuse(0), full) and torch.equal(fuse(1), left)
    lost = {share: {i for i in range(50) if not torch.equal(fuse(share)[i], full[i])} for share in (0.3, 0.7)}
    assert len(lost[0.3]) == 15 and len(lost[0.7]) == 35 and lost[0.3] < lost[0.7]          # 0.7: 70 % lose it, not 30 %
    assert lost[0.7] != set(range(35))
    assert all(torch.equal(fuse(0.7)[i], left[i]) for i in lost[0.7]) and torch.equal(fuse(0.7), fuse(0.7))


@pytest.mark.parametrize("rule", evaluate.FUSIONS)
@pytest.mark.parametrize("multilabel", [False, True])
def test_one_modality_is_that_modality_and_the_order_of_samples_is_nothing(rule, multilabel):
    torch.manual_seed(0)
    logits, order = {m: 3 * torch.randn(50, 4) for m in "abc"}, torch.randperm(50)
    for m, z in logits.items():
        torch.testing.assert_close(evaluate.fuse({m: z}, rule, multilabel), z.sigmoid() if multilabel else z.softmax(-1))
    whole = evaluate.fuse(logits, rule, multilabel)
    torch.testing.assert_close(evaluate.fuse({m: z[order] for m, z in logits.items()}, rule, multilabel), whole[order])
    assert not torch.allclose(whole, evaluate.fuse({"a": logits["a"]}, rule, multilabel))


@pytest.mark.parametrize("rule", evaluate.FUSIONS)
def test_missing_beside_full_and_dropped(rule, chain, capsys):
    call(evaluate, "--run", JOINT, "--fusion", rule)
    full = rows(capsys.readouterr().out)
    call(evaluate, "--run", JOINT, "--fusion", rule, "--drop", "audio")
    dropped = rows(capsys.readouterr().out)
    call(evaluate, "--run", JOINT, "--fusion", rule, "--drop", "audio", "--missing", 0, 0.5, 1)
    swept = rows(capsys.readouterr().out)
    assert dropped == {name: full[name] for name in ("visual alone", "visual alone (UMFT)")} and full.items() <= swept.items()
    for name, alone in (("UME", "visual alone (UMFT)"), ("together", "visual alone")):
        assert swept[f"{name}, audio missing in 0 %"] == full[f"{name}, fusion {rule}"] != swept[f"{name}, audio missing in 100 %"] == full[alone]
        assert f"{name}, audio missing in 50 %" in swept
    ume = json.loads(Path(JOINT, "result.json").read_text())["ume"]["test"]       # what the run says it started from
    assert rule == "entropy" or full[f"UME, fusion {rule}"] == round(100 * ume[rule]["accuracy"], 1)


def test_runs_that_differ_in_the_seed_are_averaged(chain, capsys):
    call(evaluate, "--run", JOINT, JOINT[:-1] + "1", "runs/toy/unimodal-audio-s0")
    *single, _, mean = capsys.readouterr().out.split("\n\n")        # the uni-modal run is alone of its kind
    assert len(single) == 2 and mean.startswith("mmlora-all-r1-s0, mmlora-all-r1-s1\n") and "2 seeds" in mean
    each = [rows(text) for text in single]
    for label, value in rows(mean).items():
        assert value == pytest.approx((each[0][label] + each[1][label]) / 2, abs=0.1)
    assert rows(mean).keys() == each[0].keys() == {"audio alone (UMFT)", "visual alone (UMFT)", "UME, fusion prob", "audio alone", "visual alone", "together, fusion prob"}


# ------------------------------------------------------------------------------------------------ linear evaluation
def problem(multilabel, n=80, d=6, c=4):
    torch.manual_seed(0)
    x, w = torch.randn(n, d).double(), torch.randn(d, c).double()
    z = 2 * x @ w + torch.randn(n, c).double()
    return x, (z > 0.5).to(torch.uint8) if multilabel else z.argmax(1)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_solver_against_the_gradient_by_hand_and_gradient_descent(multilabel, l2):
    x, y = problem(multilabel)
    targets = y.double() if multilabel else nn.functional.one_hot(y, 4).double()

    def gradient(w, b):         # of the mean cross-entropy: (P - Y)^T x / N, whatever P is
        z = x @ w.T + b
        wrong = ((z.sigmoid() if multilabel else z.softmax(1)) - targets) / len(x)
        return wrong.T @ x + l2 * w, wrong.sum(0)

    layer = evaluate.logistic_regression(x, y, 4, l2)
    assert max(g.abs().max() for g in gradient(layer.weight.data, layer.bias.data)) < 1e-6
    w, b = torch.zeros(4, 6).double(), torch.zeros(4).double()
    for _ in range(30_000 if l2 < 0.01 else 3000):
        dw, db = gradient(w, b)
        w, b = w - dw, b - db
    torch.testing.assert_close(layer.weight.data, w, rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.bias.data, b, rtol=0, atol=1e-4)
    warm = evaluate.logistic_regression(x, y, 4, l2, evaluate.logistic_regression(x, y, 4, 1.0))
    torch.testing.assert_close(warm.weight.data, layer.weight.data, rtol=0, atol=1e-4)


def test_solver_in_closed_form():
    """Features that say nothing: the best bias is the log of the class frequencies, or, per class, the log-odds."""
    x, y = torch.zeros(40, 3).double(), torch.arange(40) % 10 // 4        # 40, 40, 20 %
    b = evaluate.logistic_regression(x, y, 3, 0.1).bias.data
    torch.testing.assert_close(b.softmax(0), torch.tensor([0.4, 0.4, 0.2]).double(), rtol=0, atol=1e-6)
    b = evaluate.logistic_regression(x, nn.functional.one_hot(y, 3).to(torch.uint8), 3, 0.1).bias.data
    torch.testing.assert_close(b.sigmoid(), torch.tensor([0.4, 0.4, 0.2]).double(), rtol=0, atol=1e-6)


def test_standardise():
    torch.manual_seed(0)
    like, x = torch.randn(30, 3).double() * torch.tensor([1, 1e4, 0]) + 5, torch.randn(10, 3).double()
    out = evaluate.standardise(like, like)
    torch.testing.assert_close(out[:, :2].mean(0), torch.zeros(2).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(out[:, :2].std(0), torch.ones(2).double())
    assert (evaluate.standardise(x, like)[:, 2] == 0).all()             # constant in training: no infinity in test


def test_probe_of_a_run(chain, capsys):
    weights = {f: f.read_bytes() for f in Path("runs").rglob("*.safetensors")}
    call(evaluate, "--probe", "--run", JOINT)
    printed, stored = capsys.readouterr().out, json.loads(Path(JOINT, "probe.json").read_text())
    assert {f: f.read_bytes() for f in Path("runs").rglob("*.safetensors")} == weights
    _, models, info, where = opened(JOINT)
    for m, model in models.items():             # once more, step by step
        x = {name: features(model, where, name, m).double() for name in ("train", "val", "test")}
        mean, std = x["train"].mean(0), x["train"].std(0)
        right, layer, y = {}, None, {name: data.Split(where, name).labels for name in x}
        for l2 in (0.1, 0.01, 0.001, 0.0001):
            layer = evaluate.logistic_regression((x["train"] - mean) / std, y["train"], 12, l2, layer)
            right[l2] = {name: float((layer((x[name] - mean) / std).argmax(1) == y[name]).double().mean()) for name in ("val", "test")}
        best = stored[m]["l2"]
        assert right[best]["val"] == max(r["val"] for r in right.values()) == pytest.approx(stored[m]["val"]["accuracy"])
        assert right[best]["test"] == pytest.approx(stored[m]["test"]["accuracy"], abs=0.012)              # one of 90
        assert stored[m]["trained_parameters"] == 12 * 33
        assert rows(printed)[f"{m}, linear evaluation"] == pytest.approx(100 * stored[m]["test"]["accuracy"], abs=0.051)


def test_probe_is_deterministic_and_chooses_on_validation(chain):
    found = []
    for shuffle in (False, False, True):
        if shuffle:
            labels = data.Split(Path("data/toy-s0"), "test").labels.numpy()
            evaluate.data.np.save("data/toy-s0/test/labels.npy", labels[::-1])
        call(evaluate, "--probe", "--run", JOINT, "--modality", "visual")
        found.append(json.loads(Path(JOINT, "probe.json").read_text())["visual"])
        found[-1].pop("seconds")
    assert found[0] == found[1] and found[2]["test"] != found[0]["test"]
    assert [found[2][key] for key in ("l2", "val")] == [found[0][key] for key in ("l2", "val")]


def test_probe_of_a_pretrained_encoder(chain, capsys, monkeypatch):
    monkeypatch.setitem(BUILD, "vit_toy", (ViT, dict(image_size=32, patch_size=8, width=32, depth=3, heads=4)))
    call(evaluate, "--probe", "--dataset", "toy", "--modality", "visual", "--pretrained", CLIP)
    folder = Path("runs/toy/probe-visual-vit_toy-s0")
    stored, settings = (json.loads((folder / f).read_text()) for f in ("probe.json", "config.json"))
    assert settings["settings"]["pretrained"] == str(CLIP) and stored.keys() == {"visual"}
    model = UnimodalModel(checkpoints.load_public(build("vit_toy"), CLIP), 12).eval()
    x = {name: features(model, Path("data/toy-s0"), name, "visual").double() for name in ("train", "val")}
    layer = evaluate.logistic_regression(evaluate.standardise(x["train"], x["train"]), data.Split(Path("data/toy-s0"), "train").labels, 12, stored["visual"]["l2"])
    right = layer(evaluate.standardise(x["val"], x["train"])).argmax(1) == data.Split(Path("data/toy-s0"), "val").labels
    assert float(right.float().mean()) == pytest.approx(stored["visual"]["val"]["accuracy"], abs=0.018)    # one of 60
    with pytest.raises(ValueError, match="--out"):          # the folder belongs to another start
        call(evaluate, "--probe", "--dataset", "toy", "--modality", "visual")
    with pytest.raises(ValueError, match="toy has audio, visual"):
        call(evaluate, "--probe", "--dataset", "toy", "--modality", "text")


def test_probe_of_a_baseline_takes_its_encoders(chain, capsys):
    settings, models, info, where = opened(JOINT)
    plain = {m: merge_lora(model) for m, model in models.items()}
    tensors = {f"{m}.encoder.{k}": t for m, model in plain.items() for k, t in model.encoder.state_dict().items()}
    folder = Path("runs/toy/concat-s0")
    shutil.copytree(JOINT, folder)
    (folder / "config.json").write_text(json.dumps(dict(settings={k: v for k, v in settings.items() if k not in ("lora", "rank", "unimodal")} | dict(method="concat"))))
    save_file(tensors | {"joint.linear.weight": torch.zeros(12, 64)}, folder / "model.safetensors")
    call(evaluate, "--probe", "--run", JOINT, folder)
    ours, theirs = (json.loads((f / "probe.json").read_text()) for f in (Path(JOINT), folder))
    assert {m: r["val"]["accuracy"] for m, r in theirs.items()} == pytest.approx({m: r["val"]["accuracy"] for m, r in ours.items()}, abs=0.018)
    with pytest.raises(ValueError, match="baselines/concat.py"):
        call(evaluate, "--run", folder)
    tensors.pop("audio.encoder.cls_token")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="audio.encoder.cls_token"):
        call(evaluate, "--probe", "--run", folder)


# ------------------------------------------------------------------------------------------------ export
def test_export_merges_lora_and_loads_back(chain, capsys):
    call(evaluate, "--run", JOINT, "--export", "out/mine")
    printed = capsys.readouterr().out
    settings, models, info, where = opened(JOINT)
    files = {"audio": Path("out/mine/audio/imagebind_huge.pth"), "visual": Path("out/mine/visual/open_clip_pytorch_model.bin")}
    assert sorted(f for f in Path("out").rglob("*") if f.is_file()) == sorted([*files.values(), *(f.with_name("head.safetensors") for f in files.values())])
    for m, file in files.items():
        adapted = features(models[m], where, "test", m)
        again = UnimodalModel(checkpoints.load_public(build(settings["encoders"][m]), file), 12).eval()
        torch.testing.assert_close(features(again, where, "test", m), adapted, rtol=1e-4, atol=1e-4)
        assert (features(opened(f"runs/toy/unimodal-{m}-s0")[1][m], where, "test", m) - adapted).abs().max() > 0.01        # LoRA had done something
        with safe_open(file.with_name("head.safetensors"), "pt") as f:
            assert json.loads(f.metadata()["classes"]) == info["classes"]
            assert torch.equal(f.get_tensor("weight"), models[m].head.weight) and torch.equal(f.get_tensor("bias"), models[m].head.bias)
        assert str(file) in printed
    assert "ImageBind" in printed and "open_clip" in printed
    with pytest.raises(ValueError, match="exists already"):
        call(evaluate, "--run", JOINT, "--export", "out/mine")


def test_export_writes_all_or_nothing(chain, monkeypatch):
    def export_public(encoder, path, source):
        if "visual" in str(path):
            raise OSError("disk full")
        path.write_bytes(b"")
    monkeypatch.setattr(checkpoints, "export_public", export_public)
    with pytest.raises(OSError):
        call(evaluate, "--run", JOINT, "--export", "out")
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("how", ["path", "public", "gone"])
def test_export_of_an_untouched_encoder_is_the_public_file(how, chain, capsys, monkeypatch):
    monkeypatch.setitem(BUILD, "vit_toy", (ViT, dict(image_size=32, patch_size=8, width=32, depth=3, heads=4)))
    if how == "path":
        file = Path("mine.bin")
    else:
        monkeypatch.setitem(checkpoints.PUBLIC, "vit_toy", checkpoints.Public("https://example.org/files/towers.bin", 0.1, "MIT"))
        file = Path("checkpoints/vit_toy/towers.bin")
        file.parent.mkdir(parents=True)
    shutil.copy(CLIP, file)
    words = ["--pretrained", file] if how == "path" else []
    call(train_unimodal, "--modality", "visual", "--epochs", 1, "--lr", 1e-30, "--out", "other", *words)       # too small a step to change any weight
    if how == "gone":
        file.unlink()
    call(evaluate, "--run", "other/toy/unimodal-visual-s0", "--export", "out")
    before, after = (torch.load(f, weights_only=True) for f in (CLIP, Path("out/visual") / file.name))
    assert after.keys() == (before.keys() if how != "gone" else {k for k in before if k.startswith("visual.") and k != "visual.proj"})
    assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in after.items())
    assert f"{file} is not there" * (how == "gone") in capsys.readouterr().out


def test_export_of_a_flow_network(tmp_path, capsys):
    """Its first layer takes more channels than the public file has: written alone."""
    source = FIXTURES / "resnet_basic/resnet.pth"
    network = checkpoints.load_public(ResNet((2, 2, 2, 2), False, width=8, in_channels=4), source)
    models = nn.ModuleDict({"flow": UnimodalModel(network, 2)})
    checkpoints.export_run(tmp_path, dict(modality="flow", encoder="resnet18", pretrained=str(source)), models, dict(classes=["a", "b"]), tmp_path / "out")
    again = checkpoints.load_public(ResNet((2, 2, 2, 2), False, width=8, in_channels=4), tmp_path / "out/flow/resnet.pth")
    assert all(torch.equal(t, network.state_dict()[k]) for k, t in again.state_dict().items()) and "4 channels" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("words, told", [
    ("", "give one of"), ("--table 5 --run x", "give one of"), ("--probe --dataset toy", "--modality NAME"), ("--run nowhere", "nowhere holds no finished run"),
    ("--table 5 --dataset ave", "toy, toy_noisy"), ("--table 11 --dataset toy", "1, 3, 4, 5, 8, 9, 10, 13"), ("--run x --fill", "--fill goes with --table"),
    ("--export out", "--export takes one --run"), ("--run a b --export out", "--export takes one --run"),
    (f"--run {JOINT} --missing 0.7", "--missing needs --drop"), (f"--run {JOINT} --drop audio --missing 70", "0.7 = 70 %"),
    (f"--run {JOINT} --drop text", "has audio, visual"), (f"--run {JOINT} --drop audio visual --missing 0.5", "leaves no modality"),
    (f"--run {JOINT} --probe --modality text", "has audio, visual"), ("--probe --dataset toy --modality audio --pretrained gone.pth", "no checkpoint at gone.pth"),
])
def test_bad_input_is_one_line_and_leaves_nothing(words, told, trained, monkeypatch):
    monkeypatch.chdir(trained)
    before = sorted(trained.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(evaluate.__file__)), run_name="__main__")
    assert stop.value.code.startswith("error: ") and told in stop.value.code and "\n" not in stop.value.code
    assert sorted(trained.rglob("*")) == before
