"""Encoders and public checkpoints against the reference libraries.

`fixtures/encoders` holds tiny random models made with open_clip, ImageBind, transformers and
torchvision: checkpoint files in the public layouts, inputs, and what the library answered.
So a test here proves the rename and the arithmetic at once, without a download.
"""
import copy
import hashlib
import http.server
import json
import re
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from encoders import (BERT, BUILD, AudioViT, DeBERTa, PreNormBlock, ResNet, UnimodalModel, ViT,
                      build, padding_mask)
from lora import add_lora, merge_lora
from pretrained import checkpoints
from pretrained.checkpoints import (PUBLIC, Public, download, export_public, load_public,
                                    public_names, public_state)

FIXTURES = Path(__file__).parent / "fixtures" / "encoders"
TEXT = dict(width=32, depth=3, heads=4, mlp_width=128, max_length=24)
MODELS = {     # fixture -> (encoder of its sizes, its checkpoint files)
    "openclip": (lambda: ViT(32, 8, 32, 3, 4),
                 ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"]),
    "imagebind_audio": (lambda: AudioViT(32, 3, 4, drop_path=0.1), ["imagebind_huge.pth"]),
    "bert": (lambda: BERT(67, **TEXT), ["pytorch_model.bin", "model.safetensors"]),
    "deberta": (lambda: DeBERTa(71, **TEXT), ["pytorch_model.bin"]),
    "resnet_basic": (lambda: ResNet((2, 2, 2, 2), False, width=8), ["resnet.pth"]),
    "resnet_bottleneck": (lambda: ResNet((1, 2, 3, 1), True, width=4), ["resnet.pth"]),
}
FILES = [(model, file) for model, (_, files) in MODELS.items() for file in files]
TRANSFORMERS = ["openclip", "imagebind_audio", "bert", "deberta"]
every_file = pytest.mark.parametrize("model, file", FILES)
every_transformer = pytest.mark.parametrize("model", TRANSFORMERS)


def make(model):
    torch.manual_seed(0)
    return MODELS[model][0]()


def loaded(model, file=None):
    return load_public(make(model), FIXTURES / model / (file or MODELS[model][1][0])).eval()


def io(model, name="io"):
    return load_file(FIXTURES / model / f"{name}.safetensors")


def inputs(model, x):
    """The encoder's arguments out of a fixture."""
    if model == "imagebind_audio":
        return (x["input.mel"].flatten(0, 1),)
    if model in ("openclip", "resnet_basic", "resnet_bottleneck"):
        return (x["input.image"],)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(x[f"input.{name}"] for name in names if f"input.{name}" in x)


def tensors_of(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def close(ours, theirs, atol=5e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= atol, f"differs by {(ours - theirs).abs().max():.1e}"


def watch(module, call):
    """What `module` returned while `call` ran."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
    call()
    handle.remove()
    return seen[-1]


# ---- Parity with the libraries ----

@pytest.mark.parametrize("model, file", [pair for pair in FILES if pair[0] in TRANSFORMERS])
@torch.no_grad()
def test_transformers_equal_the_reference(model, file):
    encoder, x = loaded(model, file), io(model)
    args = inputs(model, x)
    tokens, embedded = (encoder.tokens(*args),
                        encoder.embed(*(args[0], args[2]) if model == "bert" else args))
    if model == "deberta":     # the reference libraries differ at padded places
        tokens = tokens * x["input.attention_mask"][..., None]
        close(encoder(*args), x["out.cls"])
        dense = torch.nn.functional.linear(encoder(*args), x["pooler.dense.weight"],
                                           x["pooler.dense.bias"])
        close(torch.nn.functional.gelu(dense), x["out.pooled"])
    else:
        close(encoder(*args), x["out.pooled"])
    close(embedded, x["out.embed_tokens"], 5e-6)
    close(tokens, x["out.tokens"])
    if "out.last_block" in x:
        close(watch(encoder.blocks[-1], lambda: encoder.tokens(*args)), x["out.last_block"])
    if model in ("bert", "deberta"):
        # The mask is found from the padding.
        close(encoder(args[0], None, *args[2:]), encoder(*args), 0)
        # Padding only: with no key at all, some kernels give NaN.
        nothing = torch.zeros(2, 5, dtype=torch.int32)
        assert padding_mask(nothing).any(dim=1).all() and torch.isfinite(encoder(nothing)).all()


@torch.no_grad()
def test_deberta_at_and_beyond_its_table():
    encoder, x = loaded("deberta"), io("deberta")
    close(encoder.tokens(x["full.input_ids"]), x["full.tokens"])
    close(encoder.tokens(x["optional_long.input_ids"]), x["optional_long.tokens"])
    close(encoder(x["optional_long.input_ids"]), x["optional_long.tokens"][:, 0])


@pytest.mark.parametrize("model", ["resnet_basic", "resnet_bottleneck"])
@torch.no_grad()
def test_resnets_equal_the_reference(model):
    encoder, x = loaded(model), io(model)
    close(watch(encoder.layer1, lambda: encoder(x["input.image"])), x["out.layer1"])
    close(encoder.feature_map(x["input.image"]), x["out.layer4"])
    close(encoder(x["input.image"]), x["out.pooled"])
    fc = tensors_of(FIXTURES / model / "resnet.pth")
    close(torch.nn.functional.linear(encoder(x["input.image"]), fc["fc.weight"], fc["fc.bias"]),
          x["out.logits"])


@torch.no_grad()
def test_flow_resnet_averages_the_first_layer():
    x = io("resnet_basic")
    encoder = ResNet((2, 2, 2, 2), False, width=8, in_channels=20)
    load_public(encoder, FIXTURES / "resnet_basic/resnet.pth").eval()
    close(encoder.conv1.weight, x["flow.conv1.weight"], 1e-6)
    close(encoder(x["flow.input"]), x["flow.pooled"])


def recipe_tensor(key, shape, seed):
    """Weights out of a key and a seed. The full-size torchvision models are too large to keep here;
    they were filled in the same way."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    x = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(
        size=tuple(shape))
    if key.endswith("running_var"):
        x = np.exp(0.2 * x)
    elif key.endswith(("running_mean", "bias")):
        x = 0.1 * x
    elif len(shape) == 4:
        x = x * np.sqrt(0.5 / (shape[1] * shape[2] * shape[3]))
    else:
        x = 1 + 0.1 * x
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize("name", ["resnet18", "resnet152"])
@torch.no_grad()
def test_full_size_resnets_equal_torchvision(name):
    x, seed = (io(f"{name}_recipe"),
               json.loads((FIXTURES / f"{name}_recipe/config.json").read_text())["seed"])
    with torch.device("meta"):
        encoder = build(name).eval()
    recipe = {key: recipe_tensor(key, t.shape, seed) for key, t in encoder.state_dict().items()}
    encoder.load_state_dict(recipe, assign=True)
    for key in (key for key in x if key.startswith("weight_head.") and "fc." not in key):
        close(encoder.state_dict()[key.removeprefix("weight_head.")].flatten()[:4],
              x[key].flatten(), 1e-6)
    close(encoder.feature_map(x["input.image"]), x["out.layer4"])
    close(encoder(x["input.image"]), x["out.pooled"])


@every_transformer
@torch.no_grad()
def test_lora_on_query_key_value_equals_the_reference(model):
    encoder, x, settings = (loaded(model), io(model, "lora"),
                            json.loads((FIXTURES / "lora.json").read_text()))
    names = add_lora(encoder, rank=settings["r"], scale=settings["scaling"])
    assert len(names) == 9     # three blocks; DeBERTa's position projections stay as they are
    for name in names:
        _, i, _, which = name.split(".")
        for half in "AB":
            getattr(encoder.get_submodule(name), f"lora_{half}").copy_(
                x[f"layer.{i}.{which[0]}.{half}"])
    args = inputs(model, io(model))
    args = (args[0][:2],) if model == "imagebind_audio" else args
    # Added, and folded into the weights.
    for encoder in (encoder, merge_lora(copy.deepcopy(encoder))):
        tokens = encoder.tokens(*args)
        close(tokens * args[1][..., None] if model == "deberta" else tokens, x["out.tokens"])
        close(encoder(*args), x["out.cls" if model == "deberta" else "out.pooled"])


@torch.no_grad()
def test_lora_on_every_convolution_equals_the_reference():
    encoder, x = loaded("resnet_basic"), io("resnet_basic", "lora")
    settings = json.loads((FIXTURES / "lora.json").read_text())
    names = add_lora(encoder, rank=settings["r"], scale=settings["scaling"])
    assert ({f"peft.{name}.A" for name in names}
            == {key for key in x if key.startswith("peft.") and key.endswith(".A")})
    for name in names:
        encoder.get_submodule(name).lora_A.copy_(x[f"peft.{name}.A"])
        encoder.get_submodule(name).lora_B.copy_(x[f"peft.{name}.B"])
    close(encoder(io("resnet_basic")["input.image"]), x["peft.out.pooled"])


def test_deberta_gradients():
    """Against finite differences. The position scores enter the fused attention as its bias,
    and some kernels give a bias no gradient."""
    torch.manual_seed(0)
    encoder = DeBERTa(11, 8, 2, 2, 16, 5).double().eval()
    ids = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])
    for name in ("relative.weight", "blocks.0.attention.pos_query.weight",
                 "blocks.1.attention.query.bias"):
        # Times 20: away from the small numbers of the start.
        weight = encoder.get_parameter(name).detach().mul(20).requires_grad_()
        call = lambda w: torch.func.functional_call(encoder, {name: w}, (ids,))
        assert torch.autograd.gradcheck(call, weight, eps=1e-6, atol=1e-6)


