"""What the stored logits of finished runs answer, without a model: temperatures, weights, and two
methods on the same samples."""
import re
from pathlib import Path

import torch

import data
from harness import arguments, calibration, compare, fingerprint, metrics, report, stored


def open_data_of(args, folder: Path) -> tuple:
    """-> folder of the prepared data of a finished run, its dataset.json, the run's settings.

    Raises ValueError for data with several labels a sample, and where the stored logits are not of
    these data.
    """
    stored.check_finished(folder)
    fingerprint.say_changes(folder)
    settings = stored.read_config(folder)["settings"]
    where = arguments.find(args.data_root, settings["dataset"], settings["seed"])
    info = data.check(where)
    calibration.only_one_label(info)
    fingerprint.check_stored_logits(folder, where)
    return where, info, settings


# ---- Temperatures, weights ----

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


def show_calibration(args) -> None:
    """A table a run; of runs that differ in the seed alone also the mean."""
    same = {}
    for folder in args.run:
        rows = calibration_rows(args, folder)
        print_calibration(str(folder), [rows])
        settings = stored.read_config(folder)["settings"]
        same.setdefault(stored.experiment_of(folder, settings), []).append((folder.name, rows))
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


# ---- Two methods on the same samples ----

def show_comparison(args) -> None:
    """--compare A B: the same test samples, seed by seed; then over the seeds."""
    folder_a, folder_b = args.compare
    ume = str(folder_b) == "ume"                          # of A
    if ume:
        folder_b = folder_a
    opened, differences, gains = [], [], []
    seeds = arguments.each_once("seed", args.seeds or [None])
    for seed in seeds:                                    # what has changed is said above the table
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
