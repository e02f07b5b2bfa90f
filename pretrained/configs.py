"""What a folder of the hub says of its weights: sizes, activation, vocabulary.

Beside the weights lies config.json (transformers: BERT, DeBERTa) or open_clip_config.json (ViT).
Our encoders compute these architectures as the public weights need them. So every setting
that they do not follow is an error that names it.
"""
import os
import re
from pathlib import Path

from torch.nn import functional as F

from data import read_json
from encoders import BERT, BUILD, DeBERTa, ViT
from pretrained.formats import FOREIGN, weights_in
from pretrained.tokenizer import Tokenizer, load_tokenizer

FAMILIES = {"bert": BERT, "deberta": DeBERTa, "vit": ViT}

# What our encoders compute. A key that is not in config.json has the value in the second place.
TRANSFORMER = dict(hidden_act=("gelu", "gelu"), pad_token_id=(0, 0))
ONLY = {
    "bert": dict(TRANSFORMER, layer_norm_eps=(1e-12, 1e-12), type_vocab_size=(2, 2),
                 position_embedding_type=("absolute", "absolute"), is_decoder=(False, False),
                 add_cross_attention=(False, False)),
    "deberta": dict(TRANSFORMER, layer_norm_eps=(1e-7, 1e-7), type_vocab_size=(0, 0),
                    relative_attention=(True, False), position_biased_input=(False, True),
                    talking_head=(False, False), share_att_key=(False, False)),
}
# Of the settings of open_clip's ViT. All that are not here must be off.
FREE = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio",
        "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads",
        "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
        "timm_drop_path"}
DEFAULTS = {"pos_embed_type": "learnable", "pool_type": "tok", "block_type": "default"}

TOKENIZERS = {"wordpiece": ["vocab.txt"],
              "byte_bpe": ["vocab.json", "merges.txt", "bpe_encoder.bin"]}     # the third is enough

# Whole numbers from 1 to these, far above all that is public. A file that says more is damaged, and
# what it says would fill the memory.
MOST = dict(vocab_size=2 ** 24, width=2 ** 14, depth=200, heads=2 ** 10, mlp_width=2 ** 16,
            max_length=2 ** 16, image_size=2 ** 12, patch_size=2 ** 12, mlp_ratio=64)

# Names of files and folders on the hub, where no config lies beside the weights.
QUICK_GELU = r"(?i)openai|quickgelu|dfn[25]b(?!.*39b)|metaclip_(400m|2pt5b|fullcc)"
GELU = r"(?i)laion-?2b|datacomp|commonpool|vit_toy"


def read_config(folder: Path) -> tuple[str, dict]:
    """-> (family, sizes): which encoder the folder holds, and the arguments that build it.

    Raises FileNotFoundError, or ValueError when it is an encoder that we do not have.
    """
    file = folder / "open_clip_config.json"
    if file.is_file():
        return "vit", checked(file, sizes_of_vit(file, read_json(file)))
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json or open_clip_config.json in {folder}: it lies"
                                " beside the weights on the hub")
    config = read_json(file)
    # Google's first BERTs do not say that they are.
    family = str(config.get("model_type", "bert"))
    if family not in ONLY:
        other = (foreign_beside(folder)
                 or f"{family!r:.60}; take a BERT, a DeBERTa or an OpenCLIP ViT")
        raise ValueError(f"{folder} holds {other}")
    return family, checked(file, sizes_of_text(file, family, config))


def checked(file: Path | str, sizes: dict) -> dict:
    """The sizes as they are. Raises ValueError for those that no encoder has."""
    for key, value in sizes.items():
        if key in MOST and (type(value) is not int or not 1 <= value <= MOST[key]):
            raise ValueError(f"{file}: {key} is {value!r:.40}, but it is a number from 1 to"
                             f" {MOST[key]}")
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"{file}: a width of {sizes['width']} does not divide into"
                         f" {sizes['heads']} heads")
    if sizes.get("image_size", 1) % sizes.get("patch_size", 1):
        raise ValueError(f"{file}: an image of {sizes['image_size']} pixels does not divide into"
                         f" patches of {sizes['patch_size']}")
    rate = sizes.get("dropout", 0)
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise ValueError(f"{file}: dropout is {rate!r:.40}, but it is a share from 0 to 1")
    return sizes


