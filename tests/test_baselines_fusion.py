"""baselines/mbt, mmbt, pmf: each against its formula written out by hand, what may and may not reach what, and the scripts on tiny data."""
import itertools
import json
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import checkpoints
import data
import encoders
import train_unimodal
from baselines import common, mbt, mmbt, pmf

MENU = ["--dataset", "menu", "--encoder", "visual=vit_toy", "text=bert_small"]


# ------------------------------------------------------------------------------------------------ towers and inputs
def towers(**names):
    """Modality -> encoder in eval mode as `common.encoders` would give it, with weights large enough that everything matters."""
    torch.manual_seed(0)
    models = nn.ModuleDict()
    for m, name in names.items():
        models[m] = encoders.UnimodalModel(encoders.build(name, **(dict(vocab_size=50) if "bert" in name else {})), 5)
        models[m].head = None
    with torch.no_grad():
        for p in models.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return models.eval()


def inputs(models, views=1):
    """Three samples; of the second the text is shorter."""
    x = {}
    for m, model in models.items():
        kind = type(model.encoder)
        shape = (3, views, 1, 32, 64) if kind is encoders.AudioViT else (3, views, 3, 32, 32)
        x[m] = torch.tensor([[1, 7, 8, 9, 2], [1, 6, 2, 0, 0], [1, 9, 9, 8, 2]]) if kind is encoders.BERT else torch.randn(shape)
    return x


def alone(encoder, x, i):
    """Tokens and block call of one view of sample i, with everything padded cut off: (1, T, D)."""
    x = x[i][x[i] != 0] if x.dim() == 2 else x[i]
    mask = {"mask": None} if isinstance(encoder, encoders.BERT) else {}
    return encoder.embed(x[None]), lambda block, tokens: block(tokens, **mask)


# ------------------------------------------------------------------------------------------------ the real scripts
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared data: `toy`, but tiny; `menu`, pictures with a word or two, where the class takes both (bright or dark) x (20 or 30)."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY_SIZES", {"train": 96, "val": 48, "test": 60})
        data.make_toy(folder / "toy-s0", "toy", 0)
    rng, counts = np.random.default_rng(0), {"train": 64, "val": 32, "test": 32}
    for split, n in counts.items():
        (folder / "menu" / split).mkdir(parents=True)
        bright, word, long = rng.integers(0, 2, (3, n))
        text = np.array([[101, 20 + 10 * w, 40, 102] if l else [101, 20 + 10 * w, 102, 0] for w, l in zip(word, long)], np.int32)
        pictures = rng.integers(0, 128, (n, 1, 3, 36, 36)) + 127 * bright[:, None, None, None, None]
        for name, array in dict(labels=2 * bright + word, text=text, visual=pictures.astype(np.uint8)).items():
            np.save(folder / "menu" / split / f"{name}.npy", array)
    (folder / "menu" / "dataset.json").write_text(json.dumps(dict(
        name="menu", classes=list("abcd"), multilabel=False, modalities={"visual": "image", "text": "text"}, counts=counts,
        shapes={"visual": [1, 3, 36, 36], "text": [4]}, tokenizer=dict(kind="wordpiece", vocab_size=120))))
    return folder


@pytest.fixture
def script(root, tmp_path, monkeypatch):
    """script("mbt", "--bottlenecks", 2) does what `python -m baselines.mbt --bottlenecks 2 ...` does; -> the folder of the run."""
    def run(method, *words, out=None):
        out = out or tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        words = [str(w) for w in words] + ([] if "--epochs" in words else ["--epochs", "2"]) + ["--batch-size", "32"]
        monkeypatch.setattr(sys, "argv", [method, *words, "--device", "cpu", "--out", str(out), "--data-root", str(root)])
        import_module(f"baselines.{method}").main()
        return next(f for f in out.glob("*/*") if not f.name.startswith("unimodal"))
    return run


def tensors(folder, name="model"):
    return load_file(folder / f"{name}.safetensors")


def logged(folder):
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in (folder / "log.jsonl").read_text().splitlines()]