# ---- Sizes ----

@pytest.mark.parametrize("name, parameters", [
    # ours + what the public count includes and we leave out
    ("vit_b16", 86_192_640 - 768 * 512), ("vit_b32", 87_849_216 - 768 * 512),
    ("vit_l14", 303_966_208 - 1024 * 768),
    ("bert_base", 109_482_240), ("bert_large", 335_141_888), ("bert_minilm", 22_713_216),
    ("deberta_base", 138_601_728), ("deberta_large", 405_163_008),
    ("resnet18", 11_689_512 - 513 * 1000), ("resnet152", 60_192_808 - 2049 * 1000),
])
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        encoder = build(name)
    assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize("name, tensors, rank_one", [
    # less the projection
    ("vit_b16", 152 - 1, 55_296), ("vit_l14", 296 - 1, 147_456), ("audio_vit_b", 177 - 2, 55_296),
    ("bert_base", 199, 55_296), ("deberta_large", None, 147_456)])
def test_public_tensors_and_lora_parameters(name, tensors, rank_one):
    with torch.device("meta"):
        encoder = build(name)
        assert tensors in (None, len(public_names(encoder)))
        add_lora(encoder, rank=1)
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == rank_one


@pytest.mark.parametrize("name, shape", [
    ("vit_toy", (3, 32, 32)), ("audio_vit_toy", (1, 32, 64)), ("vit_small", (3, 96, 96)),
    ("audio_vit_small", (1, 128, 204)), ("resnet_small", (3, 64, 64)), ("bert_small", (20,)),
    ("deberta_small", (20,)), ("resnet18", (3, 64, 64))])
