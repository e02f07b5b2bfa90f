"""Public checkpoints as people meet them: other spellings, folders of any size, and downloads.

The spellings are made out of `fixtures/encoders`, whose files and answers are the libraries' own.
The web server is one of this machine; it can cut, lie, redirect, or send whole files only.
"""
import argparse
import contextlib
import copy
import hashlib
import http.server
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from baselines import mmbt, parts
from encoders import BERT, BUILD, AudioViT, DeBERTa, ViT, build, quick_gelu
from harness import export
from harness.models import load_run, new_model
from lora import merge_lora
from paper import settings
from pretrained import checkpoints, configs, formats, remote
from pretrained.checkpoints import (PUBLIC, Public, download, export_public, load_folder,
                                    load_public, place, public_names, public_state)
from pretrained.tokenizer import load_tokenizer
from running import call, error

FIXTURES = Path(__file__).parent / "fixtures" / "encoders"
TEXT = dict(width=32, depth=3, heads=4, mlp_width=128, max_length=24)
MODELS = {     # fixture -> (encoder of its sizes, its checkpoint, the name of what it answers)
    "openclip": (lambda: ViT(32, 8, 32, 3, 4), "open_clip_pytorch_model.bin", "out.pooled"),
    "bert": (lambda: BERT(67, **TEXT), "pytorch_model.bin", "out.pooled"),
    "deberta": (lambda: DeBERTa(71, **TEXT), "pytorch_model.bin", "out.cls"),
    "imagebind_audio": (lambda: AudioViT(32, 3, 4), "imagebind_huge.pth", "out.pooled"),
}


def state_of(model):
    return torch.load(FIXTURES / model / MODELS[model][1], weights_only=True)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def reference(model):
    return load_public(MODELS[model][0](), FIXTURES / model / MODELS[model][1])


def copy_of(model, folder):
    """A folder of the hub: the fixture's weights and config."""
    folder.mkdir(parents=True)
    for file in FIXTURES.joinpath(model).glob("*config.json"):
        shutil.copy(file, folder)
    shutil.copy(FIXTURES / model / MODELS[model][1], folder)
    return folder


@torch.no_grad()
def differs(encoder, model, answers=None):
    """The largest difference to what the library answered."""
    x = load_file(FIXTURES / model / "io.safetensors")
    names = ("input.image", "input.input_ids", "input.attention_mask", "input.token_type_ids")
    args = [x[name] for name in names if name in x]
    return float((encoder.eval()(*args) - (answers or x)[MODELS[model][2]]).abs().max())


# ---- Spellings ----

