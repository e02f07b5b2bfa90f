"""baselines/mbt, mmbt, pmf: each against its formula written out by hand, what may and may not
reach what, and the scripts on tiny data.
"""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import encoders
from baselines import mbt, mmbt, parts, pmf
from harness import arguments, fingerprint, metrics, models, optim, runs
from data import read_json
from prepare import toy
from pretrained import checkpoints
from running import call, error
from test_baselines import (decayed_names, killed_and_resumed, logged, parameters, result_of,
                            run_script, same, settings_of, tensors, weights_of_layers)
from test_baselines import watch  # noqa: F401  a fixture

MENU = ["--dataset", "menu", "--encoder", "visual=vit_toy", "text=bert_small"]


# ---------------------------------------------------------------------------- towers and inputs
def towers(**names):
    """Modality -> encoder in eval mode, as `parts.pretrained_encoders` would give it, with weights
    large enough that everything matters."""
    torch.manual_seed(0)
    made = nn.ModuleDict()
    for m, name in names.items():
        sizes = dict(vocab_size=50) if "bert" in name else {}
        made[m] = encoders.UnimodalModel(encoders.build(name, **sizes), 5)
        made[m].head = None
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


def inputs(towers, views=1):
    """Three samples; of the second the text is shorter."""
    x = {}
    for m, model in towers.items():
        kind = type(model.encoder)
        if kind is encoders.BERT:
            x[m] = torch.tensor([[1, 7, 8, 9, 2], [1, 6, 2, 0, 0], [1, 9, 9, 8, 2]])
        elif kind is encoders.AudioViT:
            x[m] = torch.randn(3, views, 1, 32, 64)
        else:
            x[m] = torch.randn(3, views, 3, 32, 32)
    return x


def views_of(m, x, views=2):
    """What each view of a modality is: (3, ...); a text is one view."""
    return [x[m]] if m == "text" else [x[m][:, v] for v in range(views)]


def alone(encoder, x, i):
    """Tokens of one view of sample i, with everything padded cut off, (1, T, D); and how to call a
    block."""
    x = x[i][x[i] != 0] if x.dim() == 2 else x[i]
    mask = {"mask": None} if isinstance(encoder, encoders.BERT) else {}
    return encoder.embed(x[None]), lambda block, tokens: block(tokens, **mask)


