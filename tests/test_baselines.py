"""baselines/: for each method its formula against a naive one, and that training really uses it;
the scripts as they are run, on a tiny toy. `test_baselines_fusion.py` has MBT, PMF and MMBT.
"""
import ast
import difflib
import json
import math
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import count

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import data
import encoders
from baselines import g_blending, mla, ogm_ge, parts, pmr
from harness import arguments, fingerprint, metrics, models, optim, runs
from data import read_json
from lora import add_lora
from paper import settings as paper
from prepare import toy
from running import ROOT, call, error

METHODS = ("concat", "ogm_ge", "g_blending", "pmr", "mla")
# of data sets that paper/settings.py does not know
TOWERS = ["--encoder", "audio=audio_vit_toy", "visual=vit_toy", "visual2=vit_toy"]


# ---------------------------------------------------------------------------- the real scripts
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared data: `toy`, but tiny; `tri` with three modalities; `multi`, several labels a
    sample; `mono`, one modality."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SIZES", {"toy": {"train": 96, "val": 48, "test": 60}})
        for seed in (0, 1):
            arguments.find(folder, "toy", seed)
    for name in ("tri", "multi", "mono"):
        shutil.copytree(folder / "toy-s0", folder / name)
        info = read_json(folder / name / "dataset.json") | dict(name=name)
        del info["made_by"], info["sample_groups"]     # a data set like anybody's own, not a toy
        for split in ("train", "val", "test"):
            where = folder / name / split
            if name == "tri":
                np.save(where / "visual2.npy", 255 - np.load(where / "visual.npy"))
            if name == "multi":
                y = np.load(where / "labels.npy")
                several = np.eye(8)[y] + np.eye(8)[(y + 1) % 8]
                np.save(where / "labels.npy", several.astype(np.uint8))
        if name == "tri":
            info["modalities"]["visual2"] = "image"
            info["shapes"]["visual2"] = info["shapes"]["visual"]
        if name == "multi":
            info.update(multilabel=True)
        if name == "mono":
            info["modalities"] = {"audio": "audio"}
        (folder / name / "dataset.json").write_text(json.dumps(info))
    return folder


