"""Models of runs: new ones for prepared data, and those of finished runs."""
from pathlib import Path

from torch import nn

from encoders import BERT, BUILD, AudioViT, DeBERTa, ResNet, UnimodalModel, ViT, build
from harness import files, fingerprint, runs, stored
from lora import add_lora
from pretrained import checkpoints

READS = {ViT: ("frames", "image"), AudioViT: ("audio",), BERT: ("text",), DeBERTa: ("text",),
         ResNet: ("frames", "image", "flow", "audio")}


def new_model(name: str, info: dict, modality: str) -> UnimodalModel:
    """An untrained encoder and linear head for a prepared data set; `info` is its dataset.json.

    Raises ValueError when the encoder cannot read what was prepared.
    """
    if modality not in info["modalities"]:
        raise ValueError(f"{info['name']} has no modality {modality}, but"
                         f" {', '.join(info['modalities'])}")
    kind, shape = info["modalities"][modality], info["shapes"][modality]
    family = BUILD[name][0] if name in BUILD else None
    if family and kind not in READS[family]:
        raise ValueError(f"encoder {name} reads {' or '.join(READS[family])}, but {modality} of"
                         f" {info['name']} is {kind}")
    options = {}
    if family is ResNet:
        options["in_channels"] = 1 if kind == "audio" else shape[1]
    if kind == "text" and family:
        options["vocab_size"] = vocabulary_size(name, info)
    encoder = build(name, **options)
    if isinstance(encoder, AudioViT) and tuple(shape[-2:]) != tuple(encoder.mel):
        raise ValueError(f"encoder {name} takes spectrograms of {encoder.mel}, but {info['name']}"
                         f" holds {tuple(shape[-2:])}")
    return UnimodalModel(encoder, len(info["classes"]))


def vocabulary_size(name: str, info: dict) -> int:
    """The size of the vocabulary whose token ids the encoder reads in these data."""
    family, sizes = BUILD[name]
    there = [info["tokenizer"], *(info.get("other_tokenizers") or [])]
    fitting = [tokenizer for tokenizer in there if tokenizer["kind"] == family.tokenizer]
    if not fitting:
        raise ValueError(f"encoder {name} needs {family.tokenizer} token ids, but {info['name']}"
                         f" was prepared with a {there[0]['kind']} tokenizer")
    size = fitting[0]["vocab_size"]
    trained_from_scratch = "small" in name                # so any vocabulary will do
    if not trained_from_scratch and size != sizes["vocab_size"]:
        raise ValueError(f"encoder {name} knows {sizes['vocab_size']} tokens, but {info['name']}"
                         f" was prepared with a vocabulary of {size}; prepare it with the"
                         " encoder's own")
    return size


def pretrained_model(settings: dict, modality: str, info: dict) -> UnimodalModel:
    """Encoder and new head of a run with these settings.

    It starts from what settings["pretrained"] says: a file, "none" for random weights, or the
    encoder's own name for its public checkpoint, which is downloaded once.
    """
    if "encoders" in settings:                            # of a joint run
        encoder, start = settings["encoders"][modality], settings["pretrained"][modality]
    else:
        encoder, start = settings["encoder"], settings["pretrained"]
    model = new_model(encoder, info, modality)
    set_drop_path(model, settings)
    if start == encoder:
        try:
            file = checkpoints.download(encoder)
        except ConnectionError as error:
            raise ConnectionError(f"{error}. Without a network: --pretrained none (random weights)"
                                  " with a small encoder (--help), or --dataset toy") from None
        checkpoints.load_public(model.encoder, file)
    elif start != "none":
        checkpoints.load_public(model.encoder, Path(start))
    return model


def set_drop_path(model: nn.Module, settings: dict) -> None:
    """--drop-path: the rate of the last block; it falls linearly to 0 at the first."""
    if "drop_path" not in settings:
        return
    for encoder in model.modules():
        if isinstance(encoder, AudioViT):
            last = max(len(encoder.blocks) - 1, 1)
            for i, block in enumerate(encoder.blocks):
                block.drop_path = settings["drop_path"] * i / last


def load_unimodal(run: runs.Run, info: dict) -> UnimodalModel:
    """The fine-tuned model of a finished run of step 1."""
    modality = run.settings["modality"]
    models = nn.ModuleDict({modality: new_model(run.settings["encoder"], info, modality)})
    check_names(run.folder / "model.safetensors", *fill(models, run.folder))
    return models[modality]


def fill(models: nn.ModuleDict, folder: Path) -> tuple[list, list]:
    """Put a run's stored weights into its models.

    -> names that the file lacks, names that it has too many. Raises ValueError where the file
    is damaged or holds other shapes.
    """
    file = folder / "model.safetensors"
    tensors, _ = files.read_tensors(file)
    try:
        return models.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read into the model of its config.json:"
                         f" {str(error).splitlines()[-1].strip()}") from None


def check_names(file: Path, missing: list, unexpected: list) -> None:
    wrong = [*missing, *unexpected]
    if wrong:
        raise ValueError(f"{file} does not fit its config.json: {wrong[0]}"
                         f" and {len(wrong) - 1} more")


def load_run(folder: Path, info: dict, encoders_only=False) -> tuple[dict, nn.ModuleDict]:
    """-> (settings, models by modality) of a finished run, with LoRA in place where it has LoRA.

    encoders_only: the heads may mean nothing, as after a run of `baselines/`, which has a head of
    its own. Raises ValueError when the run's uni-modal models have changed since, or a file does
    not fit.
    """
    stored.check_finished(folder)
    settings = stored.read_config(folder)["settings"]
    encoders = stored.encoders_of(settings)
    models = nn.ModuleDict({m: new_model(name, info, m) for m, name in encoders.items()})
    adapted = settings["method"] in stored.ADAPTED
    if adapted:
        for base in settings["unimodal"].values():
            file = folder.parent / base["run"] / "model.safetensors"
            if not file.exists() or fingerprint.sha256(file) != base.get("sha256"):
                raise ValueError(f"{file} is not the model that {folder} was trained on; run the"
                                 " command that made it again")
            fill(models, file.parent)
    for m in settings.get("lora") or ():
        add_lora(models[m], settings["rank"])
    missing, unexpected = fill(models, folder)
    if adapted:                                           # the rest came from the uni-modal runs
        missing = [name for name in missing if name.endswith(("lora_A", "lora_B"))]
    wrong = [n for n in missing + unexpected if ".encoder." in n or not encoders_only]
    check_names(folder / "model.safetensors", wrong, [])
    return settings, models.eval()
