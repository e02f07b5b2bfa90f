"""`evaluate.py` on finished runs: fusion, missing modalities, linear evaluation, export.

All of one real chain on a small toy, two seeds of few epochs. `test_clip.py` has --clip,
`test_tables.py` the paper's tables.
"""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import data
from encoders import BUILD, ResNet, UnimodalModel, ViT, build
from harness import export, metrics, models
from data import read_json
from harness.linear import logistic_regression, standardise
from lora import merge_lora
from paper import settings as paper
from prepare import toy
from pretrained import checkpoints
from running import call, error

FIXTURES = Path(__file__).parent / "fixtures" / "encoders"
CLIP = FIXTURES / "openclip" / "open_clip_pytorch_model.bin"
JOINT = "runs/toy/mmlora-all-r1-s0"
SMALL_VIT = ViT, dict(image_size=32, patch_size=8, width=32, depth=3, heads=4)       # as CLIP is


def show(*words):
    """`python evaluate.py words` -> what it printed."""
    return call("evaluate.py", *words, "--device", "cpu")


def told(*words):
    """The one line that it ends with."""
    return error("evaluate.py", *words, "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/ and runs/ of two seeds, where B is not zero any more."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(toy, "SIZES", {"toy": {"train": 120, "val": 60, "test": 90}})
        call("train_joint.py", "--seeds", 0, 1, "--umft-epochs", 3, "--epochs", 1,
             "--device", "cpu")
        for seed in (0, 1):
            file = folder / f"runs/toy/mmlora-all-r1-s{seed}/model.safetensors"
            torch.manual_seed(seed)
            moved = {k: t + 0.3 * torch.randn(t.shape) for k, t in load_file(file).items()}
            save_file(moved, file)
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
    info = read_json(where / "dataset.json")
    return *models.load_run(Path(run), info), info, where


def features(model, where, split, modality):
    """By the shortest way: what evaluation shows of every sample, all at once."""
    split, settings = data.Split(where, split), paper.settings_for("toy")
    index = torch.arange(len(split))
    x = data.model_input(split, modality, index, model.encoder, "cpu", settings)
    with torch.no_grad():
        return model.features(x)


def labels(where, split):
    return data.Split(Path(where), split).labels


def rows(text):
    """Printed lines -> {label: accuracy}. A label that is too long has a line of its own."""
    found, before = {}, ""
    for line in text.splitlines():
        cells = re.match(r"(\S.*?)? {2,}(\d+\.\d) \+-", line)
        if cells:
            found[cells[1] or before] = float(cells[2])
        before = line
    return found


# ---------------------------------------------------------------------------- missing modalities
@pytest.mark.parametrize("rule", metrics.FUSIONS)
@pytest.mark.parametrize("multilabel", [False, True])
def test_missing_samples_are_predicted_from_what_is_left(rule, multilabel):
    torch.manual_seed(0)
    logits = {m: 3 * torch.randn(50, 4) for m in "abc"}
    full = metrics.fuse(logits, rule, multilabel)
    left = metrics.fuse({m: logits[m] for m in "bc"}, rule, multilabel)

    def fuse(share):
        return metrics.fuse_missing(logits, ["a"], share, rule, multilabel)
    assert torch.equal(fuse(0), full) and torch.equal(fuse(1), left)
    lost = {}
    for share in (0.3, 0.7):
        lost[share] = {i for i in range(50) if not torch.equal(fuse(share)[i], full[i])}
    assert len(lost[0.3]) == 15 and len(lost[0.7]) == 35      # 0.7: 70 % lose it, not 30 %
    assert lost[0.3] < lost[0.7] != set(range(35))
    assert all(torch.equal(fuse(0.7)[i], left[i]) for i in lost[0.7])
    assert torch.equal(fuse(0.7), fuse(0.7))


@pytest.mark.parametrize("rule", metrics.FUSIONS)
@pytest.mark.parametrize("multilabel", [False, True])
def test_one_modality_is_that_modality_and_the_order_of_samples_is_nothing(rule, multilabel):
    torch.manual_seed(0)
    logits, order = {m: 3 * torch.randn(50, 4) for m in "abc"}, torch.randperm(50)
    for m, z in logits.items():
        p = z.sigmoid() if multilabel else z.softmax(-1)
        torch.testing.assert_close(metrics.fuse({m: z}, rule, multilabel), p)
    whole = metrics.fuse(logits, rule, multilabel)
    shuffled = metrics.fuse({m: z[order] for m, z in logits.items()}, rule, multilabel)
    torch.testing.assert_close(shuffled, whole[order])
    assert not torch.allclose(whole, metrics.fuse({"a": logits["a"]}, rule, multilabel))


@pytest.mark.parametrize("rule", metrics.FUSIONS)
def test_missing_beside_full_and_dropped(rule, chain):
    full = rows(show("--run", JOINT, "--fusion", rule))
    printed = show("--run", JOINT, "--fusion", rule, "--drop", "audio")
    assert "without audio" in printed
    assert rows(printed) == {m: full[m] for m in ("visual alone", "visual alone (UMFT)")}
    swept = rows(show("--run", JOINT, "--fusion", rule, "--drop", "audio", "--missing", 0, 0.5, 1))
    assert full.items() <= swept.items()
    for name, alone in (("UME", "visual alone (UMFT)"), ("together", "visual alone")):
        none, all_lack = (swept[f"{name}, {share} % lack audio"] for share in (0, 100))
        assert none == full[f"{name}, fusion {rule}"] != all_lack == full[alone]
        assert f"{name}, 50 % lack audio" in swept
    # what the run says it started from
    ume = read_json(Path(JOINT, "result.json"))["ume"]["test"]
    if rule != "entropy":
        assert full[f"UME, fusion {rule}"] == round(100 * ume[rule]["accuracy"], 1)


def test_scores_are_those_of_the_stored_weights(chain):
    """Of the run from its weights, once more by hand; of UME from the logits of step 1."""
    shown = rows(show("--run", JOINT))
    _, adapted, info, where = opened(JOINT)
    y, logits = labels(where, "test"), {}
    for m, model in adapted.items():
        with torch.no_grad():
            logits[m] = model.head(features(model, where, "test", m))
        right = (logits[m].argmax(1) == y).double().mean()
        assert shown[f"{m} alone"] == pytest.approx(100 * float(right), abs=0.051)
    for name, of in (("together", logits), ("UME", {})):
        for m in adapted if name == "UME" else ():
            of[m] = load_file(f"runs/toy/unimodal-{m}-s0/logits.safetensors")[f"test.{m}"]
        p = sum(z.softmax(1) for z in of.values())
        right = (p.argmax(1) == y).double().mean()
        assert shown[f"{name}, fusion prob"] == pytest.approx(100 * float(right), abs=0.051)


def test_runs_that_differ_in_the_seed_are_averaged(chain):
    printed = show("--run", JOINT, JOINT[:-1] + "1", "runs/toy/unimodal-audio-s0")
    *single, _, mean = printed.split("\n\n")                  # the uni-modal run has no other seed
    assert len(single) == 2 and "2 seeds" in mean
    assert mean.startswith("mmlora-all-r1-s0, mmlora-all-r1-s1\n")
    each = [rows(text) for text in single]
    for label, value in rows(mean).items():
        assert value == pytest.approx((each[0][label] + each[1][label]) / 2, abs=0.1)
    assert rows(mean).keys() == each[0].keys() == {
        "audio alone (UMFT)", "visual alone (UMFT)", "UME, fusion prob",
        "audio alone", "visual alone", "together, fusion prob"}


# ---------------------------------------------------------------------------- linear evaluation
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

    def gradient(w, b):       # of the mean cross-entropy: (P - Y)^T x / N, whatever P is
        z = x @ w.T + b
        wrong = ((z.sigmoid() if multilabel else z.softmax(1)) - targets) / len(x)
        return wrong.T @ x + l2 * w, wrong.sum(0)

    layer = logistic_regression(x, y, 4, l2)
    W, bias = layer.weight.data, layer.bias.data
    assert max(g.abs().max() for g in gradient(W, bias)) < 1e-6
    w, b = torch.zeros(4, 6).double(), torch.zeros(4).double()
    for _ in range(30_000 if l2 < 0.01 else 3000):
        dw, db = gradient(w, b)
        w, b = w - dw, b - db
    torch.testing.assert_close(W, w, rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, b, rtol=0, atol=1e-4)
    warm = logistic_regression(x, y, 4, l2, logistic_regression(x, y, 4, 1.0))
    torch.testing.assert_close(warm.weight.data, W, rtol=0, atol=1e-4)


def test_solver_in_closed_form():
    """Features that say nothing: the best bias is the log of the class frequencies, or, per class,
    the log-odds."""
    x, y = torch.zeros(40, 3).double(), torch.arange(40) % 10 // 4            # 40, 40, 20 %
    share = torch.tensor([0.4, 0.4, 0.2]).double()
    b = logistic_regression(x, y, 3, 0.1).bias.data
    torch.testing.assert_close(b.softmax(0), share, rtol=0, atol=1e-6)
    b = logistic_regression(x, nn.functional.one_hot(y, 3).to(torch.uint8), 3, 0.1).bias.data
    torch.testing.assert_close(b.sigmoid(), share, rtol=0, atol=1e-6)


def test_standardise():
    torch.manual_seed(0)
    like = torch.randn(30, 3).double() * torch.tensor([1, 1e4, 0]) + 5
    x = torch.randn(10, 3).double()
    out = standardise(like, like)
    torch.testing.assert_close(out[:, :2].mean(0), torch.zeros(2).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(out[:, :2].std(0), torch.ones(2).double())
    assert (standardise(x, like)[:, 2] == 0).all()            # constant in training: no infinity


def stored_probe(run):
    return read_json(Path(run, "probe.json"))


def test_probe_of_a_run(chain):
    weights = {f: f.read_bytes() for f in Path("runs").rglob("*.safetensors")}
    printed, stored = show("--probe", "--run", JOINT), stored_probe(JOINT)
    assert {f: f.read_bytes() for f in Path("runs").rglob("*.safetensors")} == weights
    _, adapted, info, where = opened(JOINT)
    y = {split: labels(where, split) for split in ("train", "val", "test")}
    for m, model in adapted.items():                          # once more, step by step
        x = {split: features(model, where, split, m).double() for split in y}
        mean, std = x["train"].mean(0), x["train"].std(0)
        x = {split: (h - mean) / std for split, h in x.items()}
        right, layer = {}, None
        for l2 in (0.1, 0.01, 0.001, 0.0001):
            layer = logistic_regression(x["train"], y["train"], 8, l2, layer)
            right[l2] = {}
            for split in ("val", "test"):
                hits = layer(x[split]).argmax(1) == y[split]
                right[l2][split] = float(hits.double().mean())
        best = stored[m]["l2"]
        assert right[best]["val"] == max(r["val"] for r in right.values())
        assert right[best]["val"] == pytest.approx(stored[m]["val"]["accuracy"])
        test = stored[m]["test"]["accuracy"]
        assert right[best]["test"] == pytest.approx(test, abs=0.012)          # one of 90
        assert stored[m]["trained_parameters"] == 8 * (model.encoder.width + 1)
        shown = rows(printed)[f"{m}, linear evaluation"]
        assert shown == pytest.approx(100 * test, abs=0.051)


def test_probe_is_deterministic_and_chooses_on_validation(chain):
    found = []
    for shuffle in (False, False, True):
        if shuffle:
            y = labels("data/toy-s0", "test").numpy()
            np.save("data/toy-s0/test/labels.npy", y[::-1])
        show("--probe", "--run", JOINT, "--modality", "visual")
        found.append(stored_probe(JOINT)["visual"])
        found[-1].pop("seconds")
    assert found[0] == found[1] and found[2]["test"] != found[0]["test"]
    assert [found[2][key] for key in ("l2", "val")] == [found[0][key] for key in ("l2", "val")]


def test_probe_of_a_pretrained_encoder(chain, monkeypatch):
    of_toy = BUILD["vit_toy"]
    monkeypatch.setitem(BUILD, "vit_toy", SMALL_VIT)
    words = ["--probe", "--dataset", "toy", "--modality", "visual"]
    show(*words, "--pretrained", CLIP)
    folder = Path("runs/toy/probe-visual-vit_toy-s0")
    stored = stored_probe(folder)
    settings = read_json(folder / "config.json")["settings"]
    assert settings["pretrained"] == str(CLIP) and stored.keys() == {"visual"}
    model = UnimodalModel(checkpoints.load_public(build("vit_toy"), CLIP), 8).eval()
    x = {}
    for split in ("train", "val"):
        x[split] = features(model, Path("data/toy-s0"), split, "visual").double()
    y = {split: labels("data/toy-s0", split) for split in x}
    train = standardise(x["train"], x["train"])
    layer = logistic_regression(train, y["train"], 8, stored["visual"]["l2"])
    right = (layer(standardise(x["val"], x["train"])).argmax(1) == y["val"]).float().mean()
    shown = stored["visual"]["val"]["accuracy"]
    assert float(right) == pytest.approx(shown, abs=0.018)                    # one of 60

    # Another start is another experiment: what was found before is moved aside, not mixed with it.
    printed = show(*words, "--pretrained", "none")
    settings = read_json(folder / "config.json")["settings"]
    aside, = Path("runs/toy/old").iterdir()
    assert settings["pretrained"] == "none" and str(aside) in printed
    assert stored_probe(aside) == stored != stored_probe(folder)
    random = stored_probe(folder)
    monkeypatch.setitem(BUILD, "vit_toy", of_toy)
    show(*words)                                              # the file that this project ships
    settings = read_json(folder / "config.json")["settings"]
    assert settings["pretrained"] == "vit_toy" and len(list(Path("runs/toy/old").iterdir())) == 2
    assert stored_probe(folder) != random
    assert "toy has audio, visual" in told(*words[:-1], "text")


def test_probe_of_a_baseline_takes_its_encoders(chain):
    settings, adapted, info, where = opened(JOINT)
    tensors = {}
    for m, model in adapted.items():
        for k, t in merge_lora(model).encoder.state_dict().items():
            tensors[f"{m}.encoder.{k}"] = t
    folder = Path("runs/toy/concat-s0")
    shutil.copytree(JOINT, folder)
    settings = {k: v for k, v in settings.items() if k not in ("lora", "rank", "unimodal")}
    config = read_json(folder / "config.json")
    config["settings"] = settings | dict(method="concat")
    (folder / "config.json").write_text(json.dumps(config))
    result = read_json(folder / "result.json") | dict(method="concat")
    (folder / "result.json").write_text(json.dumps(result))
    save_file(tensors | {"joint.linear.weight": torch.zeros(8, 96)}, folder / "model.safetensors")
    show("--probe", "--run", JOINT, folder)
    ours, theirs = ({m: r["val"]["accuracy"] for m, r in stored_probe(f).items()}
                    for f in (JOINT, folder))
    assert theirs == pytest.approx(ours, abs=0.018)
    assert "baselines/concat.py" in told("--run", folder)
    tensors.pop("audio.encoder.cls_token")
    save_file(tensors, folder / "model.safetensors")
    assert "audio.encoder.cls_token" in told("--probe", "--run", folder)


# ---------------------------------------------------------------------------- export
def test_export_merges_lora_and_loads_back(chain):
    printed = show("--run", JOINT, "--export", "out/mine")
    settings, adapted, info, where = opened(JOINT)
    files = {"audio": Path("out/mine/audio/audio_vit_toy.safetensors"),
             "visual": Path("out/mine/visual/vit_toy.safetensors")}
    heads = {m: file.with_name("head.safetensors") for m, file in files.items()}
    there = sorted(f for f in Path("out").rglob("*") if f.is_file())
    assert there == sorted([*files.values(), *heads.values()])
    for m, file in files.items():
        wanted = features(adapted[m], where, "test", m)
        encoder = checkpoints.load_public(build(settings["encoders"][m]), file)
        again = features(UnimodalModel(encoder, 8).eval(), where, "test", m)
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
        # and LoRA had done something
        before = opened(f"runs/toy/unimodal-{m}-s0")[1][m]
        assert (features(before, where, "test", m) - wanted).abs().max() > 0.01
        with safe_open(heads[m], "pt") as f:
            assert json.loads(f.metadata()["classes"]) == info["classes"]
            assert torch.equal(f.get_tensor("weight"), adapted[m].head.weight)
            assert torch.equal(f.get_tensor("bias"), adapted[m].head.bias)
        assert str(file) in printed
    assert "ImageBind" in printed and "open_clip" in printed
    assert "safetensors.torch.load_file(FILE)" in printed and "torch.load(FILE)" not in printed
    assert "exists already" in told("--run", JOINT, "--export", "out/mine")


def test_export_clears_away_what_a_killed_one_left(chain):
    Path("out.partial/flow").mkdir(parents=True)
    Path("out.partial/flow/of-another-run.pth").write_bytes(b"")
    show("--run", JOINT, "--export", "out")
    assert {file.name for file in Path("out").iterdir()} == {"audio", "visual"}


def test_export_writes_all_or_nothing(chain, monkeypatch):
    def export_public(encoder, path, source):
        if "visual" in str(path):
            raise OSError("disk full")
        path.write_bytes(b"")
    monkeypatch.setattr(checkpoints, "export_public", export_public)
    assert told("--run", JOINT, "--export", "out") == "error: disk full"
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("how", ["path", "public", "gone"])
def test_export_of_an_untouched_encoder_is_the_public_file(how, chain, monkeypatch):
    monkeypatch.setitem(BUILD, "vit_toy", SMALL_VIT)
    if how == "path":
        file, words = Path("mine.bin"), ["--pretrained", "mine.bin"]
    else:
        public = checkpoints.Public("https://example.org/files/towers.bin", 0.1, "MIT")
        monkeypatch.setitem(checkpoints.PUBLIC, "vit_toy", public)
        file, words = Path("checkpoints/vit_toy/towers.bin"), []
        file.parent.mkdir(parents=True)
    shutil.copy(CLIP, file)
    # too small a step to change any weight
    call("train_unimodal.py", "--modality", "visual", "--epochs", 1, "--lr", 1e-30, *words,
         "--device", "cpu", out="other")
    if how == "gone":
        file.unlink()
    printed = show("--run", "other/toy/unimodal-visual-s0", "--export", "out")
    before = torch.load(CLIP, weights_only=True)
    after = torch.load(Path("out/visual") / file.name, weights_only=True)
    wanted = set(before)
    if how == "gone":
        wanted = {k for k in before if k.startswith("visual.") and k != "visual.proj"}
    assert after.keys() == wanted
    assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in after.items())
    assert (f"{file} is not there" in printed) == (how == "gone")


def test_export_of_a_flow_network(tmp_path, capsys):
    """Its first layer takes more channels than the public file has: written alone."""
    def network(file):
        return checkpoints.load_public(ResNet((2, 2, 2, 2), False, width=8, in_channels=4), file)
    source = FIXTURES / "resnet_basic/resnet.pth"
    flow = network(source)
    settings = dict(modality="flow", encoder="resnet18", pretrained=str(source))
    export.write(tmp_path, dict(classes=["a", "b"]), settings,
                 nn.ModuleDict({"flow": UnimodalModel(flow, 2)}), tmp_path / "out")
    again = network(tmp_path / "out/flow/resnet.pth").state_dict()
    assert all(torch.equal(t, flow.state_dict()[k]) for k, t in again.items())
    assert "4 channels" in capsys.readouterr().out


# ---------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("words, message", [
    ("", "give one of"),
    ("--run x --probe --dataset toy --modality audio", "--run says its own data"),
    (f"--run {JOINT} --seeds 0 1", "--run says its own data"),
    (f"--run {JOINT} --modality audio", "--modality is for --probe"),
    (f"--run {JOINT} --clip a.wav --fusion weighted", "--clip and --text: not with"),
    (f"--run {JOINT} --temperature --plot", "--temperature and --fusion weighted read"),
    (f"--compare {JOINT} ume --plot", "--compare stands alone"),
    ("--probe --dataset toy", "--modality NAME"),
    ("--run nowhere", "nowhere holds no finished run"),
    ("--export out", "--export takes one --run"),
    ("--run a b --export out", "--export takes one --run"),
    (f"--run {JOINT} --missing 0.7", "--missing needs --drop"),
    (f"--run {JOINT} --drop audio --missing 70", "0.7 = 70 %"),
    (f"--run {JOINT} --drop text", "has audio, visual"),
    (f"--run {JOINT} --drop audio visual --missing 0.5", "leaves no modality"),
    (f"--run {JOINT} --probe --modality text", "has audio, visual"),
    ("--probe --dataset toy --modality audio --pretrained gone.pth", "no checkpoint at gone.pth"),
])
def test_bad_input_is_one_line_and_leaves_nothing(words, message, trained, monkeypatch):
    monkeypatch.chdir(trained)
    before = sorted(trained.rglob("*"))
    assert message in told(*words.split())
    assert sorted(trained.rglob("*")) == before
