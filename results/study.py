"""Every number of README.md, docs/toy.md and docs/clips.md, made again.

    python -m results.study                      # all of it, hours; it goes on where it stopped
    python -m results.study --worlds toy --seeds 30 31
    python -m results.study --only toy:mmlora 'toy:small*' toy_mimics:concat
    python -m results.study --studies main shares
    python -m results.study --tune                     # only the learning rates
    python -m results.tables                           # the tables, from the JSON files

For each world, first a learning rate for each row: three rates, a factor of about three apart. The
best on validation of seeds 0 and 1 is taken. While it is the lowest or the highest, one more is
tried, so the winner has a worse one on either side. A rate that stands in rates.json is not
searched again. Then the fresh seeds. (Of `grid_av`, see docs/clips.md, a seed has no world of its
own, only its own weights.) A row is a command that anybody can type; it stands in the JSON file
beside its results, with the commit and the versions. One process, one thread. Runs are kept in
--out, and a finished one is not trained again.

    rates.json      the rates tried, and their validation scores
    main.json       all methods; temperatures, weights, averages of logits (from stored logits)
    ablations.json  ranks, each with its own learning rate; LoRA on one modality
    shares.json     a share of the training set; epochs times so many, see SHARES
    laziness.json   linear evaluation of encoders: before, after step 1, after joint training
    missing.json    a share of the test samples lacks a modality
    sgd.json        the methods whose authors train with SGD
"""
import argparse
import functools
import math
import runpy
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch

import data
from harness import (arguments, calibration, compare, files, fingerprint, linear, metrics,
                     report, runs)
from paper import settings as paper
from prepare import locks
from pretrained import checkpoints
from results import tables

HERE = fingerprint.PROJECT / "results"
WORLDS, CLIPS = tables.WORLDS, tables.CLIPS
STUDIES = ("main", "ablations", "shares", "laziness", "missing", "sgd")
FRESH = tuple(range(30, 40))           # no world and no rate was chosen on them
FRESH_OF_CLIPS = FRESH[:3]
TUNED_ON = (0, 1)
SERIES = [float(f"{digit}e{k}") for k in range(-7, 2) for digit in (1, 3)]
MOST_RATES = 7                         # an edge may win so long
RANKS = (2, 4, 8, 64)
SHARES = {0.3: 3, 0.1: 6}              # share of train -> epochs times so many: about as many steps
LACKING = (0, 0.3, 0.5, 0.7, 1)


class Row(NamedTuple):
    """One row of a table: a command, without data set, seeds and learning rate."""
    label: str
    script: str
    words: tuple = ()
    start: str | float = "lora"        # where the search of the rate starts: a kind, or a rate
    step_1: bool = True                # whether it starts from uni-modal fine-tuning


SMALL = {"heads": 3e-3, "biases": 3e-3, "norms": 1e-2, "temperatures": 3e-2}
MAIN = {
    "concat": Row("multi-modal baseline", "baselines/concat.py", (), "joint", False),
    "ogm_ge": Row("OGM-GE", "baselines/ogm_ge.py", (), "joint", False),
    "g_blending": Row("G-Blending", "baselines/g_blending.py", (), "joint", False),
    "g_blending_fixed": Row("G-Blending, equal weights", "baselines/g_blending.py",
                            ("--weights", "1", "1", "1"), "joint", False),
    "pmr": Row("PMR", "baselines/pmr.py", (), "joint", False),
    "mla": Row("MLA", "baselines/mla.py", (), "joint", False),
    "mbt": Row("MBT", "baselines/mbt.py", (), "joint", False),
    "pmf": Row("PMF, fine-tuned towers", "baselines/pmf.py", ("--umft",), 1e-3),
    "frozen": Row("classifier on frozen features", "baselines/frozen.py", (), 3e-3),
    "no_umft": Row("MMLoRA without UMFT", "baselines/no_umft.py", ("--lora", "all"),
                   "lora", False),
    "logits": Row("LoRA on averaged logits", "baselines/logits.py", ("--lora", "all")),
    "separate": Row("control: separate losses", "baselines/separate.py", ("--lora", "all")),
    "separate_full": Row("control: separate losses, all weights", "baselines/separate_full.py", (),
                         "full"),
    **{f"small_{what}": Row(f"Eq. 3 trains {what}", "baselines/small.py", ("--what", what), rate)
       for what, rate in SMALL.items()},
    "all_linear": Row("MMLoRA, all linear layers", "baselines/all_linear.py", ("--lora", "all")),
    "drop_modality": Row("MMLoRA, modality dropout", "baselines/drop_modality.py",
                         ("--lora", "all")),
    "full_ume": Row("fully fine-tuned UME", "baselines/full_ume.py", (), "full"),
    "mmlora": Row("**MMLoRA, rank 1, both**", "train_joint.py", ("--lora", "all")),
}
ABLATIONS = {f"rank {r}": Row(f"rank {r}", "train_joint.py", ("--lora", "all", "--rank", str(r)))
             for r in RANKS}
