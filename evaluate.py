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
from pathlib import Path

import harness                            # before torch: from here on Ctrl-C ends in one line
import torch
from torch import nn

import data
from encoders import BUILD
from harness import (arguments, clip, export, files, fingerprint, from_logits, linear, metrics,
                     page, report, runs, stored)
from harness.models import load_run, predict, pretrained_model


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
        try:
            fingerprint.check_stored_logits(folder, where)
        except ValueError as error:
            print(f"UME is left out: {error}")
        else:
            logits["UME"] = stored.logits_of_step_1(folder, settings, "test", len(test))
    logits["together"] = predict(models, test, args.device, settings)

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


# ---- The page ----

def show_page(args, folder: Path) -> None:
    """page.html in the folder of a run: its stored logits, and the samples they are of."""
    stored.check_finished(folder)
    settings = stored.read_config(folder)["settings"]
    fingerprint.say_changes(folder)
    where = arguments.find(args.data_root, settings["dataset"], settings["seed"])
    fingerprint.check_stored_logits(folder, where)
    print(f"wrote {page.write(folder, where, args.tokenizer)}")


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
    if file.exists() and not fingerprint.changed(folder):
        before = stored.read_probe(folder)
        if not linear.is_of_this_code(before):
            before = {}                                   # not beside probes of other code
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


# ---- Opening a run ----

def open_run(args, folder: Path) -> tuple:
    """-> (the run's folder, that of the prepared data, its dataset.json, settings, models)."""
    stored.check_finished(folder)
    settings = stored.read_config(folder)["settings"]
    if not args.probe:
        stored.check_own_prediction(folder, settings)
    fingerprint.say_changes(folder)
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
    arguments.check_device(args.device)
    arguments.each_once("run", [folder.resolve() for folder in args.run or []])
    if args.modality and not args.probe:
        raise ValueError("--modality is for --probe")
    if args.run and (args.seeds or args.dataset or args.encoder or args.pretrained):
        raise ValueError("--run says its own data, encoders and seed: not with --dataset,"
                         " --encoder, --pretrained or --seeds")
    if args.run and (args.clip or args.text is not None):
        if args.temperature or args.fusion == "weighted" or args.plot or args.missing:
            raise ValueError("--clip and --text: not with --temperature, --fusion weighted,"
                             " --missing or --plot")
        for folder in args.run:
            clip.show(folder, args)
        return
    if args.compare:
        alone = (args.run, args.drop, args.missing, args.probe, args.temperature, args.fusion,
                 args.page, args.plot, args.export, args.clip, args.text)
        if any(alone):
            raise ValueError("--compare stands alone, with --seeds at most")
        return from_logits.show_comparison(args)
    if args.page:
        if not args.run or args.temperature or args.fusion or args.missing or args.plot:
            raise ValueError("--page takes --run RUN, and no option that changes the result")
        for folder in args.run:
            show_page(args, folder)
        return
    if args.run and (args.temperature or args.fusion == "weighted"):
        if args.drop or args.missing or args.probe or args.export or args.plot:
            raise ValueError("--temperature and --fusion weighted read stored logits: not with"
                             " --drop, --missing, --probe, --export or --plot")
        return from_logits.show_calibration(args)
    if args.plot:
        report.import_pyplot()                            # it may not be there
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
        export.write(folder, info, settings, models, args.export)
    elif args.run:
        show_tables(args, (open_run(args, folder) for folder in args.run))
    else:
        arguments.prepare_torch(args.dataset)
        seeds = arguments.each_once("seed", args.seeds or [args.seed])
        show_tables(args, (open_pretrained(args, seed) for seed in seeds))


def show_tables(args, opened) -> None:
    """One table a run; of runs that differ in the seed alone also the table of their means."""
    rows_of = probe_rows if args.probe else score_rows
    same = {}                                             # experiment -> its tables, one a seed
    for folder, where, info, settings, models in opened:
        rows = rows_of(args, folder, where, info, settings, models)
        report.print_table(rows, where, info)
        group = same.setdefault(stored.experiment_of(folder, settings), [])
        group.append((folder, rows, where, info))
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
