"""The tables of README.md and docs/ from the JSON files of `results/study.py`.

    python -m results.tables                      # fill them; says which files have changed
    python -m results.tables 'methods toy'        # print one

A table stands between two comments, and a test compares it with what is generated here:

    <!-- results: methods toy -->
    <!-- end -->

One rule for all claims: the difference to UME on the same seeds, its mean +- the standard error of
the mean. It is bold where Student's paired t, two-sided, has p < 0.05.
"""
import argparse
import re
import statistics
from pathlib import Path

import data
from harness import compare, files
from harness.arguments import guard
from harness.report import mean_std

HERE = Path(__file__).resolve().parent
FILES = ("README.md", "docs/toy.md", "docs/clips.md")
BLOCK = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
WORLDS = ("toy", "toy_mismatched", "toy_mimics")
CLIPS = "grid_av"                      # real clips, for those who have them: docs/clips.md

# The rows of the tables, in their order.
METHODS = ("unimodal_audio", "unimodal_visual", "concat", "ogm_ge", "g_blending",
           "g_blending_fixed", "pmr", "mla", "mbt", "pmf", "frozen", "no_umft", "logits",
           "ume_logits", "ume", "ume_T", "ume_T_nll", "ume_T_each", "ume_weighted", "separate",
           "separate_full", "small_heads", "small_biases", "small_norms", "small_temperatures",
           "drop_modality", "all_linear", "full_ume", "mmlora", "mmlora_T")
SHORT = ("concat", "no_umft", "ume_logits", "ume", "ume_T", "separate", "mmlora", "mmlora_T")
CALIBRATION = ("ume", "ume_T", "ume_T_nll", "ume_T_each", "ume_T_each_nll", "ume_weighted",
               "mmlora_T_none", "mmlora_T", "mmlora_T_nll", "mmlora_T_each", "mmlora_T_each_nll",
               "mmlora_weighted")
RANKS = ("rank 2", "rank 4", "rank 8", "rank 64", "audio", "visual")
PROBES = ("pretrained", "unimodal", "concat", "ogm_ge", "mmlora")


# ---- Numbers ----

def read(study: str, world: str) -> dict:
    """Row -> what the JSON file says of it. Raises ValueError where nothing is known."""
    file = HERE / f"{study}.json"
    known = data.read_json(file).get(world, {}) if file.exists() else {}
    if not known:
        raise ValueError(f"{file} has nothing of {world}: python -m results.study --worlds {world}"
                         f" --studies {study}")
    return known


def row_of(rows: dict, name: str) -> dict:
    """Raises ValueError where the row is not measured yet."""
    if name not in rows:
        raise ValueError(f"the row {name} is not measured: python -m results.study")
    return rows[name]


def accuracies(row: dict) -> dict[str, float]:
    """Seed -> test accuracy in %."""
    return {seed: numbers["accuracy"] for seed, numbers in row["seeds"].items()}


def mean_cell(values, digits: int = 1) -> str:
    mean, std = mean_std(list(values))
    return f"{mean:.{digits}f} +- {std:.{digits}f}"


def paired(row: dict, base: dict) -> dict | None:
    """`compare.paired` of two rows on the seeds that both have; None for one row with itself."""
    own, other = accuracies(row), accuracies(base)
    both = [seed for seed in own if seed in other]
    if row is base or not both:
        return None
    return compare.paired([own[seed] - other[seed] for seed in both])


def difference_cell(found: dict | None, digits: int = 2) -> str:
    if found is None:
        return ""
    text = f"{found['mean']:+.{digits}f}"
    if found["se"] is not None:
        text += f" +- {found['se']:.{digits}f}"
    if found["p"] is not None and found["p"] < 0.05:
        text = f"**{text}**"
    return text


def p_cell(found: dict | None) -> str:
    if found is None or found["p"] is None:
        return ""
    return "< 0.0001" if found["p"] < 0.0001 else f"{found['p']:.2g}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


# ---- Tables ----

def main_table() -> str:
    """README: some rows of all worlds."""
    studies, head, lines = {world: read("main", world) for world in WORLDS}, [""], []
    for world in WORLDS:
        head += [f"`{world}`", "- UME"]
    for name in SHORT:
        line = [row_of(studies[WORLDS[0]], name)["label"]]
        for study in studies.values():
            line += both_cells(study.get(name), row_of(study, "ume"))
        lines.append(line)
    return markdown(head, lines)


def methods(world: str) -> str:
    rows, lines = read("main", world), []
    for name in METHODS:
        if name not in rows:
            continue
        row = rows[name]
        found = paired(row, row_of(rows, "ume"))
        lr = f"{row['lr']:g}" if "lr" in row else ""
        trained = f"{row['trained']:,}" if "trained" in row else ""
        lines.append([row["label"], mean_cell(accuracies(row).values()), difference_cell(found),
                      p_cell(found), lr, row.get("epochs", ""), trained])
    head = ["", "accuracy", "- UME", "p", "rate", "epochs", "trained"]
    return markdown(head, lines)