# ---------------------------------------------------------------------------- the real scripts
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared data: `toy`, but tiny; `menu`, pictures with a word or two, where the class takes
    both (bright or dark) x (20 or 30)."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SIZES", {"toy": {"train": 96, "val": 48, "test": 60}})
        arguments.find(folder, "toy", 0)
    rng, counts = np.random.default_rng(0), {"train": 64, "val": 32, "test": 32}
    for split, n in counts.items():
        where = folder / "menu" / split
        where.mkdir(parents=True)
        bright, word, long = rng.integers(0, 2, (3, n))
        text = []
        for w, two in zip(word, long):
            text.append([101, 20 + 10 * w, 40, 102] if two else [101, 20 + 10 * w, 102, 0])
        pictures = rng.integers(0, 128, (n, 1, 3, 36, 36)) + 127 * bright[:, None, None, None, None]
        np.save(where / "labels.npy", 2 * bright + word)
        np.save(where / "text.npy", np.array(text, np.int32))
        np.save(where / "visual.npy", pictures.astype(np.uint8))
        (where / "ids.txt").write_text("".join(f"{split}{i}\n" for i in range(n)))
    info = dict(name="menu", classes=list("abcd"), multilabel=False, counts=counts,
                modalities={"visual": "image", "text": "text"},
                shapes={"visual": [1, 3, 36, 36], "text": [4]},
                tokenizer=dict(kind="wordpiece", vocab_size=120))
    (folder / "menu" / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def script(root, tmp_path):
    """script("mbt", "--bottlenecks", 2) -> the folder of the run."""
    def run(method, *words, out=None, inside=False):
        out = out or tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        run.printed = run_script(method, words, out, root, inside)
        return next(f for f in out.glob("*/*") if not f.name.startswith("unimodal"))
    return run


def pretrained(root, dataset, **names):
    """The tensors that a run with seed 0 starts from."""
    info, state = read_json(root / dataset / "dataset.json"), {}
    start = {m: name if name in checkpoints.PUBLIC else "none" for m, name in names.items()}
    settings = dict(encoders=names, pretrained=start)
    for m in names:
        torch.manual_seed(0)
        encoder = models.pretrained_model(settings, m, info).encoder
        state |= {f"{m}.encoder.{k}": v for k, v in encoder.state_dict().items()}
    return state


ALL = ["concat", "frozen", "ogm_ge", "g_blending", "pmr", "mla", "mbt", "pmf", "mmbt"]


@pytest.mark.parametrize("method", ALL)
def test_the_prediction_of_a_sample_depends_on_no_other(script, method, monkeypatch):
    """Alone, in another order, in one batch with all: the same. Of every prediction of the run."""
    checked, real = set(), metrics.predict

    def watched(forward, models, split, device, settings, index=None):
        whole = real(forward, models, split, device, settings, index)
        if index is not None:             # what a method looks up in train
            return whole
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        shuffled = real(forward, models, split, device, settings, order)
        single = [real(forward, models, split, device, settings, torch.tensor([i]))
                  for i in range(4)]
        for name, z in whole.items():
            torch.testing.assert_close(shuffled[name], z[order], rtol=1e-4, atol=1e-5)
            one_by_one = torch.cat([s[name] for s in single])
            torch.testing.assert_close(one_by_one, z[:4], rtol=1e-4, atol=1e-5)
        checked.add(frozenset(whole))
        return whole

    monkeypatch.setattr(metrics, "predict", watched)
    more = {"mmbt": MENU, "frozen": ["--umft-epochs", 1]}.get(method, [])
    script(method, *more, "--epochs", 1)
    wanted = {"audio", "visual"} if method == "frozen" else {"joint"}         # frozen: features
    assert any(wanted <= names for names in checked)


@pytest.mark.parametrize("method, words", [
    ("mbt", []), ("pmf", []), ("mbt", MENU), ("pmf", MENU),
    ("mmbt", [*MENU, "--freeze-image", 1, "--freeze-text", 2])])
def test_the_scripts_run_learn_and_hold_what_they_say(script, root, method, words):
    folder = script(method, *words, "--epochs", 4, "--lr", 0.005)
    result, z, log = result_of(folder), tensors(folder, "logits")["test.joint"], logged(folder)
    assert result["method"] == method and len(log) == 5
    assert not (folder / "last.safetensors").exists()
    assert log[4]["loss"] < log[1]["loss"] and result["test"].keys() == {"joint"}

    # and the stored weights give the stored predictions
    settings = settings_of(folder)
    where = root / ("toy-s0" if settings["dataset"] == "toy" else "menu")
    info, split = read_json(where / "dataset.json"), data.Split(where, "test")
    made, x = nn.ModuleDict(), {}
    for m, name in settings["encoders"].items():
        made[m] = models.new_model(name, info, m)
        index = torch.arange(len(split))
        x[m] = data.model_input(split, m, index, made[m].encoder, "cpu", settings)
    widths = {m: made[m].encoder.width for m in x}
    if method == "mmbt":
        image, bert = made["visual"].encoder, made["text"].encoder
        made["visual"].head = made["text"].head = None
        made["joint"] = mmbt.MMBT(image, bert, 3, 4)
    elif method == "mbt":
        made["bottleneck"] = mbt.Bottleneck(made, 4, 4)
    else:
        made["fusion"] = nn.ModuleList(pmf.FusionLayer(widths, 4) for _ in range(2))
    made.load_state_dict(tensors(folder))                     # strict
    made.eval()
    with torch.no_grad():
        if method == "mmbt":
            wanted = made["joint"].classifier(made["joint"](image, bert, x))
        elif method == "mbt":
            wanted = sum(made[m].head(h) for m, h in made["bottleneck"](made, x).items()) / 2
        else:
            tower = {m: parts.Tower(made[m].encoder, x[m], 2) for m in x}
            for i, layer in enumerate(made["fusion"]):
                layer(tower, i)
            wanted = sum(made[m].head(t.feature()) for m, t in tower.items()) / 2
    assert torch.allclose(z, wanted, atol=1e-4)


@pytest.mark.parametrize("method, words", [
    ("mbt", []), ("pmf", []), ("mmbt", [*MENU, "--freeze-image", 1, "--freeze-text", 3])])
def test_a_killed_run_goes_on_bit_for_bit(script, monkeypatch, tmp_path, method, words):
    words = [*words, "--epochs", 4]
    whole, resumed = killed_and_resumed(script, monkeypatch, tmp_path, method, words)
    assert len(logged(resumed)) == 5 and logged(resumed) == logged(whole)
    assert same(tensors(resumed), tensors(whole))


def test_wrong_input_is_one_line_and_leaves_nothing(root, tmp_path):
    deberta = ["--dataset", "menu", "--encoder", "visual=vit_toy", "text=deberta_small"]
    no_towers = "tokens can be added between"
    cases = (("mbt", ["--encoder", "audio=resnet18"], f"--encoder audio=resnet18: {no_towers}"),
             ("pmf", deberta, f"--encoder text=deberta_small: {no_towers}"),
             ("mbt", ["--fusion-layers", 0], "--fusion-layers 0: both are 1 or more"),
             ("pmf", ["--prompts", 0], "--prompts 0 --fusion-layers 2: both"),
             ("mmbt", [], "not audio=audio_vit_toy, visual=vit_toy"),
             ("mmbt", [], "mmbt takes visual, a ResNet or a ViT, with text, a BERT"),
             ("mmbt", deberta, "not visual=vit_toy, text=deberta_small"),
             ("mmbt", [*MENU, "--image-tokens", 0], "--image-tokens 0"))
    for method, words, message in cases:
        assert message in error(f"baselines.{method}", *words, out=tmp_path / "runs", root=root)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method, words", [
    ("mbt", MENU), ("pmf", MENU), ("mmbt", [*MENU, "--freeze-image", 0, "--freeze-text", 0])])