def test_small_encoders_run_and_learn(name, shape):
    torch.manual_seed(0)
    encoder = build(name)
    x = torch.randint(1, 1000, (2, *shape)) if len(shape) == 1 else torch.randn(2, *shape)
    feature = encoder(x)
    assert feature.shape == (2, encoder.width)
    (feature * torch.randn_like(feature)).sum().backward()
    silent = {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    # A key's bias shifts all scores of a query alike, so softmax ignores it:
    # its gradient is rounding, or zero.
    assert {name for name in silent if not name.endswith("key.bias")} == set()
    assert len(x) == 2 and not torch.equal(feature[0], feature[1])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="vit_b16, vit_b32"):
        build("vit_b17")
    with pytest.raises(ValueError, match="32 x 32.*48"):
        build("vit_toy")(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ValueError, match="32 mel bins x 64 frames.*60"):
        build("audio_vit_toy")(torch.zeros(1, 1, 32, 60))
    with pytest.raises(ValueError, match="24 tokens, got 25"):
        make("bert")(torch.ones(1, 25, dtype=torch.long))
    assert build("vit_toy", width=64).width == 64


# ---- Behaviour ----

@every_transformer
@torch.no_grad()
def test_last_block_computes_the_first_token_only_and_exactly(model):
    encoder = loaded(model)
    args = inputs(model, io(model))
    first = encoder.tokens(*args)[:, 0]
    close(encoder(*args), torch.tanh(encoder.pooler(first)) if model == "bert" else first, 2e-6)
    last = encoder.blocks[-1]
    run = lambda: encoder(*args)
    assert watch(last.attention.query, run).shape[1] == watch(last.fc1, run).shape[1] == 1
    assert watch(last.attention.key, run).shape[1] > 1


