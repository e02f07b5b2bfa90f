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


def test_missing_beside_full_and_dropped(chain, capsys):
    call(evaluate, "--run", JOINT)
    full = rows(capsys.readouterr().out)
    call(evaluate, "--run", JOINT, "--drop", "audio")
    dropped = rows(capsys.readouterr().out)
    call(evaluate, "--run", JOINT, "--drop", "audio", "--missing", 0, 0.5, 1)
    swept = rows(capsys.readouterr().out)
    assert dropped == {"visual alone": full["visual alone"]} and full.items() <= swept.items()
    assert swept["audio missing in 0 %"] == full["together, fusion prob"] != swept["audio missing in 100 %"] == full["visual alone"]
    assert "audio missing in 50 %" in swept


def test_runs_that_differ_in_the_seed_are_averaged(chain, capsys):
    call(evaluate, "--run", JOINT, JOINT[:-1] + "1", "runs/toy/unimodal-audio-s0")
    *single, _, mean = capsys.readouterr().out.split("\n\n")        # the uni-modal run is alone of its kind
    assert len(single) == 2 and mean.startswith("mmlora-all-r1-s0, mmlora-all-r1-s1\n") and "2 seeds" in mean
    each = [rows(text) for text in single]
    for label, value in rows(mean).items():
        assert value == pytest.approx((each[0][label] + each[1][label]) / 2, abs=0.1)
    assert rows(mean).keys() == each[0].keys() == {"audio alone", "visual alone", "together, fusion prob"}


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


# ------------------------------------------------------------------------------------------------ the paper's tables
VIT, RESNET = {"audio": "audio_vit_b", "visual": "vit_b16"}, {"audio": "resnet18", "visual": "resnet18"}


def write(out, dataset, name, result=None, probe=None, **settings):
    """A run's folder, hand-made."""
    folder = out / dataset / name
    folder.mkdir(parents=True)
    settings = dict(dict(dataset=dataset, seed=int(name[-1])), **settings)
    (folder / "config.json").write_text(json.dumps(dict(settings=settings)))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(dict(fusion=settings.get("fusion"), **result)))
    if probe is not None:
        (folder / "probe.json").write_text(json.dumps({m: dict(test=dict(accuracy=v)) for m, v in probe.items()}))


def unimodal(out, dataset, modality, seed, accuracy, encoder, pretrained=None, probe=None, tag=""):
    write(out, dataset, f"unimodal-{modality}{tag}-s{seed}", dict(test={modality: dict(accuracy=accuracy)}), probe, method="unimodal", modality=modality,
          encoder=encoder, pretrained=pretrained or encoder)


def joint(out, dataset, name, accuracy, ume=None, method="mmlora", lora=("audio", "visual"), rank=1, encoders=VIT, fusion="prob", base="", probe=None, **more):
    """accuracy: of the fusion that it was trained with; the other one's is 0.1."""
    result = dict(test={"prob": dict(accuracy=0.1), "logits": dict(accuracy=0.1)} | {fusion: dict(accuracy=accuracy)})
    if ume:
        result["ume"] = dict(test={"prob": dict(accuracy=ume), "logits": dict(accuracy=0.1)})
    if method == "mmlora":
        more["unimodal"] = {m: dict(run=f"unimodal-{m}{base}-s{name[-1]}") for m in encoders}
    write(out, dataset, name, result, probe, method=method, encoders=encoders, fusion=fusion, **more,
          **(dict(lora=sorted(lora), rank=rank) if method in ("mmlora", "no-umft") else {}))


def filled(number, out, toy=None):
    """(row, column) -> seed -> numbers, of the cells that are not empty."""
    cells = {(row, column): cell for row, columns in evaluate.table_cells(number, toy).items() for column, cell in columns.items()}
    found = {(re.sub(" +", " ", row), column): evaluate.numbers(cell, evaluate.matches(cell, out)) for (row, column), cell in cells.items()}
    return {where: {s: tuple(round(v, 6) for v in values) for s, values in f.items()} for where, f in found.items() if f}


