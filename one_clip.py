"""One recording that is in no data set, and what every model of a run takes it for.

    python evaluate.py --run runs/crema_d/mmlora-audio-r1-s0 --clip talk.mp4                           # its pictures and its sound
    python evaluate.py --run runs/crema_d/mmlora-audio-r1-s0 --clip visual=face.jpg audio=talk.wav
    python evaluate.py --run runs/food101/mmlora-all-r1-s0 --clip plate.jpg --text "grandma's apple pie"

It goes the way of the training data, through `prepare/` into arrays and from there into the encoders. What that takes to know (shapes, classes,
vocabulary) stands in the run's config.json, so the data set itself need not be there.
"""
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import data
import evaluate
import paper
import train_joint
from prepare import media


def read(files: list[str], text: str | None, tokenizer: list[str] | None, info: dict) -> tuple[data.Split, dict]:
    """One recording, prepared as its data set was -> (a split of one sample, modality -> what it was read from).

    files: "talk.mp4" serves picture and sound, "audio=talk.wav" one modality; flow, a folder, must be named. Modalities that are not given are
    left out. Raises ValueError in one line where something cannot be read.
    """
    kinds, shapes = info["modalities"], info["shapes"]
    named = dict(f.split("=", 1) for f in files if f.split("=")[0] in kinds)
    plain = [f for f in files if f.split("=")[0] not in kinds]
    if len(plain) > 1:
        raise ValueError(f"--clip {' '.join(plain)}: one file for picture and sound; for one each say {' '.join(f'{m}={f}' for m, f in zip(kinds, plain))}")
    usual = {"frames": plain, "image": plain, "audio": plain, "text": [text] if text is not None else [], "flow": []}
    source = {m: Path(named[m]) if m in named else text if kind == "text" else Path(plain[0]) for m, kind in kinds.items() if m in named or usual[kind]}
    if not source:
        raise ValueError(f"nothing to look at: the run knows {', '.join(kinds)}; give --clip FILE, --clip MODALITY=FILE or --text TEXT")
    shape = {kind: shapes[m] for m, kind in kinds.items()}          # the options of prepare, read off the arrays it made
    pictures = next((shape[k] for k in ("frames", "image", "flow") if k in shape), [0])
    options = SimpleNamespace(frames=pictures[0], size=pictures[-1], clips=shape.get("audio", [0])[0], max_length=shape.get("text", [0])[0],
                              stacks=shape.get("flow", [0])[0], flow_length=shape.get("flow", [0, 0])[1] // 2, tokenizer=tokenizer)
    tokens = None
    if any(kinds[m] == "text" for m in source):
        tokens = media.tokenizer(options, dict(wordpiece="bert_vocab", byte_bpe="deberta_vocab")[info["tokenizer"]["kind"]])
        if tokens.fingerprint != info["tokenizer"]["fingerprint"]:
            raise ValueError(f"{info['name']} was prepared with another vocabulary than this one: name its files, --tokenizer FILE")
    row = {}
    for m in source:
        try:
            row |= media.read_item(media.Item("clip", "", {m: source[m]}), {m: kinds[m]}, options, tokens)
        except (ValueError, OSError, RuntimeError) as error:
            rest = " ".join(f"{other}={source[other]}" for other in source if other != m and kinds[other] != "text")
            raise ValueError(f"{m}: {error}" + (f"; without {m}: --clip {rest}" if rest else "")) from None
    return data.Split.of_one(kinds, row), source


def show(folder: Path, args) -> None:
    """Print the likeliest classes of one recording side by side: each modality alone, UME, and what the run made of it. No data set is needed."""
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} holds no finished run (no result.json)")
    config = checkpoints.read_json(folder / "config.json")
    settings, info = config["settings"], config.get("data")
    if settings["method"] != "unimodal" and settings["method"] not in train_joint.METHODS:
        raise ValueError(f"{folder} is a run of baselines/{settings['method']}.py, which alone can predict with it")
    if not info or info["name"] in data.WORLDS:
        raise ValueError(f"{folder} learnt {settings['dataset']}, " + ("which no recording looks or sounds like: --clip needs a run on real data" if info else "and does not say how that was prepared"))
    split, source = read(args.clip, args.text, args.tokenizer, info)
    settings, models = checkpoints.load_run(folder, info)
    alone = {m: checkpoints.load_run(folder.parent / base["run"], info)[1][m] for m, base in settings.get("unimodal", {}).items()}

    def probabilities(models, fusion="prob"):
        z = {m: evaluate.predict(models[m].to(args.device), split, m, args.device, paper.settings_for(settings["dataset"]), settings["precision"]) for m in models if m in source}
        return {**{m: evaluate.fuse({m: z[m]}, multilabel=info["multilabel"])[0] for m in z}, "all": evaluate.fuse(z, fusion, info["multilabel"])[0]}

    before, after = probabilities(alone) if alone else {}, probabilities(models, args.fusion or settings.get("fusion", "prob"))
    columns = {f"{m} alone": p for m, p in (before or after).items() if m != "all"}
    columns.update({"UME": before["all"]} if before else {})
    columns.update({train_joint.METHODS[settings["method"]]: after["all"]} if settings["method"] != "unimodal" else {})
    cells = {name: [f"{info['classes'][c]} {100 * p[c]:5.1f}" for c in p.argsort(descending=True)[:5]] for name, p in columns.items()}
    widths = {name: max(map(len, [name, *cells[name]])) + 3 for name in cells}
    print(f"\n{folder}: " + ", ".join(f"{m} of {s}" if isinstance(s, Path) else f"{m} {s!r}" for m, s in source.items())
          + "".join(f"; no {m}" for m in models if m not in source) + ". Likeliest classes, in %:\n")
    for line in zip(*([name, *cells[name]] for name in cells)):
        print("".join(f"{text:>{width}}" for text, width in zip(line, widths.values())))
