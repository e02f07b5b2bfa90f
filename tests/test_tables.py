"""paper_tables.py: which run fills which cell, by hand-made folders; the commands for the rest, run; the picture."""
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import evaluate
import paper
import paper_tables
import train_unimodal

ROOT = Path(__file__).parents[1]


def call(*words):
    """`python evaluate.py words`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        evaluate.main()


VIT, RESNET = {"audio": "audio_vit_b", "visual": "vit_b16"}, {"audio": "resnet18", "visual": "resnet18"}


def write(out, dataset, name, result=None, probe=None, **settings):
    """A run's folder, hand-made."""
    folder = out / dataset / name
    folder.mkdir(parents=True)
    settings = dict(dict(dataset=dataset, seed=int(name[-1])), **settings)
    (folder / "config.json").write_text(json.dumps(dict(settings=settings)))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(dict(fusion=settings.get("fusion"), **result)))
    if probe is not None:
        (folder / "probe.json").write_text(json.dumps({m: dict(test=dict(accuracy=v)) for m, v in probe.items()}))


def unimodal(out, dataset, modality, seed, accuracy, encoder, pretrained=None, probe=None, tag=""):
    write(out, dataset, f"unimodal-{modality}{tag}-s{seed}", dict(test={modality: dict(accuracy=accuracy)}), probe, method="unimodal", modality=modality,
          encoder=encoder, pretrained=pretrained or encoder)


def joint(out, dataset, name, accuracy, ume=None, method="mmlora", lora=("audio", "visual"), rank=1, encoders=VIT, fusion="prob", base="", probe=None, **more):
    """accuracy: of the fusion that it was trained with; the other one's is 0.1."""
    result = dict(test={"prob": dict(accuracy=0.1), "logits": dict(accuracy=0.1)} | {fusion: dict(accuracy=accuracy)})
    if ume:
        result["ume"] = dict(test={"prob": dict(accuracy=ume), "logits": dict(accuracy=0.1)})
    if method == "mmlora":
        more["unimodal"] = {m: dict(run=f"unimodal-{m}{base}-s{name[-1]}") for m in encoders}
    write(out, dataset, name, result, probe, method=method, encoders=encoders, fusion=fusion, **more,
          **(dict(lora=sorted(lora), rank=rank) if method in ("mmlora", "no-umft") else {}))


def filled(number, out, toy=None):
    """(row, column) -> seed -> numbers, of the cells that are not empty."""
    cells = {(row, column): cell for row, columns in paper_tables.table_cells(number, toy).items() for column, cell in columns.items()}
    found = {(re.sub(" +", " ", row), column): paper_tables.numbers(cell, paper_tables.matches(cell, out)) for (row, column), cell in cells.items()}
    return {where: {s: tuple(round(v, 6) for v in values) for s, values in f.items()} for where, f in found.items() if f}


