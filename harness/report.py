"""Tables and curves of finished runs."""
import math
import re
from pathlib import Path

from harness import calibration, files, fingerprint, metrics, runs, stored
from paper.settings import SETTINGS

NAMES = {"unimodal": "alone", "mmlora": "MMLoRA", "full": "Fully fine-tuned UME",
         "no-umft": "MMLoRA without UMFT", "separate": "Control: separate losses",
         "separate_full": "Control: separate losses, all weights",
         "small": "Eq. 3 trains something else", "all_linear": "LoRA on all linear layers",
         "drop_modality": "MMLoRA, modalities dropped",
         "logits": "LoRA on averaged logits", "frozen": "Classifier on frozen features",
         "concat": "Multi-modal baseline", "ogm_ge": "OGM-GE", "g_blending": "G-Blending",
         "pmr": "PMR", "mla": "MLA", "mbt": "MBT", "mmbt": "MMBT", "pmf": "PMF"}
MAIN_TABLE = {"audio-visual": 5, "vision-language": 6, "action": 7}    # of the paper
WIDTH = 80                                            # of a table, in columns of the terminal


# ---- Numbers ----

def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter is 0 for one value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def validation(group: list) -> tuple[float, float]:
    """What learning rates are compared by, of the runs of all seeds: the mean validation score; of
    equal ones the lower loss."""
    chosen = []
    for run in group:
        val = run.result["val"]
        chosen.append(val[run.settings.get("fusion") or next(iter(val))])
    score = [v.get("accuracy", v.get("f1_micro")) for v in chosen]
    return sum(score) / len(score), -sum(v["loss"] for v in chosen)


# ---- The table at the end of training ----

def closing_table(group: list) -> None:
    """Print `closing_rows`, and what must be said about them. group: the runs of one experiment."""
    first = group[0]
    print_table(closing_rows(group), first.data_folder, first.info)
    if "ume" in first.result:
        if first.info["multilabel"]:
            print("UME, one temperature: not defined for several labels a sample")
        stayed = [str(r.settings["seed"]) for r in group if r.result["best_epoch"] == 0]
        if stayed:
            print("training did not improve on UME (epoch 0 was the best): seed"
                  f" {' '.join(stayed)}")


def closing_rows(group: list) -> list:
    """One row a prediction: of each modality alone, of UME, of what training made of them.

    group: the runs of one experiment, one a seed; -> rows as `print_table` takes them.
    """
    first = group[0]
    rows = []
    if "ume" in first.result:
        for m in first.settings["unimodal"]:
            alone = [unimodal_of(run, m) for run in group]
            rows.append((f"{m} alone (UMFT)", [(r.result["test"][m], r.result) for r in alone]))
        for rule, name in (("prob", "probabilities"), ("logits", "logits")):
            untrained = dict(trained_parameters=0, seconds=0)
            found = [(run.result["ume"]["test"][rule], untrained) for run in group]
            rows.append((f"UME, {name} averaged", found))
        if not first.info["multilabel"]:
            found = [(calibration.ume_with_one_temperature(run, first.info), untrained)
                     for run in group]
            rows.append(("UME, one temperature", found))
        if first.settings["method"] != "mmlora":
            for beside in mmlora_beside(group):
                rows.append(row_of(beside))
    return rows + rows_of(group)


def unimodal_of(run, modality: str):
    return runs.Run.open(run.folder.parent / run.settings["unimodal"][modality]["run"])


def rows_of(group: list) -> list:
    settings = group[0].settings
    if settings["method"] == "unimodal":
        m = settings["modality"]
        found = [(run.result["test"][m], run.result) for run in group]
        return [(f"{m} alone, {settings['encoder']}", found)]
    if settings["fusion"] != "joint":
        return [row_of(group)]
    rows = [row_of(group)]
    for name in group[0].result["test"]:
        if name != "joint":
            rows.append((f"  {name} alone", [(r.result["test"][name], None) for r in group]))
    return rows


