"""Public checkpoints: where they are, what they call our tensors, how to load them into an encoder and how to write them back;
and the folders of our own runs.

    encoder = load_public(build("vit_b16"), download("vit_b16"))
    export_public(encoder, "tuned.safetensors", source=download("vit_b16"))     # open_clip reads this file

Loading is strict. A tensor that is missing, unexpected or of another shape is an error that names it, because an encoder that
silently kept some random weights still trains, only worse.
"""
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from encoders import BERT, BUILD, AudioViT, DeBERTa, ResNet, UnimodalModel, ViT, build
from lora import add_lora, merge_lora


# ---- Where they are ----

class Public(NamedTuple):
    url: str
    gigabytes: float
    licence: str
    sha256: str | None = None     # the first digits, where the publisher gives them


HUB = "https://huggingface.co/{}/resolve/main/{}"
PUBLIC = {
    "vit_b16": Public(HUB.format("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "open_clip_pytorch_model.bin"), 0.60, "MIT"),
    "vit_b32": Public(HUB.format("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_pytorch_model.bin"), 0.61, "MIT"),
    "vit_l14": Public(HUB.format("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "open_clip_pytorch_model.bin"), 1.71, "MIT"),
    "audio_vit_b": Public("https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth", 4.80, "CC-BY-NC-SA 4.0"),
    "bert_base": Public(HUB.format("google-bert/bert-base-uncased", "model.safetensors"), 0.44, "Apache-2.0"),
    "bert_large": Public(HUB.format("google-bert/bert-large-uncased", "model.safetensors"), 1.34, "Apache-2.0"),
    "bert_vocab": Public(HUB.format("google-bert/bert-base-uncased", "vocab.txt"), 0.0002, "Apache-2.0"),     # base and large share it
    "deberta_base": Public(HUB.format("microsoft/deberta-base", "pytorch_model.bin"), 0.56, "MIT"),
    "deberta_large": Public(HUB.format("microsoft/deberta-large", "pytorch_model.bin"), 1.63, "MIT"),
    "deberta_vocab": Public(HUB.format("microsoft/deberta-base", "bpe_encoder.bin"), 0.004, "MIT"),
    "resnet18": Public("https://download.pytorch.org/models/resnet18-f37072fd.pth", 0.05, "BSD-3-Clause", "f37072fd"),
    "resnet152": Public("https://download.pytorch.org/models/resnet152-394f9c45.pth", 0.24, "BSD-3-Clause", "394f9c45"),     # V1
}


def download(name, folder="checkpoints"):
    """The path of a public file, `folder/name/file`, fetched on first use. A name of its own for each, since many files share theirs.

    Raises ConnectionError with the URL, the size and the place for the file when it cannot be fetched whole.
    """
    if name not in PUBLIC:
        raise ValueError(f"no public checkpoint is known for {name!r}; there are {', '.join(PUBLIC)}")
    url, gigabytes, _, sha256 = PUBLIC[name]
    path = Path(folder) / name / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers={"User-Agent": "torch.hub"}), timeout=30) as reply:
            size = reply.headers["Content-Length"]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial), sha256)
        if size and partial.stat().st_size != int(size):     # a connection that breaks off looks like the end of the file
            raise OSError(f"got {partial.stat().st_size} of {size} bytes")
        partial.replace(path)     # only whole files get the real name
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({gigabytes} GB): {error}; fetch it elsewhere and put it at {path}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


# ---- What they call our tensors ----

class Layout(NamedTuple):
    name: str
    prefix: str                         # of every public name
    rename: list[tuple[str, str]]       # ours -> public, in order; a pattern matches whole parts of a name
    ignored: str                        # a pattern for the tensors in the file that are no part of the encoder


# Read from our names to theirs, the tables serve both directions: loading asks the file for the public name of each of our tensors,
# exporting stores each under it. Where several of ours get one name (query, key, value), the file has them packed in one tensor.
POST_NORM = [("blocks", "encoder.layer"), ("attention.out", "attention.output.dense"), ("norm1", "attention.output.LayerNorm"),
             ("fc1", "intermediate.dense"), ("fc2", "output.dense"), ("norm2", "output.LayerNorm"),
             ("words", "embeddings.word_embeddings"), ("norm_embed", "embeddings.LayerNorm")]

