"""The paper's tables with our runs in them.

    python -m paper.tables 5                            # the paper, our runs, commands for the rest
    python -m paper.tables 10 --seeds 0 1 2 --fill      # run these commands, then print the table
    python -m paper.tables 10 --dataset toy --fill      # the same question asked of the toy
    python -m paper.tables 10 --dataset toy --seeds 0 1 --fill --out runs10 --epochs 3
    python -m paper.tables 10 --plot                    # a picture, into the folder of the runs

With --fill, options that are not in the list below go to every training command.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from harness import compare, files, fingerprint, linear, report, stored
from harness.arguments import Help, each_once, guard, nearest_first, seed_number
from harness.report import mean_std
from paper.results import RANDOM_WEIGHTS, TABLES, Cell, cells, command, trained_before
from paper.settings import encoders_for
from prepare.toy import WORLDS
from pretrained.checkpoints import PUBLIC

# The other tables compare texts, flow or sizes of public encoders, and a toy has none of them.
TOY_TABLES = (1, 3, 4, 5, 8, 9, 10, 13)
# What the commands of a table differ in: no option for all of them.
OF_THE_TABLE = ("--modality", "--lora", "--rank", "--encoder", "--pretrained", "--seed", "--share")
WIDTH = 80                                      # of a table, in columns of the terminal
PROJECT = Path(__file__).resolve().parents[1]


# ---- What is asked ----

def rows_of(args) -> list[list[Cell]]:
    """The rows of the table, or the same questions asked of a toy."""
    if args.dataset is None:
        return cells(args.number)
    rows = {}                                   # row -> column -> cell
    for row in cells(args.number):
        for cell in row:
            if command(cell) and set(cell.encoders) <= set(encoders_for(args.dataset)):
                cell = asked_of_toy(cell, args.dataset)
                rows.setdefault(cell.row, {}).setdefault(cell.column, cell)
    return [list(row.values()) for row in rows.values()]


def asked_of_toy(cell: Cell, toy: str) -> Cell:
    names = "AVE|Kinetics-Sound|KS|CREMA-D|MM-IMDB|Food101"
    encoders = {m: encoders_for(toy)[m] for m in cell.encoders}
    row, column = re.sub(names, toy, cell.row).removesuffix("*"), re.sub(names, toy, cell.column)
    return replace(cell, row=row, column=column, backbone="", paper=None, quoted=False, start="",
                   dataset=toy, metrics=("accuracy",), encoders=encoders)


# ---- Which run of ours answers ----

class Run(NamedTuple):
    """What a table needs to know about a run."""
    folder: Path
    settings: dict
    encoders: dict          # modality -> encoder
    starts: dict            # modality -> what its encoder started from
    experiment: str         # all settings, also of step 1, but seed and learning rate
    result: dict            # result.json
    probe: dict             # probe.json
    changes: list           # what has changed since: files of code, the data


def read_run(folder: Path) -> Run:
    settings = stored.read_config(folder)["settings"]
    encoders = stored.encoders_of(settings)
    starts = {m: stored.started_from(folder, settings, m) for m in encoders}
    experiment = stored.experiment_of(folder, {**settings, "lr": None})
    result, probe = {}, {}
    if (folder / "result.json").exists():
        result = stored.read_result(folder, settings)
    if (folder / "probe.json").exists():
        probe = stored.read_probe(folder)
    changes = fingerprint.changed(folder)
    if not linear.is_of_this_code(probe):
        changes.append("harness/linear.py")
    return Run(folder, settings, encoders, starts, experiment, result, probe, changes)


def read_runs(args) -> tuple[list[Run], list[str]]:
    """-> finished runs on the data sets of the table, and a line for each that cannot be read."""
    datasets = {cell.dataset for row in rows_of(args) for cell in row if cell.dataset}
    files = []
    for out in (args.out, scratch(args)):
        for dataset in datasets:
            files += Path(out, dataset).glob("*/config.json")
    files.sort(key=lambda file: (len(file.parent.name), file))      # those without options first
    runs, unreadable = [], []
    for file in files:
        try:
            run = read_run(file.parent)
            if run.result or run.probe:
                runs.append(run)
        except (ValueError, OSError) as error:
            where = "" if str(file.parent) in str(error) else f"{file.parent}: "
            unreadable.append(f"left out: {where}{error}")
    return runs, unreadable


def scratch(args) -> str:
    """Where the runs from random weights go: a run's name says its encoders, not their start."""
    return f"{args.out}-scratch"


