"""The paper's tables with our runs in them: which run fills which cell, the commands for what is empty, and a picture.

    python evaluate.py --table 10                                         # the paper's numbers, ours beneath them, the commands for the rest
    python evaluate.py --table 10 --seeds 0 1 2 --fill                    # run these commands, one after another, then print the table
    python evaluate.py --table 10 --dataset toy --seeds 0 1 2 --fill      # the same question asked of the toy, in minutes
    python evaluate.py --table 10 --plot                                  # and as a picture, into the folder of the runs

Tables 9 to 13 are the paper's sweeps: which modality carries LoRA, the rank, the size of the encoder (11, 12), with and without uni-modal fine-tuning.
"""
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import paper
from evaluate import but_seed, import_pyplot, mean_std

TOY_TABLES = (1, 3, 4, 5, 8, 9, 10, 13)      # the others compare texts, flow or sizes of public encoders, none of which a toy has


def table_cells(number: int, toy: str | None = None) -> dict[str, dict[str, paper.Cell]]:
    """Row -> column -> cell of the paper's Table `number`; or the same questions asked of a toy, where the paper's data sets (and backbones)
    become one, and what the toy can't be asked, say about text, is left out."""
    rows = {}
    for cell in (cell for row in paper.cells(number) for cell in row):
        if toy:
            encoders = paper.encoders_for(toy)
            if not (cell.dataset and cell.method and cell.encoders.keys() <= encoders.keys()):
                continue
            row, column = (re.sub(r"\*$", "", re.sub("AVE|Kinetics-Sound|KS|CREMA-D|MM-IMDB|Food101", toy, name)) for name in (cell.row, cell.column))
            cell = replace(cell, row=row, column=column, backbone="", paper=None, quoted=False, dataset=toy, metrics=("accuracy",), pretrained=None,
                           encoders={m: encoders[m] for m in cell.encoders})
        rows.setdefault(f"{cell.row:32}{cell.backbone}".strip(), {}).setdefault(cell.column, cell)
    return rows


def matches(cell: paper.Cell, out: Path) -> list[Path]:
    """Folders of the finished runs under `out` that did what the cell asks, and that differ in nothing but the seed. Of several settings
    that would do, those that were run with more seeds; of several learning rates then the one that did best on validation."""
    if not (cell.dataset and cell.method):
        return []
    ume, trained, found = cell.method == "ume", cell.of or (cell.method if cell.umft else "no-umft"), {}
    for config in sorted((out / cell.dataset).glob("*/config.json"), key=lambda file: (len(file.parent.name), file)):     # without options first
        folder, s = config.parent, checkpoints.read_json(config)["settings"]
        if s["method"] not in (("mmlora", "full", "separate") if ume else (trained,)) or not (trained == "pretrained" or (folder / "result.json").exists()):
            continue
        if (s.get("encoders") or {s.get("modality"): s.get("encoder")}) != cell.encoders:
            continue
        starts = [(checkpoints.started_from(folder, s, m), cell.pretrained or (e if e in checkpoints.PUBLIC else "none")) for m, e in cell.encoders.items()]
        if any(start not in (wanted, cell.pretrained) for start, wanted in starts):         # None: the cell asks for the default, the run says nothing
            continue
        if not ume and (s.get("fusion") == "logits" or "rank" in s and (sorted(s["lora"]), s["rank"]) != (sorted(cell.lora), cell.rank)):
            continue
        key = "" if ume else but_seed({**s, "lr": None})                        # the ensemble is older than any setting of the joint run
        found.setdefault(key, {}).setdefault(None if ume else s.get("lr"), []).append(folder)
    rates = max(found.values(), key=lambda rates: max(map(len, rates.values())), default={})
    return max(rates.values(), key=lambda folders: (len(folders), validation(folders)), default=[])


def validation(folders: list[Path]) -> tuple[float, float]:
    """Mean validation score of finished runs, 0 where nothing was measured; of equals the lower loss counts more, as in `train_unimodal.validation`."""
    scores, losses = [], []
    for result in (checkpoints.read_json(f / "result.json") for f in folders if (f / "result.json").exists()):
        val = result.get("val", {}).get(result.get("fusion") or result.get("modality"), {})
        scores.append(val.get("accuracy", val.get("f1_micro", 0)))
        losses.append(val.get("loss", 0))
    return sum(scores) / max(1, len(scores)), -sum(losses)


def numbers(cell: paper.Cell, folders: list[Path]) -> dict[int, tuple]:
    """Seed -> the numbers of the cell in %. Every seed counts once, however many runs hold the same ensemble."""
    found = {}
    for folder in folders:
        file = folder / ("probe.json" if cell.method == "probe" else "result.json")
        result = checkpoints.read_json(file) if file.exists() else {}
        if cell.method == "probe":
            test = result.get(cell.modality, {}).get("test")
        elif cell.method == "ume":
            test = result.get("ume", {}).get("test", {}).get("prob")
        else:           # of one modality, or fused by averaging, or (baselines) by a head of their own
            test = result["test"].get(cell.modality or result.get("fusion")) or result["test"].get("joint")
        if test:
            found.setdefault(checkpoints.read_json(folder / "config.json")["settings"]["seed"], tuple(100 * test[name] for name in cell.metrics))
    return found


