"""Public checkpoints: where they are, what they call our tensors, how to load and to export them.

    encoder = load_public(build("vit_b16"), download("vit_b16"))
    export_public(encoder, "tuned.safetensors", source=download("vit_b16"))   # open_clip reads this

Loading is strict. A tensor that is missing, unexpected or of another shape is an error that names
it. An encoder that silently keeps some random weights still trains, only worse.
"""
import hashlib
import http.client
import re
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from encoders import BERT, AudioViT, DeBERTa, ResNet, ViT


# ---- Where they are ----

class Public(NamedTuple):
    url: str                      # or a path in this project
    gigabytes: float
    licence: str
    sha256: str | None = None     # the first digits, where the publisher gives them


PROJECT = Path(__file__).resolve().parents[1]
HUB = "https://huggingface.co"
OPENCLIP = "resolve/main/open_clip_pytorch_model.bin"
META = "https://dl.fbaipublicfiles.com/imagebind"
PYTORCH = "https://download.pytorch.org/models"

PUBLIC = {
    # The toy's lie in this project: `python -m prepare.toy --pretrain` makes them.
    "vit_toy": Public("pretrained/toy/vit_toy.safetensors", 0.0003, "MIT", "a1ae13890101d17b"),
    "audio_vit_toy": Public("pretrained/toy/audio_vit_toy.safetensors", 0.0003, "MIT",
                            "4b054b63d9839ab1"),
    "vit_b16": Public(f"{HUB}/laion/CLIP-ViT-B-16-laion2B-s34B-b88K/{OPENCLIP}", 0.60, "MIT"),
    "vit_b32": Public(f"{HUB}/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/{OPENCLIP}", 0.61, "MIT"),
    "vit_l14": Public(f"{HUB}/laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K/{OPENCLIP}", 1.71, "MIT"),
    "audio_vit_b": Public(f"{META}/imagebind_huge.pth", 4.80, "CC-BY-NC-SA 4.0"),
    "bert_base": Public(
        f"{HUB}/google-bert/bert-base-uncased/resolve/main/model.safetensors", 0.44, "Apache-2.0"),
    "bert_large": Public(
        f"{HUB}/google-bert/bert-large-uncased/resolve/main/model.safetensors", 1.34, "Apache-2.0"),
    "bert_minilm": Public(
        f"{HUB}/sentence-transformers/all-MiniLM-L6-v2/resolve/main/model.safetensors", 0.09,
        "Apache-2.0"),
    "bert_vocab": Public(     # all three share it
        f"{HUB}/google-bert/bert-base-uncased/resolve/main/vocab.txt", 0.0002, "Apache-2.0"),
    "deberta_base": Public(
        f"{HUB}/microsoft/deberta-base/resolve/main/pytorch_model.bin", 0.56, "MIT"),
    "deberta_large": Public(
        f"{HUB}/microsoft/deberta-large/resolve/main/pytorch_model.bin", 1.63, "MIT"),
    "deberta_vocab": Public(
        f"{HUB}/microsoft/deberta-base/resolve/main/bpe_encoder.bin", 0.004, "MIT"),
    "resnet18": Public(f"{PYTORCH}/resnet18-f37072fd.pth", 0.05, "BSD-3-Clause", "f37072fd"),
    # There are two ResNet-152; this is V1.
    "resnet152": Public(f"{PYTORCH}/resnet152-394f9c45.pth", 0.24, "BSD-3-Clause", "394f9c45"),
}


