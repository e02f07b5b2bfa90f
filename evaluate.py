"""Finished runs: test scores, fusion rules, missing modalities, linear evaluation, a clip, export.

    python evaluate.py --run runs/toy/mmlora-all-r1-s0                     # from the stored weights
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --fusion entropy --plot
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --page              # to look and listen
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --temperature       # chosen on validation
    python evaluate.py --compare runs/toy/mmlora-all-r1-s0 ume --seeds 0 1 2      # paired; p values
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --drop audio        # nothing can be heard
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --drop audio --missing 0 0.3 0.7 1
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --probe             # Tables 3 and 8
    python evaluate.py --probe --dataset ave --modality visual             # pre-trained: Table 4
    python evaluate.py --run runs/ave/mmlora-all-r1-s0 --clip talk.mp4     # one recording
    python evaluate.py --run runs/ave/mmlora-all-r1-s0 --export exported   # LoRA merged

The paper's tables beside our runs: `python -m paper.tables 5`.
"""
import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch
from torch import nn

import data
from encoders import BERT, BUILD, AudioViT, DeBERTa, ResNet, ViT, quick_gelu
from harness import (arguments, calibration, compare, files, fingerprint, linear, metrics, page,
                     report, runs, stored)
from harness.models import load_run, pretrained_model
from lora import merge_lora
from prepare import media, toy
from pretrained import checkpoints, formats


def predict(models, split: data.Split, args, settings: dict) -> dict:
    """Modality -> logits (N, C) of its own model."""
    models.to(args.device)

    def forward(x):
        with metrics.autocast(args.device, settings):
            return {m: models[m](x[m]) for m in x}
    return metrics.predict(forward, models, split, args.device, settings)


# ---- Test scores, with and without some modalities ----

def score_rows(args, folder: Path, where: Path, info: dict, settings: dict, models) -> list:
    """Rows for the table: every modality alone and all together, of UME and of the run itself.

    Without the modalities of --drop; or, with --missing, where a share of the samples lacks them.
    """
    unknown = set(args.drop) - set(models)
    if unknown:
        there = arguments.nearest_first(min(unknown), models)
        raise ValueError(f"--drop {' '.join(sorted(unknown))}: {folder} has {', '.join(there)}")
    kept = [m for m in models if m not in args.drop]
    if not kept:
        raise ValueError(f"--drop leaves no modality of {folder}")
    fusion = args.fusion or settings.get("fusion", "prob")
    test = data.Split(where, "test")

    logits = {}
    if "unimodal" in settings:                            # what the run started from
        logits["UME"] = stored.logits_of_step_1(folder, settings, "test", len(test))
    logits["together"] = predict(models, test, args, settings)

    rows = []
    for name, of_all in logits.items():
        shown = {m: z for m, z in of_all.items() if args.missing or m in kept}
        for m, z in shown.items():
            label = f"{m} alone (UMFT)" if name == "UME" else f"{m} alone"
            rows.append((label, metrics.scores({m: z}, test.labels, info, groups=test.groups)))
        if len(shown) > 1:
            score = metrics.scores(shown, test.labels, info, fusion, test.groups)
            rows.append((f"{name}, fusion {fusion}", score))
        for share in args.missing:
            p = metrics.fuse_missing(shown, args.drop, share, fusion, info["multilabel"])
            label = f"{name}, {100 * share:g} % lack {' and '.join(args.drop)}"
            rows.append((label, metrics.rates(p, test.labels, info, test.groups)))
    dropped = f", without {', '.join(args.drop)}" if args.drop and not args.missing else ""
    print(f"\n{folder}{dropped}", end="")
    return [(label, [(score, None)]) for label, score in rows]


# ---- From stored logits, no model needed: temperatures, weights ----

