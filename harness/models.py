"""Models of runs: new ones for prepared data, and those of finished runs."""
from pathlib import Path

from torch import nn

from encoders import BERT, BUILD, AudioViT, DeBERTa, ResNet, UnimodalModel, ViT, build
from harness import files, fingerprint, metrics, runs, stored
from lora import add_lora
from pretrained import checkpoints, configs

READS = {ViT: ("frames", "image"), AudioViT: ("audio",), BERT: ("text",), DeBERTa: ("text",),
         ResNet: ("frames", "image", "flow", "audio")}


def family_of(name: str) -> type | None:
    """The class of an encoder, by its name; None for a name that there is not.

    "bert-all-MiniLM-L6-v2" is the encoder of a folder, see `configs.encoder_name`.
    """
    if name in BUILD:
        return BUILD[name][0]
    return configs.FAMILIES.get(name.partition("-")[0])


def new_model(name: str, info: dict, modality: str, sizes: dict | None = None) -> UnimodalModel:
    """An untrained encoder and linear head for a prepared data set; `info` is its dataset.json.

    sizes: of the encoder of a folder, all; of others what a file says beyond their name. Raises
    ValueError when the encoder cannot read what was prepared.
    """
    if modality not in info["modalities"]:
        raise ValueError(f"{info['name']} has no modality {modality}, but"
                         f" {', '.join(info['modalities'])}")
    kind, shape = info["modalities"][modality], info["shapes"][modality]
    family, sizes = family_of(name), sizes or {}
    if family and kind not in READS[family]:
        raise ValueError(f"encoder {name} reads {' or '.join(READS[family])}, but {modality} of"
                         f" {info['name']} is {kind}")
    options = {}
    if family is ResNet:
        options["in_channels"] = 1 if kind == "audio" else shape[1]
    if kind == "text" and name in BUILD:
        options["vocab_size"] = vocabulary_size(name, info)
    if name in BUILD or not family:                       # build() says that there is no such name
        encoder = build(name, **sizes, **options)
    else:
        encoder = configs.make(name.partition("-")[0], sizes | options)
    if isinstance(encoder, AudioViT) and tuple(shape[-2:]) != tuple(encoder.mel):
        raise ValueError(f"encoder {name} takes spectrograms of {encoder.mel}, but {info['name']}"
                         f" holds {tuple(shape[-2:])}")
    return UnimodalModel(encoder, len(info["classes"]))


def vocabulary_size(name: str, info: dict) -> int:
    """The size of the vocabulary whose token ids the encoder reads in these data."""
    size, known = vocabulary_of(name, info)["vocab_size"], BUILD[name][1]["vocab_size"]
    trained_from_scratch = name.endswith("_small")        # so any vocabulary will do
    if not trained_from_scratch and size != known:
        raise ValueError(f"encoder {name} knows {known} tokens, but {info['name']}"
                         f" was prepared with a vocabulary of {size}; prepare it with the"
                         " encoder's own")
    return size


def vocabulary_of(name: str, info: dict) -> dict:
    """What dataset.json says of the vocabulary of the kind that the encoder reads."""
    kind = family_of(name).tokenizer
    there = [info["tokenizer"], *(info.get("other_tokenizers") or [])]
    for vocabulary in there:
        if vocabulary["kind"] == kind:
            return vocabulary
    raise ValueError(f"encoder {name} needs {kind} token ids, but {info['name']} was prepared with"
                     f" a {there[0]['kind']} tokenizer")


def check_vocabulary(name: str, encoder: nn.Module, folder: Path, info: dict) -> None:
    """ValueError where the data hold token ids of another vocabulary than the folder's own."""
    learnt, own = vocabulary_of(name, info), configs.tokenizer_in(folder, encoder.tokenizer)
    rows = encoder.words.num_embeddings
    if own is None or "fingerprint" not in learnt:        # the size alone tells something
        same, what = learnt["vocab_size"] == rows, f"knows {rows} tokens"
    else:
        same, what = own.fingerprint == learnt["fingerprint"], "has a vocabulary of its own"
    if not same:
        raise ValueError(f"{folder} {what}, but {info['name']} was prepared with another one, of"
                         f" {learnt['vocab_size']} tokens; prepare it with --tokenizer and the"
                         f" vocabulary of {folder}")


