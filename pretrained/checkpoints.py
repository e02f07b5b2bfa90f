"""Public checkpoints: where they are, what they call our tensors, how to load and to export them.

    encoder = load_public(build("vit_b16"), download("vit_b16"))
    export_public(encoder, "tuned.safetensors", source=download("vit_b16"))
    encoder = load_folder("downloads/all-MiniLM-L6-v2")      # of any size, config.json says which

Loading is strict. A tensor that is missing, unexpected or of another shape is an error that names
it. An encoder that silently keeps some random weights still trains, only worse.
"""
import hashlib
import http.client
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from encoders import BERT, AudioViT, DeBERTa, ResNet, ViT, build
from pretrained import configs, formats, remote
from pretrained.formats import read


# ---- Where they are ----

class Public(NamedTuple):
    url: str                      # or a path in this project
    gigabytes: float
    licence: str
    sha256: str | None = None     # the first digits, where the publisher gives them
    tower: float | None = None    # gigabytes of the encoder alone, where only it is fetched


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
    "vit_b16": Public(f"{HUB}/laion/CLIP-ViT-B-16-laion2B-s34B-b88K/{OPENCLIP}", 0.60, "MIT",
                      tower=0.34),
    "vit_b32": Public(f"{HUB}/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/{OPENCLIP}", 0.61, "MIT",
                      tower=0.35),
    "vit_l14": Public(f"{HUB}/laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K/{OPENCLIP}", 1.71, "MIT",
                      tower=1.21),
    "audio_vit_b": Public(f"{META}/imagebind_huge.pth", 4.80, "CC-BY-NC-SA 4.0", tower=0.34),
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
    """The path of a public file, or of the encoder's tensors out of it. See `place`.

    It is fetched when it is not there yet. A download that was stopped goes on where it stopped.
    Raises ConnectionError when it cannot be fetched whole, and says URL, size and place.
    """
    if name not in PUBLIC:
        raise ValueError(f"no public checkpoint is known for {name!r};"
                         f" there are {', '.join(PUBLIC)}")
    url, gigabytes, _, sha256, part = PUBLIC[name]
    path = place(name, folder)
    if "://" not in url:
        check_shipped(path, sha256)
        return path
    if path.is_file():
        remote.check_once(path, sha256)
        return path
    whole = path.with_name(url.rsplit("/", 1)[1])
    try:
        file = remote.RemoteFile(url)
        if part:
            try:
                return download_tower(name, file, path)
            except remote.NoParts as error:
                print(f"{url}: {error}; fetching the whole file, {gigabytes} GB instead of {part}",
                      flush=True)
        remote.fetch_file(file, whole, sha256)
    except (OSError, http.client.HTTPException, remote.NoParts) as error:
        later = ", or run this again: it goes on" if list(path.parent.glob("*.partial")) else ""
        raise ConnectionError(f"cannot download {url} ({gigabytes} GB): {error};"
                              f" fetch it elsewhere and put it at {whole}{later}") from error
    return whole


def download_tower(name: str, file: remote.RemoteFile, path: Path) -> Path:
    """Fetch only the tensors of the encoder. Raises remote.NoParts where that is not possible."""
    there = remote.index_of(file)
    with torch.device("meta"):
        wanted = public_names(build(name), list(there))
    remote.fetch_tensors(file, {n: there[n] for n in wanted if n in there}, path)
    return path


def place(name: str, folder="checkpoints") -> Path:
    """Where the public file of an encoder is, or would be: `folder/name/file`.

    The folder has the name of the encoder, since many files have the same name. Where only the
    encoder's tensors are fetched, these have a file of their own, `....tower.safetensors`. A whole
    file in its place is taken, too.
    """
    url = PUBLIC[name].url
    if "://" not in url:
        return PROJECT / url
    whole = Path(folder) / name / url.rsplit("/", 1)[1]
    if PUBLIC[name].tower and not whole.is_file():
        return whole.with_suffix(".tower.safetensors")
    return whole


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
    rename: list[tuple[str, str]]       # (ours, public), in this order; ours matches whole parts
    # How all public names begin -> a pattern for the tensors in such a file that are not ours.
    # The first is the public file's own. "" is that of a model without its heads or other towers.
    prefixes: dict[str, str]


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
HEADS = r"(cls|classifier|qa_outputs|lm_predictions)\."