for modality in ("audio", "visual"):
    ABLATIONS[modality] = Row(f"{modality} only", "train_joint.py", ("--lora", modality))
# The methods whose authors train with SGD, and the baseline that they are compared with.
SGD = {f"{name}_sgd": Row(f"{MAIN[name].label}, SGD", MAIN[name].script, ("--optimizer", "sgd"),
                          0.03, False) for name in ("concat", "ogm_ge", "pmr", "mla")}
# No row without UMFT: there are no pre-trained weights, and LoRA alone on random ones is nothing.
OF_CLIPS = ("concat", "frozen", "separate", "full_ume", "mmlora")
CLIPS_WORDS = ("--encoder", "resnet_small", "--pretrained", "none", "--batch-size", "32")
# Rows whose rate is that of another row.
RATE_OF = {"mmlora r8": "rank 8"}
OF_A_SHARE = {name: MAIN[name] for name in ("mmlora", "separate", "full_ume", "no_umft", "concat")}
OF_A_SHARE["mmlora r8"] = ABLATIONS["rank 8"]
PROBED = ("concat", "ogm_ge", "mmlora")
PROBE_OF = "python evaluate.py --probe --run, of the runs of"
LACK = ("mmlora", "separate", "full_ume", "drop_modality")
GAINS = ("mmlora", "separate", "full_ume", "separate_full")


# ---- Training, with the real scripts ----

@functools.cache
def names_in(script: str) -> dict:
    """The `parser` and `train` of a script. `main` reads all scripts at the start: a run's
    fingerprint names the code of then."""
    return runpy.run_path(str(fingerprint.PROJECT / script))


def train(args, row: Row, world: str, seed: int, words=(), out: str = "") -> runs.Run:
    """One run of a row, as its script trains it; or the finished one."""
    script = names_in(row.script)
    words = ["--dataset", world, "--seed", str(seed), *row.words, *words_of(world), *words,
             "--device", "cpu"]
    sys.argv = [row.script, *words, "--out", out or args.out, "--data-root", args.data_root]
    p = script["parser"]()
    asked = p.parse_args(sys.argv[1:])
    asked.default_of = p.get_default
    if asked.lr:
        asked.lr = asked.lr[0]
    if row.script == "train_unimodal.py":
        return script["train"](asked, asked.modality, seed)
    return script["train"](asked, seed)


def command(row: Row, world: str, seeds, words=()) -> str:
    module = row.script.removesuffix(".py").replace("/", ".")
    script = row.script if module == row.script.removesuffix(".py") else f"-m {module}"
    return " ".join(["python", script, "--dataset", world, *row.words, *words_of(world), *words,
                     "--seeds", *map(str, seeds)])


def words_of(world: str) -> tuple[str, ...]:
    return CLIPS_WORDS if world == CLIPS else ()