LAYOUTS = {
    ViT: Layout("OpenCLIP", "visual.", [
        ("patch", "conv1"), ("cls_token", "class_embedding"), ("positions", "positional_embedding"),
        ("norm_pre", "ln_pre"), ("norm", "ln_post"), ("blocks", "transformer.resblocks"),
        ("norm1", "ln_1"), ("norm2", "ln_2"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj"),
        ("attention.(query|key|value).(weight|bias)", r"attn.in_proj_\2"), ("attention.out", "attn.out_proj"),
    ], r"visual\.proj$|(transformer|token_embedding|ln_final)\.|(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$"),
    AudioViT: Layout("ImageBind", "", [
        ("patch", "modality_preprocessors.audio.rgbt_stem.proj"), ("norm_patch", "modality_preprocessors.audio.rgbt_stem.norm_layer"),
        ("cls_token", "modality_preprocessors.audio.cls_token"),
        ("positions", "modality_preprocessors.audio.pos_embedding_helper.pos_embed"), ("norm", "modality_heads.audio.0"),
        ("blocks", "modality_trunks.audio.blocks"), (r"norm(\d)", r"norm_\1"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
        ("attention.(query|key|value).(weight|bias)", r"attn.in_proj_\2"), ("attention.out", "attn.out_proj"), ("attention", "attn"),
    ], r"modality_\w+\.(?!audio\.)|modality_heads\.audio\.2\.weight$|modality_postprocessors\.audio\.1\.log_logit_scale$"),
    BERT: Layout("BERT", "bert.", POST_NORM + [
        ("attention.(query|key|value)", r"attention.self.\1"), ("positions", "embeddings.position_embeddings"),
        ("segments", "embeddings.token_type_embeddings"), ("pooler", "pooler.dense"),
        ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"),
    ], r"cls\.|bert\.embeddings\.position_ids$"),
    DeBERTa: Layout("DeBERTa v1", "deberta.", POST_NORM + [
        ("attention.(query|key|value).weight", "attention.self.in_proj.weight"), ("attention.query.bias", "attention.self.q_bias"),
        ("attention.value.bias", "attention.self.v_bias"), ("attention.pos_key", "attention.self.pos_proj"),
        ("attention.pos_query", "attention.self.pos_q_proj"), ("relative", "encoder.rel_embeddings"),
    ], r"lm_predictions\.|cls\.|deberta\.embeddings\.(position_embeddings\.weight|position_ids)$"),     # positions of the pre-training head
    ResNet: Layout("torchvision ResNet", "", [], r"fc\."),
}

TELLTALES = {"visual.": "OpenCLIP", "modality_": "ImageBind", "bert.": "BERT", "deberta.": "DeBERTa", "layer1.": "torchvision ResNet",
             "vision_model.": "CLIP as the transformers library stores it (take the open_clip_* file beside it)"}


def public_names(encoder, in_file=None):
    """{public name: [names of ours that it holds]}; `in_file`, the names of one file, settles the spellings that differ between files."""
    layout = LAYOUTS[type(encoder)]
    rename, names = list(layout.rename), {}
    if in_file is not None and not any(name.endswith(".gamma") for name in in_file):     # copies of BERT saved by newer code
        rename += [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")]
    for ours in encoder.state_dict():
        if "lora_A" in ours:
            raise ValueError("public checkpoints know no LoRA: load before add_lora, and export after merge_lora")
        public = ours
        for pattern, replacement in rename:
            public = re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", replacement, public)
        names.setdefault(layout.prefix + public, []).append(ours)
    return names


def pack(encoder, tensors):
    """Query, key and value as the public files hold them, rows under rows; a single tensor stays as it is."""
    if len(tensors) == 1:
        return tensors[0]
    if isinstance(encoder, DeBERTa):     # head by head: q, k, v of head 0, then of head 1 ... Thirds fit too, and are wrong
        heads = encoder.blocks[0].attention.heads
        return torch.stack([t.unflatten(0, (heads, -1)) for t in tensors], dim=1).flatten(0, 2)     # 3 x (D, D) -> (H, 3, d, D) -> (3D, D)
    return torch.cat(tensors)     # [q; k; v]


def unpack(encoder, tensor, count):
    """The inverse of `pack`."""
    if count == 1:
        return [tensor]
    if isinstance(encoder, DeBERTa):
        heads = encoder.blocks[0].attention.heads
        return [t.flatten(0, 1) for t in tensor.unflatten(0, (heads, count, -1)).unbind(1)]     # (3D, D) -> (H, 3, d, D) -> 3 x (D, D)
    return tensor.chunk(count)


# ---- Reading and writing ----

def read(path):
    """(names, get): the names of a file's tensors and a function from name to tensor. A tensor's bytes are read only when asked for,
    so ImageBind's audio tower costs 0.35 of its 4.8 GB. Raises FileNotFoundError, or ValueError when the file is no checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the checkpoint itself: fetch it with `git lfs pull`")
    if head.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a checkpoint: check the address it came from")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return list(file.keys()), file.get_tensor
        # weights_only: a pickle from the network must not run code. mmap needs the zip form that torch.save writes since 1.6.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:     # a damaged file can make the readers raise almost anything
        raise ValueError(f"{path} cannot be read as a checkpoint, perhaps it is cut short ({type(error).__name__})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):     # a training checkpoint of open_clip: the weights and more
        state = {name.removeprefix("module."): tensor for name, tensor in state["state_dict"].items()}
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    return list(state), state.__getitem__


def load_public(encoder, path):
    """Fill `encoder` from a public checkpoint (.safetensors, .bin, .pth) and return it; on any mismatch ValueError, and nothing is changed.

    A ResNet for other than three channels averages the first layer over RGB and repeats it (temporal segment networks, Wang et al. 2016).
    """
    names, get = read(path)
    layout, table, shapes = LAYOUTS[type(encoder)], public_names(encoder, names), {k: v.shape for k, v in encoder.state_dict().items()}
    if table.keys().isdisjoint(names):
        found = next((what for start, what in TELLTALES.items() if any(name.startswith(start) for name in names)), f"{names[:1]} ...")
        raise ValueError(f"{path} does not fit {type(encoder).__name__}: that needs a checkpoint of {layout.name}, this one holds {found}")
    state, wrong = {}, []
    for public, ours in table.items():
        if public not in names:
            continue
        tensor, shape = get(public), shapes[ours[0]]
        shape = (len(ours) * shape[0], *shape[1:]) if shape else ()     # packed: rows under rows; a counter has no axes
        if isinstance(encoder, ResNet) and public == "conv1.weight" and tensor.shape[1:2] == (3,) != shape[1:2]:
            tensor = tensor.mean(dim=1, keepdim=True).repeat(1, shape[1], 1, 1)     # (64, 3, 7, 7) -> (64, in_channels, 7, 7)
        if tensor.shape == shape:
            state.update(zip(ours, unpack(encoder, tensor, len(ours))))
        else:
            wrong.append(f"{public} {list(tensor.shape)}, not {list(shape)}")
    optional = "num_batches_tracked"     # a counter that inference never reads; older torchvision files lack it
    problems = {"missing": [name for name in table if name not in names and not name.endswith(optional)],
                "unexpected": [name for name in names if name not in table and not re.match(layout.ignored, name)], "wrong shape": wrong}
    if any(problems.values()):
        told = [f"{len(which)} {what} ({', '.join(which[:3] + ['...'] * (len(which) > 3))})" for what, which in problems.items() if which]
        raise ValueError(f"{path} does not fit {type(encoder).__name__}: {'; '.join(told)}")
    encoder.load_state_dict(state)     # strict as well; BatchNorm itself fills in a missing counter
    return encoder


def public_state(encoder, reference=None):
    """The encoder's tensors under their public names, packed as there: `load_public` backwards. `reference`, the public file it came from,
    settles what differs between files: gamma or weight, counters or none, data type. ValueError where a tensor no longer fits it."""
    names, get = read(reference) if reference else (None, None)
    own, state = encoder.state_dict(), {}
    for public, ours in public_names(encoder, names).items():
        tensor = pack(encoder, [own[name] for name in ours]).cpu()
        if reference:
            if public not in names and public.endswith("num_batches_tracked"):
                continue
            like = get(public) if public in names else None
            if like is None or like.shape != tensor.shape:     # among others the averaged first layer of a flow network
                raise ValueError(f"{public} {list(tensor.shape)} has no place in {reference}; without a source it is written as it is")
            tensor = tensor.to(like.dtype)
        state[public] = tensor.contiguous()
    return state


def export_public(encoder, path, source=None):
    """Write the encoder as a public file, .safetensors or .bin / .pth by the suffix. With `source`, the public file it came from,
    all that is not the encoder's (text tower, projection, heads) is carried over, so that the upstream library loads it strictly."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".bin", ".pth"):
        raise ValueError(f"cannot export to {path}: the suffix must be .safetensors, .bin or .pth")
    names, get = read(source) if source else ([], None)
    state = {name: get(name) for name in names} | public_state(encoder, source)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".safetensors":
        save_file(state, partial, metadata={"format": "pt"})     # transformers asks for this mark
    else:
        torch.save(state, partial)
    partial.replace(path)     # a file under the real name is always whole


# ---- Our own runs ----
def new_model(name: str, info: dict, modality: str) -> UnimodalModel:
    """An untrained uni-modal model for a prepared data set (its dataset.json as `info`): encoder `name` and a linear head.

    Raises ValueError when the encoder cannot read what was prepared.
    """
    kind, shape, tokenizer = info["modalities"][modality], info["shapes"][modality], info.get("tokenizer")
    family = BUILD[name][0] if name in BUILD else None
    takes = {ViT: ("frames", "image"), AudioViT: ("audio",), BERT: ("text",), DeBERTa: ("text",), ResNet: ("frames", "image", "flow", "audio")}
    if family and kind not in takes[family]:
        raise ValueError(f"encoder {name} reads {' or '.join(takes[family])}, but {modality} of {info['name']} is {kind}")
    options = {}
    if family is ResNet:
        options["in_channels"] = 1 if kind == "audio" else shape[1]
    if kind == "text":
        wanted = "wordpiece" if family is BERT else "byte_bpe"
        if tokenizer["kind"] != wanted:
            raise ValueError(f"encoder {name} needs {wanted} token ids, but {info['name']} was prepared with a {tokenizer['kind']} tokenizer")
        if "small" in name:                                 # trained from scratch, so any vocabulary will do
            options["vocab_size"] = tokenizer["vocab_size"]
        elif tokenizer["vocab_size"] != BUILD[name][1]["vocab_size"]:
            raise ValueError(f"encoder {name} knows {BUILD[name][1]['vocab_size']} tokens, but {info['name']} was prepared with a vocabulary of "
                             f"{tokenizer['vocab_size']}; prepare it with the encoder's own")
    encoder = build(name, **options)
    if isinstance(encoder, AudioViT) and tuple(shape[-2:]) != tuple(encoder.mel):
        raise ValueError(f"encoder {name} takes spectrograms of {encoder.mel}, but {info['name']} holds {tuple(shape[-2:])}")
    return UnimodalModel(encoder, len(info["classes"]))


class Run:
    """The folder of one training run. It knows what was asked for, how far it got and, once finished, the result.

        config.json          resolved settings; dataset.json of the data (`info`), so that a run can be used without them; command line, commit, versions
        log.jsonl            one line an epoch
        last.safetensors     everything to go on from the last whole epoch; gone when the run is finished
        model.safetensors    the best epoch so far
        result.json          written last: a run that has it is finished

    Every file is written under another name first and then renamed, so that a run killed at any moment finds whole files.
    Raises ValueError when the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict, info: dict | None = None):
        self.folder, self.settings, self.info = folder, json.loads(json.dumps(settings)), info
        if (folder / "config.json").exists():
            before = read_json(folder / "config.json")["settings"]
            other = [f"{k} {before.get(k)} (now {self.settings.get(k)})" for k in {**before, **self.settings} if before.get(k) != self.settings.get(k)]
            if other:
                raise ValueError(f"{folder} is a run with {', '.join(other)}; use another --out, or delete that folder")

    def begin(self) -> None:
        """Make the folder, with config.json in it. Only here: a mistake that shows before training leaves nothing behind."""
        if (self.folder / "config.json").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        git = shutil.which("git")
        commit = git and subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        made = {k: v for k, v in (self.info or {}).items() if k != "unreadable"}           # a list, long maybe, that no prediction needs
        write_json(self.folder / "config.json", dict(settings=self.settings, data=made, command=" ".join(sys.argv), commit=commit or None,
                                                     versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)))

    @property
    def result(self) -> dict | None:
        return read_json(self.folder / "result.json") if (self.folder / "result.json").exists() else None

    def resume(self, optimizer) -> tuple[dict, dict]:
        """-> (tensors, state) of the last whole epoch, ({}, {}) for a new run; fills `optimizer` and cuts the log back to that epoch."""
        self.begin()
        file, log = self.folder / "last.safetensors", self.folder / "log.jsonl"
        if not file.exists():
            log.unlink(missing_ok=True)
            return {}, {}
        with safe_open(file, "pt") as f:
            state, tensors = json.loads(f.metadata()["state"]), {k: f.get_tensor(k) for k in f.keys()}
        write_text(log, "".join(log.read_text().splitlines(True)[:state["lines"]]))
        moments = {}
        for key in [k for k in tensors if k.startswith("optimizer/")]:
            _, parameter, name = key.split("/")
            moments.setdefault(int(parameter), {})[name] = tensors.pop(key)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return tensors, state

    def save(self, tensors: dict, optimizer, state: dict, best: bool) -> None:
        """The end of an epoch. `tensors` is what is trained; `state` counts at least the `lines` of the log."""
        if best:
            self.save_tensors("model.safetensors", tensors)
        moments = {f"optimizer/{i}/{k}": torch.as_tensor(v) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items() if v is not None}
        write_tensors(self.folder / "last.safetensors", tensors | moments, {"state": json.dumps(state)})

    def save_tensors(self, name: str, tensors: dict) -> None:
        write_tensors(self.folder / name, tensors)

    def tensors(self, name: str) -> dict:
        return load_file(self.folder / name)

    def log(self, line: dict) -> None:
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def finish(self, result: dict) -> dict:
        write_json(self.folder / "result.json", result)
        (self.folder / "last.safetensors").unlink(missing_ok=True)
        return result


def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)      # atomic: whoever opens `file` sees the old content or the new one, never a part


def write_tensors(file: Path, tensors: dict, metadata: dict | None = None) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
    os.replace(temporary, file)


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=1) + "\n")


def read_json(file: Path):
    return json.loads(file.read_text())


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_run(folder: Path, info: dict, encoders_only: bool = False) -> tuple[dict, nn.ModuleDict]:
    """-> (settings, models by modality) of a finished run, its uni-modal runs included. Raises ValueError when those have changed since.

    encoders_only: the heads may mean nothing, as after a run of `baselines/`, which has a head of its own.
    """
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} holds no finished run (no result.json)")
    settings = read_json(folder / "config.json")["settings"]
    models = nn.ModuleDict({m: new_model(e, info, m) for m, e in settings.get("encoders", {settings.get("modality"): settings.get("encoder")}).items()})
    adapted = settings["method"] in ("mmlora", "separate")      # such a run holds A and B alone
    if adapted:
        for m, base in settings["unimodal"].items():
            file = folder.parent / base["run"] / "model.safetensors"
            if sha256(file) != base["sha256"]:
                raise ValueError(f"{file} is not the model that {folder} was trained on; delete {folder} and run it again")
            models.load_state_dict(load_file(file), strict=False)
    if settings.get("lora"):
        for m in settings["lora"]:
            add_lora(models[m], settings["rank"])
    file = folder / "model.safetensors"
    try:
        missing, unexpected = models.load_state_dict(load_file(file), strict=False)
    except (SafetensorError, RuntimeError) as error:      # cut short; or tensors of other shapes
        raise ValueError(f"{file} cannot be read into the model of its config.json: {str(error).splitlines()[-1].strip()}") from None
    if adapted:                                           # the rest came from the uni-modal runs
        missing = [name for name in missing if name.endswith(("lora_A", "lora_B"))]
    if wrong := [name for name in missing + unexpected if ".encoder." in name or not encoders_only]:
        raise ValueError(f"{file} does not fit its config.json: {wrong[0]} and {len(wrong) - 1} more")
    return settings, models.eval()


def started_from(folder: Path, settings: dict, modality: str) -> str | None:
    """What the encoder of a run was before any training of ours: a file, "none" (random weights), or its own name, which stands for the
    public checkpoint. A joint run leaves that to its uni-modal runs. None: nobody wrote it down."""
    if "unimodal" in settings:
        file = folder.parent / settings["unimodal"][modality]["run"] / "config.json"
        return read_json(file)["settings"]["pretrained"] if file.exists() else None
    start = settings.get("pretrained")
    return start.get(modality) if isinstance(start, dict) else start


READERS = {ViT: "open_clip.create_model(..., pretrained=FILE)",
           AudioViT: "ImageBind, imagebind_huge().load_state_dict(torch.load(FILE))",
           BERT: "transformers, BertModel.from_pretrained(FOLDER) with the original's config.json in it",
           DeBERTa: "transformers, DebertaModel.from_pretrained(FOLDER) with the original's config.json in it",
           ResNet: "torchvision, resnet...().load_state_dict(torch.load(FILE), strict=False)"}


def export_run(folder: Path, settings: dict, models: nn.ModuleDict, info: dict, target: Path) -> None:
    """Write target/<modality>/: the encoder with LoRA merged, named and laid out like the public file that it came from (or, from scratch,
    like one of its kind), and head.safetensors: weight, bias, and the classes as metadata. `target` must be new; it is written whole or not at all."""
    if target.exists():
        raise ValueError(f"{target} exists already: export to a new folder")
    partial, told = target.with_name(target.name + ".partial"), []
    try:
        for m, model in models.items():
            encoder, name = merge_lora(model).encoder, settings["encoders"][m] if "encoders" in settings else settings["encoder"]
            kin = name if name in PUBLIC else next(n for n in PUBLIC if n in BUILD and BUILD[n][0] is type(encoder))
            file, start, source = PUBLIC[kin].url.rsplit("/", 1)[1], started_from(folder, settings, m), None
            if start not in (None, "none"):
                source = Path("checkpoints", name, file) if start == name else Path(start)
                file = source.name if source.suffix in (".safetensors", ".bin", ".pth") else source.stem + ".pth"
            note = f"all else as in {source}" if source else "no public file behind it"
            if source and not source.is_file():
                source, note = None, f"nothing else, since {source} is not there"
            elif source and isinstance(encoder, ResNet) and encoder.conv1.in_channels != 3:
                source, note = None, f"nothing else, since it takes {encoder.conv1.in_channels} channels, not 3"
            (partial / m).mkdir(parents=True, exist_ok=True)
            export_public(encoder, partial / m / file, source)
            write_tensors(partial / m / "head.safetensors", model.head.state_dict(), {"classes": json.dumps(info["classes"])})
            told += [f"{target / m / file}: encoder {name}, {note}; for {READERS[type(encoder)]}",
                     f"{target / m / 'head.safetensors'}: linear layer on its features, {len(info['classes'])} classes"]
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("\n".join(told))
