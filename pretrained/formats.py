"""Checkpoint files on the disk: their tensors, and why we do not take some of them."""
import argparse
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open

# The names that the hub uses: open_clip's first, then transformers'.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin",
           "model.safetensors", "pytorch_model.bin")
WEB_PAGE = re.compile(rb"\s*<(!|\?xml|html|head)", re.IGNORECASE)
ONE_FILE = "take a repository with all weights in one file"
TORCHSCRIPT = ("is a TorchScript archive, a program and not only weights: of OpenAI's CLIP take the"
               " open_clip_* file of timm/vit_base_patch16_clip_224.openai on the hub")


def weights_in(folder: Path) -> Path:
    """The file with the weights in a folder of the hub. Raises FileNotFoundError or ValueError."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if list(folder.glob("*.index.json")):
        raise ValueError(f"{folder} has its weights in several shards: {ONE_FILE}")
    raise FileNotFoundError(f"no weights in {folder}: it holds none of {', '.join(WEIGHTS)}")


def read(path):
    """(names, get): the names of a file's tensors, and a function from a name to its tensor.

    `path` may be a folder of the hub. A tensor's bytes are read only when it is asked for. So
    ImageBind's audio trunk costs 0.35 of its 4.8 GB. Raises FileNotFoundError, or ValueError when
    the file is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    is_zip = zipfile.is_zipfile(path)
    refuse(path, is_zip)
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            names = without_module({name: name for name in file.keys()})
            return list(names), lambda name: file.get_tensor(names[name])
        # weights_only: a pickle from the network must not run code. Training scripts store their
        # arguments beside the weights, and a Namespace has no code.
        # mmap needs the zip form, which torch.save writes since version 1.6.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:     # a damaged file can make the readers raise almost anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ValueError(f"{path} cannot be read without running code, which we never do: it"
                             f" holds Python objects ({found[1]}), not only tensors; where it was"
                             " made, save model.state_dict() instead") from None
        raise ValueError(f"{path} cannot be read as a checkpoint, perhaps it is cut short"
                         f" ({type(error).__name__})") from error
    state = unwrap(state, path)
    return list(state), state.__getitem__


def check_numbers(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for weights that are whole numbers, NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(f"{path} is damaged: {name} holds NaN, infinity or whole numbers"
                         f" ({tensor.dtype})")


def refuse(path: Path, is_zip: bool) -> None:
    """Raises ValueError for a file that is no checkpoint, or not a whole one."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the checkpoint itself:"
                         " fetch it with `git lfs pull`")
    if WEB_PAGE.match(head):
        raise ValueError(f"{path} is a web page, not a checkpoint: check the address it came from")
    if re.search(r"-\d+-of-\d+\.\w+$", path.name):
        raise ValueError(f"{path} is one shard of several: {ONE_FILE}")
    try:
        inside = zipfile.ZipFile(path).namelist() if is_zip else []
    except Exception:              # a damaged list of contents, which torch.load will not read
        inside = []
    if any(name.endswith("/constants.pkl") for name in inside):
        raise ValueError(f"{path} {TORCHSCRIPT}")


def unwrap(state, path="it") -> dict[str, torch.Tensor]:
    """The tensors out of what a training script has saved: weights, and more beside them."""
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    return without_module(state)


def without_module(state: dict) -> dict:
    """DistributedDataParallel puts "module." before every name."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


# ---- Other architectures ----

A_BERT = "a BERT, such as google-bert/bert-base-uncased or sentence-transformers/all-MiniLM-L6-v2"
A_DEBERTA = "version 1, microsoft/deberta-base or microsoft/deberta-large"
A_VIT = "an OpenCLIP ViT, such as laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
THE_SAME = ("the open_clip_* file beside it; of OpenAI's CLIP that of"
            " timm/vit_base_patch16_clip_224.openai")

# model_type in config.json: (what it is, how names start, what to take instead)
FOREIGN = {
    "roberta": ("RoBERTa", r"roberta\.", A_BERT),
    "xlm-roberta": ("XLM-RoBERTa", r"$", A_BERT),
    "distilbert": ("DistilBERT", r"distilbert\.|transformer\.layer\.0\.attention\.q_lin", A_BERT),
    "electra": ("ELECTRA", r"electra\.|discriminator_predictions\.|embeddings_project\.", A_BERT),
    "albert": ("ALBERT", r"albert\.|encoder\.albert_layer_groups", A_BERT),
    "deberta-v2": ("DeBERTa version 2 or 3",
                   r"(deberta\.)?encoder\.layer\.0\.attention\.self\.query_proj", A_DEBERTA),
    "siglip": ("SigLIP", r"(vision_model\.)?embeddings\.patch_embedding\.bias", A_VIT),
    "timm_wrapper": ("SigLIP, ConvNeXt or another model that OpenCLIP takes from timm",
                     r"visual\.trunk\.", A_VIT),
    "clip_resnet": ("a ResNet of CLIP", r"visual\.layer1\.", A_VIT),
    "clip": ("CLIP as the transformers library stores it", r"(vision|text)_model\.", THE_SAME),
    "clip_vision_model": ("CLIP's ViT as the transformers library stores it",
                          r"embeddings\.class_embedding", THE_SAME),
    "vit": ("a ViT of timm or transformers, not of CLIP",
            r"blocks\.0\.attn\.qkv\.|patch_embed\.|(vit\.)?embeddings\.patch_embeddings\.", A_VIT),
}
OURS = {"visual.": "OpenCLIP", "modality_": "ImageBind", "bert.": "BERT", "deberta.": "DeBERTa v1",
        "layer1.": "torchvision ResNet"}


def foreign(names) -> str | None:
    """What other architecture these names are of, and what to take instead; None if of none."""
    for what, start, instead in FOREIGN.values():
        if any(re.match(start, name.removeprefix("model.")) for name in names):
            return f"{what}; take {instead}"
    return None


def guess(names) -> str:
    """What a file with these names seems to be."""
    for start, what in OURS.items():
        if any(name.removeprefix("model.").startswith(start) for name in names):
            return what
    return f"{names[:1]} ..."