def ours(row: dict[str, paper.Cell], out: Path) -> list[list[list[float]]]:
    """For each cell of a row, and each of its metrics, one value a seed; [] where nothing was run."""
    values = [list(map(list, zip(*numbers(cell, matches(cell, out)).values()))) for cell in row.values()]
    for i, cell in enumerate(row.values()):
        if cell.dataset is None and all(values[:i]):                            # Avg Acc.: of the cells to the left, all of them
            values[i] = [[mean_std([mean_std(v[0])[0] for v in values[:i]])[0]]]
    return values


def show(number: int, out: Path, toy: str | None = None) -> None:
    """Print the paper's numbers, under each ours, and the commands for what is empty."""
    rows, lines, todo = table_cells(number, toy), [], {}
    for label, row in rows.items():
        texts = []
        for cell, values in zip(row.values(), ours(row, out)):
            seeds = f" ({len(values[0])})" if values and cell.dataset else ""
            texts.append(" / ".join(f"{mean_std(v)[0]:.1f}" + f" +- {mean_std(v)[1]:.1f}" * (len(v) > 1) for v in values) + seeds)
            if not values and (command := paper.commands(cell, " ".join(map(str, matches(cell, out))))):
                todo.setdefault(command, cell.quoted)
        if not toy:
            lines.append([label + " (quoted)" * cell.quoted] + [" / ".join(map(str, cell.paper or ("-",))) for cell in row.values()])
        lines.append([label if toy else "    ours"] + texts)
    lines.insert(0, [""] + list(row))
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\nTable {number}{f', asked of {toy}' if toy else ''}. {paper.TABLES[number]['caption']}; {paper.TABLES[number]['source']}.\n"
          f"In %; ours: mean +- standard deviation (number of seeds), from {out}.\n")
    for label, *texts in lines:
        print((f"{label:{widths[0]}}" + "".join(f"{text:>{width + 3}}" for text, width in zip(texts, widths[1:]))).rstrip())
    if todo:
        print("\nNot run yet. RUN is the folder that the command before it writes; quoted: the paper took this row from other authors.\n")
    elsewhere = "" if out == Path("runs") else f" --out {out}"
    for command, quoted in todo.items():
        print(command.replace(" &&", f"{elsewhere} &&") + elsewhere + "     # quoted" * quoted)


# ------------------------------------------------------------------------------------------------ sweeps
def fill(number: int, toy: str | None, seeds: list[int], everywhere: list[str], training: list[str]) -> None:
    """Run what Table `number` lacks for these seeds, one command after another. Arguments: `everywhere` for all commands, `training` for those
    that train. Raises ValueError after the first that fails; what has finished by then is not run again."""
    out = Path(everywhere[everywhere.index("--out") + 1])

    def run(words, *more):
        words = [*words, *everywhere, *more]
        print(f"\n$ {shlex.join(words)}", flush=True)
        here = Path(__file__).parent
        path = [str(here / words[1])] if words[1] != "-m" else words[1:2]
        done = subprocess.run([sys.executable, *path, *words[2:]], env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])})
        if done.returncode:
            raise ValueError(f"that command failed, and --fill stops; the table so far: python evaluate.py --table {number}" + f" --dataset {toy}" * bool(toy))

    def lacks(cell):
        return not set(seeds) <= numbers(cell, matches(cell, out)).keys()

    all_seeds = ["--seeds", *map(str, seeds)]
    for cell in [cell for row in table_cells(number, toy).values() for cell in row.values() if cell.dataset and cell.method]:
        trained = replace(cell, method=cell.of) if cell.method == "probe" and cell.of != "pretrained" else cell
        if cell.of != "pretrained" and lacks(trained):
            run(paper.commands(trained).split(), *all_seeds, *training)
        if cell.of == "pretrained" and lacks(cell):
            run(paper.commands(cell).split(), *all_seeds)
        elif trained is not cell and lacks(cell):
            run(["python", "evaluate.py", "--probe", "--run", *map(str, matches(cell, out))])


def draw(number: int, out: Path, toy: str | None = None) -> Path:
    """The table as a picture, <out>/table<N>.png: full dots are ours, with the standard deviation over seeds, hollow ones the paper's.
    Of two metrics the first."""
    pyplot, rows = import_pyplot(), table_cells(number, toy)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    figure, axes = pyplot.subplots(figsize=(max(6, 2 + 1.1 * len(columns)), 5))
    for i, (label, row) in enumerate(rows.items()):
        place = {column: columns.index(column) + 0.5 * ((i + 0.5) / len(rows) - 0.5) for column in row}
        style = dict(color=f"C{i % 10}", marker="o" if i < 10 else "s", linestyle="-" if number == 10 else "")      # the rank alone has an order
        published = {column: cell.paper[0] for column, cell in row.items() if cell.paper}
        axes.plot([place[c] for c in published], list(published.values()), **style, markerfacecolor="none", alpha=0.6)
        found = {column: mean_std(v[0]) for column, v in zip(row, ours(row, out)) if v}
        label = re.sub(" {2,}", ", ", label)
        axes.errorbar([place[c] for c in found], [mean for mean, _ in found.values()], [std for _, std in found.values()], **style, capsize=3, label=label)
    axes.set(ylabel="test, %", xlim=(-0.6, len(columns) - 0.4))
    axes.set_title(f"Table {number}{f', asked of {toy}' if toy else ' (hollow: the paper)'}. {paper.TABLES[number]['caption']}", fontsize=9, wrap=True)
    axes.set_xticks(range(len(columns)), columns)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"table{number}{f'-{toy}' if toy else ''}.png"
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return file
