"""The encoders of a finished run, LoRA merged, as public checkpoints."""
import json
import shutil
from pathlib import Path

from encoders import BERT, BUILD, AudioViT, DeBERTa, ResNet, ViT, quick_gelu
from harness import files, stored
from lora import merge_lora
from pretrained import checkpoints, formats

CONFIG = "with the original's config.json"
READERS = {ViT: "open_clip.create_model(..., pretrained=FILE)",
           AudioViT: "ImageBind, imagebind_huge().load_state_dict(LOAD(FILE))",
           BERT: f"transformers, BertModel.from_pretrained(FOLDER) {CONFIG}",
           DeBERTa: f"transformers, DebertaModel.from_pretrained(FOLDER) {CONFIG}",
           ResNet: "torchvision, resnet...().load_state_dict(LOAD(FILE), strict=False)"}
LOAD = {".safetensors": "safetensors.torch.load_file"}    # other files: torch.load


def write(folder: Path, info: dict, settings: dict, models, target: Path) -> None:
    """Write target/<modality>/: the encoder with LoRA merged, in the layout of its public file, and
    head.safetensors with the classes as metadata. `target` must be new; it is written whole."""
    if target.exists():
        raise ValueError(f"{target} exists already: export to a new folder")
    partial, told = target.with_name(target.name + ".partial"), []
    shutil.rmtree(partial, ignore_errors=True)            # of an export that was killed
    try:
        for m, model in models.items():
            name = settings["encoders"][m] if "encoders" in settings else settings["encoder"]
            encoder = merge_lora(model).encoder
            file, source, note = public_file(folder, settings, m, name, encoder)
            (partial / m).mkdir(parents=True, exist_ok=True)
            checkpoints.export_public(encoder, partial / m / file, source)
            classes = {"classes": json.dumps(info["classes"])}
            files.write_tensors(partial / m / "head.safetensors", model.head.state_dict(), classes)
            load = LOAD.get(Path(file).suffix, "torch.load")
            told.append(f"{target / m / file}: encoder {name}, {note};"
                        f" for {READERS[type(encoder)].replace('LOAD', load)}")
            if isinstance(encoder, ViT) and encoder.blocks[0].activation is quick_gelu:
                told.append("its activation is QuickGELU: open_clip needs force_quick_gelu=True")
            told.append(f"{target / m / 'head.safetensors'}: linear layer on its features,"
                        f" {len(info['classes'])} classes")
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("\n".join(told))


def public_file(folder: Path, settings: dict, modality: str, name: str, encoder) -> tuple:
    """-> (name of the exported file, the public file that the rest comes from or None, a note)."""
    start = stored.started_from(folder, settings, modality)
    like = name                                           # from scratch: like one of its kind
    if name not in checkpoints.PUBLIC:
        kin = [n for n in checkpoints.PUBLIC if n in BUILD and BUILD[n][0] is type(encoder)]
        like = next(n for n in kin if not n.endswith("_toy"))
    file = checkpoints.PUBLIC[like].url.rsplit("/", 1)[1]
    if start in (None, "none"):
        return file, None, "no public file behind it"
    source = checkpoints.place(name) if start == name else Path(start)
    if source.is_dir():
        source = formats.weights_in(source)
    file = source.name
    if source.suffix not in (".safetensors", ".bin", ".pth"):
        file = source.stem + ".pth"
    if not source.is_file():
        return file, None, f"nothing else, since {source} is not there"
    if isinstance(encoder, ResNet) and encoder.conv1.in_channels != 3:
        channels = encoder.conv1.in_channels
        return file, None, f"nothing else, since it takes {channels} channels, not 3"
    if source.name.endswith(".tower.safetensors"):
        return file, source, f"like {source} nothing else, so load it with strict=False"
    return file, source, f"all else as in {source}"