def differences(world: str) -> str:
    """What Eq. 3 adds over its controls: pairs of rows, a - b."""
    pairs = [("mmlora", "ume"), ("mmlora", "separate"), ("mmlora", "ume_T"),
             ("mmlora_T", "ume_T"), ("mmlora", "ume_logits"), ("full_ume", "separate_full"),
             ("mmlora", "full_ume"), ("mmlora", "small_heads"), ("mmlora", "small_biases"),
             ("mmlora", "all_linear"), ("mmlora", "no_umft"), ("mmlora", "pmf"), ("ume_T", "ume"),
             ("ume_logits", "ume"), ("ogm_ge", "concat"), ("pmr", "concat"),
             ("mla", "concat"), ("mla", "ume"), ("g_blending", "g_blending_fixed")]
    rows, lines = read("main", world), []
    for a, b in pairs:
        found = None
        if a in rows and b in rows:
            found = paired(rows[a], rows[b])
        if found:
            t = "" if found["t"] is None else f"{found['t']:.1f}"
            label = f"{rows[a]['label']} - {rows[b]['label']}".replace("**", "")
            lines.append([label, difference_cell(found), t, p_cell(found), str(found["n"])])
    return markdown(["", "difference", "t", "p", "seeds"], lines)


def calibration(world: str) -> str:
    rows, lines = read("main", world), []
    for name in CALIBRATION:
        if name not in rows:
            continue
        seeds = rows[name]["seeds"].values()
        lines.append([rows[name]["label"], mean_cell([s["accuracy"] for s in seeds]),
                      mean_cell([s["nll"] for s in seeds], 3), mean_cell([s["ece"] for s in seeds]),
                      medians([s.get("chosen", {}) for s in seeds])])
    return markdown(["", "accuracy", "NLL", "ECE, %", "chosen (median)"], lines)


def gains(world: str) -> str:
    """In points of all samples, by how many models of step 1 are right; they add up to - UME."""
    rows, lines = read("main", world), []
    of_mmlora = row_of(rows, "mmlora_gain")["seeds"].values()
    for name in ("separate_gain", "mmlora_gain", "separate_full_gain", "full_ume_gain"):
        if name not in rows:
            continue
        seeds = rows[name]["seeds"].values()
        cells = []
        for group in ("all", "some", "none"):
            found = compare.paired([seed[group][1] for seed in seeds])
            cells.append(difference_cell(found))
        lines.append([rows[name]["label"], *cells])
    shares = []
    for group in ("all", "some", "none"):
        shares.append(f"{mean_std([seed[group][0] for seed in of_mmlora])[0]:.1f}")
    lines.insert(0, ["share of the samples, %", *shares])
    return markdown(["models of step 1 that are right", "both", "one", "none"], lines)


def medians(of_seeds: list[dict]) -> str:
    """The median over the seeds; of each modality, where they differ."""
    found = {}
    for m in of_seeds[0]:
        found[m] = f"{statistics.median(seed[m] for seed in of_seeds):.2g}"
    if len(set(found.values())) <= 1:                     # one for all
        return next(iter(found.values()), "")
    return "; ".join(f"{m} {value}" for m, value in found.items())


def ablations(world: str) -> str:
    main, rows = read("main", world), read("ablations", world)
    lines = []
    for label, row in [("UME", row_of(main, "ume")), ("rank 1, both", row_of(main, "mmlora")),
                       *((rows[name]["label"], rows[name]) for name in RANKS if name in rows)]:
        to_ume, to_both = paired(row, main["ume"]), None
        if row is not main["ume"]:
            to_both = paired(row, main["mmlora"])
        lr = f"{row['lr']:g}" if "lr" in row else ""
        lines.append([label, mean_cell(accuracies(row).values()), difference_cell(to_ume),
                      difference_cell(to_both), p_cell(to_both), lr])
    return markdown(["", "accuracy", "- UME", "- rank 1, both", "p", "rate"], lines)


def sgd(world: str) -> str:
    """Differences to the multi-modal baseline with the same optimiser."""
    main, rows, lines = read("main", world), read("sgd", world), []
    for name in rows:
        adamw, baseline = row_of(main, name.removesuffix("_sgd")), row_of(main, "concat")
        line = [adamw["label"]]
        for row, base in ((adamw, baseline), (rows[name], row_of(rows, "concat_sgd"))):
            line += [mean_cell(accuracies(row).values()), difference_cell(paired(row, base))]
        lines.append([*line, f"{rows[name]['lr']:g}"])
    return markdown(["", "AdamW", "- baseline", "SGD", "- baseline", "rate"], lines)