def calibration_rows(args, folder: Path) -> dict[str, dict]:
    """Label -> test accuracy, NLL, ECE: as it is, and with what validation chose; of UME and of the
    run itself. The labels are the same for all seeds; what was chosen is printed."""
    where, info, settings = open_data_of(args, folder)
    y = {split: data.Split(where, split).labels for split in ("val", "test")}
    val, test = (calibration.stored(folder, split) for split in ("val", "test"))
    asked = [("T", args.temperature, by) for by in ("accuracy", "nll") if args.temperature]
    if args.fusion == "weighted":
        asked.append(("weights", "weighted", "accuracy"))
    rows = {}
    print(f"\n{folder}. Chosen on validation:")
    for base, of_test in test.items():
        name = base if base == "UME" else report.NAMES[settings["method"]]
        p = calibration.fuse(of_test, *calibration.unchanged(list(of_test)))
        rows[name] = calibration.scores(p, y["test"])
        for what, kind, by in asked:
            temperatures, weights = calibration.choose(kind, by, val[base], y["val"])
            p = calibration.fuse(of_test, temperatures, weights)
            label = f"{name}, {what} by {by if by == 'accuracy' else by.upper()}"
            rows[label] = calibration.scores(p, y["test"])
            chosen = temperatures if what == "T" else weights
            told = ", ".join(f"{m} {value:.3g}" for m, value in chosen.items())
            print(f"    {label}: {told}")
    return rows


def open_data_of(args, folder: Path) -> tuple:
    """-> folder of the prepared data of a finished run, its dataset.json, the run's settings.

    Raises ValueError for data with several labels a sample.
    """
    stored.check_finished(folder)
    say_changes(folder)
    settings = stored.read_config(folder)["settings"]
    where = arguments.find(args.data_root, settings["dataset"], settings["seed"])
    info = data.check(where)
    calibration.only_one_label(info)
    return where, info, settings


def show_calibration(args) -> None:
    """A table a run; of runs that differ in the seed alone also the mean."""
    same = {}
    for folder in args.run:
        rows = calibration_rows(args, folder)
        print_calibration(str(folder), [rows])
        settings = stored.read_config(folder)["settings"]
        same.setdefault(stored.but_seed(settings), []).append((folder.name, rows))
    for group in same.values():
        if len(group) > 1:
            names, tables = zip(*group)
            print_calibration("Mean +- standard deviation of " + ", ".join(names), tables)


def print_calibration(title: str, tables) -> None:
    print(f"\n{title}: test. ECE: {calibration.BINS} bins of equal width.")
    print(f"{'':36}{'accuracy':>14}{'NLL':>16}{'ECE, %':>14}")
    for label in tables[0]:
        cells = ""
        for key, times, digits, width in (("accuracy", 100, 1, 14), ("nll", 1, 3, 16),
                                          ("ece", 100, 1, 14)):
            mean, std = report.mean_std([times * rows[label][key] for rows in tables])
            text = f"{mean:.{digits}f}"
            if len(tables) > 1:
                text += f" +- {std:.{digits}f}"
            cells += f"{text:>{width}}"
        if len(label) > 36:                               # on a line of its own
            print(label)
            label = ""
        print(f"{label:36}{cells}")


def show_page(args, folder: Path) -> None:
    """page.html in the folder of a run. Its samples stand beside the stored logits, so the data
    must be those of the run."""
    stored.check_finished(folder)
    config = stored.read_config(folder)
    say_changes(folder)
    where = arguments.find(args.data_root, config["settings"]["dataset"],
                           config["settings"]["seed"])
    learnt_from = (config.get("fingerprint") or {}).get("data")
    if learnt_from not in (None, fingerprint.of_data(where)):
        raise ValueError(f"{where} is not what {folder} has learnt from: --page would show other"
                         " samples beside its predictions; train it anew with --again")
    print(f"wrote {page.write(folder, where, args.tokenizer)}")


# ---- Two methods on the same samples ----