def test_audio_without_channel_axis():
    encoder, mel = build("audio_vit_toy"), torch.randn(2, 1, 32, 64)
    assert torch.equal(encoder(mel), encoder(mel[:, 0]))


@pytest.mark.parametrize("model", list(MODELS))
@torch.no_grad()
def test_frozen_encoder_stays_in_eval_mode(model):
    args = inputs(model, io(model))
    encoder = loaded(model)
    parent = UnimodalModel(encoder, 3)
    before, state = encoder(*args), copy.deepcopy(encoder.state_dict())
    parent.train()
    if model != "openclip":     # nothing random in that one: the test has teeth in the others
        torch.manual_seed(1)
        assert encoder.training and not torch.equal(encoder(*args), before)
        encoder.load_state_dict(state)     # BatchNorm has moved
    next(encoder.parameters()).requires_grad_(False)     # one frozen tensor is enough
    parent.train()
    assert parent.training and not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(*args), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block, branch = PreNormBlock(8, 2, 16, 1e-6, drop_path=0.25), torch.randn(4000, 3, 8)
    out = block.skip(branch)
    kept = out.abs().sum(dim=(1, 2)) > 0
    torch.testing.assert_close(out, branch / 0.75 * kept[:, None, None])
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert torch.equal(block.eval().skip(branch), branch)
    assert ([round(b.drop_path, 4) for b in AudioViT(8, 3, 2, drop_path=0.1).blocks]
            == [0, 0.05, 0.1])
    with torch.device("meta"):
        assert build("audio_vit_b").blocks[-1].drop_path == 0.1


@pytest.mark.parametrize("name", [n for n, (kind, _) in BUILD.items() if kind is AudioViT])
def test_drop_path_can_be_switched_off(name):
    with torch.device("meta"):
        assert all(block.drop_path == 0 for block in build(name, drop_path=0.0).blocks)
    torch.manual_seed(0)
    kept, off = (build(name, width=32, depth=2, heads=4, drop_path=rate).train()
                 for rate in (0.5, 0.0))
    mel = torch.randn(8, 1, *off.mel)
    assert torch.equal(off(mel), off(mel)) and not torch.equal(kept(mel), kept(mel))


def test_text_encoders_say_whose_ids_they_read():
    assert {name: kind.tokenizer for name, (kind, _) in BUILD.items() if kind.tokenizer} == {
        "bert_base": "wordpiece", "bert_large": "wordpiece", "bert_small": "wordpiece",
        "bert_minilm": "wordpiece", "deberta_base": "byte_bpe", "deberta_large": "byte_bpe",
        "deberta_small": "byte_bpe"}


@pytest.mark.parametrize("model", ["bert", "deberta"])
@torch.no_grad()
def test_dropout_where_the_originals_have_it(model):
    torch.manual_seed(0)
    encoder, ids = make(model), io(model)["input.input_ids"]
    dropouts = [module for module in encoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in dropouts] == [0.1] * 4     # the embedding, three blocks
    for module in dropouts:
        module.eval()
    if model == "deberta":     # on the table of relative positions, anew in every block
        seen = []
        for block in encoder.blocks:
            block.attention.pos_key.register_forward_pre_hook(
                lambda module, args: seen.append(args[0][:, :14]))
        encoder(ids)
        assert all(0.03 < (relative == 0).float().mean() < 0.2 for relative in seen)
        assert not torch.equal(seen[0], seen[1])
        # Without it, the line behind the loop is about the probabilities alone.
        for block in encoder.blocks:
            block.attention.pos_key.weight.zero_()
            block.attention.pos_query.weight.zero_()
    assert not torch.equal(encoder(ids), encoder(ids))     # on the attention probabilities