def download(name, folder="checkpoints"):
    """The path of a public file, `folder/name/file`. It is fetched when it is not there yet.

    The folder has the name of the encoder, since many files have the same name. Raises
    ConnectionError when the file cannot be fetched whole, and says its URL, size and place.
    """
    if name not in PUBLIC:
        raise ValueError(f"no public checkpoint is known for {name!r};"
                         f" there are {', '.join(PUBLIC)}")
    url, gigabytes, _, sha256 = PUBLIC[name]
    path = place(name, folder)
    if "://" not in url:
        check_shipped(path, sha256)
    if path.is_file():
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        ask = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "torch.hub"})
        with urllib.request.urlopen(ask, timeout=30) as reply:
            size = reply.headers["Content-Length"]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial), sha256)
        # A connection that breaks off looks like the end of the file.
        if size and partial.stat().st_size != int(size):
            raise OSError(f"got {partial.stat().st_size} of {size} bytes")
        partial.replace(path)     # only a whole file gets the real name
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({gigabytes} GB): {error};"
                              f" fetch it elsewhere and put it at {path}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def place(name: str, folder="checkpoints") -> Path:
    """Where the public file of an encoder is, or would be."""
    url = PUBLIC[name].url
    if "://" not in url:
        return PROJECT / url
    return Path(folder) / name / url.rsplit("/", 1)[1]


def check_shipped(path: Path, sha256: str) -> None:
    """Raises ValueError when a file of this project is not the one that it came with."""
    found = "not there"
    if path.is_file():
        found = hashlib.sha256(path.read_bytes()).hexdigest()[:len(sha256)]
    if found != sha256:
        raise ValueError(f"{path} is not the file that this project came with (sha256 {found}, not"
                         f" {sha256}): get it again, or load your own with --pretrained PATH")


# ---- What they call our tensors ----

class Layout(NamedTuple):
    name: str
    prefix: str                         # of every public name
    rename: list[tuple[str, str]]       # (ours, public), in this order; ours matches whole parts
    ignored: str                        # a pattern for the tensors in the file that are not ours


# The tables go from our names to the public ones and serve both directions. Loading asks the file
# for the public name of each of our tensors. Exporting stores each tensor under that name.
# Where query, key and value get one name, the file has the three packed in one tensor.
POST_NORM = [
    ("blocks", "encoder.layer"), ("attention.out", "attention.output.dense"),
    ("norm1", "attention.output.LayerNorm"), ("fc1", "intermediate.dense"),
    ("fc2", "output.dense"), ("norm2", "output.LayerNorm"),
    ("words", "embeddings.word_embeddings"), ("norm_embed", "embeddings.LayerNorm"),
]
PACKED = [
    ("attention.(query|key|value).(weight|bias)", r"attn.in_proj_\2"),
    ("attention.out", "attn.out_proj"),
]
AUDIO = "modality_preprocessors.audio"