def test_only_the_run_that_a_cell_asks_for_fills_it(tmp_path):
    for seed in (0, 1):
        for m, encoder in VIT.items():
            unimodal(tmp_path, "ave", m, seed, 0.8, encoder)
            unimodal(tmp_path, "ave", m, seed, 0.5, "resnet18", tag="-scratch", pretrained="none")
            unimodal(tmp_path, "ave", m, seed, 0.6, "resnet18", tag="-resnet18")
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", 0.96 + seed / 100, ume=0.95)
    joint(tmp_path, "ave", "mmlora-audio-r1-s0", 0.2, lora=["audio"], ume=0.95)
    joint(tmp_path, "ave", "mmlora-all-r4-s0", 0.3, rank=4, ume=0.95)
    joint(tmp_path, "ave", "mmlora-all-r1-logits-s2", 0.4, fusion="logits", ume=0.94)
    joint(tmp_path, "kinetics_sound", "mmlora-all-r1-logits-s0", 0.4, fusion="logits", ume=0.9)
    joint(tmp_path, "ave", "no-umft-all-r1-s0", 0.5, method="no-umft", pretrained=dict(VIT))
    joint(tmp_path, "ave", "full-s0", 0.6, method="full", ume=0.95)
    joint(tmp_path, "ave", "mmlora-all-r1-resnet18-s0", 0.7, encoders=RESNET, ume=0.65, base="-resnet18")      # ImageNet, where Table 5 has none
    joint(tmp_path, "ave", "mmlora-all-r1-resnet18-scratch-s0", 0.75, encoders=RESNET, ume=0.72, base="-scratch")
    joint(tmp_path, "ave", "no-umft-all-r1-none-s0", 0.55, method="no-umft", pretrained=dict.fromkeys(VIT, "none"))
    joint(tmp_path, "ave", "mmlora-all-r1-lr-s3", 0.9, lr=1)                # a setting tried with fewer seeds
    write(tmp_path, "ave", "mmlora-unfinished-s5", method="mmlora", encoders=VIT, lora=["audio", "visual"], rank=1, fusion="prob", unimodal={})
    write(tmp_path, "ave", "concat-s0", dict(test={"joint": dict(accuracy=0.91)}), method="concat", encoders=VIT, pretrained=dict(VIT), fusion="joint")
    write(tmp_path, "ave", "ogm_ge-s0", dict(test={"prob": dict(accuracy=0.92)}), method="ogm_ge", encoders=VIT, fusion="prob")
    write(tmp_path, "ave", "ogm_ge-scratch-s0", dict(test={"joint": dict(accuracy=0.73)}), method="ogm_ge", encoders=RESNET, pretrained="none")
    write(tmp_path, "ave", "pmr-s0", dict(test={"joint": dict(accuracy=0.74)}), method="pmr", encoders=RESNET)             # says nothing of its start
    assert filled(5, tmp_path) == {
        ("OGM-GE ResNet18/ResNet18", "AVE"): {0: (73.0,)},
        ("UME* ResNet18/ResNet18", "AVE"): {0: (72.0,)},
        ("MMLoRA (ours) ResNet18/ResNet18", "AVE"): {0: (75.0,)},
        ("Multi-Modal Baseline* ViT-B/ViT-B", "AVE"): {0: (91.0,)},
        ("OGM-GE* ViT-B/ViT-B", "AVE"): {0: (92.0,)},
        ("UME* ViT-B/ViT-B", "AVE"): {0: (95.0,), 1: (95.0,), 2: (94.0,)},                # seed 2: its run averages logits, its ensemble does not
        ("UME* ViT-B/ViT-B", "KS"): {0: (90.0,)},
        ("Fully Fine-tuned UME* ViT-B/ViT-B", "AVE"): {0: (60.0,)},
        ("MMLoRA (ours) ViT-B/ViT-B", "AVE"): {0: (96.0,), 1: (97.0,)},
    }
    assert filled(9, tmp_path) == {("MMLoRA", "AVE Audio"): {0: (20.0,)}, ("MMLoRA", "AVE Both"): {0: (96.0,), 1: (97.0,)}}
    assert filled(10, tmp_path) == {("AVE", "UME"): {0: (95.0,), 1: (95.0,), 2: (94.0,)}, ("Kinetics-Sound", "UME"): {0: (90.0,)},
                                    ("AVE", "1"): {0: (96.0,), 1: (97.0,)}, ("AVE", "4"): {0: (30.0,)}}
    assert filled(13, tmp_path) == {("MMLoRA (w/o UMFT)", "AVE"): {0: (50.0,)}, ("MMLoRA (w UMFT)", "AVE"): {0: (96.0,), 1: (97.0,)}}
    both = {0: (80.0,), 1: (80.0,)}
    assert filled(1, tmp_path) == {("Fine-tuned Visual Model", "AVE"): both, ("Fine-tuned Audio / Language Model", "AVE"): both}