def pretrained(root, dataset, **names):
    """The tensors that a run with seed 0 starts from."""
    state = {}
    for m, name in names.items():
        torch.manual_seed(0)
        encoder = train_unimodal.pretrained_model("none", name, checkpoints.read_json(root / dataset / "dataset.json"), m).encoder
        state |= {f"{m}.encoder.{k}": v for k, v in encoder.state_dict().items()}
    return state


@pytest.mark.parametrize("method", ["concat", "ogm_ge", "g_blending", "pmr", "mla", "mbt", "pmf", "mmbt"])
def test_the_prediction_of_a_sample_depends_on_no_other(script, method, monkeypatch):
    """Alone, in another order, in one batch with all: the same."""
    checked, finish = [], common.finish

    def watched(task, models, logits, load):
        n = len(task.split("test"))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        predict = lambda index: common.predict(task, models, logits, load, "test", index)
        whole, shuffled, single = predict(None), predict(order), [predict(torch.tensor([i])) for i in range(8)]
        for name, z in whole.items():
            torch.testing.assert_close(shuffled[name], z[order], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.cat([s[name] for s in single]), z[:8], rtol=1e-4, atol=1e-5)
            checked.append(name)
        return finish(task, models, logits, load)

    monkeypatch.setattr(common, "finish", watched)
    script(method, *(MENU if method == "mmbt" else []), "--epochs", 1)
    assert "joint" in checked


@pytest.mark.parametrize("method, words", [("mbt", []), ("pmf", []), ("mbt", MENU), ("pmf", MENU), ("mmbt", MENU)])
def test_the_scripts_run_learn_and_hold_what_they_say(script, root, method, words):
    folder = script(method, *words, "--epochs", 4, "--lr", 0.005, *(["--freeze-image", 1, "--freeze-text", 2] if method == "mmbt" else []))
    result, z, log = checkpoints.read_json(folder / "result.json"), tensors(folder, "logits")["test.joint"], logged(folder)
    assert result["method"] == method and len(log) == 5 and not (folder / "last.safetensors").exists()
    assert log[4]["loss"] < log[1]["loss"] and result["test"].keys() == {"joint"}

    settings = checkpoints.read_json(folder / "config.json")["settings"]      # and the stored weights give the stored predictions
    where = root / ("toy-s0" if settings["dataset"] == "toy" else "menu")
    info, split, setting = checkpoints.read_json(where / "dataset.json"), data.Split(where, "test"), common.paper.settings_for(settings["dataset"])
    models = nn.ModuleDict({m: checkpoints.new_model(e, info, m) for m, e in settings["encoders"].items()})
    x = {m: data.model_input(split, m, torch.arange(len(split)), models[m].encoder, "cpu", setting) for m in models}
    if method == "mmbt":
        models["visual"].head = models["text"].head = None
        models["joint"] = mmbt.MMBT(models["visual"].encoder, models["text"].encoder, 3, 4)
    else:
        widths = {m: models[m].encoder.width for m in x}
        new = mbt.Bottleneck(models, 4, 4) if method == "mbt" else nn.ModuleList(pmf.FusionLayer(widths, 4) for _ in range(2))
        models["bottleneck" if method == "mbt" else "fusion"] = new
    models.load_state_dict(tensors(folder))                                   # strict
    models.eval()
    with torch.no_grad():
        if method == "mmbt":
            wanted = models["joint"].classifier(models["joint"](models["visual"].encoder, models["text"].encoder, x))
        elif method == "mbt":
            wanted = sum(models[m].head(h) for m, h in models["bottleneck"](models, x).items()) / 2
        else:
            towers = {m: common.Tower(models[m].encoder, x[m], 2) for m in x}
            for i, layer in enumerate(models["fusion"]):
                layer(towers, i)
            wanted = sum(models[m].head(tower.feature()) for m, tower in towers.items()) / 2
    assert torch.allclose(z, wanted, atol=1e-4)