def test_only_the_run_that_a_cell_asks_for_fills_it(tmp_path):
    for seed in (0, 1):
        for m, encoder in VIT.items():
            unimodal(tmp_path, "ave", m, seed, 0.8, encoder)
            unimodal(tmp_path, "ave", m, seed, 0.5, "resnet18", tag="-scratch", pretrained="none")
            unimodal(tmp_path, "ave", m, seed, 0.6, "resnet18", tag="-resnet18")
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", 0.96 + seed / 100, ume=0.95)
    joint(tmp_path, "ave", "mmlora-audio-r1-s0", 0.2, lora=["audio"], ume=0.95)
    joint(tmp_path, "ave", "mmlora-all-r4-s0", 0.3, rank=4, ume=0.95)
    joint(tmp_path, "ave", "mmlora-all-r1-logits-s2", 0.4, fusion="logits", ume=0.94)
    joint(tmp_path, "kinetics_sound", "mmlora-all-r1-logits-s0", 0.4, fusion="logits", ume=0.9)
    joint(tmp_path, "ave", "no-umft-all-r1-s0", 0.5, method="no-umft", pretrained=dict(VIT))
    joint(tmp_path, "ave", "full-s0", 0.6, method="full", ume=0.95)
    joint(tmp_path, "ave", "mmlora-all-r1-resnet18-s0", 0.7, encoders=RESNET, ume=0.65, base="-resnet18")      # ImageNet, where Table 5 has none
    joint(tmp_path, "ave", "mmlora-all-r1-resnet18-scratch-s0", 0.75, encoders=RESNET, ume=0.72, base="-scratch")
    joint(tmp_path, "ave", "no-umft-all-r1-none-s0", 0.55, method="no-umft", pretrained=dict.fromkeys(VIT, "none"))
    joint(tmp_path, "ave", "mmlora-all-r1-lr-s3", 0.9, lr=1)                # a learning rate tried with fewer seeds
    joint(tmp_path, "ave", "separate-all-r1-s0", 0.1, method="separate", ume=0.95)      # the control is no MMLoRA, though it holds the same ensemble
    write(tmp_path, "ave", "mmlora-unfinished-s5", method="mmlora", encoders=VIT, lora=["audio", "visual"], rank=1, fusion="prob", unimodal={})
    write(tmp_path, "ave", "concat-s0", dict(test={"joint": dict(accuracy=0.91)}), method="concat", encoders=VIT, pretrained=dict(VIT), fusion="joint")
    write(tmp_path, "ave", "ogm_ge-s0", dict(test={"prob": dict(accuracy=0.92)}), method="ogm_ge", encoders=VIT, fusion="prob")
    write(tmp_path, "ave", "ogm_ge-scratch-s0", dict(test={"joint": dict(accuracy=0.73)}), method="ogm_ge", encoders=RESNET, pretrained="none")
    write(tmp_path, "ave", "pmr-s0", dict(test={"joint": dict(accuracy=0.74)}), method="pmr", encoders=RESNET)             # says nothing of its start
    assert filled(5, tmp_path) == {
        ("OGM-GE ResNet18/ResNet18", "AVE"): {0: (73.0,)},
        ("UME* ResNet18/ResNet18", "AVE"): {0: (72.0,)},
        ("MMLoRA (ours) ResNet18/ResNet18", "AVE"): {0: (75.0,)},
        ("Multi-Modal Baseline* ViT-B/ViT-B", "AVE"): {0: (91.0,)},
        ("OGM-GE* ViT-B/ViT-B", "AVE"): {0: (92.0,)},
        ("UME* ViT-B/ViT-B", "AVE"): {0: (95.0,), 1: (95.0,), 2: (94.0,)},                # seed 2: its run averages logits, its ensemble does not
        ("UME* ViT-B/ViT-B", "KS"): {0: (90.0,)},
        ("Fully Fine-tuned UME* ViT-B/ViT-B", "AVE"): {0: (60.0,)},
        ("MMLoRA (ours) ViT-B/ViT-B", "AVE"): {0: (96.0,), 1: (97.0,)},
    }
    assert filled(9, tmp_path) == {("MMLoRA", "AVE Audio"): {0: (20.0,)}, ("MMLoRA", "AVE Both"): {0: (96.0,), 1: (97.0,)}}
    assert filled(10, tmp_path) == {("AVE", "UME"): {0: (95.0,), 1: (95.0,), 2: (94.0,)}, ("Kinetics-Sound", "UME"): {0: (90.0,)},
                                    ("AVE", "1"): {0: (96.0,), 1: (97.0,)}, ("AVE", "4"): {0: (30.0,)}}
    assert filled(13, tmp_path) == {("MMLoRA (w/o UMFT)", "AVE"): {0: (50.0,)}, ("MMLoRA (w UMFT)", "AVE"): {0: (96.0,), 1: (97.0,)}}
    both = {0: (80.0,), 1: (80.0,)}
    assert filled(1, tmp_path) == {("Fine-tuned Visual Model", "AVE"): both, ("Fine-tuned Audio / Language Model", "AVE"): both}