LAYOUTS = {
    ViT: Layout("OpenCLIP", [
        ("patch", "conv1"), ("cls_token", "class_embedding"), ("positions", "positional_embedding"),
        ("norm_pre", "ln_pre"), ("norm", "ln_post"), ("blocks", "transformer.resblocks"),
        ("norm1", "ln_1"), ("norm2", "ln_2"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj"), *PACKED,
    ], {"visual.": r"visual\.proj$|(text|transformer|token_embedding|ln_final)\."
                   r"|(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$",
        "": "proj$"}),

    AudioViT: Layout("ImageBind", [
        ("patch", f"{AUDIO}.rgbt_stem.proj"), ("norm_patch", f"{AUDIO}.rgbt_stem.norm_layer"),
        ("cls_token", f"{AUDIO}.cls_token"),
        ("positions", f"{AUDIO}.pos_embedding_helper.pos_embed"),
        ("norm", "modality_heads.audio.0"), ("blocks", "modality_trunks.audio.blocks"),
        (r"norm(\d)", r"norm_\1"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), *PACKED,
        ("attention", "attn"),
    ], {"": r"modality_\w+\.(?!audio\.)|modality_heads\.audio\.2\.weight$"
            r"|modality_postprocessors\.audio\.1\.log_logit_scale$"}),

    BERT: Layout("BERT", [
        *POST_NORM, ("attention.(query|key|value)", r"attention.self.\1"),
        ("positions", "embeddings.position_embeddings"),
        ("segments", "embeddings.token_type_embeddings"), ("pooler", "pooler.dense"),
    ], {"bert.": HEADS + r"|bert\.embeddings\.position_ids$",
        "": HEADS + r"|embeddings\.position_ids$"}),

    # Only the head of pre-training reads DeBERTa's position_embeddings.
    DeBERTa: Layout("DeBERTa v1", [
        *POST_NORM, ("attention.(query|key|value).weight", "attention.self.in_proj.weight"),
        ("attention.query.bias", "attention.self.q_bias"),
        ("attention.value.bias", "attention.self.v_bias"),
        ("attention.pos_key", "attention.self.pos_proj"),
        ("attention.pos_query", "attention.self.pos_q_proj"),
        ("relative", "encoder.rel_embeddings"),
    ], {"deberta.": HEADS + r"|pooler\."
                    r"|deberta\.embeddings\.(position_embeddings\.weight|position_ids)$",
        "": HEADS + r"|pooler\.|embeddings\.(position_embeddings\.weight|position_ids)$"}),

    ResNet: Layout("torchvision ResNet", [], {"": r"fc\."}),
}

COUNTER = "num_batches_tracked"     # of BatchNorm: inference never reads it, older files lack it


def public_names(encoder, in_file=None):
    """{public name: [names of ours that it holds]}.

    `in_file`, the names in one file, decides where spellings differ between formats.
    """
    return spelling(encoder, in_file)[0]


def spelling(encoder, in_file=None):
    """-> `public_names`, and a pattern for those tensors in the file that are not the encoder's."""
    layout = LAYOUTS[type(encoder)]
    there, rename = set(in_file or ()), list(layout.rename)
    if any(name.endswith("LayerNorm.gamma") for name in there):
        # Google's own files of BERT.
        rename += [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    names = {}
    for ours in encoder.state_dict():
        if "lora_A" in ours:
            raise ValueError("public checkpoints know no LoRA: load before add_lora,"
                             " and export after merge_lora")
        public = ours
        for pattern, replacement in rename:
            public = re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", replacement, public)
        names.setdefault(public, []).append(ours)

    most, start, not_ours = -1, "", ""
    for outer in ("", "model."):     # "model.": out of a larger model
        for prefix, ignored in layout.prefixes.items():
            found = sum(outer + prefix + public in there for public in names)
            if found > most:         # of equal ones the first, the public file's own
                most, start, not_ours = found, outer + prefix, f"({outer})?({ignored})"
    return {start + public: ours for public, ours in names.items()}, not_ours


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

def load_public(encoder, path):
    """Fill `encoder` from a public checkpoint (.safetensors, .bin, .pth) and return it.

    Any mismatch raises ValueError and changes nothing. A ResNet for other than three channels gets
    its first layer as temporal segment networks do (Wang et al. 2016): see `to_channels`.
    """
    path = Path(path)
    names, get = read(path)
    table, not_ours = spelling(encoder, names)
    complaint = f"{path} does not fit {type(encoder).__name__}: "
    other = formats.foreign(names)
    if isinstance(encoder, (BERT, DeBERTa)):     # RoBERTa's tensors have the names of BERT's
        other = other or configs.foreign_beside(path)
    if other:
        raise ValueError(complaint + f"it holds {other}")
    needs, holds = LAYOUTS[type(encoder)].name, formats.guess(names)
    if needs != holds and len(table.keys() & set(names)) < len(table) / 2:
        raise ValueError(complaint + f"that needs a checkpoint of {needs}, this one holds {holds}")

    own = encoder.state_dict()
    state, wrong = {}, []
    for public, ours in table.items():
        if public not in names:
            continue
        tensor = get(public)
        if not public.endswith(COUNTER):
            formats.check_numbers(path, public, tensor)
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
    unexpected = [n for n in names if n not in table and not re.match(not_ours, n)]
    problems = []
    for what, which in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if which:
            listed = which if len(which) <= 3 else [*which[:3], "..."]
            problems.append(f"{len(which)} {what} ({', '.join(listed)})")
    if problems:
        raise ValueError(complaint + "; ".join(problems))
    encoder.load_state_dict(state)     # strict as well; BatchNorm itself fills in a missing counter
    if isinstance(encoder, ViT):
        name = path.stem if path.stem in PUBLIC else path.parent.name     # checkpoints/vit_b16/file
        configs.choose_activation(encoder, path, PUBLIC[name].url if name in PUBLIC else "")
    return encoder


def load_folder(folder):
    """The encoder that a folder of the hub holds, of any size, with its weights.

    BERT and DeBERTa: config.json beside the weights; a ViT of OpenCLIP: open_clip_config.json.
    Raises FileNotFoundError, or ValueError when it is something else; as strict as `load_public`.
    """
    folder = Path(folder)
    return load_public(configs.make(*configs.read_config(folder)), folder)


def to_channels(weight, channels):
    """A first layer for another number of channels: its mean over RGB, once for each channel."""
    if weight.shape[1:2] != (3,) or channels == 3:
        return weight
    return weight.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)     # (64, channels, 7, 7)


def public_state(encoder, reference=None):
    """`load_public` backwards: the encoder's tensors, named and packed as in public formats.

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
    for copy in names or ():
        # The head that predicts words has the word embeddings once more, where they were tied.
        if copy.endswith("predictions.decoder.weight") and hasattr(encoder, "words"):
            words = next(n for n in state if n.endswith("word_embeddings.weight"))
            if torch.equal(get(copy), get(words)):
                state[copy] = state[words].clone()
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
