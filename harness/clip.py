"""One recording: what a finished run, UME and each modality alone say of it."""
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import data
from harness import fingerprint, metrics, report, stored
from harness.models import load_run, predict
from prepare import media, toy


def sources_of_clip(args, kinds: dict) -> dict:
    """Modality -> the file, or the text, that --clip and --text give for it.

    "talk.mp4" serves picture and sound, "audio=talk.wav" one modality. Flow must be named.
    """
    source, plain = {}, []
    for file in args.clip:
        modality, _, path = file.partition("=")
        if modality in kinds:
            source[modality] = Path(path)
        else:
            plain.append(file)
    if len(plain) > 1:
        one_each = " ".join(f"{m}={file}" for m, file in zip(kinds, plain))
        raise ValueError(f"--clip {' '.join(plain)}: one file serves all; else say {one_each}")
    for m, kind in kinds.items():
        if kind == "text" and args.text is not None:
            source.setdefault(m, args.text)
        if kind in ("frames", "image", "audio") and plain:
            source.setdefault(m, Path(plain[0]))
    if not source:
        raise ValueError(f"nothing to look at: the run knows {', '.join(kinds)}; give --clip FILE,"
                         " --clip MODALITY=FILE or --text TEXT")
    return {m: source[m] for m in kinds if m in source}


def read_clip(args, source: dict, info: dict, models) -> data.Split:
    """The recording as a split of one sample, prepared as the data set was.

    Raises ValueError where something cannot be read.
    """
    kinds, row = info["modalities"], {}
    for m in source:
        # The options of prepare, read off the array that it made: n frames, clips or tokens.
        shape, tokenizer = info["shapes"][m], None
        n, size = shape[0], shape[-1]
        options = SimpleNamespace(frames=n, clips=n, stacks=n, max_length=n, size=size)
        if kinds[m] == "flow":
            options.flow_length = shape[1] // 2
        if kinds[m] == "text":
            tokenizer = tokenizer_of(args, info, models[m].encoder)
        try:
            item = media.Item("clip", "", {m: source[m]})
            row |= media.read_item(item, {m: kinds[m]}, options, tokenizer)
        except (ValueError, OSError, RuntimeError) as error:
            rest = [f"{n}={source[n]}" for n in source if n != m and kinds[n] != "text"]
            hint = f"; without {m}: --clip {' '.join(rest)}" if rest else ""
            raise ValueError(f"{m}: {error}{hint}") from None
    for m, array in row.items():
        if list(array.shape) != info["shapes"][m]:
            raise ValueError(f"{m}: prepared, it is {list(array.shape)}, but {info['name']} holds"
                             f" {info['shapes'][m]}: arrays of your own need clips of your own")
    one = {m: array[None] for m, array in row.items()}
    return data.Split.of(kinds, one, torch.zeros(1, dtype=torch.int64))


def tokenizer_of(args, info: dict, encoder):
    """The tokenizer whose ids the encoder has learnt."""
    there = [info["tokenizer"], *(info.get("other_tokenizers") or [])]
    learnt = next(known for known in there if known["kind"] == encoder.tokenizer)
    tokenizer = media.tokenizer(args, media.VOCABULARIES[learnt["kind"]])
    if learnt.get("fingerprint") not in (None, tokenizer.fingerprint):
        raise ValueError(f"{info['name']} was prepared with another vocabulary than this one:"
                         " name its files, --tokenizer FILE")
    return tokenizer


def show(folder: Path, args) -> None:
    """Print the likeliest classes of one recording: each modality alone, UME, the run itself.

    The run's config.json says how the data set was prepared; the data set need not be there.
    """
    stored.check_finished(folder)
    config = stored.read_config(folder)
    settings, info = config["settings"], config["data"]
    stored.check_own_prediction(folder, settings)
    fingerprint.say_changes(folder)
    if info["name"] in toy.WORLDS:
        raise ValueError(f"{folder} learnt {info['name']}, which no recording looks or sounds like:"
                         " --clip needs a run on real data")
    settings, models = load_run(folder, info)
    source = sources_of_clip(args, {m: info["modalities"][m] for m in models})
    clip = read_clip(args, source, info, models)

    def predict_clip(models):
        models = nn.ModuleDict({m: models[m] for m in source})
        return predict(models, clip, args.device, settings)

    def fuse(logits, rule="prob"):
        return metrics.fuse(logits, rule, info["multilabel"])[0]      # (C,)

    logits = predict_clip(models)
    columns = {f"{m} alone": fuse({m: logits[m]}) for m in source}
    if "unimodal" in settings:                            # then the modalities alone are step 1's
        fine_tuned = {}
        for m, base in settings["unimodal"].items():
            fine_tuned[m] = load_run(folder.parent / base["run"], info)[1][m]
        alone = predict_clip(fine_tuned)
        columns = {f"{m} alone (UMFT)": fuse({m: alone[m]}) for m in source}
        columns["UME"] = fuse(alone)
    if settings["method"] != "unimodal":
        rule = args.fusion or settings["fusion"]
        columns[report.NAMES[settings["method"]]] = fuse(logits, rule)

    told = [f"{m} of {s}" if isinstance(s, Path) else f"{m} {s!r}" for m, s in source.items()]
    absent = "".join(f"; no {m}" for m in models if m not in source)
    print(f"\n{folder}: {', '.join(told)}{absent}. Likeliest classes, in %:\n")
    cells = []
    for name, p in columns.items():
        best = p.argsort(descending=True)[:5]
        cells.append([name, *(f"{info['classes'][c]} {100 * p[c]:5.1f}" for c in best)])
    widths = [max(map(len, column)) + 3 for column in cells]
    for line in zip(*cells):
        print("".join(f"{text:>{width}}" for text, width in zip(line, widths)))
