"""Finished runs: test scores again, fusion rules, missing modalities, linear evaluation, one clip, export.

    python evaluate.py --run runs/toy/mmlora-all-r1-s0                     # from the stored weights
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --fusion entropy --plot
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
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

import data
from encoders import BERT, BUILD, AudioViT, DeBERTa, ResNet, ViT
from harness import arguments, fingerprint, linear, metrics, report, runs
from harness.models import load_run, pretrained_model
from lora import merge_lora
from paper import settings as paper
from prepare import media, toy
from pretrained import checkpoints


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
        raise ValueError(f"--drop {' '.join(unknown)}: {folder} has {', '.join(models)}")
    kept = [m for m in models if m not in args.drop]
    if not kept:
        raise ValueError(f"--drop leaves no modality of {folder}")
    fusion = args.fusion or settings.get("fusion", "prob")
    test = data.Split(where, "test")

    logits = {"together": predict(models, test, args, settings)}
    if "unimodal" in settings:                            # what the run started from
        ume = {}
        for m, base in settings["unimodal"].items():
            stored = load_file(folder.parent / base["run"] / "logits.safetensors")
            ume[m] = stored[f"test.{m}"]
        logits = {"UME": ume, **logits}

    rows = []
    for name, of_all in logits.items():
        shown = {m: z for m, z in of_all.items() if args.missing or m in kept}
        for m, z in shown.items():
            label = f"{m} alone (UMFT)" if name == "UME" else f"{m} alone"
            rows.append((label, [(metrics.scores({m: z}, test.labels, info), None)]))
        if len(shown) > 1:
            score = metrics.scores(shown, test.labels, info, fusion)
            rows.append((f"{name}, fusion {fusion}", [(score, None)]))
        for share in args.missing:
            p = metrics.fuse_missing(shown, args.drop, share, fusion, info["multilabel"])
            label = f"{name}, {100 * share:g} % lack {' and '.join(args.drop)}"
            rows.append((label, [(metrics.rates(p, test.labels, info), None)]))
    dropped = f", without {', '.join(args.drop)}" if args.drop and not args.missing else ""
    print(f"\n{folder}{dropped}", end="")
    return rows


# ---- Linear evaluation (Tables 3, 4, 8) ----

def probe_rows(args, folder: Path, where: Path, info: dict, settings: dict, models) -> list:
    """Linear evaluation of the run's encoders -> probe.json in its folder, and the rows to print."""
    if args.modality and args.modality not in models:
        raise ValueError(f"--modality {args.modality}: {folder} has {', '.join(models)}")
    found = {}
    for m in models:
        if args.modality in (None, m):
            found[m] = linear.probe(models[m], m, where, info, args.device, settings)
    file = folder / "probe.json"
    before = runs.read_json(file) if file.exists() else {}
    runs.write_json(file, {**before, **found})
    print(f"\n{folder}: linear evaluation of the frozen encoders. Validation chose L2", end="")
    for m, result in found.items():
        print(f" {result['l2']:g} ({m}, {100 * result['val'][metrics.metric(info)]:.1f})", end="")
    return [(f"{m}, linear evaluation", [(r["test"], r)]) for m, r in found.items()]


def open_pretrained(args, seed: int) -> tuple:
    """As `open_run`, for the encoder of --modality before any training of ours."""
    where, info = arguments.open_data(args, seed)
    m = args.modality
    if m not in info["modalities"]:
        raise ValueError(f"--modality {m}: {args.dataset} has {', '.join(info['modalities'])}")
    encoder = arguments.encoder_of(args, m)
    start = arguments.pretrained_of(args, m, encoder)
    args.batch_size, args.precision, args.again = None, "fp32", True
    args.micro_batch = args.drop_path = None
    settings = dict(method="pretrained", modality=m, encoder=encoder, pretrained=start,
                    **arguments.common_settings(args, seed, info, epochs=0))
    torch.manual_seed(seed)               # the weights, where nothing is pre-trained
    models = nn.ModuleDict({m: pretrained_model(settings, m, info)})
    run = runs.Run(args, f"probe-{m}-{encoder}-s{seed}", settings, where, info,
                   fingerprint.PROJECT / "encoders.py")
    run.begin()
    return run.folder, where, info, run.settings, models