def test_bf16(script, method, words):
    folder = script(method, *words, "--epochs", 1, "--precision", "bf16")
    assert result_of(folder)["test"]["joint"]["loss"] < 3
    assert all(v.dtype == torch.float32 for v in tensors(folder).values() if v.is_floating_point())


@pytest.mark.parametrize("method, words", [
    ("mbt", []), ("pmf", []), ("mmbt", [*MENU, "--freeze-image", 0, "--freeze-text", 0])])
def test_micro_batches_give_the_same_gradients(script, watch, monkeypatch, method, words):
    """At so small a learning rate all gradients are those of the first weights."""
    def without_dropout(self, mode=True):
        return nn.Module.train(self, False)
    monkeypatch.setattr(encoders.BERT, "train", without_dropout)
    gradients = []
    for more in ([], ["--micro-batch", 12]):
        gradients.append([])
        watch(lambda optimizer, names, g=gradients[-1]: g.append(
            torch.cat([p.grad.flatten() for p in parameters(optimizer) if p.grad is not None])))
        script(method, *words, *more, "--epochs", 1, "--lr", 1e-9)
    assert len(gradients[0]) == len(gradients[1]) >= 2
    for whole, in_parts in zip(*gradients):
        assert whole.norm() > 0 and (in_parts - whole).norm() < 1e-3 * whole.norm()


def test_ogm_ge_leaves_words_that_are_not_in_the_data_alone(script, root):
    """The noise of GE must not reach them: AdamW would make a full step of it."""
    words = "text.encoder.words.weight"
    file = tensors(script("ogm_ge", *MENU, "--modulated-epochs", 2))[words]
    start = pretrained(root, "menu", visual="vit_toy", text="bert_small")[words]
    used = torch.tensor([20, 30, 40, 101, 102])
    others = [i for i in range(120) if i not in used.tolist()]
    assert ((file - start)[used].norm(dim=1) > 0.01).all()
    torch.testing.assert_close(file[others], start[others], rtol=1e-3, atol=0)      # weight decay