def test_views_are_encoded_apart_and_averaged():
    torch.manual_seed(0)
    model, x = UnimodalModel(build("vit_toy"), 5), torch.randn(2, 3, 3, 32, 32)
    apart = torch.stack([model.encoder(x[:, v]) for v in range(3)]).mean(dim=0)
    close(model.features(x), apart, 1e-6)
    close(model(x), model.head(apart), 1e-6)
    assert model(x[:, 0]).shape == (2, 5)
    text = UnimodalModel(make("bert"), 4).eval()
    ids = io("bert")["input.input_ids"]
    assert torch.equal(text.features(ids), text.encoder(ids)) and text(ids.int()).shape == (3, 4)


# ---- Checkpoints ----

@every_file
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_export_of_an_untouched_encoder_is_the_file_again(model, file, suffix, tmp_path):
    source = FIXTURES / model / file
    export_public(loaded(model, file), tmp_path / f"out{suffix}", source)
    theirs, ours = tensors_of(source), tensors_of(tmp_path / f"out{suffix}")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
               for name in theirs)
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]


@every_file
def test_export_carries_the_encoders_own_weights(model, file, tmp_path):
    encoder = make(model)     # random: nothing of the file may shine through
    export_public(encoder, tmp_path / "out.pth", FIXTURES / model / file)
    again = load_public(MODELS[model][0](), tmp_path / "out.pth")
    assert all(torch.equal(t, encoder.state_dict()[name]) for name, t in again.state_dict().items())
    assert load_public(make(model), FIXTURES / model / file)     # and the source is as it was


@pytest.mark.parametrize("model", list(MODELS))
def test_public_state_needs_no_reference(model, tmp_path):
    encoder = make(model)
    save_file(public_state(encoder), tmp_path / "own.safetensors")
    again = load_public(MODELS[model][0](), tmp_path / "own.safetensors")
    assert all(torch.equal(t, encoder.state_dict()[name]) for name, t in again.state_dict().items())


def test_spellings_of_bert(tmp_path):
    """Newer copies say weight and bias for gamma and beta, and carry position_ids."""
    state = tensors_of(FIXTURES / "bert/model.safetensors")
    state = {name.replace("gamma", "weight").replace("beta", "bias"): tensor
             for name, tensor in state.items()}
    save_file(state | {"bert.embeddings.position_ids": torch.arange(24)[None]},
              tmp_path / "model.safetensors")
    encoder = load_public(make("bert"), tmp_path / "model.safetensors")
    assert all(torch.equal(t, loaded("bert").state_dict()[name])
               for name, t in encoder.state_dict().items())
    assert public_state(encoder, tmp_path / "model.safetensors").keys() <= state.keys()
    # Today's, where no file decides.
    assert not any(name.endswith(".gamma") for name in public_state(encoder))