def test_probes_fill_tables_3_4_and_8(tmp_path):
    for m, encoder in VIT.items():
        unimodal(tmp_path, "ave", m, 0, 0.8, encoder, probe={m: 0.81})
        write(tmp_path, "ave", f"probe-{m}-s0", probe={m: 0.7}, method="pretrained", modality=m, encoder=encoder, pretrained=encoder)
        write(tmp_path, "ave", f"probe-{m}-s1", probe={m: 0.1}, method="pretrained", modality=m, encoder=encoder, pretrained="none")
    joint(tmp_path, "ave", "mmlora-all-r1-s0", 0.9, probe=dict(visual=0.84))
    joint(tmp_path, "ave", "mmlora-audio-r1-s0", 0.9, lora=["audio"], probe=dict(visual=0.2, audio=0.2))
    write(tmp_path, "ave", "concat-s0", dict(test={"joint": dict(accuracy=0.91)}), dict(visual=0.77, audio=0.78), method="concat", encoders=VIT)
    tuned = {("Uni-Modal Fine-Tuned", f"AVE {which}"): {0: (81.0,)} for which in ("RGB", "Audio")}
    assert filled(3, tmp_path) == tuned | {("Multi-Modal Training", "AVE RGB"): {0: (77.0,)}, ("Multi-Modal Training", "AVE Audio"): {0: (78.0,)}}
    assert filled(8, tmp_path) == tuned | {("MMLoRA (ours)", "AVE RGB"): {0: (84.0,)}}
    assert filled(4, tmp_path) == {("linear eval", f"AVE {which}"): {0: (70.0,)} for which in ("RGB", "Audio")} | {
        ("fine-tuning", f"AVE {which}"): {0: (80.0,)} for which in ("RGB", "Audio")}


def test_f1_pairs(tmp_path):
    encoders = {"visual": "vit_l14", "text": "deberta_large"}
    write(tmp_path, "mm_imdb", "mmlora-s0", dict(test={"prob": dict(f1_micro=0.7, f1_macro=0.6)}), method="mmlora", encoders=encoders, fusion="prob",
          lora=["text", "visual"], rank=1, unimodal={m: dict(run="gone") for m in encoders})
    assert filled(6, tmp_path) == {("MMLoRA (ours) Table 2", "MM-IMDB"): {0: (70.0, 60.0)}}


def test_print_of_table_5(tmp_path, capsys):
    for dataset, accuracy in (("ave", 0.95), ("kinetics_sound", 0.9), ("crema_d", 0.88)):
        for seed in (0, 1, 2) if dataset == "ave" else (0,):
            joint(tmp_path, dataset, f"mmlora-s{seed}", accuracy + (seed - 1) / 100 * (dataset == "ave"), lora=["audio"] if dataset == "crema_d" else ["audio", "visual"])
    joint(tmp_path, "ave", "full-s0", 0.9, method="full")
    call(evaluate, "--table", 5, "--out", tmp_path)
    table, commands = capsys.readouterr().out.split("\n\n")[1::2]
    lines = [re.split("  +", line.strip()) for line in table.splitlines()]
    assert lines[0] == ["AVE", "KS", "CREMA-D", "Avg Acc."]
    assert lines[1] == ["G-Blending", "ResNet18/ResNet18 (quoted)", "65.5", "62.2", "58.7", "62.1"]
    assert lines[-2:] == [["MMLoRA (ours)", "ViT-B/ViT-B", "96.2", "91.4", "88.6", "92.1"], ["ours", "95.0 +- 1.0 (3)", "90.0 (1)", "88.0 (1)", "91.0"]]
    assert lines[-3] == ["ours", "90.0 (1)"] and len(lines) == 1 + 2 * 12                    # no mean of one
    commands = commands.splitlines()
    here = f" --out {tmp_path}"
    assert len(commands) == len(set(commands)) and all(here in line for line in commands)
    assert f"python train_joint.py --dataset kinetics_sound --tune full{here}" in commands and f"python train_joint.py --dataset ave --tune full{here}" not in commands
    assert f"python -m baselines.mbt --dataset ave{here}     # quoted" in commands and f"python -m baselines.concat --dataset ave{here}" in commands
    assert f"python train_joint.py --dataset ave --lora all{here}" in commands               # filled for MMLoRA, but these runs hold no UME