def shares(world: str) -> str:
    main, rows = read("main", world), read("shares", world)
    full = {"mmlora r8": row_of(read("ablations", world), "rank 8"), **main}
    there = sorted({name.split()[-1] for name in rows}, key=float)
    head, lines = [""], []
    for share in [*there, "1"]:
        head += [f"{100 * float(share):g} %", "- UME"]
    for name in ("ume", "ume_T", "concat", "no_umft", "separate", "mmlora", "mmlora r8",
                 "full_ume"):
        label = row_of(full, name)["label"]
        line = [f"MMLoRA, {label}" if " r8" in name else label]
        for share in there:
            row = rows.get(f"{name} {share}")
            line += both_cells(row, row_of(rows, f"ume {share}"))
        lines.append(line + both_cells(full[name], row_of(main, "ume")))
    return markdown(head, lines)


def both_cells(row: dict | None, base: dict) -> list[str]:
    if row is None:
        return ["", ""]
    return [f"{mean_std(list(accuracies(row).values()))[0]:.1f}",
            difference_cell(paired(row, base), digits=1)]


def laziness(world: str) -> str:
    """Linear evaluation of encoders; differences to fine-tuning alone, on the same seeds."""
    rows, lines = read("laziness", world), []
    modalities = [name.removeprefix("unimodal_") for name in rows if name.startswith("unimodal_")]
    if not modalities:
        raise ValueError(f"laziness of {world} needs its row mmlora: python -m results.study"
                         f" --worlds {world} --studies laziness")
    for name in PROBES:
        if not any(row.startswith(name) for row in rows):
            continue
        line = [{"pretrained": "pre-trained", "unimodal": "fine-tuned alone (UMFT)"}.get(name)]
        for m in modalities:
            row = rows.get(f"{name}_{m}", rows.get(name))
            if row is None:
                line += ["", ""]
                continue
            line[0] = line[0] or row["label"]
            alone = rows[f"unimodal_{m}"]["seeds"]
            values = {seed: numbers[m] for seed, numbers in row["seeds"].items()}
            line.append(mean_cell(values.values()))
            found = None
            if name != "unimodal":
                found = compare.paired([values[s] - alone[s][m] for s in values if s in alone])
            line.append(difference_cell(found))
        lines.append(line)
    head = [""]
    for m in modalities:
        head += [m, "- UMFT"]
    return markdown(head, lines)


def missing(world: str) -> str:
    rows, lines = read("missing", world), []
    first = next(iter(next(iter(rows.values()))["seeds"].values()))
    for name, row in rows.items():
        line = [f"{row['label']}, {name.split(', ')[-1]}"]
        for share in first:
            line.append(f"{mean_std([s[share] for s in row['seeds'].values()])[0]:.1f}")
        lines.append(line)
    return markdown(["share without it", *(f"{100 * float(s):g} %" for s in first)], lines)


def rates(world: str) -> str:
    lines = []
    for name, row in read("rates", world).items():
        tried = []
        for rate, score in row["validation"].items():
            text = f"{rate}: " + ("diverged" if score is None else f"{score:.1f}")
            tried.append(f"**{text}**" if float(rate) == row["rate"] else text)
        lines.append([name, ", ".join(tried)])
    return markdown(["", "rate: validation accuracy, %"], lines)


TABLES = dict(main=main_table, methods=methods, differences=differences, gains=gains,
              calibration=calibration, ablations=ablations, shares=shares, laziness=laziness,
              missing=missing, sgd=sgd, rates=rates)


def table(words: str) -> str:
    """words: what stands in the comment: the name of a table, and of a world."""
    name, *world = words.split()
    if name not in TABLES or (name != "main" and world not in [[w] for w in (*WORLDS, CLIPS)]):
        raise ValueError(f"no table is called {words!r}; there are main, and with one of"
                         f" {', '.join((*WORLDS, CLIPS))}: {', '.join(list(TABLES)[1:])}")
    return TABLES[name](*world)


# ---- The files ----

def filled(text: str) -> str:
    """The text of a file with all its tables made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{table(block[2])}{block[3]}", text)


def fill() -> None:
    """Fill all tables. A file that asks for what is not measured yet stays as it is."""
    for name in FILES:
        file = HERE.parent / name
        before = file.read_text()
        try:
            after = filled(before)
        except ValueError as error:
            print(f"{name} stays as it is: {error}")
            continue
        if after != before:
            files.write_text(file, after)
            print(f"{name}: tables made anew")


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m results.tables", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tables", nargs="*", metavar="TABLE",
                   help="print these, and fill no file: main, 'methods toy'")
    args = p.parse_args()
    for words in args.tables:
        print(table(words))
    if not args.tables:
        fill()


if __name__ == "__main__":
    guard(main)