def test_training_checkpoint_of_open_clip_and_old_pickles(tmp_path):
    state = tensors_of(FIXTURES / "openclip/open_clip_pytorch_model.bin")
    wrapped = {f"module.{name}": t for name, t in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, tmp_path / "epoch_3.pt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    half = {name: t.half() for name, t in state.items()}
    torch.save(half, tmp_path / "half.bin")
    for file in ("epoch_3.pt", "old.bin"):
        encoder = load_public(make("openclip"), tmp_path / file)
        assert all(torch.equal(t, loaded("openclip").state_dict()[name])
                   for name, t in encoder.state_dict().items())
    encoder = load_public(make("openclip"), tmp_path / "half.bin")
    export_public(encoder, tmp_path / "half_again.bin", tmp_path / "half.bin")
    again = tensors_of(tmp_path / "half_again.bin")
    assert all(torch.equal(t, half[name]) and t.dtype == torch.half for name, t in again.items())


def test_only_the_audio_tower_of_imagebind_is_read(monkeypatch):
    asked, read = [], checkpoints.read

    def spy(path):
        names, get = read(path)
        return names, lambda name: asked.append(name) or get(name)
    monkeypatch.setattr(checkpoints, "read", spy)
    loaded("imagebind_audio")
    assert asked and all(name.split(".")[1] == "audio" for name in asked)


@every_file
def test_loading_is_strict(model, file, tmp_path):
    state = tensors_of(FIXTURES / model / file)
    encoder = make(model)
    before = copy.deepcopy(encoder.state_dict())
    victim = [name for name in public_names(encoder, list(state))
              if name in state and state[name].dim() > 1][-1]
    extra = "visual.extra" if model == "openclip" else f"{victim}_extra"
    for change, message in [
        ({victim: None}, f"1 missing ({victim})"),
        ({extra: torch.zeros(1)}, "1 unexpected ("),
        ({victim: state[victim][:, 1:]}, f"1 wrong shape ({victim} "),
    ]:
        torch.save({name: t for name, t in {**state, **change}.items() if t is not None},
                   tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=re.escape(message)):
            load_public(encoder, tmp_path / "bad.pth")
    # Not even the tensors that would have fitted.
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


def test_other_sizes_are_refused(tmp_path):
    # Two blocks for a file of three.
    with pytest.raises(ValueError, match=r"24 unexpected|12 unexpected .*resblocks\.2"):
        load_public(ViT(32, 8, 32, 2, 4), FIXTURES / "openclip/open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"conv1\.weight \[32, 3, 8, 8\], not \[32, 3, 16, 16\]"):
        load_public(ViT(32, 16, 32, 3, 4), FIXTURES / "openclip/open_clip_model.safetensors")
    flow = ResNet((2, 2, 2, 2), False, width=8, in_channels=20)
    load_public(flow, FIXTURES / "resnet_basic/resnet.pth")
    with pytest.raises(ValueError, match="conv1.weight"):     # an average can't be turned back
        export_public(flow, tmp_path / "flow.pth", FIXTURES / "resnet_basic/resnet.pth")
    # As it is, it can be kept, and loaded into a net of the same kind.
    export_public(flow, tmp_path / "flow.pth")
    assert torch.equal(load_public(copy.deepcopy(flow), tmp_path / "flow.pth").conv1.weight,
                       flow.conv1.weight)
    with pytest.raises(ValueError, match="conv1.weight"):
        load_public(ResNet((2, 2, 2, 2), False, width=8), tmp_path / "flow.pth")


def test_files_that_are_something_else(tmp_path):
    whole = (FIXTURES / "openclip/open_clip_model.safetensors").read_bytes()
    zipped = (FIXTURES / "openclip/open_clip_pytorch_model.bin").read_bytes()
    old = tmp_path / "old.bin"
    torch.save(tensors_of(FIXTURES / "openclip/open_clip_pytorch_model.bin"), old,
               _use_new_zipfile_serialization=False)
    for name, content, message in [
        ("pointer.bin",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 598641023\n",
         "Git LFS pointer"),
        ("page.bin", b"\n<!DOCTYPE html><html>", "web page"),
        ("cut.safetensors", whole[:-100], "cut short"), ("cut.bin", zipped[:-100], "cut short"),
        ("cut_old.bin", old.read_bytes()[:5000], "cut short"),
        ("empty.bin", b"", "cut short"), ("noise.bin", b"noise" * 100, "cut short"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_public(make("openclip"), tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="not a dictionary of tensors"):
        load_public(make("openclip"), tmp_path / "list.bin")
    # A pickle that would run code is not run.
    with pytest.raises(ValueError, match="cannot be read"):
        torch.save({"weight": tmp_path}, tmp_path / "code.bin")
        load_public(make("openclip"), tmp_path / "code.bin")
    with pytest.raises(ValueError, match="needs a checkpoint of OpenCLIP, this one holds BERT"):
        load_public(make("openclip"), FIXTURES / "bert/pytorch_model.bin")
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(32)},
               tmp_path / "transformers.bin")
    with pytest.raises(ValueError, match="take the open_clip_"):
        load_public(make("openclip"), tmp_path / "transformers.bin")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_public(make("openclip"), tmp_path / "nowhere.bin")
    with pytest.raises(ValueError, match="suffix"):
        export_public(make("openclip"), tmp_path / "out.onnx")
    encoder = make("openclip")
    add_lora(encoder)
    with pytest.raises(ValueError, match="before add_lora"):
        load_public(encoder, FIXTURES / "openclip/open_clip_model.safetensors")
    with pytest.raises(ValueError, match="after merge_lora"):
        export_public(encoder, tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


# ---- Download ----

@pytest.fixture
def server():
    """A web server on this machine: /whole and /cut (half of what its header promises);
    anything else is not found."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            content = b"weights" * 1000
            self.send_response(404 if self.path not in ("/whole.pth", "/cut.pth") else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.server.served += 1     # before the client has all, or it asks too early
                self.wfile.write(content if self.path == "/whole.pth" else content[:3500])

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.served = 0
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd
        httpd.shutdown()


def test_download(server, monkeypatch, tmp_path):
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(PUBLIC, "vit_b16", Public(f"{address}/whole.pth", 0.1, "MIT"))
    path = download("vit_b16", tmp_path)
    assert path == tmp_path / "vit_b16" / "whole.pth" and path.read_bytes() == b"weights" * 1000
    # The second time it is there.
    assert download("vit_b16", tmp_path) == path and server.served == 1
    for url, sha256, reason in [
        (f"{address}/cut.pth", None, "got 3500 of 7000 bytes"),
        (f"{address}/none.pth", None, "404"),
        (f"{address}/whole.pth", "00000000", "invalid hash"),
        ("http://127.0.0.1:1/whole.pth", None, "refused"),
    ]:
        monkeypatch.setitem(PUBLIC, "vit_b32", Public(url, 0.6, "MIT", sha256))
        with pytest.raises(ConnectionError, match=reason) as error:
            download("vit_b32", tmp_path)
        message = str(error.value)
        assert (url in message and "0.6 GB" in message and str(tmp_path / "vit_b32") in message
                and "\n" not in message)
        # Nothing half-fetched, under any name.
        assert not [file for file in tmp_path.glob("vit_b32/*")]
    with pytest.raises(ValueError, match="vit_b16"):
        download("vit_mini", tmp_path)


SHIPPED = ["vit_toy", "audio_vit_toy"]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_this_project_ships_is_loaded_where_it_lies(name, tmp_path):
    path = download(name, tmp_path)
    assert path == checkpoints.place(name) == ROOT / "pretrained" / "toy" / f"{name}.safetensors"
    assert not list(tmp_path.iterdir())
    encoder = load_public(build(name), path)     # strict
    assert all(torch.isfinite(t).all() for t in encoder.state_dict().values())
    assert public_state(encoder, path).keys() == load_file(path).keys()
    layout = "visual." if name == "vit_toy" else "modality_"
    assert all(public.startswith(layout) for public in load_file(path))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_damaged_shipped_file_is_refused(name, tmp_path, monkeypatch):
    """Cut short, one bit turned, not there, or another file:
    one line says which file, and what to do."""
    whole = download(name).read_bytes()
    monkeypatch.setattr(checkpoints, "PROJECT", tmp_path)
    path = checkpoints.place(name)
    path.parent.mkdir(parents=True)
    path.write_bytes(whole)
    assert download(name) == path     # a good copy is good anywhere
    turned = bytearray(whole)
    turned[-1] ^= 1
    for content in (whole[:-100], bytes(turned), b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            download(name)
        message = str(error.value)
        assert (message.startswith(f"{path} is not the file that this project came with")
                and "\n" not in message)
        assert PUBLIC[name].sha256 in message and "--pretrained" in message
        assert ("not there" in message) == (content is None)
        assert path.exists() == (content is not None) and len(list(path.parent.iterdir())) <= 1
        path.touch()


def test_public_sources_cover_the_table():
    small = {name for name in BUILD if name.endswith(("_mini", "_small"))}
    assert (BUILD.keys() - small <= PUBLIC.keys() and not small & PUBLIC.keys()
            and len(BUILD.keys() - small) >= 12)
    for name in SHIPPED:
        public = PUBLIC[name]
        assert public.url == f"pretrained/toy/{name}.safetensors" and public.licence == "MIT"
        content = (ROOT / public.url).read_bytes()
        assert (hashlib.sha256(content).hexdigest().startswith(public.sha256)
                and len(public.sha256) >= 8)
        assert 0.5 < len(content) / (public.gigabytes * 1e9) < 2
    for name, public in PUBLIC.items():
        if name in SHIPPED:
            continue
        assert public.url.startswith("https://") and 0 < public.gigabytes < 5 and public.licence
        # torchvision writes the hash into the file's name.
        hashed = re.search(r"-([0-9a-f]{8})\.pth$", public.url)
        assert public.sha256 == (hashed and hashed[1])