def encoders_of(world: str) -> dict[str, str]:
    """Modality -> encoder."""
    if world == CLIPS:
        return dict(audio="resnet_small", visual="resnet_small")
    return paper.encoders_for(world)


def wanted(args, world: str, name: str) -> bool:
    if not args.only:
        return True
    matching = [pattern for pattern in args.only if fnmatch(f"{world}:{name}", pattern)]
    args.unknown -= set(matching)
    return len(matching) > 0


# ---- Learning rates ----

def start_of(row: Row, world: str) -> float:
    if isinstance(row.start, float):
        return row.start
    return paper.joint_lr(world, encoders_of(world), row.start)


def search(first: float, score) -> tuple[float, dict]:
    """-> the best rate, and {rate: score}. Of equal scores the rate nearest to `first` wins.

    score(rate) -> something that can be compared. A rate that diverges has no score: None.
    """
    middle = min(range(len(SERIES)), key=lambda i: abs(math.log(SERIES[i] / first)))
    tried = {i: score(SERIES[i]) for i in (middle, middle - 1, middle + 1)}
    while True:
        # A dict keeps its order: the middle is the first, so it wins a tie.
        finite = [i for i in tried if tried[i] is not None]
        if not finite:
            rates = ", ".join(f"{SERIES[i]:g}" for i in sorted(tried))
            raise ValueError(f"training diverged at all rates: {rates}")
        best = max(finite, key=lambda i: tried[i])
        if best not in (min(tried), max(tried)) or len(tried) == MOST_RATES:
            return SERIES[best], {SERIES[i]: tried[i] for i in sorted(tried)}
        new = best - 1 if best == min(tried) else best + 1
        tried[new] = score(SERIES[new])


def validation_of(train_all) -> list | None:
    """[score, -loss] of the runs that train_all() gives; None where training diverged."""
    try:
        return list(report.validation(train_all()))
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        print(error)
        return None


def rate_of(args, world: str, name: str, row: Row) -> float:
    """The learning rate of a row: from rates.json, else searched for and written there."""
    name = RATE_OF.get(name, name)
    known = read("rates").get(world, {})
    if name in known:
        return known[name]["rate"]

    def score(rate):
        words = ["--lr", f"{rate:g}", *umft_words(world, row)]
        return validation_of(lambda: [train(args, row, world, seed, words) for seed in TUNED_ON])

    rate, tried = search(start_of(row, world), score)
    words = ["--lr", *(f"{lr:g}" for lr in tried), *umft_words(world, row)]
    store_rate(world, name, command(row, world, TUNED_ON, words), rate, tried)
    return rate


def umft_rate(args, world: str) -> float:
    """That of step 1: one rate for all modalities."""
    known = read("rates").get(world, {})
    if "umft" in known:
        return known["umft"]["rate"]

    def score(rate):
        # A joint script looks for one uni-modal run a seed, so each rate has a folder of its own.
        def train_all():
            out = f"{args.out}/umft-lr{rate:g}"
            return [train(args, alone(m), world, seed, ["--lr", f"{rate:g}"], out)
                    for m in encoders_of(world) for seed in TUNED_ON]
        return validation_of(train_all)

    default = paper.umft_lr(world, encoders_of(world)["audio"], "audio")
    rate, tried = search(default, score)
    words = ["--lr", f"{rate:g}"]                        # step 1 takes one
    commands = [command(alone(m), world, TUNED_ON, words) for m in encoders_of(world)]
    store_rate(world, "umft", " && ".join(commands), rate, tried)
    return rate


def umft_words(world: str, row: Row) -> list[str]:
    if not row.step_1:
        return []
    return ["--umft-lr", f"{read('rates')[world]['umft']['rate']:g}"]


def alone(modality: str) -> Row:
    return Row(f"fine-tuned alone (UMFT), {modality}", "train_unimodal.py",
               ("--modality", modality))