def fits(cell: Cell, run: Run) -> bool:
    """Whether a run did what a cell asks, with whatever learning rate, epochs, batch and seed."""
    asked, method = cell.of or cell.method, run.settings["method"]
    if asked == "ume":
        # These hold the ensemble that they started from.
        if "ume" not in run.result:
            return False
    elif method != asked:
        return False
    if asked != "ume" and has_options(run):
        return False
    if "share" in run.settings:                 # trained on a part of the training set
        return False
    if run.folder.parent.name != cell.dataset or run.encoders != cell.encoders:
        return False
    for m, encoder in run.encoders.items():
        wanted = encoder if encoder in PUBLIC and cell.start != RANDOM_WEIGHTS else "none"
        unknown = run.starts[m] is None and cell.start == ""        # its run of step 1 is gone
        if run.starts[m] != wanted and not unknown:
            return False
    if cell.lora and asked != "ume":
        lora, rank = run.settings.get("lora", ()), run.settings.get("rank")
        return (set(lora), rank) == (set(cell.lora), cell.rank)
    return True


def has_options(run: Run) -> bool:
    """Whether something of the method was not the default: the folder is named after it."""
    options = [name.replace("_", "-") for name in (*run.settings.get("options", {}), "drop_path")]
    return any(f"-{option}" in run.folder.name for option in options)


def runs_for(cell: Cell, runs: list[Run]) -> list[Run]:
    """The runs that fill a cell, one a seed. They differ in nothing else.

    Of several settings: those that were run with most seeds. Of several learning rates: the best
    on validation.
    """
    fitting = [run for run in runs if fits(cell, run)]
    if cell.method == "ume":
        # Whatever was trained from it later, the ensemble of a seed is the same.
        fitting.sort(key=lambda run: len(run.changes) > 0)
        of_seed = {}
        for run in fitting:
            of_seed.setdefault(run.settings["seed"], run)
        return list(of_seed.values())

    experiments = {}                            # settings -> learning rate -> runs, one a seed
    for run in fitting:
        rates = experiments.setdefault(run.experiment, {})
        rates.setdefault(run.settings.get("lr"), []).append(run)
    best = []
    for rates in experiments.values():
        most = max(map(len, rates.values()))
        groups = [group for group in rates.values() if len(group) == most]
        if most > len(best):
            best = groups[0] if len(groups) == 1 else max(groups, key=report.validation)
    return best


def numbers(cell: Cell, runs: list[Run]) -> dict[int, tuple]:
    """Seed -> the numbers of a cell in %."""
    found = {}
    for run in runs_for(cell, runs):
        if cell.method == "probe":
            scores = run.probe.get(cell.modality, {}).get("test", {})
        elif cell.method == "ume":
            scores = run.result.get("ume", {}).get("test", {}).get("prob", {})
        else:
            prediction = cell.modality or run.settings["fusion"]
            scores = run.result.get("test", {}).get(prediction, {})
        if set(cell.metrics) <= set(scores):
            found[run.settings["seed"]] = tuple(100 * scores[name] for name in cell.metrics)
    return found