@pytest.mark.parametrize("method, words", [("mbt", []), ("pmf", []), ("mmbt", [*MENU, "--freeze-image", 1, "--freeze-text", 3])])
def test_a_killed_run_goes_on_bit_for_bit(script, monkeypatch, tmp_path, method, words):
    whole = script(method, *words, "--epochs", 4, out=tmp_path / "whole")
    save, count = checkpoints.Run.save, itertools.count(1)

    def save_and_die(*a):
        save(*a)
        if next(count) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.Run, "save", save_and_die)
        script(method, *words, "--epochs", 4, out=tmp_path / "killed")
    resumed = script(method, *words, "--epochs", 4, out=tmp_path / "killed")
    assert len(logged(resumed)) == 5 and logged(resumed) == logged(whole)
    a, b = tensors(resumed), tensors(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_wrong_input_is_one_line_and_leaves_nothing(script, tmp_path):
    deberta = ["--dataset", "menu", "--encoder", "visual=vit_toy", "text=deberta_small"]
    for words, message in ((["mbt", "--encoder", "audio=resnet18"], "--encoder audio=resnet18: tokens can be added between"),
                           (["pmf", *deberta], "--encoder text=deberta_small: tokens can be added between"),
                           (["mbt", "--fusion-layers", 0], "--fusion-layers 0: both are 1 or more"),
                           (["pmf", "--prompts", 0], "--prompts 0 --fusion-layers 2: both"),
                           (["mmbt"], "mmbt takes visual.* with text.*not audio=audio_vit_toy, visual=vit_toy"),
                           (["mmbt", *deberta], "not visual=vit_toy, text=deberta_small"),
                           (["mmbt", *MENU, "--image-tokens", 0], "--image-tokens 0")):
        with pytest.raises(SystemExit, match=message):
            script(*words, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method, words", [("mbt", MENU), ("pmf", MENU), ("mmbt", [*MENU, "--freeze-image", 0, "--freeze-text", 0])])
def test_bf16(script, method, words):
    folder = script(method, *words, "--epochs", 1, "--precision", "bf16")
    assert checkpoints.read_json(folder / "result.json")["test"]["joint"]["loss"] < 3
    assert all(v.dtype == torch.float32 for v in tensors(folder).values() if v.is_floating_point())


# ------------------------------------------------------------------------------------------------ towers
@pytest.mark.parametrize("name", ["vit_toy", "audio_vit_toy", "bert_small"])
def test_a_tower_is_its_encoder(name):
    models = towers(m=name)
    encoder, x = models["m"].encoder, inputs(models, views=2)["m"]
    for layers in (1, 2):
        tower = common.Tower(encoder, x, layers)
        for i in range(layers):
            tower.x, rest = tower.block(i, torch.zeros(3, 0, encoder.width))
        h = tower.feature()
        h = encoder.pooler(h).tanh() if name == "bert_small" else h
        assert torch.allclose(h, models["m"].features(x), atol=1e-5) and rest.shape == (3, 0, encoder.width)


# ------------------------------------------------------------------------------------------------ MBT
def bottleneck(models, tokens=3, layers=2):
    torch.manual_seed(1)
    b = mbt.Bottleneck(models, tokens, layers).eval()
    nn.init.normal_(b.tokens)
    return b


@pytest.mark.parametrize("names", [dict(audio="audio_vit_toy", visual="vit_toy"), dict(visual="vit_toy", text="bert_small"),
                                   dict(audio="audio_vit_toy", visual="vit_toy", text="bert_small")])
def test_mbt_is_its_formula(names):
    """Sample by sample, view by view, without batch, padding or masks; text is four times as wide as the others."""
    models = towers(**names)
    b, x = bottleneck(models), inputs(models, views=2)
    assert b.tokens.shape == (3, 128 if "text" in names else 32)
    h = b(models, x)
    for i in range(3):
        z, call, bn = {}, {}, b.tokens[None]
        for m in names:
            views = [x[m]] if m == "text" else [x[m][:, v] for v in range(2)]
            z[m], call[m] = [alone(models[m].encoder, v, i)[0] for v in views], alone(models[m].encoder, views[0], i)[1]
        for layer in range(2):
            written = []
            for m in names:
                T = z[m][0].shape[1]
                out = [call[m](models[m].encoder.blocks[layer], torch.cat([v, b.into[m](bn)], 1)) for v in z[m]]
                z[m] = [o[:, :T] for o in out]
                written.append(b.back[m](sum(o[:, T:] for o in out) / len(out)))
            bn = sum(written) / len(written)
        for m in names:
            wanted = sum(models[m].encoder.norm(v)[0, 0] for v in z[m]) / len(z[m])
            wanted = models[m].encoder.pooler(wanted).tanh() if m == "text" else wanted
            assert torch.allclose(h[m][i], wanted, atol=1e-4), m


def test_mbt_information_crosses_through_the_bottleneck_only(monkeypatch):
    models = towers(audio="audio_vit_toy", visual="vit_toy")
    x = inputs(models)
    x["audio"].requires_grad_()
    reach = lambda b: torch.autograd.grad(b(models, x)["visual"].sum(), x["audio"], allow_unused=True)[0]
    assert reach(bottleneck(models)).abs().max() > 1e-4
    assert reach(bottleneck(models, layers=1)) is None                        # written in the last block: nobody reads it any more
    block = common.Tower.block
    monkeypatch.setattr(common.Tower, "block", lambda *a: tuple(v if k == 0 else v.detach() for k, v in enumerate(block(*a))))
    assert reach(bottleneck(models)) is None                                  # the tokens alone carry nothing


def test_mbt_fuses_in_the_last_blocks_of_the_shallowest_at_most():
    models = nn.ModuleDict({m: encoders.UnimodalModel(encoders.build("vit_toy", depth=d), 5) for m, d in (("a", 3), ("b", 5))}).eval()
    assert bottleneck(models, layers=4).layers == 3 and bottleneck(models, layers=2).layers == 2
    b, x, read = bottleneck(models, layers=2), {"a": torch.randn(2, 3, 32, 32), "b": torch.randn(2, 3, 32, 32)}, []
    for m, model in models.items():
        for i, block in enumerate(model.encoder.blocks):
            block.register_forward_pre_hook(lambda _, a, m=m, i=i: read.append((m, i, a[0].shape[1])))
    b(models, x)
    assert sorted(read) == [("a", 0, 17), ("a", 1, 20), ("a", 2, 20), ("b", 0, 17), ("b", 1, 17), ("b", 2, 17), ("b", 3, 20), ("b", 4, 20)]


def test_mbt_trains_the_mean_of_the_cross_entropies(script, root, monkeypatch):
    parts, wanted, seen, real, count = [], [], [], common.cross_entropy, common.Epoch.count
    monkeypatch.setattr(common.Epoch, "count", lambda self, loss, z, y: (wanted.append((parts[-2:], y)), seen.append((loss, z)), count(self, loss, z, y)))
    monkeypatch.setattr(common, "cross_entropy", lambda z, y: (parts.append(z), real(z, y))[1])
    file = tensors(script("mbt", "--epochs", 1, "--lr", 0.001))
    assert len(seen) == 3 and len(parts) == 6                                 # one for each modality and batch
    for ((a, b), y), (loss, joint) in zip(wanted, seen):
        assert torch.allclose(loss, (real(a, y) + real(b, y)) / 2) and torch.allclose(joint, (a + b) / 2) and not torch.allclose(loss, real(joint, y))
    start = pretrained(root, "toy-s0", audio="audio_vit_toy", visual="vit_toy")
    assert not [k for k, v in start.items() if torch.equal(file[k], v)] and file["bottleneck.tokens"].shape == (4, 32)      # both towers whole


# ------------------------------------------------------------------------------------------------ PMF
def fusion(models, layers=2, prompts=3):
    torch.manual_seed(2)
    modules = nn.ModuleList(pmf.FusionLayer({m: model.encoder.width for m, model in models.items()}, prompts) for _ in range(layers))
    with torch.no_grad():
        for p in modules.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return modules


@pytest.mark.parametrize("names", [dict(audio="audio_vit_toy", visual="vit_toy"), dict(visual="vit_toy", text="bert_small")])
def test_pmf_is_its_formula(names):
    """Sample by sample, view by view, without batch, padding or masks."""
    models = towers(**names)
    layers, x = fusion(models), inputs(models, views=2)
    tower = {m: common.Tower(models[m].encoder, x[m], 2) for m in names}
    for i, layer in enumerate(layers):
        layer(tower, i)
    a, b = names
    for s in range(3):
        z, call = {}, {}
        for m in names:
            views = [x[m]] if m == "text" else [x[m][:, v] for v in range(2)]
            z[m], call[m] = [alone(models[m].encoder, v, s)[0] for v in views], alone(models[m].encoder, views[0], s)[1]
        for i, layer in enumerate(layers):
            q = {}
            for m in names:
                asked = [torch.cat([v, layer.query_context[m][None], layer.query[m][None]], 1) for v in z[m]]
                q[m] = sum(call[m](models[m].encoder.blocks[i], v)[:, -3:] for v in asked) / len(asked)
            for m, other in ((a, b), (b, a)):
                w1, _, w2 = layer.translate[other]
                t = w2(w1(q[other]).clamp(min=0))
                told = [torch.cat([v, layer.fusion_context[m][None], t], 1) for v in z[m]]
                z[m] = [call[m](models[m].encoder.blocks[i], v)[:, :-6] for v in told]
        for m in names:
            wanted = sum(models[m].encoder.norm(v)[0, 0] for v in z[m]) / len(z[m])
            assert torch.allclose(tower[m].feature()[s], wanted, atol=1e-4), m
            assert tower[m].x.shape[1] == common.Tower(models[m].encoder, x[m], 2).x.shape[1]          # what was added is cut off


def test_pmf_every_prompt_gets_a_gradient_and_no_tower_does(script, monkeypatch):
    """In the script itself, so also that nothing of it was left out of the optimiser, as the released code leaves its fusion contexts."""
    real, grads, given = common.optimizer_for, {}, set()

    def watched(task, models):
        optimizer = real(task, models)
        given.update(id(p) for group in optimizer.param_groups for p in group["params"])
        optimizer.register_step_pre_hook(lambda *_: grads.update({n: (id(p) in given, p.grad) for n, p in models.named_parameters()}))
        return optimizer
    monkeypatch.setattr(common, "optimizer_for", watched)
    script("pmf", *MENU, "--epochs", 1)
    for kind in ("query", "query_context", "fusion_context"):
        assert {n for n in grads if n.startswith("fusion") and f".{kind}." in n} == {f"fusion.{i}.{kind}.{m}" for i in (0, 1) for m in ("visual", "text")}
    for name, (optimised, grad) in grads.items():
        if ".encoder." in name:
            assert grad is None and not optimised, name
        else:
            assert optimised and grad.abs().max() > 0, name


def test_pmf_trains_the_share_it_should_and_leaves_the_towers(script, root):
    folder = script("pmf", *MENU, "--prompts", 2, "--lr", 0.01)
    V, T, n, C, hidden = 32, 128, 2, 4, 64                                    # widths, prompts, classes
    mlps = (V * hidden + hidden + hidden * T + T) + (T * hidden + hidden + hidden * V + V)
    assert checkpoints.read_json(folder / "result.json")["trained_parameters"] == 2 * (3 * n * (V + T) + mlps) + (V + 1) * C + (T + 1) * C
    file, start = tensors(folder), pretrained(root, "menu", visual="vit_toy", text="bert_small")
    assert start and all(torch.equal(file[k], v) for k, v in start.items())


def test_pmf_stays_under_three_percent_of_the_published_towers():
    with torch.device("meta"):
        models = {m: encoders.build(name) for m, name in (("visual", "vit_b16"), ("text", "bert_base"))}
        new = nn.ModuleList(pmf.FusionLayer({m: e.width for m, e in models.items()}, 4) for _ in range(2))
    count = lambda m: sum(p.numel() for p in m.parameters())
    share = (count(new) + 2 * 769 * 101) / (count(new) + 2 * 769 * 101 + sum(map(count, models.values())))
    assert 0.01 < share < 0.03


def test_pmf_starts_from_fine_tuned_towers(script, tmp_path, root):
    args = pmf.arguments().parse_args(["--out", str(tmp_path / "runs"), "--data-root", str(root), "--device", "cpu"])
    tuned = {m: train_unimodal.train(args, m, 0, epochs=1).folder for m in ("audio", "visual")}
    folder = script("pmf", "--umft", out=tmp_path / "runs")
    assert folder.name == "pmf-umft-s0"
    file = tensors(folder)
    for m, there in tuned.items():
        assert checkpoints.read_json(folder / "config.json")["settings"]["unimodal"][m]["sha256"] == checkpoints.sha256(there / "model.safetensors")
        assert all(torch.equal(file[f"{m}.encoder.{k}"], v) for k, v in
                   ((k.removeprefix(f"{m}.encoder."), v) for k, v in tensors(there).items() if ".encoder." in k))


# ------------------------------------------------------------------------------------------------ MMBT
def mmbt_parts(image="vit_toy", tokens=3):
    models = towers(visual=image, text="bert_small")
    torch.manual_seed(3)
    image, bert = models["visual"].encoder, models["text"].encoder
    return mmbt.MMBT(image, bert, tokens, 5).eval(), image, bert, inputs(models, views=2)


@pytest.fixture
def resnet(monkeypatch):
    monkeypatch.setitem(encoders.BUILD, "resnet_tiny", (encoders.ResNet, dict(blocks=(1, 1, 1, 1), bottleneck=False, width=8)))


@pytest.mark.parametrize("tokens, grid", [(1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (4, (2, 2)), (5, (5, 1)), (6, (3, 2)), (7, (7, 1)), (8, (4, 2)), (9, (3, 3))])
def test_mmbt_cells_are_means_of_the_feature_map(resnet, tokens, grid):
    model = mmbt.MMBT(SimpleNamespace(width=4), SimpleNamespace(width=6), tokens, 5)
    assert model.grid == grid
    feature_map = torch.randn(4, 4, 6 * grid[0], 5 * grid[1])                 # two views each of two pictures, grid cells of 6 x 5
    image = SimpleNamespace(feature_map=lambda x: feature_map)
    out = model.cells(image, torch.zeros(2, 2, 3, 8, 8))
    assert out.shape == (2, tokens, 6)
    cells = [feature_map[:, :, 6 * r:6 * r + 6, 5 * c:5 * c + 5].mean((2, 3)) for r in range(grid[0]) for c in range(grid[1])]
    wanted = model.project(torch.stack(cells, 1).unflatten(0, (2, 2)).mean(1))
    assert torch.allclose(out, wanted, atol=1e-5)


def test_mmbt_takes_a_vits_patches_for_the_map():
    model, image, _, x = mmbt_parts()
    patches = image.tokens(x["visual"][:, 0])[:, 1:].unflatten(1, (4, 4))     # (B, rows, columns, D)
    first = patches[:, :2].mean((1, 2))                                       # adaptive pooling of 4 rows to 3: rows 0-1, 1-2, 2-3
    assert torch.allclose(model.cells(image, x["visual"][:, :1])[:, 0], model.project(first), atol=1e-5)


@pytest.mark.parametrize("image", ["vit_toy", "resnet_tiny"])
def test_mmbt_is_bert_on_the_framed_sequence(resnet, image):
    """Sample by sample and without padding: words, positions and segments written out, then BERT's own blocks and pooler."""
    model, image, bert, x = mmbt_parts(image)
    out, v = model(image, bert, x), model.cells(image, x["visual"])
    for i in range(3):
        ids = x["text"][i][x["text"][i] != 0]
        words = bert.words(ids)
        tokens = torch.cat([words[:1], v[i], words[-1:], words[1:]])
        T = len(ids) - 1
        where, segment = [0, 1, 2, 3, 4, *range(T)], [0] * 5 + [1] * T
        tokens = bert.norm_embed(tokens + bert.positions.weight[where] + bert.segments.weight[segment])[None]
        for block in bert.blocks:
            tokens = block(tokens, mask=None)
        assert torch.allclose(out[i], bert.pooler(tokens[0, 0]).tanh(), atol=1e-4)
    sequence, there = model.sequence(bert, v, x["text"])
    assert sequence.shape == (3, 3 + 2 + 4, 128) and there.sum(1).tolist() == [9, 7, 9]


def test_mmbt_without_the_cells_is_bert_on_text():
    model, image, bert, x = mmbt_parts()
    tokens, there = model.sequence(bert, model.cells(image, x["visual"]), x["text"])
    there[:, 1:4] = False                                                     # nobody attends to the cells
    out = bert.encode(tokens, mask=there[:, None, None])[:, 0]
    ids = torch.cat([x["text"][:, :1], torch.tensor([[2]] * 3), x["text"][:, 1:]], 1)                        # [CLS] [SEP] w_1 w_2 .. [SEP]
    positions, segments = [0, 4, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]
    plain = bert.norm_embed(bert.words(ids) + bert.positions.weight[positions] + bert.segments.weight[segments])
    plain = bert.encode(plain, mask=encoders.padding_mask(ids)[:, None, None])[:, 0]
    assert torch.allclose(out, plain, atol=1e-5)
    assert not torch.allclose(bert.pooler(out).tanh(), model(image, bert, x), atol=1e-2)                     # with them it says something else


def test_mmbt_padding_changes_nothing_and_the_picture_does():
    model, image, bert, x = mmbt_parts()
    out = model(image, bert, x)
    longer = x | {"text": torch.cat([x["text"], torch.zeros(3, 4, dtype=torch.long)], 1)}
    assert torch.allclose(model(image, bert, longer), out, atol=1e-5)
    other = x | {"visual": x["visual"].roll(1, 0)}
    assert (model(image, bert, other) - out).abs().max() > 1e-2
    empty = x | {"text": torch.zeros(3, 1, dtype=torch.long)}
    assert model(image, bert, empty).isfinite().all()


def test_mmbt_thaws_gradually(script, resnet, monkeypatch, root):
    """Epoch 1: neither encoder; 2: the image encoder too; 3: BERT's blocks too. Frozen is bit-identical, statistics of BatchNorm included."""
    states, modes, save = [], [], checkpoints.Run.save
    monkeypatch.setattr(checkpoints.Run, "save", lambda self, t, *a: (states.append({k: v.clone() for k, v in t.items()}), save(self, t, *a)))
    dropout, norm = encoders.BERT.embed, encoders.ResNet.feature_map
    monkeypatch.setattr(encoders.BERT, "embed", lambda self, *a, **k: (modes.append(("text", self.training)), dropout(self, *a, **k))[1])
    monkeypatch.setattr(encoders.ResNet, "feature_map", lambda self, x: (modes.append(("image", self.training)), norm(self, x))[1])
    words = ["--dataset", "menu", "--encoder", "visual=resnet_tiny", "text=bert_small", "--epochs", 3, "--lr", 1e-3]
    folder = script("mmbt", *words, "--freeze-image", 1, "--freeze-text", 2)
    states.insert(0, pretrained(root, "menu", visual="resnet_tiny", text="bert_small"))
    moved = lambda a, b, part: {k for k in states[0] if part in k and not torch.equal(states[a][k], states[b][k])}
    for epoch in (1, 2, 3):
        assert bool(moved(epoch - 1, epoch, "visual.")) == (epoch > 1) and bool(moved(epoch - 1, epoch, "text.encoder.blocks")) == (epoch > 2)
        assert moved(epoch - 1, epoch, "text.encoder.words") and moved(epoch - 1, epoch, "text.encoder.pooler")
    assert "visual.encoder.bn1.running_mean" in moved(1, 2, "visual.")
    training = lambda kind: [m for k, m in modes if k == kind]
    per_epoch = len(training("text")) - 3                                     # before the first epoch and at the end, val and test are predicted
    assert per_epoch == 3 * 3 and sum(training("text")) == 2 and sum(training("image")) == 4      # 2 batches an epoch, in training mode once thawed
    weights = sum(v.numel() for k, v in tensors(folder).items() if "running" not in k and "num_batches" not in k)
    assert checkpoints.read_json(folder / "result.json")["trained_parameters"] == weights                    # in the last epoch: all


def test_mmbt_gradient_reaches_the_picture_once_thawed():
    model, image, bert, x = mmbt_parts()
    for frozen in (True, False):
        image.requires_grad_(not frozen)
        model.zero_grad()
        model.classifier(model(image, bert, x)).square().sum().backward()
        assert (image.patch.weight.grad is None) if frozen else (image.patch.weight.grad.abs().max() > 0)
        assert model.project.weight.grad.abs().max() > 0