def test_probes_fill_tables_3_4_and_8(tmp_path):
    for m, encoder in VIT.items():
        unimodal(tmp_path, "ave", m, 0, 0.8, encoder, probe={m: 0.81})
        write(tmp_path, "ave", f"probe-{m}-s0", probe={m: 0.7}, method="pretrained", modality=m, encoder=encoder, pretrained=encoder)
        write(tmp_path, "ave", f"probe-{m}-s1", probe={m: 0.1}, method="pretrained", modality=m, encoder=encoder, pretrained="none")
    joint(tmp_path, "ave", "mmlora-all-r1-s0", 0.9, probe=dict(visual=0.84))
    joint(tmp_path, "ave", "mmlora-audio-r1-s0", 0.9, lora=["audio"], probe=dict(visual=0.2, audio=0.2))
    write(tmp_path, "ave", "concat-s0", dict(test={"joint": dict(accuracy=0.91)}), dict(visual=0.77, audio=0.78), method="concat", encoders=VIT)
    tuned = {("Uni-Modal Fine-Tuned", f"AVE {which}"): {0: (81.0,)} for which in ("RGB", "Audio")}
    assert filled(3, tmp_path) == tuned | {("Multi-Modal Training", "AVE RGB"): {0: (77.0,)}, ("Multi-Modal Training", "AVE Audio"): {0: (78.0,)}}
    assert filled(8, tmp_path) == tuned | {("MMLoRA (ours)", "AVE RGB"): {0: (84.0,)}}
    assert filled(4, tmp_path) == {("linear eval", f"AVE {which}"): {0: (70.0,)} for which in ("RGB", "Audio")} | {
        ("fine-tuning", f"AVE {which}"): {0: (80.0,)} for which in ("RGB", "Audio")}


def test_f1_pairs(tmp_path):
    encoders = {"visual": "vit_l14", "text": "deberta_large"}
    write(tmp_path, "mm_imdb", "mmlora-s0", dict(test={"prob": dict(f1_micro=0.7, f1_macro=0.6)}), method="mmlora", encoders=encoders, fusion="prob",
          lora=["text", "visual"], rank=1, unimodal={m: dict(run="gone") for m in encoders})
    assert filled(6, tmp_path) == {("MMLoRA (ours) Table 2", "MM-IMDB"): {0: (70.0, 60.0)}}


def test_print_of_table_5(tmp_path, capsys):
    for dataset, accuracy in (("ave", 0.95), ("kinetics_sound", 0.9), ("crema_d", 0.88)):
        for seed in (0, 1, 2) if dataset == "ave" else (0,):
            joint(tmp_path, dataset, f"mmlora-s{seed}", accuracy + (seed - 1) / 100 * (dataset == "ave"), lora=["audio"] if dataset == "crema_d" else ["audio", "visual"])
    joint(tmp_path, "ave", "full-s0", 0.9, method="full")
    call("--table", 5, "--out", tmp_path)
    table, commands = capsys.readouterr().out.split("\n\n")[1::2]
    lines = [re.split("  +", line.strip()) for line in table.splitlines()]
    assert lines[0] == ["AVE", "KS", "CREMA-D", "Avg Acc."]
    assert lines[1] == ["G-Blending", "ResNet18/ResNet18 (quoted)", "65.5", "62.2", "58.7", "62.1"]
    assert lines[-2:] == [["MMLoRA (ours)", "ViT-B/ViT-B", "96.2", "91.4", "88.6", "92.1"], ["ours", "95.0 +- 1.0 (3)", "90.0 (1)", "88.0 (1)", "91.0"]]
    assert lines[-3] == ["ours", "90.0 (1)"] and len(lines) == 1 + 2 * 12                    # no mean of one
    commands = commands.splitlines()
    here = f" --out {tmp_path}"
    assert len(commands) == len(set(commands)) and all(here in line for line in commands)
    assert f"python train_joint.py --dataset kinetics_sound --tune full{here}" in commands and f"python train_joint.py --dataset ave --tune full{here}" not in commands
    assert f"python -m baselines.mbt --dataset ave{here}     # quoted" in commands and f"python -m baselines.concat --dataset ave{here}" in commands
    assert f"python train_joint.py --dataset ave --lora all{here}" in commands               # filled for MMLoRA, but these runs hold no UME