def store_rate(world, name, command_line, rate, tried) -> None:
    validation = {f"{r:g}": None if s is None else percent(s[0]) for r, s in tried.items()}
    store("rates", world, name, dict(command=command_line, rate=rate, validation=validation,
                                     commit=runs.commit()))


# ---- Results ----

def read(study: str) -> dict:
    """World -> row -> what is known; {} where nothing is."""
    file = HERE / f"{study}.json"
    return data.read_json(file) if file.exists() else {}


def store(study: str, world: str, name: str, value: dict) -> None:
    """Into the JSON file. What another process wrote meanwhile stays, and so do other seeds of the
    same row, as long as their command was the same."""
    file = HERE / f"{study}.json"
    lock(file)
    known = read(study)
    before = known.setdefault(world, {}).get(name)
    if before and "seeds" in value and without_seeds(before) == without_seeds(value):
        value["seeds"] = dict(sorted({**before["seeds"], **value["seeds"]}.items()))
        value["commits"] = sorted({*before["commits"], *value["commits"]})
        value["command"] = f"{without_seeds(value)} --seeds {' '.join(value['seeds'])}"
    known[world][name] = value
    files.write_json(file, known)
    locks.unlock(file)


def lock(file: Path) -> None:
    """Wait until no other study writes this file."""
    while True:
        try:
            return locks.lock(file)
        except ValueError:                                # another one writes, for milliseconds
            time.sleep(0.05)


def without_seeds(row: dict) -> str:
    return row["command"].split(" --seeds")[0]


def record(label: str, command_line: str, found: dict[int, runs.Run], numbers) -> dict:
    """What a JSON file says of a row. found: seed -> run; numbers(run) -> what a seed has."""
    configs = [data.read_json(run.folder / "config.json") for run in found.values()]
    first = next(iter(found.values()))
    seconds = [run.result["seconds"] for run in found.values()]
    epochs = str(first.settings["epochs"])
    if "unimodal" in first.settings:
        base = next(iter(first.settings["unimodal"].values()))["run"]
        step_1 = data.read_json(first.folder.parent / base / "config.json")["settings"]["epochs"]
        epochs = f"{step_1} + {epochs}"
    return dict(label=label, command=command_line, lr=first.settings["lr"], epochs=epochs,
                trained=first.result["trained_parameters"], seconds=sum(seconds) / len(seconds),
                commits=sorted({str(config["commit"]) for config in configs}),
                versions=configs[0]["versions"],
                seeds={str(seed): numbers(run) for seed, run in sorted(found.items())})


def percent(share: float) -> float:
    """In %, rounded: equal counts of right samples must be equal numbers."""
    return round(100 * share, 4)


def numbers_of(run: runs.Run) -> dict:
    fusion = run.settings.get("fusion") or run.settings["modality"]
    test = run.result["test"][fusion]
    groups = {name: percent(value) for name, value in test.get("groups", {}).items()}
    return dict(accuracy=percent(test["accuracy"]), loss=round(test["loss"], 4), groups=groups,
                validation=percent(run.result["val"][fusion]["accuracy"]),
                best_epoch=run.result["best_epoch"])


def train_seeds(args, world: str, name: str, row: Row, more=()) -> tuple[dict, str]:
    """Train all seeds of a row. -> seed -> run, and the command that does it."""
    words = ["--lr", f"{rate_of(args, world, name, row):g}", *umft_words(world, row), *more]
    found = {seed: train(args, row, world, seed, words) for seed in args.seeds}
    return found, command(row, world, args.seeds, words)


def train_row(args, study: str, world: str, name: str, row: Row) -> tuple[dict, str]:
    """`train_seeds`, and write them down."""
    found, line = train_seeds(args, world, name, row)
    store(study, world, name, record(row.label, line, found, numbers_of))
    return found, line