def show_comparison(args) -> None:
    """--compare A B: the same test samples, seed by seed; then over the seeds."""
    folder_a, folder_b = args.compare
    ume = str(folder_b) == "ume"                          # of A
    if ume:
        folder_b = folder_a
    opened, differences, gains = [], [], []
    for seed in args.seeds or [None]:                     # what has changed is said above the table
        a, b = with_seed(folder_a, seed), with_seed(folder_b, seed)
        where, _, settings = open_data_of(args, a)
        if not ume:
            open_data_of(args, b)
            check_same_samples(a, b)
        opened.append((a, b, where, settings["seed"]))
    print(f"\nA {folder_a}\nB {'what A started from, UME' if ume else folder_b}\n")
    print(f"{'seed':>6}{'A':>8}{'B':>8}{'A - B':>8}{'both right':>13}{'only A':>9}{'only B':>9}"
          f"{'neither':>9}{'p':>9}")
    for a, b, where, seed in opened:
        y = data.Split(where, "test").labels
        right_a, right_b = right_of(a, "run", y), right_of(b, "UME" if ume else "run", y)
        of_a, of_b = (100 * float(right.double().mean()) for right in (right_a, right_b))
        differences.append(of_a - of_b)
        t = compare.table(right_a, right_b)
        print(f"{seed:>6}{of_a:>8.1f}{of_b:>8.1f}{of_a - of_b:>+8.2f}"
              f"{t['both']:>13}{t['only_a']:>9}{t['only_b']:>9}{t['neither']:>9}{t['p']:>9.2g}")
        experts = experts_of((a, b), y)
        if experts:
            gains.append(compare.gain_by_experts(right_a, right_b, experts))
    print("p: McNemar's exact test on the samples that only one of them gets right.")
    print_over_seeds(differences)
    print_gains(gains)


def with_seed(folder: Path, seed: int | None) -> Path:
    if seed is None:
        return folder
    name, found = re.subn(r"-s\d+$", f"-s{seed}", folder.name)
    if not found:
        raise ValueError(f"{folder}: --seeds needs names that end in a seed, like mmlora-all-r1-s0")
    return folder.with_name(name)


def check_same_samples(a: Path, b: Path) -> None:
    """ValueError for runs on other data or, of a toy, of other seeds: no pairs of samples."""
    first, second = (stored.read_config(folder).get("fingerprint") or {} for folder in (a, b))
    if first.get("data") != second.get("data"):
        raise ValueError(f"{a} and {b} were made on different data: their samples are not pairs")


def right_of(folder: Path, which: str, y: torch.Tensor) -> torch.Tensor:
    """Which test samples the "run", or the "UME" that it started from, gets right: bool (N,)."""
    logits = calibration.stored(folder, "test")
    if which not in logits:
        raise ValueError(f"{folder} did not start from a UME: it has no step 1")
    return metrics.fuse(logits[which]).argmax(1) == y


def experts_of(folders, y: torch.Tensor) -> list[torch.Tensor]:
    """Which test samples each model of step 1 gets right, alone; [] if no run had a step 1."""
    for folder in folders:
        logits = calibration.stored(folder, "test")
        if "UME" in logits:
            return [z.argmax(1) == y for z in logits["UME"].values()]
    return []


def print_over_seeds(differences: list[float]) -> None:
    found = compare.paired(differences)
    if found["n"] == 1:
        print("\nOne seed shows how sure this pair of runs is, not how sure the methods are: give"
              " --seeds.")
        return
    t = "" if found["t"] is None else f", t {found['t']:.2f}"
    print(f"\nA - B over {found['n']} seeds, in points: {found['mean']:+.2f} +- {found['se']:.2f}"
          f" (standard error){t}, p {found['p']:.2g}")


def print_gains(gains: list[dict]) -> None:
    """Where the difference comes from; means over the seeds."""
    if not gains:
        print("\nNeither run has a step 1, so nobody knows which modality alone is right.")
        return
    print(f"\n{'each modality alone (UMFT) is right:':38}{'all':>10}{'some':>10}{'none':>10}")
    shares, points = "", ""
    for group in ("all", "some", "none"):
        shares += f"{report.mean_std([gain[group][0] for gain in gains])[0]:>10.1f}"
        points += f"{report.mean_std([gain[group][1] for gain in gains])[0]:>+10.2f}"
    print(f"{'share of the samples, %':38}{shares}")
    print(f"{'A - B there, points of all samples':38}{points}")


# ---- Linear evaluation (Tables 3, 4, 8) ----