def foreign_beside(path: Path) -> str | None:
    """As `formats.foreign`, out of the config.json beside a file or in a folder."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    family = str(read_json(file).get("model_type")) if file.is_file() else None
    if family not in FOREIGN:
        return None
    what, _, instead = FOREIGN[family]
    return f"{what}; take {instead}"


def an_object(value, file: Path) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: {value!r:.40} stands where an object {{...}} should")
    return value


def sizes_of_text(file: Path, family: str, config: dict) -> dict:
    for key, (ours, default) in ONLY[family].items():
        if config.get(key, default) != ours:
            raise ValueError(f"{file}: {key} is {config.get(key, default)!r:.60}, our"
                             f" {FAMILIES[family].__name__} has {ours}")
    dropout = config.get("hidden_dropout_prob", 0.1)
    of_attention = config.get("attention_probs_dropout_prob", 0.1)
    if of_attention != dropout:
        raise ValueError(f"{file}: attention_probs_dropout_prob is {of_attention!r:.60}, and"
                         f" hidden_dropout_prob {dropout!r:.60}: ours are one")
    length = needed(config, "max_position_embeddings", file)
    if family == "deberta":
        terms = config.get("pos_att_type")
        names = terms.split("|") if isinstance(terms, str) else terms
        if names not in (["c2p", "p2c"], ["p2c", "c2p"]):
            raise ValueError(f"{file}: pos_att_type is {terms!r:.60}, our DeBERTa has c2p|p2c")
        if config.get("max_relative_positions", -1) != -1:
            length = config["max_relative_positions"]
    return dict(vocab_size=needed(config, "vocab_size", file),
                width=needed(config, "hidden_size", file),
                depth=needed(config, "num_hidden_layers", file),
                heads=needed(config, "num_attention_heads", file),
                mlp_width=needed(config, "intermediate_size", file),
                max_length=length, dropout=dropout)


def sizes_of_vit(file: Path, config: dict) -> dict:
    model = an_object(needed(config, "model_cfg", file), file)
    vision = an_object(needed(model, "vision_cfg", file), file)
    for key, value in vision.items():
        if key not in FREE and value and value != DEFAULTS.get(key):
            raise ValueError(f"{file}: {key} is {value!r:.60}, which our ViT does not have; take"
                             f" {FOREIGN['vit'][2]}")
    layers, ratio = needed(vision, "layers", file), vision.get("mlp_ratio", 4)
    if not isinstance(layers, int):
        raise ValueError(f"{file}: layers are {layers!r:.60}, so this is a ResNet of CLIP and no"
                         " ViT")
    if isinstance(ratio, float) and ratio.is_integer():
        ratio = int(ratio)
    if not isinstance(ratio, int):
        raise ValueError(f"{file}: mlp_ratio is {ratio!r:.60}, our ViT takes whole numbers")
    size = needed(vision, "image_size", file)
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise ValueError(f"{file}: image_size is {size!r:.60}, our ViT takes squares")
        size = size[0]
    width, of_head = needed(vision, "width", file), vision.get("head_width", 64)
    checked(file, dict(width=width, heads=of_head))
    sizes = dict(image_size=size, patch_size=needed(vision, "patch_size", file), width=width,
                 depth=layers, heads=width // of_head, mlp_ratio=ratio)
    if model.get("quick_gelu"):
        sizes["quick_gelu"] = True
    # Most, not all, were trained with the mean and standard deviation of OpenAI's.
    look, pixels = an_object(config.get("preprocess_cfg", {}), file), []
    for key, ours in zip(("mean", "std"), ViT.pixels):
        pixels.append(look.get(key, list(ours)))
        if not is_colour(pixels[-1]):
            raise ValueError(f"{file}: {key} is {pixels[-1]!r:.40}, but it is three numbers from"
                             " 0 to 1")
    if pixels != [list(ours) for ours in ViT.pixels]:
        sizes["pixels"] = pixels
    return sizes


def is_colour(value) -> bool:
    right = isinstance(value, list) and len(value) == 3
    return right and all(type(part) in (int, float) and 0 < part < 1 for part in value)


def needed(config: dict, key: str, file: Path):
    if key not in config:
        raise ValueError(f"{file} does not say {key}")
    return config[key]


def make(family: str, sizes: dict):
    """The encoder of these sizes, with random weights."""
    sizes = dict(sizes)
    pixels = sizes.pop("pixels", None)
    encoder = FAMILIES[family](**sizes)
    if pixels:
        encoder.pixels = pixels
    return encoder


def tokenizer_in(folder: Path, kind: str) -> Tokenizer | None:
    """The tokenizer of a text encoder's folder; None where its files are not there."""
    config = folder / "tokenizer_config.json"
    cased = config.is_file() and not read_json(config).get("do_lower_case", True)
    if kind == "wordpiece" and cased:
        raise ValueError(f"{folder} has a vocabulary with capital letters, and WordPiece here makes"
                         " all letters small: take an uncased BERT")
    paths = [folder / name for name in TOKENIZERS[kind] if (folder / name).is_file()]
    if kind == "byte_bpe" and len(paths) == 3:     # the same vocabulary twice
        paths.pop()
    return load_tokenizer(*paths) if paths else None