def step_1_of(run: runs.Run) -> dict[str, runs.Run]:
    """Modality -> the finished run of step 1 that a run started from."""
    return {m: runs.Run.open(run.folder.parent / base["run"])
            for m, base in run.settings["unimodal"].items()}


def rows_of(world: str) -> dict[str, Row]:
    """The rows of the main table."""
    if world == CLIPS:
        return {name: MAIN[name] for name in OF_CLIPS}
    return MAIN


def main_study(args, world: str) -> None:
    for name, row in rows_of(world).items():
        if wanted(args, world, name):
            found, line = train_row(args, "main", world, name, row)
            if name in GAINS:
                store_gain(args, world, name, row, found, line)
            if name == "mmlora":
                store_step_1(world, found)
                store_chosen(args, world, found, line)


def store_step_1(world: str, found: dict) -> None:
    """Each modality alone; both ensembles of them: they stand in the results of MMLoRA."""
    for m in next(iter(found.values())).settings["unimodal"]:
        of_m = {seed: step_1_of(run)[m] for seed, run in found.items()}
        row, words = alone(m), ["--lr", f"{next(iter(of_m.values())).settings['lr']:g}"]
        line = command(row, world, found, words)
        store("main", world, f"unimodal_{m}", record(row.label, line, of_m, numbers_of))


def store_chosen(args, world: str, found: dict, line: str) -> None:
    """UME and MMLoRA with averaged probabilities and logits, temperatures, weights: whatever can be
    had from stored logits."""
    # (name, label) -> what harness/calibration.py is asked for
    asked = {"": ("", None), "_T": (", one temperature", ("one", "accuracy")),
             "_T_nll": (", one temperature (NLL)", ("one", "nll")),
             "_T_each": (", a temperature each", ("each", "accuracy")),
             "_T_each_nll": (", a temperature each (NLL)", ("each", "nll")),
             "_weighted": (", weighted", ("weighted", "accuracy"))}
    for base, label in (("ume", "UME"), ("mmlora", "MMLoRA")):
        for suffix, (more, choice) in asked.items():
            def numbers(run):
                return chosen_numbers(args, world, run, base, choice)
            if base + suffix != "mmlora":
                store("main", world, base + suffix, posthoc(label + more, found, numbers, line))

    def of_logits(run):
        return dict(accuracy=percent(run.result["ume"]["test"]["logits"]["accuracy"]))
    store("main", world, "ume_logits", posthoc("UME, logits averaged", found, of_logits, line))

    def calibrated(run):
        return chosen_numbers(args, world, run, "mmlora", None)
    store("main", world, "mmlora_T_none", posthoc("MMLoRA, T = 1", found, calibrated, line))


def store_gain(args, world: str, name: str, row: Row, found: dict, line: str) -> None:
    """Where a row is better than UME: both, one or none of the models of step 1 right."""
    def numbers(run):
        y, ume = labels_of(args, world, run, "test"), logits_of(run, "ume", "test")
        right = metrics.fuse(logits_of(run, "own", "test")).argmax(1) == y
        right_ume = metrics.fuse(ume).argmax(1) == y
        gain = compare.gain_by_experts(right, right_ume, [z.argmax(1) == y for z in ume.values()])
        return {group: [round(share, 4), round(points, 4)]
                for group, (share, points) in gain.items()}
    store("main", world, f"{name}_gain", posthoc(row.label, found, numbers, line))


def posthoc(label: str, found: dict, numbers, line: str, how="from the stored logits of") -> dict:
    """A row that needs no training of its own; line: the command that trained its runs."""
    full = record(label, f"{how}: {line}", found, numbers)
    return {key: full[key] for key in ("label", "command", "commits", "versions", "seeds")}


def logits_of(run: runs.Run, base: str, split: str) -> dict:
    """Modality -> logits (N, C): of the ensemble that a run started from, "ume", or its own."""
    return calibration.stored(run.folder, split)["UME" if base == "ume" else "run"]