def probe_rows(args, folder: Path, where: Path, info: dict, settings: dict, models) -> list:
    """Linear evaluation of the run's encoders -> probe.json in its folder, and rows to print."""
    if args.modality and args.modality not in models:
        there = arguments.nearest_first(args.modality, models)
        raise ValueError(f"--modality {args.modality}: {folder} has {', '.join(there)}")
    found = {}
    for m in models:
        if args.modality in (None, m):
            found[m] = linear.probe(models[m], m, where, info, args.device, settings)
    file = folder / "probe.json"
    before = {}
    if file.exists() and not fingerprint.changed(folder):     # not beside probes of other code
        before = stored.read_probe(folder)
    files.write_json(file, {**before, **found})
    print(f"\n{folder}: linear evaluation of the frozen encoders. Validation chose L2", end="")
    for m, result in found.items():
        print(f" {result['l2']:g} ({m}, {100 * result['val'][metrics.metric(info)]:.1f})", end="")
    return [(f"{m}, linear evaluation", [(r["test"], r)]) for m, r in found.items()]


def open_pretrained(args, seed: int) -> tuple:
    """As `open_run`, for the encoder of --modality before any training of ours."""
    where, info = arguments.open_data(args, seed)
    m = args.modality
    if m not in info["modalities"]:
        raise ValueError(f"--modality {m}: {arguments.has(args.dataset, info, m)}")
    encoder = arguments.encoder_of(args, m)
    settings = dict(method="pretrained", modality=m, encoder=encoder,
                    **arguments.start_settings(args, m, encoder),
                    **arguments.common_settings(args, seed, info, epochs=0))
    torch.manual_seed(seed)               # the weights, where nothing is pre-trained
    models = nn.ModuleDict({m: pretrained_model(settings, m, info)})
    run = runs.Run(args, f"probe-{m}-{encoder}-s{seed}", settings, where, info,
                   fingerprint.PROJECT / "encoders.py")
    run.begin()
    return run.folder, where, info, run.settings, models


# ---- One recording ----

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
    one = {m: array[None] for m, array in row.items()}
    return data.Split.of(kinds, one, torch.zeros(1, dtype=torch.int64))


def tokenizer_of(args, info: dict, encoder):
    """The tokenizer whose ids the encoder has learnt."""
    there = [info["tokenizer"], *(info.get("other_tokenizers") or [])]
    learnt = next(known for known in there if known["kind"] == encoder.tokenizer)
    tokenizer = media.tokenizer(args, media.VOCABULARIES[learnt["kind"]])
    if tokenizer.fingerprint != learnt["fingerprint"]:
        raise ValueError(f"{info['name']} was prepared with another vocabulary than this one:"
                         " name its files, --tokenizer FILE")
    return tokenizer


def show_clip(folder: Path, args) -> None:
    """Print the likeliest classes of one recording: each modality alone, UME, the run itself.

    The run's config.json says how the data set was prepared; the data set need not be there.
    """
    stored.check_finished(folder)
    config = stored.read_config(folder)
    settings, info = config["settings"], config["data"]
    check_own_prediction(folder, settings)
    say_changes(folder)
    if info["name"] in toy.WORLDS:
        raise ValueError(f"{folder} learnt {info['name']}, which no recording looks or sounds like:"
                         " --clip needs a run on real data")
    settings, models = load_run(folder, info)
    source = sources_of_clip(args, {m: info["modalities"][m] for m in models})
    clip = read_clip(args, source, info, models)

    def predict_clip(models):
        return predict(nn.ModuleDict({m: models[m] for m in source}), clip, args, settings)

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


# ---- Export ----

CONFIG = "with the original's config.json"
READERS = {ViT: "open_clip.create_model(..., pretrained=FILE)",
           AudioViT: "ImageBind, imagebind_huge().load_state_dict(torch.load(FILE))",
           BERT: f"transformers, BertModel.from_pretrained(FOLDER) {CONFIG}",
           DeBERTa: f"transformers, DebertaModel.from_pretrained(FOLDER) {CONFIG}",
           ResNet: "torchvision, resnet...().load_state_dict(torch.load(FILE), strict=False)"}