def pretrained_model(settings: dict, modality: str, info: dict) -> UnimodalModel:
    """Encoder and new head of a run with these settings.

    It starts from what settings["pretrained"] says: a file or a folder, "none" for random weights,
    or the encoder's own name for its public checkpoint, which is downloaded once.
    """
    if "encoders" in settings:                            # of a joint run
        encoder, start = settings["encoders"][modality], settings["pretrained"][modality]
    else:
        encoder, start = settings["encoder"], settings["pretrained"]
    model = new_model(encoder, info, modality, sizes_of(settings, modality))
    set_drop_path(model, settings)
    if encoder not in BUILD and info["modalities"][modality] == "text":
        check_vocabulary(encoder, model.encoder, Path(start), info)
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


def sizes_of(settings: dict, modality: str) -> dict | None:
    """What the settings of a run say of an encoder beyond its name."""
    sizes = settings.get("sizes") or {}
    return sizes.get(modality) if "encoders" in settings else sizes


def set_drop_path(model: nn.Module, settings: dict) -> None:
    """--drop-path: the rate of the last block; it falls linearly to 0 at the first."""
    if "drop_path" not in settings:
        return
    for encoder in model.modules():
        if isinstance(encoder, AudioViT):
            last = max(len(encoder.blocks) - 1, 1)
            for i, block in enumerate(encoder.blocks):
                block.drop_path = settings["drop_path"] * i / last


def fold_temperatures(tensors: dict, models: nn.ModuleDict) -> None:
    """Into the heads, in place: z / T = (W / T) h + b / T (`baselines/small.py`)."""
    for m, model in models.items():
        name = f"{m}.head.log_temperature"
        if name in tensors:
            T = tensors.pop(name).exp()
            tensors[f"{m}.head.weight"] = model.head.weight.detach() / T
            tensors[f"{m}.head.bias"] = model.head.bias.detach() / T


def load_unimodal(run: runs.Run, info: dict) -> UnimodalModel:
    """The fine-tuned model of a finished run of step 1."""
    modality = run.settings["modality"]
    model = new_model(run.settings["encoder"], info, modality, sizes_of(run.settings, modality))
    models = nn.ModuleDict({modality: model})
    check_names(run.folder / "model.safetensors", *fill(models, run.folder))
    return model


def fill(models: nn.ModuleDict, folder: Path) -> tuple[list, list]:
    """Put a run's stored weights into its models.

    -> names that the file lacks, names that it has too many. Raises ValueError where the file
    is damaged or holds other shapes.
    """
    file = folder / "model.safetensors"
    tensors, _ = files.read_tensors(file)
    for name, own in models.state_dict().items():
        if name in tensors and tensors[name].dtype != own.dtype:
            raise ValueError(f"{file} is damaged: {name} is {tensors[name].dtype}")
    fold_temperatures(tensors, models)
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
    models = nn.ModuleDict()
    for m, name in stored.encoders_of(settings).items():
        models[m] = new_model(name, info, m, sizes_of(settings, m))
    adapted = settings["method"] in stored.ADAPTED
    if adapted:
        for base in settings["unimodal"].values():
            file = folder.parent / base["run"] / "model.safetensors"
            if not file.exists() or fingerprint.sha256(file) != base.get("sha256"):
                raise ValueError(f"{file} is not the model that {folder} was trained on; run the"
                                 " command that made it again")
            fill(models, file.parent)
    for m in settings.get("lora") or ():
        if settings["method"] == "all_linear":            # which layers that are, its file says
            encoder = models[m].encoder
            encoder.lora_targets = (*encoder.lora_targets, *layers_with_lora(folder, m))
        add_lora(models[m], settings["rank"])
    missing, unexpected = fill(models, folder)
    if adapted:                                           # the rest came from the uni-modal runs
        missing = [name for name in missing if name.endswith(("lora_A", "lora_B"))]
    wrong = [n for n in missing + unexpected if ".encoder." in n or not encoders_only]
    check_names(folder / "model.safetensors", wrong, [])
    return settings, models.eval()


def layers_with_lora(folder: Path, modality: str) -> tuple[str, ...]:
    """The names of the layers of an encoder for which a run has stored A."""
    names, start, end = [], f"{modality}.encoder.", ".lora_A"
    for name in files.read_tensors(folder / "model.safetensors")[0]:
        if name.startswith(start) and name.endswith(end):
            names.append(name.removeprefix(start).removesuffix(end))
    return tuple(names)


def predict(models, split, device: str, settings: dict) -> dict:
    """Modality -> logits (N, C) of its own model."""
    models.to(device)

    def forward(x):
        with metrics.autocast(device, settings):
            return {m: models[m](x[m]) for m in x}
    return metrics.predict(forward, models, split, device, settings)