def labels_of(args, world: str, run: runs.Run, split: str) -> torch.Tensor:
    return data.Split(arguments.find(args.data_root, world, run.settings["seed"]), split).labels


def chosen_numbers(args, world: str, run: runs.Run, base: str, choice) -> dict:
    val, test = logits_of(run, base, "val"), logits_of(run, base, "test")
    chosen = calibration.unchanged(list(val))
    if choice:
        chosen = calibration.choose(*choice, val, labels_of(args, world, run, "val"))
    p = calibration.fuse(test, *chosen)
    scores = calibration.scores(p, labels_of(args, world, run, "test"))
    out = dict(accuracy=percent(scores["accuracy"]), nll=round(scores["nll"], 4),
               ece=percent(scores["ece"]))
    if choice:
        values = chosen[1] if choice[0] == "weighted" else chosen[0]
        out["chosen"] = {m: round(value, 4) for m, value in values.items()}
    return out


# ---- The other studies ----

def ablation_study(args, world: str) -> None:
    for name, row in ABLATIONS.items():
        if wanted(args, world, name):
            train_row(args, "ablations", world, name, row)


def sgd_study(args, world: str) -> None:
    for name, row in SGD.items():
        if wanted(args, world, name):
            train_row(args, "sgd", world, name, row)


def share_study(args, world: str) -> None:
    setting = paper.settings_for(world)
    for share, times in SHARES.items():
        umft, joint = times * setting["umft_epochs"], times * setting["epochs"]
        for name, row in OF_A_SHARE.items():
            if not wanted(args, world, f"{name} {share:g}"):
                continue
            words = ["--share", f"{share:g}"]
            if row.step_1:
                words += ["--umft-epochs", str(umft), "--epochs", str(joint)]
            elif row.start == "joint":
                words += ["--epochs", str(umft)]
            else:
                words += ["--epochs", str(umft + joint)]
            found, line = train_seeds(args, world, name, row, words)
            store("shares", world, f"{name} {share:g}", record(row.label, line, found, numbers_of))
            if name == "mmlora":
                def of_ume(run):
                    return chosen_numbers(args, world, run, "ume", None)

                def of_temperature(run):
                    return chosen_numbers(args, world, run, "ume", ("one", "accuracy"))
                store("shares", world, f"ume {share:g}", posthoc("UME", found, of_ume, line))
                store("shares", world, f"ume_T {share:g}",
                      posthoc("UME, one temperature", found, of_temperature, line))


def laziness_study(args, world: str) -> None:
    """Linear evaluation (Sec. 3.1): of pre-trained encoders, of step 1, of joint training."""
    for name in PROBED:
        if wanted(args, world, f"probe {name}"):
            row = MAIN[name]
            found, line = train_seeds(args, world, name, row)
            store_probe(args, world, name, row.label, found, line)
            if name == "mmlora":
                for m in found[args.seeds[0]].settings["unimodal"]:
                    of_m = {seed: step_1_of(run)[m] for seed, run in found.items()}
                    store_probe(args, world, f"unimodal_{m}", alone(m).label, of_m, line)
    for m, encoder in paper.encoders_for(world).items():
        if encoder in checkpoints.PUBLIC and wanted(args, world, f"probe pretrained_{m}"):
            evaluate(args, "--probe", "--dataset", world, "--modality", m, "--out", args.out,
                     "--seeds", *map(str, args.seeds))
            seeds = {}
            for seed in args.seeds:
                file = Path(args.out, world, f"probe-{m}-{encoder}-s{seed}", "probe.json")
                seeds[str(seed)] = {m: percent(data.read_json(file)[m]["test"]["accuracy"])}
            store("laziness", world, f"pretrained_{m}", dict(
                label=f"pre-trained, {m}", seeds=seeds, commits=[str(runs.commit())],
                command=f"python evaluate.py --probe --dataset {world} --modality {m} --seeds "
                        + " ".join(map(str, args.seeds))))