def difference(cell: Cell, runs: list[Run]) -> str:
    """"+0.24 +- 0.09 (6)": the paired difference to UME on the seeds that have both, with its
    standard error; "" where there is none. Of two metrics the first."""
    if cell.dataset is None or cell.modality or cell.method in ("ume", "probe"):
        return ""
    own, ume = numbers(cell, runs), numbers(replace(cell, method="ume", of=None), runs)
    found = [own[seed][0] - ume[seed][0] for seed in own if seed in ume]
    if not found:
        return ""
    paired = compare.paired(found)
    if paired["se"] is None:
        return f"{paired['mean']:+.2f}"
    return f"{paired['mean']:+.2f} +- {paired['se']:.2f} ({paired['n']})"


def ours(row: list[Cell], runs: list[Run]) -> list[list]:
    """For each cell of a row, for each of its metrics: one value a seed. [] without a run."""
    values = []
    for cell in row:
        if cell.dataset is not None:
            values.append([list(metric) for metric in zip(*numbers(cell, runs).values())])
        elif all(values):                       # Avg Acc.: the mean of all cells to the left
            means = [mean_std(of_cell[0])[0] for of_cell in values]
            values.append([[sum(means) / len(means)]])
        else:
            values.append([])
    return values


# ---- Print ----

def show(args) -> None:
    """Print the paper's numbers, ours beneath them, and the commands for what is empty."""
    rows, (runs, notes) = rows_of(args), read_runs(args)
    lines, todo = [["", *[cell.column for cell in rows[0]]]], {}
    last = ""                                   # a row with two starts has its name once
    for row in rows:
        name = ", ".join(filter(None, [row[0].row, row[0].backbone]))
        if row[0].quoted:
            name += " (quoted)"
        if args.dataset is None and name != last:
            lines.append([name])
            lines.append(["    paper", *[" / ".join(map(str, c.paper or "-")) for c in row]])
        last = name
        if args.dataset is None:
            name = ", ".join(filter(None, ["    ours", row[0].start]))
        values = ours(row, runs)
        lines.append([name, *map(text, row, values)])
        paired = [difference(cell, runs) for cell in row]
        if any(paired):
            lines.append(["    - UME", *paired])
        for cell, found in zip(row, values):
            if not found and command(cell):
                todo.setdefault(steps(args, cell, runs), cell.quoted)
            for run in runs_for(cell, runs):
                if run.changes:
                    changed = fingerprint.sentence(run.changes)
                    notes.append(f"{run.folder}: {changed} since it was trained")

    print()
    print(textwrap.fill(f"Table {title(args)}; {TABLES[args.number]['source']}.", WIDTH))
    print(f"In %; ours: mean +- standard deviation (number of seeds), from {args.out}.")
    if any(line[0] == "    - UME" for line in lines):
        print("- UME: the difference on the same seeds, +- its standard error.")
    print_in_blocks(lines)
    if notes:
        print("", *dict.fromkeys(notes), sep="\n")
    if todo:
        print("\nNot run yet:\n")
    for line, quoted in todo.items():
        print(f"{line}     # quoted" if quoted else line)
    if any("--run RUN" in line for line in todo):
        print("\nRUN is the folder that the command before it writes.")
    if any(todo.values()):
        print("\nquoted: the paper took this row from other authors.")
    if any(cell.start == RANDOM_WEIGHTS for row in rows for cell in row):
        print("\nThe name of a run does not say what its encoders started from. So runs from"
              f"\nrandom weights go to {scratch(args)}, and this table looks there, too.")


def title(args) -> str:
    asked = f"{args.number}, asked of {args.dataset}" if args.dataset else f"{args.number}"
    return f"{asked}. {TABLES[args.number]['caption']}"


def text(cell: Cell, values: list[list[float]]) -> str:
    """"91.2 +- 0.4 (3)"; of two metrics "70.1 +- 0.2 / 66.0 +- 0.3 (3)"."""
    parts = []
    for of_seeds in values:
        mean, std = mean_std(of_seeds)
        parts.append(f"{mean:.1f} +- {std:.1f}" if len(of_seeds) > 1 else f"{mean:.1f}")
    seeds = f" ({len(values[0])})" if values and cell.dataset else ""
    return " / ".join(parts) + seeds