@pytest.mark.parametrize("number", paper.TABLES)
def test_every_empty_cell_has_its_command(number, tmp_path, capsys):
    call("--table", number, "--out", "runs")
    printed = capsys.readouterr().out
    commands = {line.removesuffix("     # quoted") for line in printed.splitlines() if line.startswith("python")}
    assert commands == {paper.commands(cell) for row in paper.cells(number) for cell in row} - {""}
    assert ("# quoted" in printed) == any(cell.quoted and paper.commands(cell) for row in paper.cells(number) for cell in row)


@pytest.mark.parametrize("number, columns, count", [
    (1, ["toy"], 2), (3, ["toy RGB", "toy Audio"], 2), (4, ["toy RGB", "toy Audio"], 2), (5, ["toy"], 9), (8, ["toy RGB", "toy Audio"], 2),
    (9, ["toy RGB", "toy Audio", "toy Both"], 1), (10, ["UME", "1", "2", "4", "8", "64"], 1), (13, ["toy"], 2)])
def test_tables_asked_of_the_toy(number, columns, count):
    table = paper_tables.table_cells(number, "toy")
    assert len(table) == count and all(list(row) == columns for row in table.values())
    for cell in (cell for row in table.values() for cell in row.values()):
        assert cell.paper is None and not cell.quoted and cell.encoders.items() <= paper.encoders_for("toy").items()
        assert "--dataset toy" in paper.commands(cell) and not {"--encoder", "--pretrained"} & set(paper.commands(cell).split())


def test_of_several_learning_rates_the_best_on_validation(tmp_path):
    for lr, val, loss, test in ((1e-3, 0.8, 0.5, 0.9), (2e-3, 0.8, 0.4, 0.6), (5e-3, 0.75, 0.3, 0.95)):      # of equals the lower loss, as `train_unimodal.tuned`
        for seed in (0, 1):
            write(tmp_path, "ave", f"ogm_ge-lr{lr}-s{seed}", dict(val={"joint": dict(accuracy=val, loss=loss)}, test={"joint": dict(accuracy=test)}),
                  method="ogm_ge", encoders=VIT, pretrained=dict(VIT), lr=lr, fusion="joint")
            write(tmp_path, "ave", f"ogm_ge-conv-only-lr{lr}-s{seed}", dict(val={"joint": dict(accuracy=0.99)}, test={"joint": dict(accuracy=0.1)}),
                  method="ogm_ge", encoders=VIT, pretrained=dict(VIT), lr=lr, fusion="joint", conv_only=True)      # another method, by its options
    assert filled(5, tmp_path) == {("OGM-GE* ViT-B/ViT-B", "AVE"): {0: (60.0,), 1: (60.0,)}}


# ------------------------------------------------------------------------------------------------ from commands to runs to tables, on the toy
@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with small toys under data/, where the real scripts find them, and uni-modal models of one epoch."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "TOY_SIZES", {"train": 64, "val": 36, "test": 48})
        for modality in ("audio", "visual"):
            patch.setattr(sys, "argv", ["", "--modality", modality, "--epochs", "1", "--seeds", "0", "1"])
            train_unimodal.main()
    return folder