# ---- One recording ----

def read_clip(args, info: dict) -> tuple[data.Split, dict]:
    """One recording, prepared as the data set was -> (a split of one sample, modality -> source).

    "talk.mp4" serves picture and sound, "audio=talk.wav" one modality; flow, a folder, must be named.
    Modalities that are not given are left out. Raises ValueError where something cannot be read.
    """
    kinds, shapes = info["modalities"], info["shapes"]
    named, plain = {}, []
    for file in args.clip:
        modality, _, path = file.partition("=")
        if modality in kinds:
            named[modality] = Path(path)
        else:
            plain.append(file)
    if len(plain) > 1:
        one_each = " ".join(f"{m}={file}" for m, file in zip(kinds, plain))
        raise ValueError(f"--clip {' '.join(plain)}: one file for picture and sound; for one each"
                         f" say {one_each}")
    source = {}
    for m, kind in kinds.items():
        if m in named:
            source[m] = named[m]
        elif kind == "text" and args.text is not None:
            source[m] = args.text
        elif kind in ("frames", "image", "audio") and plain:
            source[m] = Path(plain[0])
    if not source:
        raise ValueError(f"nothing to look at: the run knows {', '.join(kinds)}; give --clip FILE,"
                         " --clip MODALITY=FILE or --text TEXT")

    # The options of prepare, read off the arrays that it made.
    options = SimpleNamespace(tokenizer=args.tokenizer)
    for m, kind in kinds.items():
        shape = shapes[m]
        if kind in ("frames", "image"):
            options.frames, options.size = shape[0], shape[-1]
        elif kind == "audio":
            options.clips = shape[0]
        elif kind == "text":
            options.max_length = shape[0]
        elif kind == "flow":
            options.stacks, options.flow_length, options.size = shape[0], shape[1] // 2, shape[-1]
    tokenizer = None
    if any(kinds[m] == "text" for m in source):
        tokenizer = media.tokenizer(options, media.VOCABULARIES[info["tokenizer"]["kind"]])
        if tokenizer.fingerprint != info["tokenizer"]["fingerprint"]:
            raise ValueError(f"{info['name']} was prepared with another vocabulary than this one:"
                             " name its files, --tokenizer FILE")
    row = {}
    for m in source:
        try:
            item = media.Item("clip", "", {m: source[m]})
            row |= media.read_item(item, {m: kinds[m]}, options, tokenizer)
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{m}: {error}{how_without(m, source, kinds)}") from None
    return data.Split.of_one(kinds, row), source


def how_without(modality: str, source: dict, kinds: dict) -> str:
    rest = [f"{m}={source[m]}" for m in source if m != modality and kinds[m] != "text"]
    return f"; without {modality}: --clip {' '.join(rest)}" if rest else ""


def show_clip(folder: Path, args) -> None:
    """Print the likeliest classes of one recording: each modality alone, UME, the run itself.

    What that takes to know stands in the run's config.json: the data set need not be there.
    """
    runs.check_finished(folder)
    config = runs.read_json(folder / "config.json")
    settings, info = config["settings"], config.get("data")
    check_own_prediction(folder, settings)
    if not info:
        raise ValueError(f"{folder} does not say how {settings['dataset']} was prepared")
    if info["name"] in toy.WORLDS:
        raise ValueError(f"{folder} learnt {info['name']}, which no recording looks or sounds like:"
                         " --clip needs a run on real data")
    split, source = read_clip(args, info)

    def probabilities(models, fusion="prob"):
        given = nn.ModuleDict({m: models[m] for m in models if m in source})
        logits = predict(given, split, args, settings)
        p = {f"{m} alone": metrics.fuse({m: logits[m]}, "prob", info["multilabel"])[0] for m in given}
        return p, metrics.fuse(logits, fusion, info["multilabel"])[0]

    settings, models = load_run(folder, info)
    columns, together = probabilities(models, args.fusion or settings.get("fusion", "prob"))
    if "unimodal" in settings:
        alone = nn.ModuleDict()
        for m, base in settings["unimodal"].items():
            alone[m] = load_run(folder.parent / base["run"], info)[1][m]
        columns, columns_ume = probabilities(alone)
        columns["UME"] = columns_ume
    if settings["method"] != "unimodal":
        columns[report.NAMES[settings["method"]]] = together

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