def store_probe(args, world: str, name: str, label: str, found: dict, line: str) -> None:
    """found: seed -> run. Those that have no probe yet, or one of other code, get one."""
    new = []
    for run in found.values():
        file = run.folder / "probe.json"
        if not file.exists() or not linear.is_of_this_code(data.read_json(file)):
            new.append(str(run.folder))
    if new:
        evaluate(args, "--probe", "--run", *new)

    def numbers(run):
        probed = data.read_json(run.folder / "probe.json")
        return {m: percent(probed[m]["test"]["accuracy"]) for m in probed}
    store("laziness", world, name, posthoc(label, found, numbers, line, PROBE_OF))


def evaluate(args, *words) -> None:
    sys.argv = ["evaluate.py", *words, "--device", "cpu", "--data-root", args.data_root]
    runpy.run_path(str(fingerprint.PROJECT / "evaluate.py"), run_name="__main__")


def missing_study(args, world: str) -> None:
    """A share of the test samples lacks one modality."""
    for name in LACK:
        if not wanted(args, world, f"missing {name}"):
            continue
        row = MAIN[name]
        found, line = train_seeds(args, world, name, row)
        for base in ("ume", name) if name == "mmlora" else (name,):
            for m in paper.encoders_for(world):
                def numbers(run):
                    test, labels = logits_of(run, base, "test"), labels_of(args, world, run, "test")
                    out = {}
                    for share in LACKING:
                        p = metrics.fuse_missing(test, [m], share)
                        out[f"{share:g}"] = percent(calibration.accuracy(p, labels))
                    return out
                label = "UME" if base == "ume" else row.label
                store("missing", world, f"{base}, no {m}", posthoc(label, found, numbers, line))


# ---- The command line ----

def main() -> None:
    p = argparse.ArgumentParser(prog="python -m results.study", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worlds", nargs="+", choices=(*WORLDS, CLIPS), default=WORLDS,
                   metavar="WORLD", help=f"default: {' '.join(WORLDS)}; {CLIPS}: only main")
    p.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES, metavar="STUDY",
                   help=f"default: {' '.join(STUDIES)}")
    p.add_argument("--seeds", nargs="+", type=arguments.seed_number, metavar="SEED",
                   help=f"default: 30 to 39; {CLIPS}: 30 to 32")
    p.add_argument("--only", nargs="+", metavar="WORLD:ROW", help="a part; * stands for anything")
    p.add_argument("--tune", action="store_true", help="stop after the learning rates")
    p.add_argument("--out", default="runs/study", metavar="FOLDER",
                   help="folder of the runs; default: runs/study")
    p.add_argument("--data-root", default="data", metavar="FOLDER",
                   help="of the prepared data; default: data")
    args = p.parse_args()
    args.unknown = set(args.only or [])                   # patterns that no row has matched yet
    torch.set_num_threads(1)
    seeds = arguments.each_once("seed", args.seeds or [])
    for row in (alone("audio"), *MAIN.values()):
        names_in(row.script)
    runs.commit()                                         # of now, not of when the first run ends
    for world in args.worlds:
        args.seeds = seeds or (FRESH_OF_CLIPS if world == CLIPS else FRESH)
        umft_rate(args, world)
        if args.tune:
            others = {} if world == CLIPS else {**ABLATIONS, **SGD}
            for name, row in {**rows_of(world), **others}.items():
                if wanted(args, world, name):
                    rate_of(args, world, name, row)
            continue
        do = dict(main=main_study, ablations=ablation_study, shares=share_study,
                  laziness=laziness_study, missing=missing_study, sgd=sgd_study)
        for study in ("main",) if world == CLIPS else args.studies:
            do[study](args, world)
    if not args.tune:
        tables.fill()
    if args.unknown:
        raise ValueError(f"--only {' '.join(sorted(args.unknown))}: no row of these worlds and"
                         " studies is called so")


if __name__ == "__main__":
    arguments.guard(main)