def today(name):
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def encoder_only(state, prefix):
    """As the model class without a head saves itself."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def under(start, state):
    return {start + name: t for name, t in state.items()}


def of_today(state):
    return {today(name): t for name, t in state.items()}


HEADS = {"classifier.weight": torch.zeros(4, 32), "classifier.bias": torch.zeros(4)}
SPELLINGS = {     # -> what is saved; prefix: how the encoder's names start
    "no prefix": lambda state, prefix: encoder_only(state, prefix),
    "no prefix, of today": lambda state, prefix: of_today(encoder_only(state, prefix)),
    "under model.": lambda state, prefix: under("model.", state),
    "under model., no prefix": lambda state, prefix: under("model.", encoder_only(state, prefix)),
    "model": lambda state, prefix: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "state_dict, module.": lambda state, prefix: {"state_dict": under("module.", state)},
    "classifier": lambda state, prefix: under(prefix, encoder_only(state, prefix)) | HEADS,
    "half precision": lambda state, prefix: {name: t.half() for name, t in state.items()},
}
of_each = pytest.mark.parametrize("model, prefix", [
    ("bert", "bert."), ("deberta", "deberta."), ("openclip", "visual.")])


@pytest.mark.parametrize("spelling", list(SPELLINGS))
@of_each
def test_spellings(model, prefix, spelling, tmp_path):
    if (model, spelling) == ("openclip", "classifier"):
        pytest.skip("OpenCLIP has none")
    stored = SPELLINGS[spelling](state_of(model), prefix)
    torch.save(stored, tmp_path / "open_clip_laion2b.bin")
    encoder = load_public(MODELS[model][0](), tmp_path / "open_clip_laion2b.bin")
    assert differs(encoder, model) <= (2e-2 if spelling == "half precision" else 5e-5)
    # Back into a file of the same spelling, bit for bit.
    export_public(encoder, tmp_path / "again.pth", tmp_path / "open_clip_laion2b.bin")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    stored = checkpoints.formats.unwrap(stored)
    assert again.keys() == stored.keys()
    for name, t in stored.items():
        assert again[name].dtype == t.dtype and torch.equal(again[name], t)


@of_each
@pytest.mark.parametrize("outer", ["", "model."])
def test_other_spellings_are_strict_as_well(model, prefix, outer, tmp_path):
    state = under(outer, encoder_only(state_of(model), prefix))
    layer = "c_fc.weight" if model == "openclip" else "dense.weight"
    victim = next(name for name in state if ".2." in name and name.endswith(layer))
    extra = victim.replace(".2.", ".3.")     # one block more
    for change, message in [({victim: None}, f"1 missing ({victim})"),
                            ({extra: state[victim]}, f"1 unexpected ({extra})"),
                            ({victim: state[victim][:, 1:]}, f"1 wrong shape ({victim} [")]:
        changed = {name: t for name, t in {**state, **change}.items() if t is not None}
        torch.save(changed, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=re.escape(message)):
            load_public(MODELS[model][0](), tmp_path / "bad.pth")


def test_a_tied_copy_of_the_words_is_exported_as_the_words_are(tmp_path):
    source = FIXTURES / "bert/pytorch_model.bin"
    words, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    encoder = reference("bert")
    with torch.no_grad():
        encoder.words.weight.add_(1)     # as training does
    export_public(encoder, tmp_path / "tuned.bin", source)
    tuned, before = torch.load(tmp_path / "tuned.bin", weights_only=True), state_of("bert")
    assert torch.equal(before[words], before[head]) and not torch.equal(tuned[words], before[words])
    assert torch.equal(tuned[head], tuned[words])
    # A head with weights of its own keeps them.
    torch.save({**before, head: before[head] + 1}, tmp_path / "untied.bin")
    export_public(encoder, tmp_path / "tuned.bin", tmp_path / "untied.bin")
    tuned = torch.load(tmp_path / "tuned.bin", weights_only=True)
    assert torch.equal(tuned[head], before[head] + 1)


def test_without_a_source_todays_names_are_written():
    gamma, weight = "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"
    names = public_state(reference("bert"))
    assert weight in names and not [name for name in names if name.endswith((".gamma", ".beta"))]
    names = public_state(reference("bert"), FIXTURES / "bert/pytorch_model.bin")
    assert gamma in names and weight not in names


# ---- What we do not take ----

class Net(torch.nn.Module):
    pass


FOREIGN = {     # names as the libraries store them -> what the line must say
    "bert": {
        "roberta.encoder.layer.0.output.dense.weight": "RoBERTa; take a BERT",
        "distilbert.embeddings.LayerNorm.weight": "DistilBERT; take a BERT",
        "transformer.layer.0.attention.q_lin.weight": "DistilBERT; take a BERT",
        "electra.embeddings.LayerNorm.weight": "ELECTRA; take a BERT",
    },
    "deberta": {
        "deberta.encoder.layer.0.attention.self.query_proj.bias": "version 2 or 3; take version 1",
        "encoder.layer.0.attention.self.query_proj.weight": "version 2 or 3; take version 1",
        "bert.embeddings.LayerNorm.weight": "needs a checkpoint of DeBERTa v1, this one holds BERT",
    },
    "openclip": {
        "visual.trunk.blocks.0.norm1.weight": "SigLIP, ConvNeXt",
        "vision_model.embeddings.patch_embedding.bias": "SigLIP; take an OpenCLIP ViT",
        "vision_model.embeddings.class_embedding": "library stores it; take the open_clip_",
        "embeddings.class_embedding": "library stores it; take the open_clip_",
        "blocks.0.attn.qkv.weight": "not of CLIP; take an OpenCLIP ViT",
    },
}


@pytest.mark.parametrize("model", list(FOREIGN))
def test_other_architectures_are_named(model, tmp_path):
    for name, message in FOREIGN[model].items():
        torch.save({name: torch.zeros(2)}, tmp_path / "other.bin")
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load_public(MODELS[model][0](), tmp_path / "other.bin")
        assert "other.bin does not fit" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_files_that_are_no_dictionary_of_tensors(tmp_path):
    torch.save(Net(), tmp_path / "net.pt")
    torch.save({"model": state_of("bert"), "optimizer": torch.optim.SGD}, tmp_path / "train.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "jit.pt")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/model.safetensors.index.json").write_text("{}")
    for name, message in [
        ("net.pt", "Net), not only tensors; where it was made, save model.state_dict()"),
        ("train.pt", "SGD), not only tensors"), ("jit.pt", "is a TorchScript archive"),
        ("model-00001-of-00002.safetensors", "one shard of several: take a repository"),
        ("shards", "in several shards: take a repository"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            load_public(MODELS["bert"][0](), tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"),
                                   torch.zeros(67, 32, dtype=torch.int)])
def test_weights_that_are_no_numbers_to_go_on_from(value, tmp_path):
    """One bit of a header makes whole numbers of all weights, and they would train, only worse."""
    state = load_file(FIXTURES / "bert/model.safetensors")
    words = next(name for name in state if name.endswith("word_embeddings.weight"))
    state[words] = (value if isinstance(value, torch.Tensor)
                    else state[words].index_fill(0, torch.tensor(3), value))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors is damaged: {words} holds NaN,"
                                         " infinity or whole numbers"):
        load_public(MODELS["bert"][0](), tmp_path / "model.safetensors")


@pytest.mark.parametrize("model, key, value, message", [
    ("bert", "num_hidden_layers", 2 ** 31, "depth is 2147483648, but it is a number from 1 to 200"),
    ("bert", "vocab_size", "67", "vocab_size is '67'"),
    ("bert", "hidden_size", [], r"width is \[\]"),
    ("bert", "hidden_dropout_prob", 2, "hidden_dropout_prob 2"),
    ("bert", "attention_probs_dropout_prob", 0.5, "prob is 0.5, and hidden_dropout_prob 0.*: ours"),
    ("bert", "model_type", [], r"holds '\[\]'"),
    ("bert", "num_attention_heads", 5, "a width of 32 does not divide into 5 heads"),
    ("deberta", "max_relative_positions", "x", "max_length is 'x'"),
    ("deberta", "pos_att_type", 7, "pos_att_type is 7, our"),
    ("openclip", "model_cfg", "x", "damaged: 'x' stands where an object"),
    ("openclip", "preprocess_cfg", {"mean": 1}, "mean is 1, but it is three numbers"),
])
def test_a_damaged_config_is_named(model, key, value, message, tmp_path):
    folder = copy_of(model, tmp_path / "x")
    file, = folder.glob("*config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=message) as error:
        load_folder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_zip_without_its_list_of_contents(tmp_path):
    """zipfile.is_zipfile looks at the end of a file alone."""
    file = tmp_path / "pytorch_model.bin"
    whole = bytearray((FIXTURES / "bert/pytorch_model.bin").read_bytes())
    at = whole.rfind(b"PK\x01\x02")
    whole[at] = 0
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as a checkpoint"):
        load_public(MODELS["bert"][0](), file)


# ---- QuickGELU ----

def test_quick_gelu_equals_open_clip(tmp_path, capsys):
    """quick_gelu.safetensors: what open_clip answers with the same weights and QuickGELU."""
    answers = load_file(FIXTURES / "openclip/quick_gelu.safetensors")
    plain, quick = copy_of("openclip", tmp_path / "plain"), copy_of("openclip", tmp_path / "quick")
    config = json.loads((quick / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (quick / "open_clip_config.json").write_text(json.dumps(config))
    file = "open_clip_pytorch_model.bin"
    for encoder in (load_folder(quick), load_public(ViT(32, 8, 32, 3, 4), quick / file),
                    load_public(ViT(32, 8, 32, 3, 4, quick_gelu=True), quick / file)):
        assert differs(encoder, "openclip", answers) <= 5e-5
    for encoder in (load_folder(plain), load_public(ViT(32, 8, 32, 3, 4), plain / file)):
        assert differs(encoder, "openclip") <= 5e-5 and differs(encoder, "openclip", answers) > 5e-3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("folder, file, quick", [
    ("apple/DFN2B-CLIP-ViT-B-16", "open_clip_pytorch_model.bin", True),
    ("apple/DFN2B-CLIP-ViT-L-14-39B", "open_clip_pytorch_model.bin", None),
    ("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors", True),
    ("models--apple--DFN2B-CLIP-ViT-B-16/snapshots/0a1b", "open_clip_model.safetensors", True),
    ("timm/vit_base_patch16_clip_224.metaclip_2pt5b", "open_clip_pytorch_model.bin", True),
    ("timm/vit_huge_patch14_clip_224.metaclip_altogether", "open_clip_pytorch_model.bin", None),
    ("weights", "vit_b_32-quickgelu-laion400m_e32-46683a32.pt", True),
    ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "open_clip_pytorch_model.bin", False),
    ("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "open_clip_pytorch_model.bin", False),
    ("weights", "open_clip_pytorch_model.bin", None),
    ("openai_or_not", "vit_b_16-laion2b_e16.bin", False),
])
def test_quick_gelu_by_known_names(folder, file, quick, tmp_path):
    assert configs.wants_quick_gelu(tmp_path / folder / file) is quick
    folder = tmp_path / folder
    folder.mkdir(parents=True)
    # What is written there decides.
    (folder / "config.json").write_text('{"vision_config": {"hidden_act": "quick_gelu"}}')
    assert configs.wants_quick_gelu(folder / file) is True
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    assert configs.wants_quick_gelu(folder / file) is False


def test_an_unknown_activation_is_said_in_one_line(tmp_path, capsys):
    torch.save(state_of("openclip"), tmp_path / "weights.bin")
    load_public(ViT(32, 8, 32, 3, 4), tmp_path / "weights.bin")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "weights.bin: nothing says" in said and "taking GELU" in said
    # Somebody knows.
    load_public(ViT(32, 8, 32, 3, 4, quick_gelu=True), tmp_path / "weights.bin")
    for name in ("vit_b16", "vit_l14"):     # ours, in their place
        file = Path(f"checkpoints/{name}/file.bin")
        assert configs.wants_quick_gelu(file, PUBLIC[name].url) is False
    load_public(build("vit_toy"), download("vit_toy"))
    assert capsys.readouterr().out == ""


# ---- Folders ----

@pytest.mark.parametrize("model, name, file", [
    ("bert", "bert-tiny", "model.safetensors"), ("deberta", "deberta-tiny", "pytorch_model.bin"),
    ("openclip", "vit-tiny", "open_clip_model.safetensors")])
def test_a_folder_says_its_own_encoder(model, name, file, tmp_path):
    folder = copy_of(model, tmp_path / "tiny")
    encoder = load_folder(folder)
    assert differs(encoder, model) <= 5e-5 and same(encoder, reference(model))
    assert configs.encoder_name(folder) == name
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0a1b2c"     # the hub's own cache
    shutil.copytree(folder, snapshot)
    assert configs.encoder_name(snapshot) == name
    family, sizes = configs.read_config(folder)     # and they go through the config.json of a run
    again = configs.make(family, json.loads(json.dumps(sizes)))
    assert again.state_dict().keys() == encoder.state_dict().keys()
    (folder / MODELS[model][1]).unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*tiny"):
        load_folder(folder)
    if (FIXTURES / model / file).is_file():
        shutil.copy(FIXTURES / model / file, folder)
        assert same(load_folder(folder), encoder)


def test_settings_that_we_do_not_compute_are_refused(tmp_path):
    for model, changes in {
        "bert": [("hidden_act", "gelu_new"), ("layer_norm_eps", 1e-5), ("type_vocab_size", 1),
                 ("position_embedding_type", "relative_key"), ("pad_token_id", 1),
                 ("is_decoder", True)],
        "deberta": [("hidden_act", "relu"), ("layer_norm_eps", 1e-12),
                    ("relative_attention", False), ("position_biased_input", True),
                    ("pos_att_type", "c2p"), ("type_vocab_size", 2)],
    }.items():
        folder = copy_of(model, tmp_path / model)
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes:
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            with pytest.raises(ValueError, match=rf"config\.json: {key} is {value!r}, our"):
                load_folder(folder)
        for family, message in [
            ("roberta", "holds RoBERTa; take a BERT"),
            ("deberta-v2", "version 2 or 3; take version 1"),
            ("llama", "holds 'llama'; take a BERT, a DeBERTa or an OpenCLIP ViT"),
        ]:
            (folder / "config.json").write_text(json.dumps({**config, "model_type": family}))
            with pytest.raises(ValueError, match=message):
                load_folder(folder)
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
        with pytest.raises(ValueError, match="it holds RoBERTa"):     # its names are BERT's
            load_public(MODELS[model][0](), folder / "pytorch_model.bin")
        del config["hidden_size"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="does not say hidden_size"):
            load_folder(folder)
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="no config.json or open_clip_config.json"):
            load_folder(folder)


def test_settings_of_a_vit(tmp_path):
    folder = copy_of("openclip", tmp_path / "vit")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())

    def write(preprocess=(), **vision):
        changed = copy.deepcopy(config)
        changed["model_cfg"]["vision_cfg"].update(vision)
        changed["preprocess_cfg"].update(preprocess)
        file.write_text(json.dumps(changed))
    for key, value in [
        ("timm_model_name", "vit_so400m"), ("layers", [3, 4, 6, 3]), ("pool_type", "avg"),
        ("no_ln_pre", True), ("mlp_ratio", 4.3637), ("attentional_pool", True),
        ("image_size", [32, 48]),
    ]:
        write(**{key: value})
        with pytest.raises(ValueError, match=rf"open_clip_config\.json: {key} (is|are) "):
            load_folder(folder)
    write(mlp_ratio=4.0, image_size=[32, 32], pool_type="tok", timm_pool="avg", patch_dropout=0.5)
    assert same(load_folder(folder), reference("openclip"))
    assert load_folder(folder).pixels is ViT.pixels
    write(preprocess=dict(mean=[0.5] * 3, std=[0.5] * 3))     # LAION-2B's L/14
    assert load_folder(folder).pixels == [[0.5] * 3, [0.5] * 3]


# ---- Download ----

class Handler(http.server.BaseHTTPRequestHandler):
    """server.files    path -> file
    server.ranges   whether it sends parts
    server.cut      every reply ends after so many bytes
    server.stop     after so many bytes in all it sends nothing more
    server.lie      this is added to Content-Length
    server.shift    this is added to where a part begins, as it says
    server.no_length    it does not say how large the file is
    """
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        server, path = self.server, self.path
        server.asked.append((path, self.headers["Range"]))
        if path.startswith("/hub/"):     # as the hub: elsewhere, and the hash here
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/hub"))
            if server.linked:
                self.send_header("X-Linked-Etag", f'"{server.linked}"')
            return self.end_headers()
        if path not in server.files:
            return self.send_error(404)
        size = os.path.getsize(server.files[path])
        first, last = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if wanted and server.ranges:
            first, last = int(wanted[1]), min(int(wanted[2]) + 1, size)
            self.send_response(206)
            whole = "*" if server.no_length else size
            self.send_header("Content-Range", f"bytes {first + server.shift}-{last - 1}/{whole}")
        else:
            self.send_response(200)
        if not server.no_length:
            self.send_header("Content-Length", str(last - first + server.lie))
        self.send_header("ETag", server.etag)
        self.end_headers()
        # OSError: the client has hung up.
        with open(server.files[path], "rb") as file, contextlib.suppress(OSError):
            file.seek(first)
            left = min(last - first, server.cut)
            while left > 0 and server.sent < server.stop:
                chunk = file.read(min(left, 2**14))
                self.wfile.write(chunk)
                server.sent += len(chunk)
                left -= len(chunk)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSE", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.files, httpd.asked, httpd.sent = {}, [], 0
        httpd.ranges, httpd.cut, httpd.stop, httpd.lie, httpd.shift = True, 10**12, 10**12, 0, 0
        httpd.etag, httpd.linked, httpd.no_length = '"1"', None, False
        httpd.address = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


TOWER = (AudioViT, dict(width=64, depth=4, heads=4, mel=(32, 64)))


@pytest.fixture(scope="module")
def imagebind(tmp_path_factory):
    """A file of ImageBind's layout, 50 times larger than its audio tower.

    Other modalities lie before and behind.
    """
    torch.manual_seed(0)
    encoder = TOWER[0](**TOWER[1])
    state, tower = {}, public_state(encoder)
    size = sum(t.nbytes for t in tower.values())
    others = torch.randn(300, int(49 * size / 4 / 300))
    for i, t in enumerate(others[:150]):
        state[f"modality_trunks.vision.blocks.{i}.mlp.fc1.weight"] = t.clone()
    state |= tower
    for i, t in enumerate(others[150:]):
        state[f"modality_trunks.text.blocks.{i}.mlp.fc1.weight"] = t.clone()
    folder = tmp_path_factory.mktemp("imagebind")
    torch.save(state, folder / "imagebind_huge.pth")
    save_file(state, folder / "model.safetensors")
    return folder, size


@pytest.fixture
def of_imagebind(server, imagebind, monkeypatch, tmp_path):
    """(file) -> the encoder's tower out of that file of the server."""
    folder, size = imagebind
    monkeypatch.setitem(BUILD, "audio_vit_b", TOWER)

    def get(file="imagebind_huge.pth", tower=0.001, path=""):
        server.files[f"/{file}"] = folder / file
        public = Public(f"{server.address}{path}/{file}", 0.1, "X", None, tower)
        monkeypatch.setitem(PUBLIC, "audio_vit_b", public)
        return download("audio_vit_b", tmp_path / "checkpoints")
    return get


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("file", ["imagebind_huge.pth", "model.safetensors"])
def test_only_the_tower_is_fetched(file, of_imagebind, imagebind, server, tmp_path,
                                   monkeypatch):
    folder, size = imagebind
    path = of_imagebind(file)
    assert path == place("audio_vit_b", tmp_path / "checkpoints")
    assert path.name == f"{Path(file).stem}.tower.safetensors"
    assert os.path.getsize(folder / file) > 50 * size and server.sent <= 1.05 * size + 10**6
    encoder, whole = (load_public(build("audio_vit_b"), f) for f in (path, folder / file))
    assert same(encoder, whole) and set(tensors_of(path)) == set(public_names(encoder))
    sent = server.sent
    assert of_imagebind(file) == path and server.sent == sent     # it is there
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # Export: the tower alone, or into the whole file.
    monkeypatch.chdir(tmp_path)
    start = dict(pretrained="audio_vit_b")
    name, source, note = export.public_file(tmp_path, start, "audio", "audio_vit_b", encoder)
    assert (name, source) == (path.name, path.relative_to(tmp_path)) and "strict=False" in note
    export_public(encoder, tmp_path / "small.safetensors", path)
    assert tensors_of(tmp_path / "small.safetensors").keys() == tensors_of(path).keys()
    export_public(encoder, tmp_path / "large.safetensors", folder / file)
    large = tensors_of(tmp_path / "large.safetensors")
    before = tensors_of(folder / "model.safetensors")
    assert large.keys() == before.keys()
    assert all(torch.equal(large[name], before[name]) for name in large)