def run_script(method, words, out, root, inside=False):
    """`python -m baselines.METHOD words`, two epochs unless they say more; -> what it printed.

    inside: train in the module that is imported here, where a test may have replaced something.
    """
    words = [*map(str, words), "--device", "cpu"]
    for option, value in (("--epochs", "2"), ("--batch-size", "32")):
        if option not in words:
            words += [option, value]
    if not inside:
        return call(f"baselines.{method}", *words, out=out, root=root)
    module = import_module(f"baselines.{method}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [method, *words, "--out", str(out), "--data-root", str(root)])
        arguments.main(module.parser(), module.train)


@pytest.fixture
def script(root, tmp_path):
    """script("ogm_ge", "--alpha", 0) -> the folder of the run; script.printed: what it printed."""
    def run(method, *words, out=None, inside=False):
        out = out or tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        run.printed = run_script(method, words, out, root, inside)
        folders = [f.parent for f in out.glob("*/*/result.json") if "unimodal" not in str(f)]
        return max(folders)               # of several seeds the last
    return run


def tensors(folder, name="model"):
    return load_file(folder / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def result_of(folder):
    return read_json(folder / "result.json")


def settings_of(folder):
    return read_json(folder / "config.json")["settings"]


def logged(folder):
    """The log without times."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def training(folder):
    """Every number of the joint prediction in every epoch, as exact as JSON is: two runs with the
    same list trained alike, bit for bit."""
    return [(line["loss"], line["val"]["joint"]) for line in logged(folder)]


@pytest.fixture
def watch(monkeypatch):
    """watch(look): look(optimizer, names) is called before every step of a method's first
    optimiser; names: id of a parameter -> its name."""
    def install(look):
        made = []

        def watched(name, models, *more):
            optimizer = real(name, models, *more)
            if not made:
                names = {id(p): n for n, p in models.named_parameters()}
                optimizer.register_step_pre_hook(lambda o, *_: look(o, names))
            made.append(optimizer)
            return optimizer
        monkeypatch.setattr(optim, "make_optimizer", watched)
    real = optim.make_optimizer
    return install


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def features(folder, root):
    """h_m of test by hand: encoders rebuilt from the run's file, applied to the prepared arrays."""
    info = read_json(root / "toy-s0" / "dataset.json")
    file, settings, h = tensors(folder), settings_of(folder), {}
    for m, encoder in settings["encoders"].items():
        model = models.new_model(encoder, info, m).eval()
        own = {k.removeprefix(f"{m}."): v for k, v in file.items() if k.startswith(f"{m}.")}
        model.load_state_dict(own)        # strict: encoder and head
        s = data.Split(root / "toy-s0", "test")
        x = data.model_input(s, m, torch.arange(len(s)), model.encoder, "cpu", settings)
        with torch.no_grad():
            h[m] = model.features(x)
    return h, file


def joint_of(h, file):
    """z = W [h_1; ...; h_M] + b"""
    side_by_side = torch.cat([h["audio"], h["visual"]], 1)
    return side_by_side @ file["joint.linear.weight"].T + file["joint.linear.bias"]


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_holds_what_it_says(script, root, method):
    folder = script(method)
    result, z, settings = result_of(folder), tensors(folder, "logits"), settings_of(folder)
    assert folder.name == f"{method}-s0" and result["method"] == settings["method"] == method
    assert settings["encoders"] == {"audio": "audio_vit_toy", "visual": "vit_toy"}
    assert settings["pretrained"] == settings["encoders"]     # the files that this project ships
    assert settings["lr"] == paper.TOY_LR["toy"]["joint"]
    assert len(logged(folder)) == 3 and not (folder / "last.safetensors").exists()
    assert result["test"].keys() == {"joint", "audio", "visual"}
    labels = data.Split(root / "toy-s0", "test").labels
    for name, s in result["test"].items():
        right = (z[f"test.{name}"].argmax(1) == labels).float().mean()
        assert s["accuracy"] == pytest.approx(float(right))
    epochs = [line["val"]["joint"] for line in logged(folder)]
    best = max(epochs, key=lambda s: [s["accuracy"], -s["loss"]])
    assert result["best_epoch"] == epochs.index(best)
    assert result["val"]["joint"]["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert f"{100 * result['test']['joint']['accuracy']:.1f} +- " in script.printed

    h, file = features(folder, root)      # and the stored weights give the stored predictions
    heads = {m: h[m] @ file[f"{m}.head.weight"].T + file[f"{m}.head.bias"] for m in h}
    if method == "mla":
        joint = metrics.fuse(heads, "entropy").log()
        assert torch.equal(file["audio.head.weight"], file["visual.head.weight"])
    else:
        joint = joint_of(h, file)
        if method != "g_blending":
            assert torch.allclose(sum(heads.values()), joint, atol=1e-5)
    for name, wanted in {"joint": joint, **heads}.items():
        assert torch.allclose(z[f"test.{name}"], wanted, atol=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_three_modalities(script, method):
    result = result_of(script(method, "--dataset", "tri", *TOWERS, "--epochs", 1))
    assert result["test"].keys() == {"joint", "audio", "visual", "visual2"}


def test_several_labels_a_sample(script, root, tmp_path):
    words = ["--dataset", "multi", *TOWERS[:-1], "--epochs", 1]
    for method in ("concat", "g_blending", "mla"):
        joint = result_of(script(method, *words))["test"]["joint"]
        assert 0 <= joint["f1_micro"] <= 1 and joint["loss"] < 1.5
    for method in ("ogm_ge", "pmr"):
        told = error(f"baselines.{method}", *words, out=tmp_path / "none", root=root)
        assert "multi has several labels a sample" in told


def test_seeds_and_wrong_input(script, root, tmp_path):
    folder = script("concat", "--seeds", 0, 1, "--epochs", 1)
    assert folder.name == "concat-s1"
    assert "Mean +- standard deviation of 2 seeds" in script.printed
    cases = (("concat", ["--dataset", "mono"], "mono has only audio: concat needs two"),
             ("concat", ["--dataset", "tri"], "--encoder visual2=NAME"),
             ("mla", ["--order", "audio"], "--order audio: toy has audio, visual"),
             ("g_blending", ["--held-out", "1"], "--held-out 1.0"))
    for method, words, message in cases:
        assert message in error(f"baselines.{method}", *words, out=tmp_path / "none", root=root)
    assert not (tmp_path / "none").exists()
    words = ["--dataset", "mono", "--data-root", str(root)]
    done = subprocess.run([sys.executable, "-m", "baselines.concat", *words], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "error: mono has only audio: concat needs two modalities or more\n"


def test_options_are_settings_and_part_of_the_name(script):
    folder = script("ogm_ge", "--alpha", 0.5, "--no-ge", "--epochs", 1)
    assert folder.name == "ogm_ge-alpha-0.5-no-ge-s0"
    options = settings_of(folder)["options"]
    assert options["alpha"] == 0.5 and options["no_ge"] is True and options["conv_only"] is False


def test_a_run_killed_while_it_is_tested_trains_nothing_again(script, monkeypatch, tmp_path):
    def die(*a):
        raise KeyboardInterrupt
    whole = script("concat", out=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs.Run, "finish", die)
        script("concat", out=tmp_path / "killed")
    resumed = script("concat", out=tmp_path / "killed")
    epochs = settings_of(resumed)["epochs"]
    assert f"going on from epoch {epochs + 1}" in script.printed
    assert same(tensors(resumed), tensors(whole))


def killed_and_resumed(script, monkeypatch, out, method, words):
    """The same run twice: at once, and killed at the end of epoch 2; -> both folders."""
    whole = script(method, *words, out=out / "whole")
    save, epochs = runs.Run.save_last, count(1)

    def save_and_die(*a):
        save(*a)
        if next(epochs) == 2:
            raise KeyboardInterrupt
    unimodal = len(list(out.glob("whole/*/unimodal*")))
    for folder in out.glob("whole/*/unimodal*"):
        shutil.copytree(folder, out / "killed" / folder.relative_to(out / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(runs.Run, "save_last", save_and_die)
        script(method, *words, out=out / "killed")
    assert stop.value.code == 130 and len(list(out.glob("killed/*/*"))) == unimodal + 1
    resumed = script(method, *words, out=out / "killed")
    assert "going on from epoch 3" in script.printed
    return whole, resumed


@pytest.mark.parametrize("method, words", [
    # in the middle of a super-epoch, with prototypes and projection on their way
    ("concat", []), ("ogm_ge", []), ("g_blending", ["--super-epoch", 3]),
    ("pmr", ["--momentum", 0.5]), ("mla", []), ("frozen", ["--umft-epochs", 1])])
def test_a_killed_run_goes_on_bit_for_bit(script, monkeypatch, tmp_path, method, words):
    words = ["--epochs", 4, *words]
    whole, resumed = killed_and_resumed(script, monkeypatch, tmp_path, method, words)
    assert len(logged(resumed)) == 5 and logged(resumed) == logged(whole)
    for name in ("model", "logits"):
        assert same(tensors(resumed, name), tensors(whole, name))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_give_the_same_training(script, monkeypatch, method):
    seen, counted = [], runs.Run.count
    monkeypatch.setattr(runs.Run, "count", lambda self, loss, z, y: (seen.append(len(y)),
                                                                     counted(self, loss, z, y)))
    turns = 2 if method == "mla" else 1
    more = ["--held-out", 1e-9] if method == "g_blending" else []         # one sample
    whole = script(method, "--lr", 0.001, *more)
    sizes = [32, 32, 31] if more else [32, 32, 32]
    assert seen == [n for n in sizes for _ in range(turns)] * 2
    seen.clear()
    in_parts = script(method, "--lr", 0.001, "--micro-batch", 12, *more)
    of_batch = {32: [12, 12, 8], 31: [12, 12, 7]}
    assert seen == [part for n in sizes for _ in range(turns) for part in of_batch[n]] * 2
    losses = [[line[0] for line in training(folder)[1:]] for folder in (whole, in_parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    whole, in_parts = tensors(whole), tensors(in_parts)
    assert not same(whole, in_parts)
    # AdamW turns what is rounded in a gradient near 0 into a step, so not weight by weight
    change = sum((whole[k].float() - in_parts[k].float()).norm() ** 2 for k in whole) ** 0.5
    assert change < 1e-3 * sum(v.float().norm() ** 2 for v in whole.values()) ** 0.5


@pytest.mark.parametrize("method, words", [("concat", []), ("full_ume", ["--umft-epochs", 1])])
def test_drop_path_is_a_switch(script, monkeypatch, method, words):
    """It acts wherever all weights of AudioViT are trained, from 0 in the first block upwards."""
    rates, real = [], optim.make_optimizer

    def watched(name, models, *more):
        if "audio" in models:
            rates.append([block.drop_path for block in models["audio"].encoder.blocks])
        return real(name, models, *more)
    monkeypatch.setattr(optim, "make_optimizer", watched)
    plain, dropped = (script(method, *words, *more, "--epochs", 1)
                      for more in ([], ["--drop-path", 0.5]))
    n = 1 + len(words) // 2               # optimisers with an audio encoder: step 1 has one, too
    assert rates == [[0, 0, 0]] * n + [[0, 0.25, 0.5]] * n
    assert dropped.name == plain.name.replace("-s0", "-drop-path0.5-s0")
    assert logged(plain)[1]["loss"] != logged(dropped)[1]["loss"]


# ---------------------------------------------------------------------------- controls of MMLoRA
def code_of(path):
    """The lines of a file's code, without comments and docstrings."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip()]


CONTROLS = {
    "separate": ("""
        - from lora import add_lora, lora_state_dict, mean_prob_loss
        + from lora import add_lora, lora_state_dict
        - loss = mean_prob_loss(logits, y)
        + loss = sum((metrics.cross_entropy(z, y) for z in logits.values())) / len(logits)"""),
    "logits": ("""
        - from lora import add_lora, lora_state_dict, mean_prob_loss
        + from lora import add_lora, lora_state_dict, mean_logits, mean_prob_loss
        + logits = mean_logits(logits)"""),
    "no_umft": ("""
        - import train_unimodal
        - from harness.models import load_unimodal
        + from harness.models import pretrained_model
        - from lora import add_lora, lora_state_dict, mean_prob_loss
        + from lora import add_lora, mean_prob_loss
        - unimodal = {}
        - for m in modalities:
        - unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)
        - models[m] = load_unimodal(unimodal[m], info)
        + models[m] = pretrained_model(settings, m, info)
        + models[m].head.requires_grad_(True)
        - run.end_of_epoch(0, predict(val_split), lora_state_dict(models))
        + run.end_of_epoch(0, predict(val_split), models.state_dict())
        - run.end_of_epoch(epoch, predict(val_split), lora_state_dict(models))
        + run.end_of_epoch(epoch, predict(val_split), models.state_dict())
        - arguments.add_step_1(p)"""),
    "full_ume": ("""
        - from harness.models import load_unimodal
        + from harness.models import load_unimodal, set_drop_path
        - from lora import add_lora, lora_state_dict, mean_prob_loss
        + from lora import mean_prob_loss
        - lora = arguments.lora_modalities(args, info)
        - models[m].requires_grad_(False)
        - if m in lora:
        - add_lora(models[m], args.rank)
        + set_drop_path(models[m], settings)
        - run.end_of_epoch(0, predict(val_split), lora_state_dict(models))
        + run.end_of_epoch(0, predict(val_split), models.state_dict())
        - run.end_of_epoch(epoch, predict(val_split), lora_state_dict(models))
        + run.end_of_epoch(epoch, predict(val_split), models.state_dict())
        - arguments.add_lora_arguments(p)"""),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_train_joint_with_one_idea_changed(name):
    """Apart from its docstring, comments, and the line that names its settings."""
    ours, theirs = code_of("train_joint.py"), code_of(f"baselines/{name}.py")
    changed = [line for line in difflib.ndiff(ours, theirs) if line[0] in "+-"]
    settings = [line for line in changed if "arguments.joint_settings(" in line]
    assert len(settings) == 2
    wanted = [line.strip() for line in CONTROLS[name].strip().splitlines()]
    assert sorted(line for line in changed if line not in settings) == sorted(wanted)


# ---------------------------------------------------------------------------- concat, frozen
def toy_models(widths):
    class Body(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.encoder = nn.Linear(3, width)
            self.encoder.width = width
    return nn.ModuleDict({m: Body(w) for m, w in widths.items()})


def test_the_parts_of_a_concat_head_sum_to_its_logits():
    head = parts.ConcatHead(toy_models({"a": 3, "b": 5, "c": 2}), 4)
    h = {m: torch.randn(6, w) for m, w in head.widths.items()}
    split, W, bias = head.split(h), head.linear.weight, head.linear.bias
    assert torch.allclose(sum(split.values()), head(h), atol=1e-6)
    own = h["b"] @ W[:, 3:8].T + bias / 3                     # its own columns
    assert torch.allclose(split["b"], own, atol=1e-6)
    assert not torch.allclose(split["a"], split["b"])


def test_frozen_trains_the_layer_and_nothing_else(script, root):
    folder = script("frozen", "--umft-epochs", 2, "--epochs", 5, "--lr", 0.05)
    file, result, log = tensors(folder), result_of(folder), logged(folder)
    assert folder.name == "frozen-lr0.05-s0" and result["method"] == "frozen"
    assert settings_of(folder)["unimodal"].keys() == {"audio", "visual"}
    for m, base in settings_of(folder)["unimodal"].items():
        alone = folder.parent / base["run"]
        sha256 = fingerprint.sha256(alone / "model.safetensors")
        assert base == dict(run=f"unimodal-{m}-s0", sha256=sha256)
        assert all(torch.equal(file[k], v) for k, v in tensors(alone).items() if ".encoder." in k)
    assert result["trained_parameters"] == 8 * (48 + 48) + 8
    assert log[-1]["loss"] < log[1]["loss"] - 0.1
    h, _ = features(folder, root)
    assert torch.allclose(tensors(folder, "logits")["test.joint"], joint_of(h, file), atol=1e-4)


# ---------------------------------------------------------------------------- OGM-GE
def test_ogm_coefficients_are_the_papers():
    k = ogm_ge.coefficients({"a": torch.tensor(30.0), "v": torch.tensor(20.0)}, 0.3)
    assert float(k["a"]) == pytest.approx(1 - math.tanh(0.3 * 1.5)) and float(k["v"]) == 1
    scores = {"a": torch.tensor(1.0), "v": torch.tensor(4.0), "t": torch.tensor(2.0)}
    k = [float(v) for v in ogm_ge.coefficients(scores, 0.1).values()]
    assert k == pytest.approx([1, 1 - math.tanh(0.4), 1 - math.tanh(0.2)])


def test_ogm_shrinks_gradients_by_exactly_k():
    encoder = encoders.build("vit_toy")
    encoder(torch.randn(4, 3, 32, 32)).square().sum().backward()
    before = {n: p.grad.clone() for n, p in encoder.named_parameters()}
    k = torch.tensor(0.25)
    ogm_ge.modulate(encoder, k, noise=False, conv_only=True)
    changed = {n for n, p in encoder.named_parameters() if not torch.equal(p.grad, before[n])}
    assert changed == {"patch.weight"}                        # all that is 4-D in a ViT
    encoder.patch.weight.grad.copy_(before["patch.weight"])
    ogm_ge.modulate(encoder, k, noise=False, conv_only=False)
    for n, p in encoder.named_parameters():
        assert torch.equal(p.grad, before[n] * (k if p.ndim > 1 else 1)), n


def test_ge_noise_is_as_large_as_the_gradient():
    layer = nn.Linear(400, 300)
    before = 0.7 * torch.randn(300, 400) + 2                  # std 0.7 whatever the mean
    layer.weight.grad, layer.bias.grad = before.clone(), torch.ones(300)
    ogm_ge.modulate(layer, torch.tensor(0.5), noise=True, conv_only=False)
    noise = layer.weight.grad - 0.5 * before
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02) and abs(float(noise.mean())) < 0.02
    assert torch.equal(layer.bias.grad, torch.ones(300))


def test_ge_noise_leaves_words_that_are_not_in_the_batch_alone():
    """AdamW would move them by a full step, whatever the size of the noise."""
    torch.manual_seed(0)
    bert = encoders.build("bert_small", vocab_size=50)
    ids = torch.tensor([[1, 7, 8, 9, 2], [1, 6, 2, 0, 0]])
    bert(ids).square().sum().backward()
    before = {n: p.grad.clone() for n, p in bert.named_parameters()}
    ogm_ge.modulate(bert, torch.tensor(0.5), noise=True, conv_only=False)
    there = dict(words=[1, 2, 6, 7, 8, 9], positions=[0, 1, 2, 3, 4], segments=[0])
    for name, rows in there.items():
        grad, was = getattr(bert, name).weight.grad, before[f"{name}.weight"]
        assert was.any(1).nonzero().flatten().tolist() == rows
        assert grad.any(1).nonzero().flatten().tolist() == rows
        noise = (grad - 0.5 * was)[rows]
        assert noise.any(1).all() and noise.isfinite().all()
    noise = bert.blocks[0].fc1.weight.grad - 0.5 * before["blocks.0.fc1.weight"]
    assert float(noise.std()) == pytest.approx(float(before["blocks.0.fc1.weight"].std()), rel=0.05)


def test_ogm_is_concat_when_its_parts_are_off_and_not_when_on(script):
    concat = training(script("concat"))
    assert training(script("ogm_ge", "--alpha", 0, "--no-ge")) == concat      # 1 - tanh 0 = 1
    assert training(script("ogm_ge", "--modulated-epochs", 0)) == concat
    assert training(script("ogm_ge", "--alpha", 0)) != concat                 # noise alone
    folder = script("ogm_ge", "--no-ge", "--modulated-epochs", 1)
    log = logged(folder)
    assert training(folder)[1:] != concat[1:] and "k_audio" not in log[2]
    # the leader of 3 batches
    assert 0.4 < min(log[1]["k_audio"], log[1]["k_visual"]) < 1 - math.tanh(0.3) / 3


# ---------------------------------------------------------------------------- G-Blending
def test_blend_weights_follow_the_formula():
    def weights(*losses):                 # train before, train after, held before, held after
        return g_blending.blend_weights(*map(torch.tensor, losses)).tolist()

    # gains 1, 1, 0.5; gaps grew by 0.5, 1, 0.5  ->  1/0.25, 1/1, 0.5/0.25 = 4, 1, 2
    w = weights([2.0, 2.0, 2.0], [0.5, 0.0, 1.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.5])
    assert w == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    # the first only overfits
    assert weights([2.0, 2.0], [0.1, 1.0], [2.0, 2.0], [2.5, 1.5]) == [0, 1]
    # O = 0 and 0.1: capped at 1e-4, 1e-2
    w = weights([2.0, 2.0], [1.0, 0.9], [2.0, 2.0], [1.0, 1.0])
    assert w == pytest.approx([1e4 / (1e4 + 1e2), 1e2 / (1e4 + 1e2)], rel=1e-4)
    assert weights([1.0, 1.0], [0.5, 0.5], [1.0, 1.0], [1.1, 1.2]) == [0.5, 0.5]
    # what both had before counts: the same gap before and after is no overfitting
    assert weights([1.0, 2.0], [0.5, 1.0], [2.0, 2.0], [1.5, 1.5])[0] > 0.99


def test_g_blending_never_trains_on_what_measures_it(script, monkeypatch):
    trained, measured, real = set(), set(), data.model_input

    def spy(split, m, index, encoder, device, settings, rng=None):
        if len(split) == 96:
            (measured if rng is None else trained).update(index.tolist())
        return real(split, m, index, encoder, device, settings, rng)
    with monkeypatch.context() as patch:
        patch.setattr(data, "model_input", spy)
        folder = script("g_blending", "--super-epoch", 1)
    assert len(trained) == 96 - 10 and measured == set(range(96))
    w = [[line[k] for k in ("w_joint", "w_audio", "w_visual")] for line in logged(folder)[1:]]
    assert all(sum(v) == pytest.approx(1) for v in w) and w[0] != w[1]
    assert w[0] != pytest.approx([1 / 3] * 3)
    best = result_of(folder)["best_epoch"]
    assert tensors(folder)["blend.w"].tolist() == pytest.approx(w[best - 1])


def test_g_blending_trains_with_its_weights(script, monkeypatch, watch):
    """All weight on the visual head: nothing but the visual model has a gradient, and that is the
    one of its cross-entropy."""
    moved = []
    watch(lambda optimizer, names: moved.append(
        {names[id(p)].split(".")[0] for p in parameters(optimizer) if p.grad.any()}))
    only_visual = torch.tensor([0.0, 0.0, 1.0])               # joint, audio, visual
    monkeypatch.setattr(g_blending, "blend_weights", lambda *losses: only_visual)
    log = logged(script("g_blending", "--epochs", 3, inside=True))
    assert moved == [{"visual"}] * 9
    assert [log[3][k] for k in ("w_joint", "w_audio", "w_visual")] == [0, 0, 1]
    assert log[3]["val"]["visual"]["loss"] < log[1]["val"]["visual"]["loss"]


# ---------------------------------------------------------------------------- PMR
def filled(momentum=0.0):
    torch.manual_seed(0)
    p = pmr.Prototypes(toy_models({"a": 3, "b": 5}), 4)
    h = {"a": torch.randn(9, 3), "b": torch.randn(9, 5)}
    y = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0, 1])             # class 2 is absent
    p.update(h, y, momentum)
    return p, h, y


def leads(m):
    """Scores s of a batch where m is far ahead: beta is 0 for m and 1 for the other one."""
    return {k: torch.tensor(10.0 if k == m else 1.0) for k in ("a", "b")}


def terms(p, h, y):
    """PCE_m and H(p_m), by asking for one term of the loss at a time."""
    pce, entropy = {}, {}
    for m, other in (("a", "b"), ("b", "a")):
        pce[m] = p.loss(h, y, leads(other), alpha=1.0, mu=0.0)[0]
        entropy[m] = -p.loss(h, y, leads(m), alpha=0.0, mu=1.0)[0]
    return pce, entropy


def test_prototypes_are_class_means_with_momentum():
    p, h, y = filled(0.2)
    for k in (0, 1, 3):       # the first time without momentum: there is nothing old
        assert torch.allclose(p.a[k], h["a"][y == k].mean(0), atol=1e-6)
    assert p.seen.tolist() == [True, True, False, True] and p.b[2].tolist() == [0] * 5
    old = p.b.clone()
    p.update({"a": h["a"], "b": 2 * h["b"]}, torch.full_like(y, 2), 0.2)      # only class 2
    assert torch.equal(p.b[[0, 1, 3]], old[[0, 1, 3]]) and p.seen.all()
    assert torch.allclose(p.b[2], 2 * h["b"].mean(0), atol=1e-6)
    p.update({"a": h["a"], "b": h["b"]}, y, 0.2)
    assert torch.allclose(p.b[1], 0.2 * old[1] + 0.8 * h["b"][y == 1].mean(0), atol=1e-6)


def test_pmr_terms_are_the_papers():
    p, h, y = filled()
    pce, entropy = terms(p, h, y)
    s = {}
    for m in h:               # naive: sample by sample, class by class
        s[m] = total = ent = 0
        for i in range(9):
            d = {}
            for k in (0, 1, 3):
                d[k] = math.exp(-math.dist(h[m][i].tolist(), getattr(p, m)[k].tolist()))
            q = {k: v / sum(d.values()) for k, v in d.items()}
            s[m] += q[int(y[i])]
            total -= math.log(q[int(y[i])])
            ent -= sum(v * math.log(v) for v in q.values())
        assert float(pce[m]) == pytest.approx(total / 9, rel=1e-4)
        assert float(entropy[m]) == pytest.approx(ent / 9, rel=1e-4)
    scores = p.scores(h, y)
    assert {m: float(v) for m, v in scores.items()} == pytest.approx(s, rel=1e-4)

    rho = s["a"] / s["b"]     # the paper's two coefficients, for two modalities
    wanted = (min(max(1 / rho - 1, 0), 1), 0) if rho < 1 else (0, min(max(rho - 1, 0), 1))
    assert max(wanted) > 0.01
    slow, leader = ("a", "b") if rho < 1 else ("b", "a")
    extra, beta = p.loss(h, y, scores, 2.0, 0.5)
    assert (float(beta["a"]), float(beta["b"])) == pytest.approx(wanted, rel=1e-3)
    # the slow one is pulled, the other one's entropy kept up
    wanted = max(wanted) * (2 * float(pce[slow]) - 0.5 * float(entropy[leader]))
    assert float(extra) == pytest.approx(wanted, rel=1e-3)


def test_pmr_terms_pull_features_and_never_give_nan():
    p, h, y = filled()
    y = y.clone()
    y[0] = 2                  # a sample of the class without prototype
    h = {m: v.requires_grad_() for m, v in h.items()}
    pce, entropy = terms(p, h, y)
    pull = torch.autograd.grad(pce["a"], h["a"], retain_graph=True)[0]
    spread = torch.autograd.grad(entropy["a"], h["a"])[0]
    for gradient in (pull, spread):
        assert gradient.isfinite().all() and gradient[1:].any() and not gradient[0].any()
    nearer = {"a": (h["a"] - 0.1 * pull).detach(), "b": h["b"]}
    assert terms(p, nearer, y)[0]["a"] < pce["a"]
    without = {m: v[:1] for m, v in h.items()}, y[:1]         # no sample at all counts
    scores = p.scores(*without)
    extra, beta = p.loss(*without, scores, 1.0, 1.0)
    assert all(torch.as_tensor(v).isfinite() for v in [extra, *scores.values(), *beta.values()])


def test_prototypes_come_from_a_share_of_every_class():
    y = torch.tensor([0] * 50 + [1] * 30 + [2])
    i = pmr.a_share_of_every_class(y, 0.1, 0)
    assert y[i].tolist() == [0] * 5 + [1] * 3 + [2] and len(set(i.tolist())) == 9
    assert not torch.equal(i, pmr.a_share_of_every_class(y, 0.1, 1))


def test_pmr_is_concat_when_its_terms_are_off_and_not_when_on(script):
    concat = training(script("concat"))
    assert training(script("pmr", "--alpha", 0, "--mu", 0)) == concat
    assert training(script("pmr", "--alpha", 0, "--per-epochs", 0)) == concat
    assert training(script("pmr", "--pce-epochs", 0, "--mu", 0)) == concat
    # the prototype loss alone, the entropy term alone
    assert training(script("pmr", "--alpha", 1, "--mu", 0)) != concat
    assert training(script("pmr", "--alpha", 0, "--mu", 1, "--per-epochs", 2)) != concat


def test_pmr_prototype_loss_ends(script):
    """As the authors switch it off: 100 of 150 epochs. It is a deviation that the file declares."""
    words = ["--epochs", 3, "--mu", 0]
    every, one = (training(script("pmr", *words, "--pce-epochs", n)) for n in (3, 1))
    two = training(script("pmr", *words, "--pce-epochs", 2))
    assert one[:2] == two[:2] == every[:2]                    # epochs 0 and 1
    assert one[2] != two[2] == every[2] and two[3] != every[3]
    assert training(script("pmr", *words)) == two             # the default: two thirds
    text = " ".join(pmr.__doc__.split())
    assert "prototype loss ends" in text.split("Where we differ")[1]


def test_pmr_first_refresh_keeps_nothing_of_untrained_encoders(script):
    words = ["--epochs", 3, "--pce-epochs", 3]
    none, most = (training(script("pmr", *words, "--momentum", k)) for k in (0, 0.9))
    assert none[:3] == most[:3] and none[3] != most[3]


def test_pmr_in_micro_batches_is_pmr_of_the_whole_batch(script, watch):
    """beta and the leader are those of the batch, not of each part; so the gradients are the same.
    At so small a learning rate all gradients are those of the first weights."""
    words = ["--lr", 1e-9, "--alpha", 5, "--mu", 1, "--pce-epochs", 2, "--per-epochs", 2]
    gradients, logs = [], []
    for more in ([], ["--micro-batch", 8], ["--alpha", 0, "--mu", 0]):
        gradients.append([])
        watch(lambda optimizer, names, g=gradients[-1]: g.append(
            torch.cat([p.grad.flatten() for p in parameters(optimizer)])))
        logs.append(logged(script("pmr", *words, *more)))
    assert [len(g) for g in gradients] == [6, 6, 6]
    for whole, in_parts, concat in zip(*gradients):
        assert (in_parts - whole).norm() < 1e-3 * whole.norm()
        assert (concat - whole).norm() > 0.1 * whole.norm()   # PMR's terms are there at all
    for line, of_parts in zip(logs[0][1:], logs[1][1:]):
        beta = {k: line[k] for k in ("beta_audio", "beta_visual")}
        assert {k: of_parts[k] for k in beta} == pytest.approx(beta, rel=1e-3)
        assert max(beta.values()) > 0.01


# ---------------------------------------------------------------------------- MLA
def with_one(h):
    """[h ; 1]: the bias is the weight of the last entry."""
    return torch.cat([h, torch.ones(*h.shape[:-1], 1)], -1)


def test_projection_is_recursive_least_squares():
    torch.manual_seed(0)
    projection, seen = mla.Projection(32, 0.1), torch.randn(5, 32)
    for h in seen:
        projection.update(h)
    P, seen = projection.P, with_one(seen)
    assert P.shape == (33, 33) and P.dtype == torch.float32
    wide = seen.double()      # what the recursion computes
    wanted = torch.linalg.inv(torch.eye(33, dtype=torch.float64) + wide.T @ wide / 0.1)
    assert torch.allclose(P.double(), wanted, atol=1e-5)
    # of what was seen almost nothing is left, of what is at right angles to it all
    assert ((seen @ P).norm(dim=1) < 0.02 * seen.norm(dim=1)).all()
    other = torch.linalg.qr(torch.cat([seen, torch.randn(1, 33)]).T)[0][:, 5]
    assert float((P @ other).norm()) == pytest.approx(1, abs=1e-4)
    for h in torch.randn(2000, 32) + 3:
        projection.update(h)
    assert torch.equal(P, P.T)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert eigenvalues.min() > -1e-5 and eigenvalues.max() < 1 + 1e-5


def test_a_projected_step_leaves_the_logits_of_a_seen_mean():
    """The bias included: left alone, it would undo what the weight's projection protects."""
    torch.manual_seed(0)
    projection, head, h = mla.Projection(8, 0.1), nn.Linear(8, 3), torch.randn(8)
    projection.update(h)
    x, y = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    metrics.cross_entropy(head(x), y).backward()
    before = torch.cat([head.weight.grad, head.bias.grad[:, None]], 1)
    projection.project(head)
    after = torch.cat([head.weight.grad, head.bias.grad[:, None]], 1)
    assert torch.allclose(after, before @ projection.P, atol=1e-6)
    assert not torch.allclose(head.bias.grad, before[:, -1], rtol=0.01)
    z, of_x = head(h).detach(), head(x).detach()
    torch.optim.SGD(head.parameters(), 1.0).step()
    assert (head(h) - z).norm() < 0.02 * (before @ with_one(h)).norm()        # unprojected: so much
    assert (head(x) - of_x).norm() > 0.1                                      # and yet it learns


def test_the_optimiser_reads_the_projected_gradient():
    torch.manual_seed(0)
    projection, head = mla.Projection(8, 0.1), nn.Linear(8, 3)
    projection.update(torch.randn(8))
    head.weight.grad, head.bias.grad = torch.randn(3, 8), torch.randn(3)
    optimizer = optim.make_optimizer("adamw", head, 0.1, 0.0)
    projection.project(head)
    optimizer.step()
    for p in (head.weight, head.bias):    # the first moment after one step is a tenth of it
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * p.grad)


def test_mla_takes_turns(script, watch):
    turns = []

    def look(optimizer, names):
        moved, remembered = set(), set()
        for p in parameters(optimizer):
            part = names[id(p)].split(".encoder")[0]
            if p.grad is not None:
                moved.add(part)
            if optimizer.state.get(p):
                remembered.add(part)
        turns.append((moved, remembered))
    watch(look)
    script("mla", "--epochs", 1, "--order", "visual", "audio")
    # the shared head goes by the name it has first; 96 samples in batches of 32
    head = {"audio.head.weight", "audio.head.bias"}
    assert [moved for moved, _ in turns] == [{"visual"} | head, {"audio"} | head] * 3
    # the first step left no moments for the audio encoder
    assert turns[1][1] == {"visual"} | head


def test_mla_projects_with_what_came_before(script, monkeypatch, watch):
    """In the loop: the gradient that the optimiser gets is the original one times P, and P was made
    of the turns before this one."""
    before, steps, means = [], [], []
    project, update = mla.Projection.project, mla.Projection.update

    def gradient(weight, bias):
        return torch.cat([weight.grad, bias.grad[:, None]], 1).clone()

    def look(optimizer, names):
        head = {names[id(p)].split(".")[-1]: p for p in parameters(optimizer)
                if ".head." in names[id(p)]}
        steps.append(gradient(head["weight"], head["bias"]))
    monkeypatch.setattr(mla.Projection, "project", lambda self, head: (
        before.append(gradient(head.weight, head.bias)), project(self, head))[1])
    monkeypatch.setattr(mla.Projection, "update", lambda self, h: (
        means.append(h.clone()), update(self, h)))
    watch(look)
    script("mla", "--epochs", 1, inside=True)
    monkeypatch.undo()
    assert len(before) == len(steps) == len(means) == 6
    P = mla.Projection(48, 0.1)
    for original, used, mean in zip(before, steps, means):
        assert torch.allclose(used, original @ P.P, atol=1e-6)
        P.update(mean)
    seen = with_one(means[0])
    assert torch.equal(before[0], steps[0])
    assert (steps[1] @ seen).norm() < 0.02 * (before[1] @ seen).norm()


def test_mla_without_projection_and_in_another_order(script):
    plain, default = script("mla", "--no-projection"), script("mla")
    assert "projection.P" not in tensors(plain) and "projection.P" in tensors(default)
    assert training(script("mla", "--alpha", 1e30)) == training(plain)        # P = I
    assert training(default)[1:] != training(plain)[1:]
    assert training(script("mla", "--order", "visual", "audio"))[1:] != training(default)[1:]


def test_mla_heads_of_their_own(script, monkeypatch, root, tmp_path):
    narrow = encoders.ViT, encoders.BUILD["vit_toy"][1] | dict(width=16)
    monkeypatch.setitem(encoders.BUILD, "vit_toy", narrow)
    words = ["--pretrained", "visual=none"]                   # no file is so narrow
    told = error("baselines.mla", *words, out=tmp_path / "none", root=root)
    assert "audio 48, visual 16" in told and "--separate-heads" in told
    file = tensors(script("mla", "--separate-heads", *words))
    assert file["audio.head.weight"].shape == (8, 48)
    assert file["visual.head.weight"].shape == (8, 16)


def test_mla_prediction_of_a_sample_is_its_own(script):
    z = tensors(script("mla"), "logits")
    alone = []
    for i in range(60):
        one = {m: z[f"test.{m}"][i:i + 1] for m in ("audio", "visual")}
        alone.append(metrics.fuse(one, "entropy"))
    assert torch.allclose(z["test.joint"].exp(), torch.cat(alone), atol=1e-6)


# ---------------------------------------------------------------------------- optimisers
def decayed_names(optimizer, model):
    pulled = [group["params"] for group in optimizer.param_groups if group["weight_decay"] > 0]
    ids = {id(p) for params in pulled for p in params}
    return {n for n, p in model.named_parameters() if id(p) in ids}


def weights_of_layers(model):
    """Names of what should decay: weights of linear layers, convolutions and embeddings."""
    layers = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, layers)}


SMALL = ("vit_toy", "audio_vit_toy", "vit_mini", "audio_vit_mini", "bert_small", "deberta_small",
         "resnet_small")


@pytest.mark.parametrize("optimizer", ["adamw", "bertadam", "sgd"])
@pytest.mark.parametrize("encoder", SMALL)
def test_weight_decay_is_for_the_weights_of_layers(encoder, optimizer):
    model = encoders.UnimodalModel(encoders.build(encoder), 5)
    made = optim.make_optimizer(optimizer, model, 0.1, 0.3, 10)
    assert {id(p) for p in parameters(made)} == {id(p) for p in model.parameters()}
    wanted = weights_of_layers(model)
    assert decayed_names(made, model) == wanted
    assert "head.weight" in wanted and "head.bias" not in wanted
    spared = {n.split(".")[-1] for n, _ in model.named_parameters() if n not in wanted}
    if encoder.startswith("audio_vit"):   # of shape (1, 1, D), and yet no matrices
        assert spared == {"weight", "bias", "cls_token", "positions", "bias_k", "bias_v"}
    add_lora(model, 2)                    # A and B should not be pulled back to W0
    made = optim.make_optimizer(optimizer, model, 0.1, 0.3, 10)
    assert parameters(made) and not decayed_names(made, model)


def test_bertadam_without_warmup_falls_from_the_start():
    """The rate is multiplied by 1 - x, x the share of the steps done; upstream takes -1 for 0."""
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    falling = optim.BertAdam([p], 0.1, warmup=-1, t_total=8)
    constant = optim.BertAdam([q], 0.1)
    for step in range(10):
        moved = []
        for parameter, optimizer in ((p, falling), (q, constant)):
            before = parameter.detach().clone()
            parameter.grad = torch.tensor([0.3, -0.2, 0.1])
            optimizer.param_groups[0]["weight_decay"] = 0.0
            optimizer.step()
            moved.append(parameter.detach() - before)
        assert torch.allclose(moved[0], max(1 - step / 8, 0) * moved[1], rtol=1e-4, atol=1e-7), step