READERS = {ViT: "open_clip.create_model(..., pretrained=FILE)",
           AudioViT: "ImageBind, imagebind_huge().load_state_dict(torch.load(FILE))",
           BERT: "transformers, BertModel.from_pretrained(FOLDER) with the original's config.json",
           DeBERTa: "transformers, DebertaModel.from_pretrained(FOLDER) with the original's"
                    " config.json",
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
            runs.write_tensors(partial / m / "head.safetensors", model.head.state_dict(), classes)
            told.append(f"{target / m / file}: encoder {name}, {note};"
                        f" for {READERS[type(encoder)]}")
            told.append(f"{target / m / 'head.safetensors'}: linear layer on its features,"
                        f" {len(info['classes'])} classes")
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("\n".join(told))


def public_file(folder: Path, settings: dict, modality: str, name: str, encoder) -> tuple:
    """-> (name of the exported file, the public file that the rest comes from or None, a note)."""
    start = runs.started_from(folder, settings, modality)
    like = name                                           # from scratch: like one of its kind
    if name not in checkpoints.PUBLIC:
        like = next(n for n in checkpoints.PUBLIC if n in BUILD and BUILD[n][0] is type(encoder))
    file = checkpoints.PUBLIC[like].url.rsplit("/", 1)[1]
    if start in (None, "none"):
        return file, None, "no public file behind it"
    source = Path("checkpoints", name, file) if start == name else Path(start)
    file = source.name
    if source.suffix not in (".safetensors", ".bin", ".pth"):
        file = source.stem + ".pth"
    if not source.is_file():
        return file, None, f"nothing else, since {source} is not there"
    if isinstance(encoder, ResNet) and encoder.conv1.in_channels != 3:
        channels = encoder.conv1.in_channels
        return file, None, f"nothing else, since it takes {channels} channels, not 3"
    return file, source, f"all else as in {source}"


# ---- The command line ----

def check_own_prediction(folder: Path, settings: dict) -> None:
    if settings["method"] not in ("unimodal", "mmlora", "separate", "logits", "no-umft", "full"):
        raise ValueError(f"{folder} is a run of baselines/{settings['method']}.py, which alone can"
                         " predict with it; --probe can test its encoders")


def open_run(args, folder: Path) -> tuple:
    """-> (the run's folder, that of the prepared data, its dataset.json, settings, models)."""
    runs.check_finished(folder)
    settings = runs.read_json(folder / "config.json")["settings"]
    if not args.probe:
        check_own_prediction(folder, settings)
    changes = fingerprint.changed(folder)
    if changes:
        print(f"{folder}: {fingerprint.sentence(changes)} since it was trained")
    arguments.prepare_torch(settings["dataset"])
    where = arguments.find(args.data_root, settings["dataset"], settings["seed"])
    info = runs.read_json(where / "dataset.json")
    return folder, where, info, *load_run(folder, info, encoders_only=args.probe)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python evaluate.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", nargs="+", type=Path, metavar="RUN",
                   help="folders of finished runs; of those that differ in the seed alone also the"
                        " mean")
    p.add_argument("--fusion", choices=metrics.FUSIONS,
                   help="what is averaged; default: what the run was trained with")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--drop", nargs="+", default=[], metavar="MODALITY",
                     help="leave these modalities out of the average")
    p.add_argument("--missing", nargs="+", type=float, default=[], metavar="SHARE",
                   help="with --drop: shares of the samples that lack them; 0.7 = 70 %% of them")
    one.add_argument("--probe", action="store_true",
                     help="linear evaluation: of the encoders of --run, or of the pre-trained one of"
                          " --dataset and --modality")
    one.add_argument("--clip", nargs="+", default=[], metavar="[MODALITY=]FILE",
                     help="the likeliest classes of one video, picture or sound of your own")
    one.add_argument("--export", type=Path, metavar="FOLDER",
                     help="write the encoders, LoRA merged, as public checkpoints into a new folder")
    p.add_argument("--plot", action="store_true",
                   help="draw each run's training curves (needs matplotlib)")
    p.add_argument("--text", help="with --clip or alone: its text")
    p.add_argument("--tokenizer", nargs="+", metavar="FILE",
                   help="for --text: vocabulary files, where the data were prepared with your own")
    p.add_argument("--dataset", help="for --probe without --run")
    p.add_argument("--modality", help="for --probe; default: all that the run has")
    p.add_argument("--encoder", nargs="+", default=[], metavar="NAME",
                   help="for --probe --dataset: another one than Table 2's")
    p.add_argument("--pretrained", nargs="+", default=[], metavar="PATH",
                   help="for --probe --dataset: a public checkpoint, or none for random weights")
    p.add_argument("--seed", type=int, default=0, help="for --probe --dataset; default: 0")
    p.add_argument("--seeds", type=int, nargs="+", metavar="SEED",
                   help="for --probe --dataset: all of these")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", default="runs", metavar="FOLDER",
                   help="for --probe --dataset: folder of all runs; default: runs")
    p.add_argument("--data-root", default="data", metavar="FOLDER",
                   help="folder of the prepared data sets; default: data")
    return p