def test_a_cut_download_of_the_tower_goes_on_where_it_stopped(of_imagebind, imagebind, server,
                                                              tmp_path):
    folder, size = imagebind
    server.stop = 400_000 + size // 2     # then it sends nothing any more
    with pytest.raises(ConnectionError, match="bytes are missing.*run this again: it goes on"):
        of_imagebind()
    partial, = tmp_path.glob("checkpoints/audio_vit_b/*.partial")
    have, sent = partial.stat().st_size, server.sent
    assert have > size // 4
    server.stop = 10**12
    path = of_imagebind()
    assert server.sent - sent <= 1.05 * (size - have) + 500_000
    assert same(load_public(build("audio_vit_b"), path),
                load_public(build("audio_vit_b"), folder / "imagebind_huge.pth"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_connections_that_are_cut_again_and_again(of_imagebind, imagebind, server):
    server.cut = 200_000
    path = of_imagebind()
    assert same(load_public(build("audio_vit_b"), path),
                load_public(build("audio_vit_b"), imagebind[0] / "imagebind_huge.pth"))


@pytest.mark.parametrize("what", ["no parts", "old format", "another file"])
def test_where_only_the_whole_file_can_be_had(what, of_imagebind, imagebind, server, tmp_path,
                                              capsys):
    file = "imagebind_huge.pth"
    if what == "no parts":
        server.ranges = False
    else:
        state = tensors_of(imagebind[0] / "model.safetensors")
        small = {name: t for name, t in state.items() if "audio" in name}
        file, old = "old.pth", what == "old format"
        torch.save(small, imagebind[0] / file, _use_new_zipfile_serialization=False)
        if not old:
            (imagebind[0] / file).write_bytes(b"PK\x05\x06" + b"\0" * 1000)
    path = of_imagebind(file)
    assert path == tmp_path / "checkpoints" / "audio_vit_b" / file
    assert path.read_bytes() == (imagebind[0] / file).read_bytes()
    assert "fetching the whole file, 0.1 GB" in capsys.readouterr().out
    assert of_imagebind(file) == path == place("audio_vit_b", tmp_path / "checkpoints")
    assert [p.name for p in path.parent.iterdir()] == [file]


def test_a_damaged_tensor_is_noticed(of_imagebind, imagebind, server, tmp_path):
    damaged = bytearray((imagebind[0] / "imagebind_huge.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 1     # in the audio tower, which lies in the middle
    (imagebind[0] / "damaged.pth").write_bytes(damaged)
    with pytest.raises(ConnectionError, match="came damaged"):
        of_imagebind("damaged.pth")
    assert not list(tmp_path.glob("checkpoints/audio_vit_b/*"))


@pytest.fixture
def whole(server, monkeypatch, tmp_path):
    """(sha256, path) -> what `download` returns for a file of 300 kB."""
    (tmp_path / "content").write_bytes(os.urandom(300_000))
    server.files["/weights.pth"] = tmp_path / "content"
    server.hash = hashlib.sha256((tmp_path / "content").read_bytes()).hexdigest()

    def get(sha256=None, path=""):
        public = Public(f"{server.address}{path}/weights.pth", 0.1, "X", sha256)
        monkeypatch.setitem(PUBLIC, "resnet18", public)
        return download("resnet18", tmp_path)
    return get


def test_a_whole_file_goes_on_where_it_stopped(whole, server, tmp_path):
    server.stop = 100_000
    with pytest.raises(ConnectionError, match="run this again"):
        whole()
    assert server.sent < 150_000
    server.stop = 10**12
    assert whole(server.hash[:8]).read_bytes() == (tmp_path / "content").read_bytes()
    assert server.sent < 350_000     # 300,000, and a piece that was under way


def test_a_file_that_changes_between_is_fetched_anew(whole, server, tmp_path):
    server.stop = 100_000
    with pytest.raises(ConnectionError):
        whole()
    (tmp_path / "content").write_bytes(os.urandom(300_000))
    server.stop, server.etag = 10**12, '"2"'
    assert whole().read_bytes() == (tmp_path / "content").read_bytes()
    assert len(list(tmp_path.glob("resnet18/*"))) == 1


def test_redirects_and_hashes(whole, server, tmp_path):
    server.linked = server.hash
    path = whole(path="/hub")
    assert path.read_bytes() == (tmp_path / "content").read_bytes()
    path.unlink()
    for sha256, linked in [("0" * 8, None), (None, "0" * 64)]:     # the publisher's, the hub's
        server.linked = linked
        with pytest.raises(ConnectionError, match="invalid hash"):
            whole(sha256, path="/hub")
        assert not list(tmp_path.glob("resnet18/*"))


def test_servers_that_lie(whole, server, tmp_path):
    server.shift = 7     # another part than was asked for
    with pytest.raises(ConnectionError, match="asked for bytes from 0, the server sent bytes 7-"):
        whole()
    server.shift, server.ranges, server.lie = 0, False, 5000     # it promises more than it sends
    with pytest.raises(ConnectionError, match="got 300000 of 305000 bytes"):
        whole()
    server.lie = -5000     # it promises less: only a hash tells
    with pytest.raises(ConnectionError, match="invalid hash"):
        whole(server.hash)
    server.ranges, server.lie = True, 5000     # a part tells the whole length besides
    path = whole(server.hash)
    assert path.read_bytes() == (tmp_path / "content").read_bytes()
    path.unlink()
    assert not list(tmp_path.glob("resnet18/*"))
    server.files.clear()
    with pytest.raises(ConnectionError, match="404"):
        whole()


def test_a_reply_that_is_no_file(whole, server, tmp_path):
    (tmp_path / "content").write_bytes(b"<!DOCTYPE html><html>log in first</html>")
    with pytest.raises(ConnectionError, match="sent a web page instead"):
        whole()
    assert not list(tmp_path.glob("resnet18/*"))
    for server.ranges in (False, True):
        server.no_length = True
        with pytest.raises(ConnectionError, match="does not say how large it is"):
            whole()


def test_a_header_that_looks_like_a_web_page(tmp_path):
    """A .safetensors file begins with the length of its header: b" <" is one, too."""
    file = tmp_path / "model.safetensors"
    header = b"{}".ljust(int.from_bytes(b" <", "little"))
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    formats.refuse(file, False)
    file.write_bytes(b"\n<HTML><body>")
    with pytest.raises(ValueError, match="is a web page"):
        formats.refuse(file, False)


def test_a_file_that_somebody_has_put_there_is_checked_once(whole, server, tmp_path, monkeypatch):
    path = tmp_path / "resnet18" / "weights.pth"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"weights\.pth is not the public file .* delete it"):
        whole(server.hash[:8])
    shutil.copy(tmp_path / "content", path)
    assert whole(server.hash[:8]) == path and not server.asked
    assert (tmp_path / "resnet18/weights.pth.sha256").read_text() == f"{server.hash}  weights.pth\n"
    monkeypatch.setattr(hashlib, "file_digest", None)     # a second look would fail
    assert whole(server.hash[:8]) == path


# ---- From the command line to a finished run ----

VOCABULARY = FIXTURES / "tokenizer_wordpiece" / "vocab.txt"
START = ["--dataset", "menu", "--epochs", 1, "--encoder", "visual=vit_mini"]


def small_bert(folder, seed=0):
    """A folder of the hub, of a size that no table knows."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    sizes = dict(vocab_size=328, width=24, depth=2, heads=3, mlp_width=40, max_length=16)
    export_public(BERT(**sizes), folder / "model.safetensors")
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings")
    config = {"model_type": "bert", **dict(zip(keys, sizes.values()))}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def menu(tmp_path_factory):
    """Pictures of 36 x 36 and short texts; the folder of a BERT; a run of MMLoRA from it."""
    root = tmp_path_factory.mktemp("menu")
    tokenizer = load_tokenizer(VOCABULARY)
    counts = dict(train=8, val=4, test=4)
    for split, n in counts.items():
        where = root / "data" / "menu" / split
        where.mkdir(parents=True)
        pictures = np.random.default_rng(n).integers(0, 255, (n, 1, 3, 36, 36), np.uint8)
        np.save(where / "visual.npy", pictures)
        texts = [tokenizer.encode(("cooked", "cream")[i % 2], 6) for i in range(n)]
        padded = [ids + [0] * (6 - len(ids)) for ids in texts]
        np.save(where / "text.npy", np.array(padded, np.int32))
        np.save(where / "labels.npy", np.arange(n, dtype=np.int64) % 2)
        (where / "ids.txt").write_text("".join(f"{split}{i}\n" for i in range(n)))
    told = dict(kind="wordpiece", fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size)
    info = dict(name="menu", classes=["cooked", "cream"], multilabel=False, counts=counts,
                tokenizer=told, modalities={"visual": "image", "text": "text"},
                shapes={"visual": [1, 3, 36, 36], "text": [6]})
    (root / "data/menu/dataset.json").write_text(json.dumps(info))
    small_bert(root / "small")
    (root / "openai").mkdir()
    torch.manual_seed(1)
    export_public(build("vit_mini"), root / "openai" / "vit.bin")
    start = ["--pretrained", f"text={root / 'small'}", f"visual={root / 'openai' / 'vit.bin'}"]
    words = [*START, *start, "--umft-epochs", 1]
    call("train_joint.py", *words, out=root / "runs", root=root / "data")
    return root


RUN = "menu/mmlora-all-r1-visual-vit_mini-text-bert-small-s0"


def test_a_folder_from_the_command_line_to_a_finished_run(menu, tmp_path):
    sizes = dict(vocab_size=328, width=24, depth=2, heads=3, mlp_width=40, max_length=16,
                 dropout=0.1)
    config = menu / "runs/menu/unimodal-text-bert-small-s0/config.json"
    step_1 = json.loads(config.read_text())["settings"]
    assert step_1["encoder"] == "bert-small" and step_1["pretrained"] == str(menu / "small")
    assert step_1["sizes"] == sizes and re.fullmatch("[0-9a-f]{12}", step_1["pretrained_sha256"])
    assert step_1["lr"] == 5e-5     # that of BERT
    joint = json.loads((menu / "runs" / RUN / "config.json").read_text())
    assert joint["settings"]["sizes"] == {"text": sizes, "visual": {"quick_gelu": True}}
    # It is read again, also where the folder is gone.
    (menu / "small").rename(menu / "away")
    try:
        settings, models = load_run(menu / "runs" / RUN, joint["data"])
    finally:
        (menu / "away").rename(menu / "small")
    assert models["text"].encoder.words.weight.shape == (328, 24)
    assert all(block.activation is quick_gelu for block in models["visual"].encoder.blocks)
    words = ["--run", menu / "runs" / RUN, "--export", tmp_path / "out"]
    said = call("evaluate.py", *words, root=menu / "data")
    assert f"all else as in {menu / 'small' / 'model.safetensors'}" in said
    assert "force_quick_gelu=True" in said
    shutil.copy(menu / "small" / "config.json", tmp_path / "out" / "text")
    exported = load_folder(tmp_path / "out" / "text")
    assert same(exported, merge_lora(models["text"]).encoder)


def test_another_file_under_the_same_path_is_noticed(menu):
    words = ["train_unimodal.py", "--modality", "text", *START, "--pretrained", menu / "small"]
    where = dict(out=menu / "runs", root=menu / "data")
    assert "nothing to do" in call(*words, **where)
    try:
        small_bert(menu / "small", seed=5)
        said = error(*words, **where)
        assert re.search(r"is a run with pretrained_sha256 \w{12} \(now \w{12}\); use", said)
        joint = ["train_joint.py", *START, "--umft-epochs", 1, "--pretrained"]
        visual = f"visual={menu / 'openai' / 'vit.bin'}"
        assert "pretrained_sha256" in error(*joint, f"text={menu / 'small'}", visual, **where)
        shutil.copy(menu / "small/model.safetensors", menu / "openai/copy.safetensors")
    finally:
        small_bert(menu / "small")
    assert "nothing to do" in call(*words, **where)


@pytest.mark.parametrize("what, words, message", [
    ("vocabulary", [], "has a vocabulary of its own, but menu was prepared with another one"),
    ("no vocabulary", [], "knows 328 tokens, but menu was prepared with another one, of 325"),
    ("cased", [], "has a vocabulary with capital letters"),
    ("encoder", ["--encoder", "text=bert_base"], "its own encoder: leave --encoder text=... out"),
    ("no config", [], "no config.json or open_clip_config.json in"),
    ("no such file", ["--pretrained", "text=nowhere.bin"], "no checkpoint at nowhere.bin")])
def test_folders_that_do_not_fit_are_refused(what, words, message, menu, tmp_path):
    folder = shutil.copytree(menu / "small", tmp_path / "small")
    if what == "vocabulary":
        lines = VOCABULARY.read_text().splitlines()
        lines[-2:] = [lines[-1], lines[-2]]     # the same words
        (folder / "vocab.txt").write_text("\n".join(lines))
    if what == "no vocabulary":
        (folder / "vocab.txt").unlink()
    if what == "cased":
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    if what == "no config":
        (folder / "config.json").unlink()
    start = ["--modality", "text", "--dataset", "menu", "--pretrained", f"text={folder}"]
    said = error("train_unimodal.py", *start, *words, out=tmp_path / "runs", root=menu / "data")
    assert message in said
    assert not (tmp_path / "runs").exists()


def test_baselines_know_the_family_of_a_folder():
    parts.only_transformers({"text": "bert-small", "visual": "vit-small"})
    mmbt.check({"text": "bert-small", "visual": "vit-small"})
    for name in ("deberta-small", "bart-small"):
        with pytest.raises(ValueError, match=f"text={name}"):
            parts.only_transformers({"text": name})
    info = dict(name="menu", modalities={"visual": "image"}, shapes={"visual": [1]}, classes=["a"])
    with pytest.raises(ValueError, match="bert-small reads text, but visual of menu is image"):
        new_model("bert-small", info, "visual", {})
    for kind in ("wordpiece", "byte_bpe"):
        text = dict(modalities={"text": "text"}, shapes={"text": [6]},
                    tokenizer=dict(kind=kind, vocab_size=9))
        with pytest.raises(ValueError, match="no encoder is called 'bird'"):
            new_model("bird", info | text, "text")


def test_learning_rates_of_folders_are_those_of_their_family():
    for name, known in [("bert-all-MiniLM-L6-v2", "bert_base"), ("deberta-base", "deberta_base"),
                        ("vit-ViT-S-32", "vit_b16"), ("bert-my_small", "bert_base"),
                        ("bert_minilm", "bert_base")]:
        assert settings.encoder_kind(name) == settings.encoder_kind(known)