def sizes_in(path: Path, encoder: str) -> dict:
    """What a file or folder says of an encoder beyond its name. Of a folder's encoder, all."""
    if path.is_dir():
        return read_config(path)[1]
    if BUILD[encoder][0] is ViT and wants_quick_gelu(path):
        return dict(quick_gelu=True)
    return {}


def files_of(path: Path) -> list[Path]:
    """The files that decide what an encoder from this file or folder computes."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}")
    names = ("config.json", "open_clip_config.json", *TOKENIZERS["wordpiece"],
             *TOKENIZERS["byte_bpe"])
    return [weights_in(path), *(path / name for name in names if (path / name).is_file())]


def encoder_name(folder: Path) -> str:
    """What a folder's encoder is called in settings and names of runs: "bert-all-MiniLM-L6-v2"."""
    family, _ = read_config(folder)
    folder = Path(os.path.abspath(folder))     # "." has a name, too
    if folder.parent.name == "snapshots":      # the hub's cache: models--org--name/snapshots/hash
        folder = Path(folder.parents[1].name.split("--")[-1])
    return f"{family}-{re.sub('[^A-Za-z0-9.]+', '-', folder.name)}"


def wants_quick_gelu(path: Path, url: str = "") -> bool | None:
    """Whether the weights of a ViT were trained with QuickGELU; None where nothing says it."""
    folder = path if path.is_dir() else path.parent
    if (file := folder / "open_clip_config.json").is_file():
        model = an_object(read_json(file).get("model_cfg", {}), file)
        return bool(model.get("quick_gelu", False))
    if (file := folder / "config.json").is_file():
        config = read_json(file)
        vision = an_object(config.get("vision_config", config), file)
        if "hidden_act" in vision:
            return vision["hidden_act"] == "quick_gelu"
        if "quick_gelu" in config:
            return bool(config["quick_gelu"])
    # The file's own name tells more than those of the folders around it. Four are enough for
    # openai/clip/snapshots/<hash>/<file>, and further up a user's own begin.
    for name in [url, *reversed(path.absolute().parts[-4:])]:
        if re.search(QUICK_GELU, name):
            return True
        if re.search(GELU, name):
            return False
    return None


def choose_activation(encoder: ViT, path: Path, url: str = "") -> None:
    """GELU or QuickGELU: the weights fit both, so nothing fails where it is the wrong one."""
    quick = wants_quick_gelu(path, url)
    if quick:
        encoder.use_quick_gelu()
    elif quick is None and encoder.blocks[0].activation is F.gelu:
        print(f"{path}: nothing says whether this ViT was trained with GELU or QuickGELU; taking"
              " GELU. The open_clip_config.json of these weights, laid beside them, would say it.",
              flush=True)