def row_of(group: list) -> tuple:
    """-> (label, [(test scores, result) of each seed]) of the method's own prediction."""
    settings = group[0].settings
    label = NAMES[settings["method"]]
    if "rank" in settings:
        label += f", rank {settings['rank']}, {'+'.join(settings['lora'])}"
    for name, value in settings.get("options", {}).items():
        if value is True:
            label += f", {name.replace('_', ' ')}"
        elif isinstance(value, str) and value != "adamw":
            label += f", {value}"
        elif name == "weights" and value:
            label += f", weights {' '.join(f'{w:g}' for w in value)}"
    if "share" in settings:
        label += f", {100 * settings['share']:g} % of train"
    if "-lr" in group[0].folder.name:
        label += f", lr {settings['lr']:g}"
    return label, [(run.result["test"][settings["fusion"]], run.result) for run in group]


def mmlora_beside(group: list) -> list[list]:
    """The MMLoRA runs on the same uni-modal models, finished for all seeds, to be compared with.

    Of several learning rates the best on validation.
    """
    seed, found = f"-s{group[0].settings['seed']}", {}
    for file in sorted(group[0].folder.parent.glob(f"mmlora-*{seed}/result.json")):
        name = file.parent.name.removesuffix(seed)
        folders = [run.folder.with_name(f"{name}-s{run.settings['seed']}") for run in group]
        if not all((folder / "result.json").exists() for folder in folders):
            continue
        if any(stored.damage(folder) or fingerprint.changed(folder) for folder in folders):
            continue                                      # made by other code: not to be compared
        same = [runs.Run.open(folder) for folder in folders]
        if all(a.settings["unimodal"] == b.settings["unimodal"] for a, b in zip(same, group)):
            found.setdefault(name.split("-lr")[0], []).append(same)
    return [max(rates, key=validation) for rates in found.values()]


def print_table(rows: list, folder: Path, info: dict) -> None:
    """rows: (label, [(scores, result or None) of each seed]); it fits 80 columns.

    One seed: score +- binomial standard error. More: mean +- standard deviation; of groups the
    mean alone.
    """
    seeds = len(rows[0][1])
    n = len((folder / "test" / "ids.txt").read_text(encoding="utf-8").splitlines())
    print(f"\n{info['name']}, test split, {n} samples, {len(info['classes'])} classes.")
    if seeds > 1:
        print(f"Mean +- standard deviation of {seeds} seeds.")
    elif not info["multilabel"]:
        print("+- is the binomial standard error of one test run.")
    shown = list(rows[0][1][0][0].get("groups", {}))[:4]  # more groups do not fit
    if info["multilabel"]:
        shown = ["f1_macro"]
    heading, lines = cells(rows, n, info, shown)
    column = max([8, *(len(group) + 2 for group in shown)])
    widths = [13, *(column for _ in shown), 9, 6]
    left = max(19, min(max(len(label) for label, _ in rows), WIDTH - sum(widths)))
    for label, *texts in [heading, *lines]:
        if len(label) > left:                             # on a line of its own
            print(label)
            label = ""
        padded = "".join(f"{text:>{width}}" for text, width in zip(texts, widths))
        print(f"{label:{left}}{padded}".rstrip())


def cells(rows: list, n: int, info: dict, shown: list[str]) -> tuple[list, list]:
    """-> the heading of a table and its lines, all in words: label, score, that of each group that
    is `shown`, trained parameters, seconds of training. n: test samples."""
    name, lines = metrics.metric(info), []
    for label, found in rows:
        line = [label, main_cell([scores[name] for scores, _ in found], n, name)]
        for key in shown:
            values = [s["groups"][key] if key in s.get("groups", {}) else s[key] for s, _ in found]
            line.append(f"{100 * mean_std(values)[0]:.1f}")
        results = [result for _, result in found if result]
        if results:
            seconds = mean_std([result["seconds"] for result in results])[0]
            line += [short(results[0]["trained_parameters"]), f"{seconds:.0f}"]
        lines.append(line)
    return ["", name, *shown, "trained", "s"], lines


def main_cell(values: list[float], n: int, name: str) -> str:
    mean, std = mean_std([100 * v for v in values])
    if len(values) == 1 and name != "accuracy":
        return f"{mean:.1f}"
    if len(values) == 1:
        std = 100 * math.sqrt(values[0] * (1 - values[0]) / n)
    return f"{mean:.1f} +- {std:.1f}"