# ---------------------------------------------------------------------------- towers
@pytest.mark.parametrize("name", ["vit_toy", "audio_vit_toy", "bert_small"])
def test_a_tower_is_its_encoder(name):
    models = towers(m=name)
    encoder, x = models["m"].encoder, inputs(models, views=2)["m"]
    for layers in (1, 2):
        tower = parts.Tower(encoder, x, layers)
        for i in range(layers):
            tower.x, rest = tower.block(i, torch.zeros(3, 0, encoder.width))
        h = tower.feature()
        h = encoder.pooler(h).tanh() if name == "bert_small" else h
        assert torch.allclose(h, models["m"].features(x), atol=1e-5)
        assert rest.shape == (3, 0, encoder.width)


# ---------------------------------------------------------------------------- MBT
def bottleneck(models, tokens=3, layers=2):
    torch.manual_seed(1)
    b = mbt.Bottleneck(models, tokens, layers).eval()
    nn.init.normal_(b.tokens)
    return b


# Of two blocks each, as many as are fused.
AUDIO_VISUAL = dict(audio="audio_vit_mini", visual="vit_mini")
VISUAL_TEXT = dict(visual="vit_mini", text="bert_small")


@pytest.mark.parametrize("names", [AUDIO_VISUAL, VISUAL_TEXT, AUDIO_VISUAL | VISUAL_TEXT])
def test_mbt_is_its_formula(names):
    """Sample by sample, view by view, without batch, padding or masks; text is four times as wide
    as the others."""
    models = towers(**names)
    b, x = bottleneck(models), inputs(models, views=2)
    assert b.tokens.shape == (3, 128 if "text" in names else 32)
    h = b(models, x)
    for i in range(3):
        z, call_of, bn = {}, {}, b.tokens[None]
        for m in names:
            views = views_of(m, x)
            z[m] = [alone(models[m].encoder, v, i)[0] for v in views]
            call_of[m] = alone(models[m].encoder, views[0], i)[1]
        for layer in range(2):
            written = []
            for m in names:
                T, block = z[m][0].shape[1], models[m].encoder.blocks[layer]
                out = [call_of[m](block, torch.cat([v, b.into[m](bn)], 1)) for v in z[m]]
                z[m] = [o[:, :T] for o in out]
                written.append(b.back[m](sum(o[:, T:] for o in out) / len(out)))
            bn = sum(written) / len(written)
        for m in names:
            wanted = sum(models[m].encoder.norm(v)[0, 0] for v in z[m]) / len(z[m])
            if m == "text":
                wanted = models[m].encoder.pooler(wanted).tanh()
            assert torch.allclose(h[m][i], wanted, atol=1e-4), m


def test_mbt_information_crosses_through_the_bottleneck_only(monkeypatch):
    models = towers(**AUDIO_VISUAL)
    x = inputs(models)
    x["audio"].requires_grad_()

    def reach(b):
        seen = b(models, x)["visual"].sum()
        return torch.autograd.grad(seen, x["audio"], allow_unused=True)[0]
    assert reach(bottleneck(models)).abs().max() > 1e-4
    assert reach(bottleneck(models, layers=1)) is None        # nobody reads the last block's
    block = parts.Tower.block

    def detached(*a):
        tokens, added = block(*a)
        return tokens, added.detach()
    monkeypatch.setattr(parts.Tower, "block", detached)
    assert reach(bottleneck(models)) is None                  # the tokens alone carry nothing