LAYOUTS = {
    ViT: Layout("OpenCLIP", prefix="visual.", rename=[
        ("patch", "conv1"), ("cls_token", "class_embedding"), ("positions", "positional_embedding"),
        ("norm_pre", "ln_pre"), ("norm", "ln_post"), ("blocks", "transformer.resblocks"),
        ("norm1", "ln_1"), ("norm2", "ln_2"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj"), *PACKED,
    ], ignored=r"visual\.proj$|(transformer|token_embedding|ln_final)\."
               r"|(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$"),

    AudioViT: Layout("ImageBind", prefix="", rename=[
        ("patch", f"{AUDIO}.rgbt_stem.proj"), ("norm_patch", f"{AUDIO}.rgbt_stem.norm_layer"),
        ("cls_token", f"{AUDIO}.cls_token"),
        ("positions", f"{AUDIO}.pos_embedding_helper.pos_embed"),
        ("norm", "modality_heads.audio.0"), ("blocks", "modality_trunks.audio.blocks"),
        (r"norm(\d)", r"norm_\1"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), *PACKED,
        ("attention", "attn"),
    ], ignored=r"modality_\w+\.(?!audio\.)|modality_heads\.audio\.2\.weight$"
               r"|modality_postprocessors\.audio\.1\.log_logit_scale$"),

    BERT: Layout("BERT", prefix="bert.", rename=[
        *POST_NORM, ("attention.(query|key|value)", r"attention.self.\1"),
        ("positions", "embeddings.position_embeddings"),
        ("segments", "embeddings.token_type_embeddings"), ("pooler", "pooler.dense"),
        ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"),
    ], ignored=r"cls\.|bert\.embeddings\.position_ids$"),

    # Only the head of pre-training reads DeBERTa's position_embeddings.
    DeBERTa: Layout("DeBERTa v1", prefix="deberta.", rename=[
        *POST_NORM, ("attention.(query|key|value).weight", "attention.self.in_proj.weight"),
        ("attention.query.bias", "attention.self.q_bias"),
        ("attention.value.bias", "attention.self.v_bias"),
        ("attention.pos_key", "attention.self.pos_proj"),
        ("attention.pos_query", "attention.self.pos_q_proj"),
        ("relative", "encoder.rel_embeddings"),
    ], ignored=r"lm_predictions\.|cls\."
               r"|deberta\.embeddings\.(position_embeddings\.weight|position_ids)$"),

    ResNet: Layout("torchvision ResNet", prefix="", rename=[], ignored=r"fc\."),
}

# How a name starts -> what the file is. It makes error messages clearer.
TELLTALES = {
    "visual.": "OpenCLIP", "modality_": "ImageBind", "bert.": "BERT", "deberta.": "DeBERTa",
    "layer1.": "torchvision ResNet",
    "vision_model.": "CLIP as the transformers library stores it"
                     " (take the open_clip_* file beside it)",
}
COUNTER = "num_batches_tracked"     # of BatchNorm: inference never reads it, older files lack it


def public_names(encoder, in_file=None):
    """{public name: [names of ours that it holds]}.

    `in_file`, the names in one file, decides where spellings differ between files.
    """
    layout = LAYOUTS[type(encoder)]
    rename = list(layout.rename)
    if in_file is not None and not any(name.endswith(".gamma") for name in in_file):
        # Copies of BERT that newer code has saved.
        rename += [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")]
    names = {}
    for ours in encoder.state_dict():
        if "lora_A" in ours:
            raise ValueError("public checkpoints know no LoRA: load before add_lora,"
                             " and export after merge_lora")
        public = ours
        for pattern, replacement in rename:
            public = re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", replacement, public)
        names.setdefault(layout.prefix + public, []).append(ours)
    return names


def pack(encoder, tensors):
    """Query, key and value in one tensor, as public files have them. One tensor stays as it is."""
    if len(tensors) == 1:
        return tensors[0]
    if isinstance(encoder, DeBERTa):
        # Head by head: q, k, v of head 0, then of head 1, ... Thirds would fit, too, and be wrong.
        heads = encoder.blocks[0].attention.heads
        by_head = [t.unflatten(0, (heads, -1)) for t in tensors]     # 3 x (H, d, D)
        return torch.stack(by_head, dim=1).flatten(0, 2)             # (H, 3, d, D) -> (3D, D)
    return torch.cat(tensors)                                        # [q; k; v], (3D, D)


def unpack(encoder, tensor, count):
    """The inverse of `pack`: `count` tensors out of one."""
    if count == 1:
        return [tensor]
    if isinstance(encoder, DeBERTa):
        heads = encoder.blocks[0].attention.heads
        by_head = tensor.unflatten(0, (heads, count, -1)).unbind(1)  # (3D, D) -> 3 x (H, d, D)
        return [t.flatten(0, 1) for t in by_head]                    # 3 x (D, D)
    return tensor.chunk(count)


# ---- Reading and writing ----

def read(path):
    """(names, get): the names of a file's tensors, and a function from a name to its tensor.

    A tensor's bytes are read only when it is asked for. So ImageBind's audio trunk costs 0.35 of
    its 4.8 GB. Raises FileNotFoundError, or ValueError when the file is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the checkpoint itself:"
                         " fetch it with `git lfs pull`")
    if head.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a checkpoint: check the address it came from")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return list(file.keys()), file.get_tensor
        # weights_only: a pickle from the network must not run code.
        # mmap needs the zip form, which torch.save writes since version 1.6.
        is_zip = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:     # a damaged file can make the readers raise almost anything
        raise ValueError(f"{path} cannot be read as a checkpoint, perhaps it is cut short"
                         f" ({type(error).__name__})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        # A training checkpoint of open_clip: the weights and more.
        state = {name.removeprefix("module."): t for name, t in state["state_dict"].items()}
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    return list(state), state.__getitem__


def load_public(encoder, path):
    """Fill `encoder` from a public checkpoint (.safetensors, .bin, .pth) and return it.

    Any mismatch raises ValueError and changes nothing. A ResNet for other than three channels gets
    its first layer as temporal segment networks do (Wang et al. 2016): see `to_channels`.
    """
    names, get = read(path)
    table = public_names(encoder, names)
    layout = LAYOUTS[type(encoder)]
    complaint = f"{path} does not fit {type(encoder).__name__}: "
    if table.keys().isdisjoint(names):
        raise ValueError(complaint + f"that needs a checkpoint of {layout.name},"
                                     f" this one holds {guess(names)}")

    own = encoder.state_dict()
    state, wrong = {}, []
    for public, ours in table.items():
        if public not in names:
            continue
        tensor = get(public)
        shape = own[ours[0]].shape
        if len(ours) > 1:
            shape = (len(ours) * shape[0], *shape[1:])     # packed: rows under rows
        if public == "conv1.weight" and isinstance(encoder, ResNet):
            tensor = to_channels(tensor, shape[1])
        if tensor.shape == shape:
            state.update(zip(ours, unpack(encoder, tensor, len(ours))))
        else:
            wrong.append(f"{public} {list(tensor.shape)}, not {list(shape)}")

    missing = [n for n in table if n not in names and not n.endswith(COUNTER)]
    unexpected = [n for n in names if n not in table and not re.match(layout.ignored, n)]
    problems = []
    for what, which in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if which:
            listed = which if len(which) <= 3 else [*which[:3], "..."]
            problems.append(f"{len(which)} {what} ({', '.join(listed)})")
    if problems:
        raise ValueError(complaint + "; ".join(problems))
    encoder.load_state_dict(state)     # strict as well; BatchNorm itself fills in a missing counter
    return encoder


def guess(names):
    """What a file with these names seems to be."""
    for start, what in TELLTALES.items():
        if any(name.startswith(start) for name in names):
            return what
    return f"{names[:1]} ..."


def to_channels(weight, channels):
    """A first layer for another number of channels: its mean over RGB, once for each channel."""
    if weight.shape[1:2] != (3,) or channels == 3:
        return weight
    return weight.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)     # (64, channels, 7, 7)


def public_state(encoder, reference=None):
    """`load_public` backwards: the encoder's tensors, named and packed as in public files.

    `reference`, the public file that the encoder came from, decides what differs between files:
    gamma or weight, counters or none, data type. ValueError where a tensor no longer fits it.
    """
    names, get = read(reference) if reference else (None, None)
    own = encoder.state_dict()
    state = {}
    for public, ours in public_names(encoder, names).items():
        tensor = pack(encoder, [own[name] for name in ours]).cpu()
        if reference:
            if public not in names and public.endswith(COUNTER):
                continue
            like = get(public) if public in names else None
            if like is None or like.shape != tensor.shape:
                # Among others, the averaged first layer of a flow network.
                raise ValueError(f"{public} {list(tensor.shape)} has no place in {reference};"
                                 " without a source it is written as it is")
            tensor = tensor.to(like.dtype)
        state[public] = tensor.contiguous()
    return state


def export_public(encoder, path, source=None):
    """Write the encoder as a public file: .safetensors, .bin or .pth, by the suffix of `path`.

    `source` is the public file that it came from. All that is not the encoder's (text tower,
    projection, heads) is taken from there, so that the upstream library loads the file strictly.
    """
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