def print_in_blocks(lines: list[list[str]]) -> None:
    """A table. What is too wide for the terminal follows as a second block of columns."""
    whole = [line for line in lines if len(line) > 1]
    left, *columns = [max(map(len, column)) for column in zip(*whole)]
    widths = [3 + width for width in columns]
    start = 0
    while start < len(widths):
        end = start + 1
        while end < len(widths) and left + sum(widths[start:end + 1]) <= WIDTH:
            end += 1
        print()
        for label, *texts in lines:
            padded = [f"{t:>{w}}" for t, w in zip(texts[start:end], widths[start:end])]
            print("".join([f"{label:{left}}", *padded]).rstrip())
        start = end


# ---- Commands ----

def command_line(args, cell: Cell, trained: list[Run] = ()) -> list[str]:
    """The words of a cell's command, with the options of the table. trained: the runs to probe."""
    words = command(cell).split()
    if trained:
        words = words[:words.index("RUN")] + [str(run.folder) for run in trained]
    if trained_before(cell) is None:
        out = scratch(args) if cell.start == RANDOM_WEIGHTS else args.out
        if out != "runs":
            words += ["--out", out]
        if args.seeds:
            words += ["--seeds", *map(str, args.seeds)]
    if args.data_root != "data":
        words += ["--data-root", args.data_root]
    if args.device:
        words += ["--device", args.device]
    return words


def steps(args, cell: Cell, runs: list[Run]) -> str:
    """What to type for a cell: its command, before a probe also that of the training."""
    before = trained_before(cell)
    trained = runs_for(before, runs) if before else []
    last = shlex.join(command_line(args, cell, trained))
    if before and not trained:
        return f"{shlex.join(command_line(args, before))} && {last}"
    return last


def fill(args) -> None:
    """Run what the table lacks for its seeds, one command after another.

    Raises ValueError after the first command that fails; what is finished by then stays.
    """
    for row in rows_of(args):
        for cell in row:
            before = trained_before(cell)
            if before and lacks(args, before):
                start(command_line(args, before) + args.training)
            if not command(cell) or not lacks(args, cell):
                continue
            if cell.method == "probe":
                start(command_line(args, cell, before and runs_for(before, read_runs(args)[0])))
            else:
                start(command_line(args, cell) + args.training)


def lacks(args, cell: Cell) -> bool:
    """Whether a seed of a cell is missing. A run of other code counts where it would be trained
    anew: on a toy, or with --again."""
    runs = read_runs(args)[0]
    if args.dataset or "--again" in args.training:
        runs = [run for run in runs if not run.changes]
    return not set(args.seeds or [0]) <= set(numbers(cell, runs))


def start(words: list[str]) -> None:
    print(f"\n$ {shlex.join(words)}", flush=True)
    python, script, *rest = words
    if script != "-m":
        script = str(PROJECT / script)
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script, *rest], env={**os.environ, "PYTHONPATH": path})
    if done.returncode != 0:
        raise ValueError("that command failed, and --fill stops; without --fill you see the table "
                         "so far")


# ---- Draw ----