def test_mbt_fuses_in_the_last_blocks_of_the_shallowest_at_most():
    models = nn.ModuleDict()
    for m, depth in (("a", 3), ("b", 5)):
        models[m] = encoders.UnimodalModel(encoders.build("vit_toy", depth=depth), 5).eval()
    assert bottleneck(models, layers=4).layers == 3 and bottleneck(models, layers=2).layers == 2
    read = []
    for m, model in models.items():
        for i, block in enumerate(model.encoder.blocks):
            block.register_forward_pre_hook(
                lambda _, a, m=m, i=i: read.append((m, i, a[0].shape[1])))
    x = {"a": torch.randn(2, 3, 32, 32), "b": torch.randn(2, 3, 32, 32)}
    bottleneck(models, layers=2)(models, x)
    assert sorted(read) == [("a", 0, 17), ("a", 1, 20), ("a", 2, 20), ("b", 0, 17), ("b", 1, 17),
                            ("b", 2, 17), ("b", 3, 20), ("b", 4, 20)]


def test_mbt_trains_the_mean_of_the_cross_entropies(script, root, monkeypatch):
    logits, seen, real, count = [], [], metrics.cross_entropy, runs.Run.count
    monkeypatch.setattr(runs.Run, "count", lambda self, loss, z, y: (
        seen.append((loss, z["joint"], logits[-2:], y)), count(self, loss, z, y)))
    monkeypatch.setattr(metrics, "cross_entropy", lambda z, y: (logits.append(z), real(z, y))[1])
    file = tensors(script("mbt", "--epochs", 1, "--lr", 0.001))
    assert len(seen) == 3 and len(logits) == 6                # one for each modality and batch
    for loss, joint, (a, b), y in seen:
        assert torch.allclose(loss, (real(a, y) + real(b, y)) / 2)
        assert torch.allclose(joint, (a + b) / 2) and not torch.allclose(loss, real(joint, y))
    # Both towers are trained whole.
    start = pretrained(root, "toy-s0", audio="audio_vit_toy", visual="vit_toy")
    assert not [k for k, v in start.items() if torch.equal(file[k], v)]
    assert file["bottleneck.tokens"].shape == (4, 48)


# ---------------------------------------------------------------------------- PMF
def fusion(models, layers=2, prompts=3):
    torch.manual_seed(2)
    widths = {m: model.encoder.width for m, model in models.items()}
    modules = nn.ModuleList(pmf.FusionLayer(widths, prompts) for _ in range(layers))
    with torch.no_grad():
        for p in modules.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return modules


@pytest.mark.parametrize("names", [AUDIO_VISUAL, VISUAL_TEXT])
def test_pmf_is_its_formula(names):
    """Sample by sample, view by view, without batch, padding or masks."""
    models = towers(**names)
    layers, x = fusion(models), inputs(models, views=2)
    tower = {m: parts.Tower(models[m].encoder, x[m], 2) for m in names}
    for i, layer in enumerate(layers):
        layer(tower, i)
    a, b = names
    for s in range(3):
        z, call_of = {}, {}
        for m in names:
            views = views_of(m, x)
            z[m] = [alone(models[m].encoder, v, s)[0] for v in views]
            call_of[m] = alone(models[m].encoder, views[0], s)[1]
        for i, layer in enumerate(layers):
            q = {}
            for m in names:
                block = models[m].encoder.blocks[i]
                prompts = torch.cat([layer.query_context[m], layer.query[m]])
                asked = [torch.cat([v[0], prompts])[None] for v in z[m]]
                q[m] = sum(call_of[m](block, v)[:, -3:] for v in asked) / len(asked)
            for m, other in ((a, b), (b, a)):
                w1, _, w2 = layer.translate[other]
                t = w2(w1(q[other]).clamp(min=0))
                block, context = models[m].encoder.blocks[i], layer.fusion_context[m]
                told = [torch.cat([v[0], context, t[0]])[None] for v in z[m]]
                z[m] = [call_of[m](block, v)[:, :-6] for v in told]
        for m in names:
            wanted = sum(models[m].encoder.norm(v)[0, 0] for v in z[m]) / len(z[m])
            assert torch.allclose(tower[m].feature()[s], wanted, atol=1e-4), m
            before = parts.Tower(models[m].encoder, x[m], 2)
            assert tower[m].x.shape == before.x.shape         # what was added is cut off