def short(count: int) -> str:
    """A number of parameters in at most six characters: 768, 22,412, 86.6M."""
    if count >= 1_000_000:
        return f"{count / 1_000_000:.1f}M"
    return f"{count:,}"


def next_steps(group: list) -> None:
    """The folder of the run, and what one would type next."""
    first = group[0]
    dataset, folder = first.settings["dataset"], first.folder
    root = first.data_folder.parent
    root = "" if root == Path("data") else f" --data-root {root}"
    print(f"\n{folder}" + (f" and {len(group) - 1} more" if len(group) > 1 else ""))
    if first.settings.get("fusion") in ("prob", "logits"):
        one = next(iter(first.settings["encoders"]))
        print(f"    python evaluate.py --run {folder} --drop {one}{root}")
    else:
        print(f"    python evaluate.py --run {folder} --probe{root}")
    if dataset in SETTINGS:                               # not for anyone's own data
        out = folder.parent.parent
        number = MAIN_TABLE[SETTINGS[dataset]["family"]]
        toy = f" --dataset {dataset}" if "made_by" in first.info else ""
        elsewhere = "" if out == Path("runs") else f" --out {out}"
        print(f"    python -m paper.tables {number}{toy}{elsewhere}{root}")
    print(f"    python evaluate.py --run {folder} --plot{root}      # needs matplotlib")


# ---- Curves ----

def import_pyplot():
    """matplotlib is optional. Asked for before any work: nobody trains for hours and then learns
    that it is absent."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        return pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None


def curves(log: list[dict]) -> tuple[dict, dict]:
    """-> training losses and validation scores in %: name -> [(epoch, value)]."""
    losses = [(line["epoch"], line["loss"]) for line in log if line.get("loss") is not None]
    labels = {"prob": "probabilities averaged", "logits": "logits averaged"}
    scores = {}
    for name, first in log[0]["val"].items():
        key = "f1_micro" if "f1_micro" in first else "accuracy"
        values = [(line["epoch"], 100 * line["val"][name][key]) for line in log]
        scores[labels.get(name, name)] = values
    return {"training loss": losses} if losses else {}, scores


def plot(folders: list[Path]) -> None:
    """Training curves of the runs of one experiment, one a seed: the loss; validation scores.

    Of one run curves.png in its folder. Of several a picture beside the folders: mean and, as a
    band, standard deviation. Dashed lines mark the epochs that validation chose.
    """
    pyplot = import_pyplot()
    logs = [curves(stored.read_log(folder)) for folder in folders]
    results = [runs.Run.open(folder).result for folder in folders]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.6))
    for side, axes in enumerate((left, right)):
        for name in logs[0][side]:
            draw_curve(axes, [log[side][name] for log in logs], name)
        for result in results:
            axes.axvline(result["best_epoch"], color="0.4", linestyle="--", linewidth=1)
        axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label="chosen epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    left.set(xlabel="epoch", ylabel="training loss")
    score = "F1-micro" if "f1_micro" in next(iter(results[0]["val"].values())) else "accuracy"
    right.set(xlabel="epoch", ylabel=f"validation {score}, %")
    file, title = folders[0] / "curves.png", folders[0].name
    if len(folders) > 1:
        title = re.sub(r"-s\d+$", "", title)
        file = folders[0].with_name(f"{title}-curves.png")
        title += f": mean and standard deviation of {len(folders)} seeds"
    figure.suptitle(title)
    figure.tight_layout()
    with files.replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    print(f"wrote {file}")


def draw_curve(axes, of_seeds: list[list], name: str) -> None:
    """Mean and band of one curve. of_seeds: [(epoch, value)] of each seed; a run may be shorter."""
    epochs, means, low, high = [], [], [], []
    for same_epoch in zip(*of_seeds):
        mean, std = mean_std([value for _, value in same_epoch])
        epochs.append(same_epoch[0][0])
        means.append(mean)
        low.append(mean - std)
        high.append(mean + std)
    line, = axes.plot(epochs, means, marker=".", label=name)
    if len(of_seeds) > 1:
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