def main() -> None:
    args = parser().parse_args()
    if args.plot:
        report.import_pyplot()
    arguments.check_device(args.device)
    if args.run and (args.clip or args.text is not None):
        for folder in args.run:
            show_clip(folder, args)
        return
    if args.export and len(args.run or ()) != 1:
        raise ValueError("--export takes one --run")
    pretrained = args.probe and args.dataset and args.modality
    if bool(args.run) == bool(pretrained):
        raise ValueError("give one of: --run RUN, --probe --dataset NAME --modality NAME")
    if args.missing and not (args.drop and all(0 <= share <= 1 for share in args.missing)):
        raise ValueError("--missing needs --drop MODALITY and shares from 0 to 1: 0.7 = 70 % of the"
                         " samples lack that modality")
    if args.export:
        folder, _, info, settings, models = open_run(args, args.run[0])
        export_run(folder, info, settings, models, args.export)
        return
    if args.run:
        opened = (open_run(args, folder) for folder in args.run)
    else:
        arguments.prepare_torch(args.dataset)
        opened = (open_pretrained(args, seed) for seed in args.seeds or [args.seed])
    show_tables(args, opened)


def show_tables(args, opened) -> None:
    """One table a run; of runs that differ in the seed alone also the table of their means."""
    rows_of = probe_rows if args.probe else score_rows
    same = {}
    for folder, where, info, settings, models in opened:
        rows = rows_of(args, folder, where, info, settings, models)
        report.print_table(rows, where, info)
        same.setdefault(runs.but_seed(settings), []).append((folder.name, rows, where, info))
        if args.plot:
            report.plot(folder)
    for group in same.values():
        if len(group) > 1:
            print("\n" + ", ".join(name for name, *_ in group), end="")
            together = []
            for rows in zip(*(rows for _, rows, _, _ in group)):
                together.append((rows[0][0], [found[0] for _, found in rows]))
            report.print_table(together, group[0][2], group[0][3])


if __name__ == "__main__":
    arguments.guard(main)