def test_pmf_every_prompt_gets_a_gradient_and_no_tower_does(script, monkeypatch):
    """In the script itself, so also that nothing of it was left out of the optimiser, as the
    released code leaves its fusion contexts."""
    real, grads, given = optim.make_optimizer, {}, set()

    def watched(name, models, *more):
        optimizer = real(name, models, *more)
        given.update(id(p) for p in parameters(optimizer))
        optimizer.register_step_pre_hook(lambda *_: grads.update(
            {n: (id(p) in given, p.grad) for n, p in models.named_parameters()}))
        return optimizer
    monkeypatch.setattr(optim, "make_optimizer", watched)
    script("pmf", *MENU, "--epochs", 1)
    for kind in ("query", "query_context", "fusion_context"):
        found = {n for n in grads if n.startswith("fusion") and f".{kind}." in n}
        assert found == {f"fusion.{i}.{kind}.{m}" for i in (0, 1) for m in ("visual", "text")}
    for name, (optimised, grad) in grads.items():
        if ".encoder." in name:
            assert grad is None and not optimised, name
        else:
            assert optimised and grad.abs().max() > 0, name


def test_pmf_trains_the_share_it_should_and_leaves_the_towers(script, root):
    folder = script("pmf", *MENU, "--prompts", 2, "--lr", 0.01)
    V, T, n, C, hidden = 48, 128, 2, 4, 64                    # widths, prompts, classes
    mlps = (V * hidden + hidden + hidden * T + T) + (T * hidden + hidden + hidden * V + V)
    wanted = 2 * (3 * n * (V + T) + mlps) + (V + 1) * C + (T + 1) * C
    assert result_of(folder)["trained_parameters"] == wanted
    file, start = tensors(folder), pretrained(root, "menu", visual="vit_toy", text="bert_small")
    assert start and all(torch.equal(file[k], v) for k, v in start.items())


def test_pmf_stays_under_three_percent_of_the_published_towers():
    with torch.device("meta"):
        built = {"visual": encoders.build("vit_b16"), "text": encoders.build("bert_base")}
        widths = {m: e.width for m, e in built.items()}
        new = nn.ModuleList(pmf.FusionLayer(widths, 4) for _ in range(2))

    def numbers(module):
        return sum(p.numel() for p in module.parameters())
    trained = numbers(new) + 2 * 769 * 101
    assert 0.01 < trained / (trained + sum(map(numbers, built.values()))) < 0.03


def test_pmf_starts_from_fine_tuned_towers(script, tmp_path, root):
    out = tmp_path / "runs"
    for m in ("audio", "visual"):
        words = ["--modality", m, "--epochs", 1, "--device", "cpu"]
        call("train_unimodal.py", *words, out=out, root=root)
    folder = script("pmf", "--umft", out=out)
    assert folder.name == "pmf-umft-s0"
    file, unimodal = tensors(folder), settings_of(folder)["unimodal"]
    for m in ("audio", "visual"):
        there = out / "toy" / f"unimodal-{m}-s0"
        assert unimodal[m]["sha256"] == fingerprint.sha256(there / "model.safetensors")
        tuned = {k: v for k, v in tensors(there).items() if ".encoder." in k}
        assert tuned and all(torch.equal(file[k], v) for k, v in tuned.items())
        assert settings_of(there)["epochs"] == 1              # and not trained anew


# ---------------------------------------------------------------------------- MMBT
def mmbt_parts(image="vit_toy", tokens=3):
    models = towers(visual=image, text="bert_small")
    torch.manual_seed(3)
    image, bert = models["visual"].encoder, models["text"].encoder
    return mmbt.MMBT(image, bert, tokens, 5).eval(), image, bert, inputs(models, views=2)


@pytest.fixture
def resnet(monkeypatch):
    tiny = encoders.ResNet, dict(blocks=(1, 1, 1, 1), bottleneck=False, width=8)
    monkeypatch.setitem(encoders.BUILD, "resnet_tiny", tiny)