def in_this_process(words, env=None, _run=subprocess.run, **options):
    """For `subprocess.run`, where that starts one of our scripts: torch takes seconds to import."""
    if words[0] != sys.executable:
        return _run(words, env=env, **options)
    assert env["PYTHONPATH"].startswith(str(ROOT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[2:] if words[1] == "-m" else words[1:])
        runpy.run_module(words[2], run_name="__main__") if words[1] == "-m" else runpy.run_path(words[1], run_name="__main__")
    return SimpleNamespace(returncode=0)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_fill_runs_what_is_missing_and_no_more(toys, monkeypatch, capfd):
    """Every table that can be asked of a toy, from nothing: each cell ends up with both seeds, and holds what the runs of its method say."""
    monkeypatch.chdir(toys)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    tiny, shown = ["--epochs", 1], {}
    for number in (10, 9, 13, 5, 8, 4, 3):
        words = ["--table", number, "--dataset", "toy", "--device", "cpu", "--seeds", 0, 1, "--fill", *tiny]
        call(*words)
        printed = capfd.readouterr().out
        shown[number] = re.findall(r"^\$ (.*)", printed, re.M)
        assert "Not run yet" not in printed
        found = filled(number, Path("runs"), "toy")
        table = paper_tables.table_cells(number, "toy")
        assert len(found) == sum(map(len, table.values())) and all(values.keys() == {0, 1} for values in found.values())
        call(*words)
        assert "$ " not in capfd.readouterr().out
    assert len(shown[10]) == 5 and "--rank 64" in shown[10][-1] and all(" --seeds 0 1 --epochs 1" in c for c in shown[10])
    assert len(shown[9]) == 2 and shown[13] == ["python train_joint.py --dataset toy --lora all --no-umft --out runs --data-root data --device cpu --seeds 0 1 --epochs 1"]
    probes = [c for number in (8, 4, 3) for c in shown[number]]
    assert all(c.startswith("python evaluate.py --probe") for c in probes) and len(probes) == 3 + 2 + 1      # concat: trained for Table 5
    result = lambda run: json.loads((Path("runs/toy") / run / "result.json").read_text())
    assert filled(10, Path("runs"), "toy")["toy", "4"][1] == (pytest.approx(100 * result("mmlora-all-r4-s1")["test"]["prob"]["accuracy"]),)
    assert filled(13, Path("runs"), "toy")["MMLoRA (w/o UMFT)", "toy"][0] == (pytest.approx(100 * result("no-umft-all-r1-s0")["test"]["prob"]["accuracy"]),)
    assert filled(5, Path("runs"), "toy")["PMR", "toy"][1] == (pytest.approx(100 * result("pmr-s1")["test"]["joint"]["accuracy"]),)


def test_fill_stops_at_what_fails(toys, monkeypatch, capfd):
    monkeypatch.chdir(toys)
    with pytest.raises(ValueError, match="that command failed, and --fill stops"):
        call("--table", 10, "--dataset", "toy", "--out", "elsewhere", "--fill", "--rank", 0)
    assert "argument --rank: 0 is not above zero" in capfd.readouterr().err


@pytest.mark.parametrize("number", paper.TABLES)
def test_pictures_show_the_numbers(number, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for seed, accuracy in enumerate((0.9, 0.92, 0.97)):
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", accuracy, ume=0.9)
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot.Axes, "plot", lambda self, x, y, _plot=pyplot.Axes.plot, **style: shown.extend(y) or _plot(self, x, y, **style))
        bars = []
        patch.setattr(pyplot.Axes, "errorbar", lambda self, x, y, std, _bar=pyplot.Axes.errorbar, **style: bars.extend(zip(y, std)) or _bar(self, x, y, std, **style))
        file = paper_tables.draw(number, tmp_path)
    assert file == tmp_path / f"table{number}.png" and file.read_bytes().startswith(b"\x89PNG")
    assert {cell.paper[0] for row in paper.cells(number) for cell in row if cell.paper} <= set(shown)
    if number in (9, 10, 13):       # the cell of AVE, rank 1, LoRA on both
        assert (pytest.approx(93), pytest.approx(100 * 0.0360555)) in bars