def export_run(folder: Path, info: dict, settings: dict, models, target: Path) -> None:
    """Write target/<modality>/: the encoder with LoRA merged, in the layout of its public file, and
    head.safetensors with the classes as metadata. `target` must be new; it is written whole."""
    if target.exists():
        raise ValueError(f"{target} exists already: export to a new folder")
    partial, told = target.with_name(target.name + ".partial"), []
    try:
        for m, model in models.items():
            name = settings["encoders"][m] if "encoders" in settings else settings["encoder"]
            encoder = merge_lora(model).encoder
            file, source, note = public_file(folder, settings, m, name, encoder)
            (partial / m).mkdir(parents=True, exist_ok=True)
            checkpoints.export_public(encoder, partial / m / file, source)
            classes = {"classes": json.dumps(info["classes"])}
            files.write_tensors(partial / m / "head.safetensors", model.head.state_dict(), classes)
            told.append(f"{target / m / file}: encoder {name}, {note};"
                        f" for {READERS[type(encoder)]}")
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


# ---- Opening a run ----

def check_own_prediction(folder: Path, settings: dict) -> None:
    if settings["method"] not in ("unimodal", "no-umft", "full", "separate_full", *stored.ADAPTED):
        raise ValueError(f"{folder} is a run of baselines/{settings['method']}.py, which alone can"
                         " predict with it; --probe can test its encoders")


def say_changes(folder: Path) -> None:
    changes = fingerprint.changed(folder)
    if changes:
        print(f"{folder}: {fingerprint.sentence(changes)} since it was trained")


def open_run(args, folder: Path) -> tuple:
    """-> (the run's folder, that of the prepared data, its dataset.json, settings, models)."""
    stored.check_finished(folder)
    settings = stored.read_config(folder)["settings"]
    if not args.probe:
        check_own_prediction(folder, settings)
    say_changes(folder)
    arguments.prepare_torch(settings["dataset"])
    where = arguments.find(args.data_root, settings["dataset"], settings["seed"])
    info = data.check(where)
    return folder, where, info, *load_run(folder, info, encoders_only=args.probe)


# ---- The command line ----

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python evaluate.py", description=__doc__,
                                formatter_class=arguments.Help)
    p.add_argument("--run", nargs="+", type=Path, metavar="RUN",
                   help="finished runs; of those that differ in the seed alone also the mean")
    p.add_argument("--fusion", choices=(*metrics.FUSIONS, "weighted"),
                   help="what is averaged; weighted: one weight a modality, chosen on validation;"
                        " default: what the run was trained with")
    p.add_argument("--temperature", nargs="?", const="one", choices=("one", "each"),
                   help="divide the logits by a number chosen on validation, one for all modalities"
                        " or one for each: test accuracy, NLL and ECE before and after")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("RUN-A", "RUN-B"),
                   help="two finished runs on the same test samples; RUN-B may be ume, what RUN-A"
                        " started from; with --seeds for all of these seeds")
    p.add_argument("--plot", action="store_true",
                   help="draw training curves; of runs that differ in the seed alone one picture"
                        " (needs matplotlib)")
    arguments.add_device(p)
    p.add_argument("--data-root", default="data", metavar="FOLDER",
                   help="of prepared data sets; default: data")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--drop", nargs="+", default=[], metavar="MODALITY",
                     help="leave these modalities out of the average")
    p.add_argument("--missing", nargs="+", type=float, default=[], metavar="SHARE",
                   help="with --drop: shares of the samples that lack them; 0.7 = 70 %% of them")
    one.add_argument("--clip", nargs="+", default=[], metavar="[MODALITY=]FILE",
                     help="the likeliest classes of one video, picture or sound of your own")
    p.add_argument("--text", help="with --clip or alone: its text")
    p.add_argument("--tokenizer", nargs="+", metavar="FILE",
                   help="for --text and --page: vocabulary files, where the data were prepared with"
                        " your own")
    one.add_argument("--page", action="store_true",
                     help="write page.html into the run's folder: result, confusions, curves, and"
                          " test samples to look at and to listen to; no network needed")
    one.add_argument("--export", type=Path, metavar="FOLDER",
                     help="write encoders, LoRA merged, as public checkpoints into a new folder")
    one.add_argument("--probe", action="store_true",
                     help="linear evaluation: of the encoders of --run, or of a pre-trained one")
    p.add_argument("--modality", help="for --probe; default: all that the run has")
    new = p.add_argument_group("--probe of a pre-trained encoder, without --run")
    new.add_argument("--dataset", metavar="NAME", help=arguments.DATASETS)
    new.add_argument("--encoder", nargs="+", default=[], metavar="NAME",
                     help=f"{', '.join(BUILD)}; default: that of Table 2")
    new.add_argument("--pretrained", nargs="+", default=[], metavar="PATH",
                     help="a public checkpoint, or none for random weights; default: the public"
                          " one, downloaded on first use")
    new.add_argument("--seed", type=arguments.seed_number, default=0, help="default: 0")
    new.add_argument("--seeds", type=arguments.seed_number, nargs="+", metavar="SEED",
                     help="a table for each of these; default: the one of --seed")
    new.add_argument("--out", default="runs", metavar="FOLDER",
                     help="folder of all runs; default: runs")
    # `common_settings` and `Run` ask for these, too.
    p.set_defaults(batch_size=None, micro_batch=None, drop_path=None, share=1.0, precision="fp32",
                   again=True)
    return p