@pytest.mark.parametrize("tokens, grid", [
    (1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (4, (2, 2)), (5, (5, 1)), (6, (3, 2)), (7, (7, 1)),
    (8, (4, 2)), (9, (3, 3))])
def test_mmbt_cells_are_means_of_the_feature_map(resnet, tokens, grid):
    model = mmbt.MMBT(SimpleNamespace(width=4), SimpleNamespace(width=6), tokens, 5)
    assert model.grid == grid
    rows, columns = grid
    # two views each of two pictures, grid cells of 6 x 5
    feature_map = torch.randn(4, 4, 6 * rows, 5 * columns)
    image = SimpleNamespace(feature_map=lambda x: feature_map)
    out = model.cells(image, torch.zeros(2, 2, 3, 8, 8))
    assert out.shape == (2, tokens, 6)
    cells = []
    for r in range(rows):
        for c in range(columns):
            cell = feature_map[:, :, 6 * r:6 * r + 6, 5 * c:5 * c + 5]
            cells.append(cell.mean((2, 3)))
    wanted = model.project(torch.stack(cells, 1).unflatten(0, (2, 2)).mean(1))
    assert torch.allclose(out, wanted, atol=1e-5)


def test_mmbt_takes_a_vits_patches_for_the_map():
    model, image, _, x = mmbt_parts()
    tokens = image.tokens(x["visual"][:, 0])
    patches = tokens[:, 1:].unflatten(1, (4, 4))              # (B, rows, columns, D)
    first = patches[:, :2].mean((1, 2))                       # 4 rows pooled to 3: 0-1, 1-2, 2-3
    cells = model.cells(image, x["visual"][:, :1])
    assert torch.allclose(cells[:, 0], model.project(first), atol=1e-5)


@pytest.mark.parametrize("image", ["vit_toy", "resnet_tiny"])
def test_mmbt_is_bert_on_the_framed_sequence(resnet, image):
    """Sample by sample and without padding: words, positions and segments written out, then BERT's
    own blocks and pooler."""
    model, image, bert, x = mmbt_parts(image)
    out, v = model(image, bert, x), model.cells(image, x["visual"])
    for i in range(3):
        ids = x["text"][i][x["text"][i] != 0]
        words = bert.words(ids)
        tokens = torch.cat([words[:1], v[i], words[-1:], words[1:]])
        T = len(ids) - 1
        where, segment = [0, 1, 2, 3, 4, *range(T)], [0] * 5 + [1] * T
        tokens = tokens + bert.positions.weight[where] + bert.segments.weight[segment]
        tokens = bert.norm_embed(tokens)[None]
        for block in bert.blocks:
            tokens = block(tokens, mask=None)
        assert torch.allclose(out[i], bert.pooler(tokens[0, 0]).tanh(), atol=1e-4)
    sequence, there = model.sequence(bert, v, x["text"])
    assert sequence.shape == (3, 3 + 2 + 4, 128) and there.sum(1).tolist() == [9, 7, 9]


def test_mmbt_without_the_cells_is_bert_on_text():
    model, image, bert, x = mmbt_parts()
    tokens, there = model.sequence(bert, model.cells(image, x["visual"]), x["text"])
    there[:, 1:4] = False                                     # nobody attends to the cells
    out = bert.encode(tokens, mask=there[:, None, None])[:, 0]
    # [CLS] [SEP] w_1 w_2 .. [SEP]
    ids = torch.cat([x["text"][:, :1], torch.tensor([[2]] * 3), x["text"][:, 1:]], 1)
    positions, segments = [0, 4, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]
    plain = bert.words(ids) + bert.positions.weight[positions] + bert.segments.weight[segments]
    mask = encoders.padding_mask(ids)[:, None, None]
    plain = bert.encode(bert.norm_embed(plain), mask=mask)[:, 0]
    assert torch.allclose(out, plain, atol=1e-5)
    # with them it says something else
    assert not torch.allclose(bert.pooler(out).tanh(), model(image, bert, x), atol=1e-2)


def test_mmbt_padding_changes_nothing_and_the_picture_does():
    model, image, bert, x = mmbt_parts()
    out = model(image, bert, x)
    longer = torch.cat([x["text"], torch.zeros(3, 4, dtype=torch.long)], 1)
    assert torch.allclose(model(image, bert, x | {"text": longer}), out, atol=1e-5)
    other = x | {"visual": x["visual"].roll(1, 0)}
    assert (model(image, bert, other) - out).abs().max() > 1e-2
    empty = x | {"text": torch.zeros(3, 1, dtype=torch.long)}
    assert model(image, bert, empty).isfinite().all()


def test_mmbt_thaws_gradually(script, resnet, monkeypatch, root):
    """Epoch 1: neither encoder; 2: the image encoder too; 3: BERT's blocks too. Frozen is
    bit-identical, statistics of BatchNorm included."""
    states, modes, save = [], [], runs.Run.save_last

    def keep(self, tensors, *a):
        states.append({k: v.clone() for k, v in tensors.items()})
        save(self, tensors, *a)
    monkeypatch.setattr(runs.Run, "save_last", keep)
    embed, feature_map = encoders.BERT.embed, encoders.ResNet.feature_map
    monkeypatch.setattr(encoders.BERT, "embed", lambda self, *a, **k: (
        modes.append(("text", self.training)), embed(self, *a, **k))[1])
    monkeypatch.setattr(encoders.ResNet, "feature_map", lambda self, x: (
        modes.append(("image", self.training)), feature_map(self, x))[1])
    names = dict(visual="resnet_tiny", text="bert_small")
    folder = script("mmbt", "--dataset", "menu", "--encoder", *map("=".join, names.items()),
                    "--epochs", 3, "--lr", 1e-3, "--freeze-image", 1, "--freeze-text", 2)
    states.insert(0, pretrained(root, "menu", **names))

    def moved(epoch, part):
        before, after = states[epoch - 1], states[epoch]
        return {k for k in states[0] if part in k and not torch.equal(before[k], after[k])}
    for epoch in (1, 2, 3):
        assert bool(moved(epoch, "visual.")) == (epoch > 1)
        assert bool(moved(epoch, "text.encoder.blocks")) == (epoch > 2)
        assert moved(epoch, "text.encoder.words") and moved(epoch, "text.encoder.pooler")
    assert "visual.encoder.bn1.running_mean" in moved(2, "visual.")

    text, image = ([mode for kind, mode in modes if kind == k] for k in ("text", "image"))
    # 2 batches an epoch and 1 of validation, which is also predicted before the first epoch and,
    # with test, at the end; in training mode once thawed
    assert len(text) - 3 == 3 * 3 and sum(text) == 2 and sum(image) == 4
    weights = 0
    for k, v in tensors(folder).items():
        if not k.endswith(("running_mean", "running_var", "num_batches_tracked")):
            weights += v.numel()
    assert result_of(folder)["trained_parameters"] == weights                 # at the end: all


def test_mmbt_gradient_reaches_the_picture_once_thawed():
    model, image, bert, x = mmbt_parts()
    for frozen in (True, False):
        image.requires_grad_(not frozen)
        model.zero_grad()
        model.classifier(model(image, bert, x)).square().sum().backward()
        if frozen:
            assert image.patch.weight.grad is None
        else:
            assert image.patch.weight.grad.abs().max() > 0
        assert model.project.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------- weight decay
def test_prompts_and_bottleneck_tokens_do_not_decay():
    """They are tokens: they have no reason to be at zero. Only the weights of layers decay."""
    built = towers(**VISUAL_TEXT)
    built["fusion"] = fusion(nn.ModuleDict({m: built[m] for m in VISUAL_TEXT}))
    built["bottleneck"] = bottleneck(nn.ModuleDict({m: built[m] for m in VISUAL_TEXT}))
    decayed = decayed_names(optim.make_optimizer("adamw", built, 0.1, 0.3), built)
    assert decayed == weights_of_layers(built)
    spared = {n for n, _ in built.named_parameters()} - decayed
    assert {"bottleneck.tokens", "fusion.0.query.text", "fusion.1.fusion_context.visual"} <= spared
    assert {"fusion.0.translate.text.0.weight", "bottleneck.into.visual.weight"} <= decayed