def draw(args) -> Path:
    """The table as a picture. Full dots are ours, with the standard deviation over the seeds;
    hollow dots are the paper's. Of two metrics the first."""
    pyplot = report.import_pyplot()
    rows, runs = rows_of(args), read_runs(args)[0]
    columns = [cell.column for cell in rows[0]]
    figure, axes = pyplot.subplots(figsize=(max(6, 2 + 1.1 * len(columns)), 5))
    for i, row in enumerate(rows):
        colour = 2 * i if i < 10 else 2 * (i - 10) + 1      # ten dark ones, then their pale ones
        style = dict(color=pyplot.get_cmap("tab20")(colour), marker="o", linestyle="")
        if args.number == 10:                               # ranks alone have an order
            style["linestyle"] = "-"
        published, measured = [], []
        for cell, values in zip(row, ours(row, runs)):
            x = columns.index(cell.column) + 0.5 * ((i + 0.5) / len(rows) - 0.5)
            if cell.paper:
                published.append((x, cell.paper[0]))
            if values:
                measured.append((x, *mean_std(values[0])))
        x, y = zip(*published) if published else ((), ())
        axes.plot(x, y, **style, markerfacecolor="none", alpha=0.6)
        x, y, deviation = zip(*measured) if measured else ((), (), ())
        label = ", ".join(filter(None, [row[0].row, row[0].backbone, row[0].start]))
        axes.errorbar(x, y, deviation, **style, capsize=3, label=label)
    hollow = "" if args.dataset else "; hollow: the paper"
    axes.set_title(f"Table {title(args)}\nbars: standard deviation over seeds{hollow}", fontsize=9,
                   wrap=True)
    first = {cell.metrics[0] for row in rows for cell in row if cell.metrics}
    score = first.pop().replace("f1_", "F1-") if len(first) == 1 else "score"
    axes.set(ylabel=f"test {score}, %", xlim=(-0.6, len(columns) - 0.4))
    if args.number == 10:
        axes.set_xlabel("rank r of BA (UME: no BA)")
    axes.set_xticks(range(len(columns)), columns)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    name = f"table{args.number}-{args.dataset}.png" if args.dataset else f"table{args.number}.png"
    file = Path(args.out, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
    pyplot.close(figure)
    return file


def table_number(text: str) -> int:
    if text not in map(str, TABLES):
        there = ", ".join(map(str, TABLES))
        raise argparse.ArgumentTypeError(f"there is no Table {text}, but {there}")
    return int(text)


def world(text: str) -> str:
    if text not in WORLDS:
        there = ", ".join(nearest_first(text, WORLDS))
        raise argparse.ArgumentTypeError(f"no toy is called {text}; there are {there}")
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paper.tables", description=__doc__, allow_abbrev=False,
        formatter_class=Help)
    a = parser.add_argument
    a("number", type=table_number, metavar="N", help="Table 1, or 3 to 13")
    a("--dataset", type=world, metavar="TOY",
      help=f"ask the table's question of {', '.join(WORLDS)}; default: the paper's data sets")
    a("--seeds", type=seed_number, nargs="+", metavar="SEED", help="for the commands; default: 0")
    a("--fill", action="store_true", help="run what is missing; further options go to training")
    a("--plot", action="store_true", help="draw the table, too (needs matplotlib)")
    a("--out", default="runs", metavar="FOLDER", help="folder of the runs; default: runs")
    a("--data-root", default="data", metavar="FOLDER", help="of the prepared data; default: data")
    a("--device", help="for the commands; default: cuda where there is one, else cpu")
    args, args.training = parser.parse_known_args()
    args.out = str(Path(args.out))      # without a slash at the end
    each_once("seed", args.seeds or [])
    if args.training and not args.fill:
        parser.error(f"{' '.join(args.training)}: options of training need --fill")
    for word in args.training:
        if word.split("=")[0] in OF_THE_TABLE:
            parser.error(f"{word}: the table sets it, and not the same for all commands")
    if args.dataset and args.number not in TOY_TABLES:
        parser.error("a toy has one encoder for sound and one for pictures, so it cannot be asked"
                     f" this table; these it can: {', '.join(map(str, TOY_TABLES))}")
    return args


def main():
    args = parse()
    if args.plot:
        report.import_pyplot()          # if it is missing, say so before hours of training
    if args.fill:
        fill(args)
    show(args)
    if args.plot:
        print(f"\nwrote {draw(args)}")


if __name__ == "__main__":
    guard(main)