def main() -> None:
    args = parser().parse_args()
    if args.plot:
        report.import_pyplot()
    arguments.check_device(args.device)
    arguments.each_once("run", [folder.resolve() for folder in args.run or []])
    if args.run and (args.clip or args.text is not None):
        for folder in args.run:
            show_clip(folder, args)
        return
    if args.compare:
        if args.run or args.drop or args.probe or args.temperature or args.fusion:
            raise ValueError("--compare stands alone, with --seeds at most")
        return show_comparison(args)
    if args.page:
        if not args.run or args.temperature or args.fusion or args.missing or args.plot:
            raise ValueError("--page takes --run RUN, and no option that changes the result")
        for folder in args.run:
            show_page(args, folder)
        return
    if args.run and (args.temperature or args.fusion == "weighted"):
        if args.drop or args.probe or args.export:
            raise ValueError("--temperature and --fusion weighted read stored logits: not with"
                             " --drop, --missing, --probe or --export")
        return show_calibration(args)
    if args.export and len(args.run or ()) != 1:
        raise ValueError("--export takes one --run")
    pretrained = args.probe and args.dataset and args.modality
    if bool(args.run) == bool(pretrained):
        raise ValueError("give one of: --run RUN, --compare RUN-A RUN-B, --probe --dataset NAME"
                         " --modality NAME")
    if args.missing and not (args.drop and all(0 <= share <= 1 for share in args.missing)):
        raise ValueError("--missing needs --drop MODALITY and shares from 0 to 1: 0.7 = 70 % of the"
                         " samples lack that modality")
    if args.export:
        folder, _, info, settings, models = open_run(args, args.run[0])
        export_run(folder, info, settings, models, args.export)
    elif args.run:
        show_tables(args, (open_run(args, folder) for folder in args.run))
    else:
        arguments.prepare_torch(args.dataset)
        seeds = arguments.each_once("seed", args.seeds or [args.seed])
        show_tables(args, (open_pretrained(args, seed) for seed in seeds))


def show_tables(args, opened) -> None:
    """One table a run; of runs that differ in the seed alone also the table of their means."""
    rows_of = probe_rows if args.probe else score_rows
    same = {}                                             # settings but the seed -> tables
    for folder, where, info, settings, models in opened:
        rows = rows_of(args, folder, where, info, settings, models)
        report.print_table(rows, where, info)
        same.setdefault(stored.but_seed(settings), []).append((folder, rows, where, info))
    for group in same.values():
        folders, tables, wheres, infos = zip(*group)
        if args.plot:
            report.plot(folders)
        if len(group) > 1:
            print("\n" + ", ".join(folder.name for folder in folders), end="")
            together = []
            for rows in zip(*tables):                     # the same row of each seed
                together.append((rows[0][0], [found[0] for _, found in rows]))
            report.print_table(together, wheres[0], infos[0])


if __name__ == "__main__":
    arguments.guard(main)