@pytest.mark.parametrize("number", paper.TABLES)
def test_every_empty_cell_has_its_command(number, tmp_path, capsys):
    call(evaluate, "--table", number, "--out", "runs")
    printed = capsys.readouterr().out
    commands = {line.removesuffix("     # quoted") for line in printed.splitlines() if line.startswith("python")}
    assert commands == {paper.commands(cell) for row in paper.cells(number) for cell in row} - {""}
    assert ("# quoted" in printed) == any(cell.quoted and paper.commands(cell) for row in paper.cells(number) for cell in row)


@pytest.mark.parametrize("number, columns, count", [
    (1, ["toy"], 2), (3, ["toy RGB", "toy Audio"], 2), (4, ["toy RGB", "toy Audio"], 2), (5, ["toy"], 9), (8, ["toy RGB", "toy Audio"], 2),
    (9, ["toy RGB", "toy Audio", "toy Both"], 1), (10, ["UME", "1", "2", "4", "8", "64"], 1), (13, ["toy"], 2)])
def test_tables_asked_of_the_toy(number, columns, count):
    table = evaluate.table_cells(number, "toy")
    assert len(table) == count and all(list(row) == columns for row in table.values())
    for cell in (cell for row in table.values() for cell in row.values()):
        assert cell.paper is None and not cell.quoted and cell.encoders.items() <= paper.encoders_for("toy").items()
        assert "--dataset toy" in paper.commands(cell) and not {"--encoder", "--pretrained"} & set(paper.commands(cell).split())


def test_from_runs_to_tables_on_the_toy(chain, capsys):
    results = [json.loads(Path(f"runs/toy/mmlora-all-r1-s{s}/result.json").read_text()) for s in (0, 1)]
    accuracy = {s: (round(100 * r["test"]["prob"]["accuracy"], 6),) for s, r in enumerate(results)}
    ensemble = {s: (round(100 * r["ume"]["test"]["prob"]["accuracy"], 6),) for s, r in enumerate(results)}
    assert filled(5, Path("runs"), "toy") == {("UME", "toy"): ensemble, ("MMLoRA (ours)", "toy"): accuracy}
    assert filled(8, Path("runs"), "toy") == {}
    call(evaluate, "--table", 8, "--dataset", "toy")
    assert f"python evaluate.py --probe --run {JOINT}" in capsys.readouterr().out.splitlines()          # what to probe is there already
    call(evaluate, "--probe", "--run", JOINT, "runs/toy/unimodal-audio-s0", "--modality", "audio")
    call(evaluate, "--probe", "--dataset", "toy", "--modality", "audio", "--seed", 1)
    assert {k: set(v) for k, v in filled(8, Path("runs"), "toy").items()} == {("Uni-Modal Fine-Tuned", "toy Audio"): {0}, ("MMLoRA (ours)", "toy Audio"): {0}}
    assert {k: set(v) for k, v in filled(4, Path("runs"), "toy").items()} == {
        ("linear eval", "toy Audio"): {1}, ("fine-tuning", "toy Audio"): {0, 1}, ("fine-tuning", "toy RGB"): {0, 1}}
    capsys.readouterr()
    call(evaluate, "--table", 5, "--dataset", "toy")
    mean = sum(v for v, in accuracy.values()) / 2
    assert re.search(rf"MMLoRA \(ours\) +{mean:.1f} \+- \d+\.\d \(2\)", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("words, told", [
    ("", "give one of"), ("--table 5 --run x", "give one of"), ("--probe --dataset toy", "--modality NAME"), ("--run nowhere", "nowhere holds no finished run"),
    ("--table 5 --dataset ave", "toy, toy_noisy"), ("--export out", "--export takes one --run"), ("--run a b --export out", "--export takes one --run"),
    (f"--run {JOINT} --missing 0.7", "--missing needs --drop"), (f"--run {JOINT} --drop audio --missing 70", "0.7 = 70 %"),
    (f"--run {JOINT} --drop text", "has audio, visual"), (f"--run {JOINT} --drop audio visual --missing 0.5", "leaves no modality"),
    (f"--run {JOINT} --probe --modality text", "has audio, visual"), (f"--probe --dataset toy --modality audio --pretrained gone.pth", "no checkpoint at gone.pth"),
])
def test_bad_input_is_one_line_and_leaves_nothing(words, told, trained, monkeypatch):
    monkeypatch.chdir(trained)
    before = sorted(trained.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(evaluate.__file__)), run_name="__main__")
    assert stop.value.code.startswith("error: ") and told in stop.value.code and "\n" not in stop.value.code
    assert sorted(trained.rglob("*")) == before
