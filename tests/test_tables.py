"""`python -m paper.tables`: which run fills which cell, the commands for the rest, the picture.

What fills a cell is tested with folders made by hand; the commands are run on small toys.
"""
import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import fingerprint, linear
from paper import results, tables
from running import ROOT, call, error, result

# These tests import `paper.tables`, and run it as a script, too.

VIT = {"audio": "audio_vit_b", "visual": "vit_b16"}
RESNET = {"audio": "resnet18", "visual": "resnet18"}
BOTH = ["audio", "visual"]


# ---------------------------------------------------------------------------- runs made by hand
def write(out, dataset, name, result=None, probe=None, code=None, **settings):
    """The folder of a run. code: the fingerprint of its code, file -> hash."""
    folder = out / dataset / name
    folder.mkdir(parents=True)
    made = dict(version=fingerprint.VERSION, python=fingerprint.python_version(), code=code or {},
                data="", data_folder=str(out / "no data"))
    settings = dict(dataset=dataset, seed=int(name[-1]), precision="fp32", frames=3,
                    audio_shift=0) | settings
    (folder / "config.json").write_text(json.dumps(dict(settings=settings, fingerprint=made)))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(whole(result)))
    if probe is not None:
        scores = {m: dict(test=dict(accuracy=v), code=linear.CODE) for m, v in probe.items()}
        (folder / "probe.json").write_text(json.dumps(scores))
    return folder


def whole(result):
    """A result with all that a run writes."""
    result = dict(best_epoch=1, trained_parameters=1, seconds=1.0) | result
    for part in filter(None, (result, result.get("ume"))):
        part.setdefault("val", part["test"])
        for scores in [*part["val"].values(), *part["test"].values()]:
            scores.setdefault("loss", 1.0)
    return result


def unimodal(out, dataset, modality, seed, accuracy, encoder, pretrained=None, tag="", **more):
    write(out, dataset, f"unimodal-{modality}{tag}-s{seed}",
          dict(test={modality: dict(accuracy=accuracy)}), method="unimodal", modality=modality,
          encoder=encoder, pretrained=pretrained or encoder, **more)


def joint(out, dataset, name, accuracy, ume=None, method="mmlora", lora=BOTH, rank=1, encoders=VIT,
          fusion="prob", base="", **more):
    """accuracy: of the fusion that it was trained with; the other one's is 0.1."""
    scores = dict(test=dict(prob=dict(accuracy=0.1), logits=dict(accuracy=0.1)))
    scores["test"][fusion] = dict(accuracy=accuracy)
    if ume:
        scores["ume"] = dict(test=dict(prob=dict(accuracy=ume), logits=dict(accuracy=0.1)))
    if method != "no-umft":
        more["unimodal"] = {m: dict(run=f"unimodal-{m}{base}-s{name[-1]}") for m in encoders}
    if method != "full":
        more |= dict(lora=sorted(lora), rank=rank)
    more |= dict(method=method, encoders=encoders, fusion=fusion)
    return write(out, dataset, name, scores, **more)


def baseline(out, dataset, name, accuracy, method, encoders=VIT, start=None, probe=None):
    """A run of a method with a head of its own."""
    pretrained = dict(encoders) if start is None else dict.fromkeys(encoders, start)
    write(out, dataset, name, dict(test=dict(joint=dict(accuracy=accuracy))), probe, method=method,
          encoders=encoders, fusion="joint", pretrained=pretrained)


def arguments(number, out, toy=None):
    return SimpleNamespace(number=number, dataset=toy, out=str(out))


def filled(number, out, toy=None):
    """(row, column) -> seed -> numbers, of the cells that are not empty."""
    args = arguments(number, out, toy)
    runs, unreadable = tables.read_runs(args)
    assert not unreadable
    found = {}
    for row in tables.rows_of(args):
        for cell in row:
            label = ", ".join(filter(None, [cell.row, cell.backbone, cell.start]))
            for seed, values in tables.numbers(cell, runs).items():
                values = tuple(round(v, 6) for v in values)
                found.setdefault((label, cell.column), {})[seed] = values
    return found


def test_only_the_run_that_a_cell_asks_for_fills_it(tmp_path):
    runs, scratch = tmp_path / "runs", tmp_path / "runs-scratch"
    for seed in (0, 1):
        for m, encoder in VIT.items():
            unimodal(runs, "ave", m, seed, 0.8, encoder)
            unimodal(runs, "ave", m, seed, 0.6, "resnet18", tag="-resnet18")
            unimodal(scratch, "ave", m, seed, 0.5, "resnet18", pretrained="none", tag="-resnet18")
        joint(runs, "ave", f"mmlora-all-r1-s{seed}", 0.96 + seed / 100, ume=0.95)
    joint(runs, "ave", "mmlora-audio-r1-s0", 0.2, lora=["audio"], ume=0.95)
    joint(runs, "ave", "mmlora-all-r4-s0", 0.3, rank=4, ume=0.95)
    joint(runs, "ave", "logits-all-r1-s2", 0.4, method="logits", fusion="logits", ume=0.94)
    joint(runs, "kinetics_sound", "logits-all-r1-s0", 0.4, method="logits", fusion="logits",
          ume=0.9)
    joint(runs, "ave", "no-umft-all-r1-s0", 0.5, method="no-umft", pretrained=dict(VIT))
    joint(runs, "ave", "no-umft-all-r1-none-s1", 0.55, method="no-umft",
          pretrained=dict.fromkeys(VIT, "none"))
    joint(runs, "ave", "full-s0", 0.6, method="full", ume=0.95)
    for out, accuracy, ume in ((runs, 0.7, 0.65), (scratch, 0.75, 0.72)):
        joint(out, "ave", "mmlora-all-r1-audio-resnet18-visual-resnet18-s0", accuracy, ume=ume,
              encoders=RESNET, base="-resnet18")
    joint(runs, "ave", "mmlora-all-r1-lr-s3", 0.9, lr=1)        # tried with fewer seeds
    joint(runs, "ave", "separate-all-r1-s0", 0.1, method="separate", ume=0.95)
    unfinished = joint(runs, "ave", "mmlora-unfinished-s5", 0.99)
    (unfinished / "result.json").unlink()
    baseline(runs, "ave", "concat-s0", 0.91, "concat")
    baseline(runs, "ave", "ogm_ge-s0", 0.92, "ogm_ge")
    baseline(scratch, "ave", "ogm_ge-s0", 0.73, "ogm_ge", RESNET, start="none")
    baseline(runs, "ave", "pmr-s0", 0.74, "pmr", RESNET)        # the paper quotes it from scratch
    resnets = "ResNet18/ResNet18, public weights", "ResNet18/ResNet18, random weights"
    three = {0: (95.0,), 1: (95.0,), 2: (94.0,)}        # seed 2: of the run on averaged logits
    two = {0: (96.0,), 1: (97.0,)}
    assert filled(5, runs) == {
        (f"OGM-GE, {resnets[1]}", "AVE"): {0: (73.0,)},
        (f"UME*, {resnets[0]}", "AVE"): {0: (65.0,)},
        (f"UME*, {resnets[1]}", "AVE"): {0: (72.0,)},
        (f"MMLoRA (ours), {resnets[0]}", "AVE"): {0: (70.0,)},
        (f"MMLoRA (ours), {resnets[1]}", "AVE"): {0: (75.0,)},
        ("Multi-Modal Baseline*, ViT-B/ViT-B", "AVE"): {0: (91.0,)},
        ("OGM-GE*, ViT-B/ViT-B", "AVE"): {0: (92.0,)},
        ("UME*, ViT-B/ViT-B", "AVE"): three,
        ("UME*, ViT-B/ViT-B", "KS"): {0: (90.0,)},
        ("Fully Fine-tuned UME*, ViT-B/ViT-B", "AVE"): {0: (60.0,)},
        ("MMLoRA (ours), ViT-B/ViT-B", "AVE"): two,
    }
    assert filled(9, runs) == {("MMLoRA", "AVE Audio"): {0: (20.0,)}, ("MMLoRA", "AVE Both"): two}
    assert filled(10, runs) == {
        ("AVE", "UME"): three, ("Kinetics-Sound", "UME"): {0: (90.0,)},
        ("AVE", "1"): two, ("AVE", "4"): {0: (30.0,)}}
    assert filled(13, runs) == {
        ("MMLoRA (w/o UMFT)", "AVE"): {0: (50.0,)}, ("MMLoRA (w UMFT)", "AVE"): two}
    alone = {0: (80.0,), 1: (80.0,)}
    assert filled(1, runs) == {("Fine-tuned Visual Model", "AVE"): alone,
                               ("Fine-tuned Audio / Language Model", "AVE"): alone}


def test_a_run_whose_step_1_is_gone_still_counts_where_the_start_is_not_the_question(tmp_path):
    joint(tmp_path, "ave", "mmlora-all-r1-s0", 0.9, ume=0.8)
    joint(tmp_path, "ave", "mmlora-all-r1-audio-resnet18-visual-resnet18-s0", 0.9, encoders=RESNET)
    assert filled(5, tmp_path) == {("UME*, ViT-B/ViT-B", "AVE"): {0: (80.0,)},
                                   ("MMLoRA (ours), ViT-B/ViT-B", "AVE"): {0: (90.0,)}}


def test_probes_fill_tables_3_4_and_8(tmp_path):
    for m, encoder in VIT.items():
        unimodal(tmp_path, "ave", m, 0, 0.8, encoder, probe={m: 0.81})
        for seed, accuracy, start in ((0, 0.7, encoder), (1, 0.1, "none")):
            write(tmp_path, "ave", f"probe-{m}-s{seed}", probe={m: accuracy}, method="pretrained",
                  modality=m, encoder=encoder, pretrained=start)
    for name, lora, probe in (("all", BOTH, {"visual": 0.84}),
                              ("audio", ["audio"], {"visual": 0.2, "audio": 0.2})):
        joint(tmp_path, "ave", f"mmlora-{name}-r1-s0", 0.9, lora=lora, probe=probe)
    baseline(tmp_path, "ave", "concat-s0", 0.91, "concat", probe=dict(visual=0.77, audio=0.78))
    tuned = {("Uni-Modal Fine-Tuned", f"AVE {which}"): {0: (81.0,)} for which in ("RGB", "Audio")}
    assert filled(3, tmp_path) == tuned | {("Multi-Modal Training", "AVE RGB"): {0: (77.0,)},
                                           ("Multi-Modal Training", "AVE Audio"): {0: (78.0,)}}
    assert filled(8, tmp_path) == tuned | {("MMLoRA (ours)", "AVE RGB"): {0: (84.0,)}}
    assert filled(4, tmp_path) == {
        ("linear eval", "AVE RGB"): {0: (70.0,)}, ("linear eval", "AVE Audio"): {0: (70.0,)},
        ("fine-tuning", "AVE RGB"): {0: (80.0,)}, ("fine-tuning", "AVE Audio"): {0: (80.0,)}}


def test_f1_pairs(tmp_path):
    folder = joint(tmp_path, "mm_imdb", "mmlora-all-r1-s0", 0, lora=["text", "visual"],
                   encoders={"visual": "vit_l14", "text": "deberta_large"})
    scores = dict(test={"prob": dict(f1_micro=0.7, f1_macro=0.6)})
    (folder / "result.json").write_text(json.dumps(whole(scores)))
    assert filled(6, tmp_path) == {("MMLoRA (ours), Table 2", "MM-IMDB"): {0: (70.0, 60.0)}}


def test_of_several_learning_rates_the_best_on_validation(tmp_path):
    tried = ((1e-3, 0.8, 0.5, 0.9), (2e-3, 0.8, 0.4, 0.6), (5e-3, 0.75, 0.3, 0.95))
    for lr, val, loss, test in tried:
        for seed in (0, 1):
            scores = dict(val={"joint": dict(accuracy=val, loss=loss)},
                          test={"joint": dict(accuracy=test)})
            settings = dict(method="ogm_ge", encoders=VIT, pretrained=VIT, fusion="joint", lr=lr)
            write(tmp_path, "ave", f"ogm_ge-lr{lr}-s{seed}", scores, **settings)
            better = dict(val={"joint": dict(accuracy=0.99, loss=0)}, test=scores["test"])
            write(tmp_path, "ave", f"ogm_ge-conv-only-lr{lr}-s{seed}", better, **settings,
                  options=dict(conv_only=True))         # another method, by its options
    assert filled(5, tmp_path) == {("OGM-GE*, ViT-B/ViT-B", "AVE"): {0: (60.0,), 1: (60.0,)}}


def test_a_run_with_an_option_is_another_method_however_many_seeds_it_has(tmp_path):
    settings = dict(method="ogm_ge", encoders=VIT, pretrained=VIT, fusion="joint")
    for name, accuracy, no_ge in (("ogm_ge-s0", 0.5, False), ("ogm_ge-no-ge-s0", 0.9, True),
                                  ("ogm_ge-no-ge-s1", 0.9, True)):
        write(tmp_path, "ave", name, dict(test={"joint": dict(accuracy=accuracy)}),
              options=dict(no_ge=no_ge), **settings)
    assert filled(5, tmp_path) == {("OGM-GE*, ViT-B/ViT-B", "AVE"): {0: (50.0,)}}
    full = joint(tmp_path, "ave", "full-drop-path0-s0", 0.9, method="full", drop_path=0)
    assert full.exists() and len(filled(5, tmp_path)) == 1


def test_seeds_whose_step_1_had_other_settings_are_not_averaged(tmp_path):
    for seed, lr in ((0, 1e-3), (1, 1e-3), (2, 3e-3)):
        for m, encoder in VIT.items():
            unimodal(tmp_path, "ave", m, seed, 0.8, encoder, lr=lr)
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", 0.9)
    assert filled(10, tmp_path)["AVE", "1"] == {0: (90.0,), 1: (90.0,)}


def test_ume_is_that_of_the_models_of_now(tmp_path):
    """The run of an older step 1 comes first by its name."""
    for m, encoder in VIT.items():
        unimodal(tmp_path, "ave", m, 0, 0.8, encoder)
        (tmp_path / f"ave/unimodal-{m}-s0/model.safetensors").write_bytes(b"new")
    for name, ume, model in (("full-s0", 0.5, b"old"), ("mmlora-all-r1-s0", 0.9, b"new")):
        folder = joint(tmp_path, "ave", name, 0.9, ume=ume, method=name[:-3].split("-")[0])
        config = json.loads((folder / "config.json").read_text())
        for base in config["settings"]["unimodal"].values():
            base["sha256"] = hashlib.sha256(model).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))
    assert filled(10, tmp_path)["AVE", "UME"] == {0: (90.0,)}
    assert "its uni-modal models" in fingerprint.changed(tmp_path / "ave/full-s0")


def test_a_linear_evaluation_of_other_code_says_so(tmp_path):
    folder = write(tmp_path, "ave", "probe-visual-s0", probe=dict(visual=0.8), method="pretrained",
                   modality="visual", encoder="vit_b16", pretrained="vit_b16")
    assert tables.read_run(folder).changes == []
    probe = json.loads((folder / "probe.json").read_text())
    probe["visual"]["code"] = "other"
    (folder / "probe.json").write_text(json.dumps(probe))
    assert tables.read_run(folder).changes == ["harness/linear.py"]


# ---------------------------------------------------------------------------- in a terminal
def blocks(printed):
    """The blocks of a printed table, each a list of lines of words."""
    found = []
    for block in printed.split("\n\n"):
        if block.startswith("    "):            # the headings of the columns
            found.append([re.split("  +", line.strip()) for line in block.splitlines()])
    return found


def commands(printed):
    return [line for line in printed.splitlines() if line.startswith("python")]


def test_print_of_table_5(tmp_path):
    for seed in (0, 1, 2):
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", 0.94 + seed / 100)
    joint(tmp_path, "kinetics_sound", "mmlora-all-r1-s0", 0.9)
    joint(tmp_path, "crema_d", "mmlora-audio-r1-s0", 0.88, lora=["audio"])
    joint(tmp_path, "ave", "full-s0", 0.9, method="full")
    printed = call("paper.tables", 5, out=tmp_path)
    [lines] = blocks(printed)
    assert lines[:4] == [["AVE", "KS", "CREMA-D", "Avg Acc."],
                         ["G-Blending, ResNet18/ResNet18 (quoted)"],
                         ["paper", "65.5", "62.2", "58.7", "62.1"], ["ours, random weights"]]
    assert lines[-6:] == [["Fully Fine-tuned UME*, ViT-B/ViT-B"],
                          ["paper", "95.2", "91.3", "87.5", "91.3"],
                          ["ours", "90.0 (1)"],                             # no mean of one
                          ["MMLoRA (ours), ViT-B/ViT-B"],
                          ["paper", "96.2", "91.4", "88.6", "92.1"],
                          ["ours", "95.0 +- 1.0 (3)", "90.0 (1)", "88.0 (1)", "91.0"]]
    assert len(lines) == 1 + 3 * 12 + 2
    found, here = commands(printed), f" --out {tmp_path}"
    assert len(found) == len(set(found)) and all(here in line for line in found)
    assert f"python -m baselines.full_ume --dataset kinetics_sound{here}" in found
    assert f"python -m baselines.full_ume --dataset ave{here}" not in found
    assert f"python -m baselines.mbt --dataset ave{here}     # quoted" in found
    assert f"python train_joint.py --dataset ave --lora all{here}" in found     # for UME


def test_both_starts_of_the_resnets_of_table_5(tmp_path):
    """One of them is a row of its own, with commands that keep its runs apart."""
    out = tmp_path / "mine"
    scratch = tmp_path / "mine-scratch"
    for where, start, accuracy in ((out, "resnet18", 0.7), (scratch, "none", 0.6)):
        for m in RESNET:
            unimodal(where, "ave", m, 0, 0.5, "resnet18", pretrained=start, tag="-resnet18")
        joint(where, "ave", "mmlora-all-r1-audio-resnet18-visual-resnet18-s0", accuracy,
              encoders=RESNET, base="-resnet18")
    printed = call("paper.tables", 5, out=f"{out}/")
    [lines] = blocks(printed)
    at = lines.index(["MMLoRA (ours), ResNet18/ResNet18"])
    assert lines[at + 1:at + 4] == [["paper", "86.9", "79.4", "81.9", "82.7"],
                                    ["ours, public weights", "70.0 (1)"],
                                    ["ours, random weights", "60.0 (1)"]]
    ks = ("python train_joint.py --dataset kinetics_sound --lora all"
          " --encoder audio=resnet18 visual=resnet18")
    assert f"{ks} --out {out}" in commands(printed)
    assert f"{ks} --pretrained none --out {out}-scratch" in commands(printed)
    for line in commands(printed):
        assert ("--pretrained none" in line) == ("-scratch" in line)
    assert f"random weights go to {out}-scratch" in printed
    assert "--pretrained none --out runs-scratch" in call("paper.tables", 5)
    assert "scratch" not in call("paper.tables", 10)


@pytest.mark.parametrize("number", results.TABLES)
def test_tables_fit_the_terminal_and_lose_nothing(number, tmp_path):
    printed = call("paper.tables", number, out=tmp_path)
    lines = [line for line in printed.splitlines() if not line.startswith("python")]
    assert max(map(len, lines)) <= 80 + len(str(tmp_path))
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    shown, wanted = [], []
    for block in blocks(printed):
        for first, *words in block:
            shown += words if first == "paper" else []
    for row in results.cells(number):
        if row[0].start != results.PUBLIC_WEIGHTS:
            wanted += [" / ".join(map(str, cell.paper or "-")) for cell in row]
    assert sorted(shown) == sorted(wanted)
    paper = [first for first, *_ in blocks(printed)[0] if first == "paper"]
    assert len(paper) == len(results.TABLES[number]["rows"])


@pytest.mark.parametrize("number", results.TABLES)
def test_every_empty_cell_has_its_command(number):
    printed = call("paper.tables", number, out="runs")
    found = set()
    for line in commands(printed):
        line = line.removesuffix("     # quoted").removesuffix(" --out runs-scratch")
        found |= set(line.split(" && "))
    wanted = set()
    for row in results.cells(number):
        for cell in row:
            before = results.trained_before(cell)
            wanted |= {results.command(cell), results.command(before) if before else ""}
    assert found == wanted - {""}
    quoted = {results.command(c) for row in results.cells(number) for c in row if c.quoted} - {""}
    assert ("# quoted" in printed) == bool(quoted)


def test_commands_carry_the_options_of_the_table(tmp_path):
    printed = call("paper.tables", 8, "--seeds", 3, 4, "--device", "cuda:1", out=tmp_path,
                   root="/somewhere else")
    where = "--data-root '/somewhere else' --device cuda:1"
    training = f"python train_joint.py --dataset crema_d --lora all --out {tmp_path} --seeds 3 4"
    probe = "python evaluate.py --probe --run RUN"
    assert f"{training} {where} && {probe} {where}" in commands(printed)
    unimodal(tmp_path, "ave", "visual", 3, 0.8, "vit_b16")
    unimodal(tmp_path, "ave", "visual", 4, 0.8, "vit_b16")
    printed = call("paper.tables", 8, out=tmp_path)
    runs = f"{tmp_path}/ave/unimodal-visual-s3 {tmp_path}/ave/unimodal-visual-s4"
    assert f"python evaluate.py --probe --run {runs}" in commands(printed)


class Parsed(Exception):
    """A script has read its command line."""


@pytest.mark.parametrize("number", results.TABLES)
def test_printed_commands_parse(number, monkeypatch):
    """With the scripts' own argparse. (What they would download or train is not tried.)"""
    printed = call("paper.tables", number, "--seeds", 0, 1, "--device", "cpu", root="elsewhere")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *words):
        parse(parser, *words)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    lines = {part for line in commands(printed) for part in line.split("     #")[0].split(" && ")}
    assert lines
    for line in sorted(lines):
        python, script, *words = shlex.split(line)
        if script == "-m":
            script, *words = words
        assert python == "python"
        with pytest.raises(Parsed):
            call(script, *words)


# ---------------------------------------------------------------------------- what is broken or old
@pytest.mark.parametrize("file, content", [
    ("config.json", b'{"settings": {"method"'), ("config.json", b"[]"), ("config.json", b"{}"),
    ("config.json", b'{"settings": {"seed": 0}}'), ("config.json", b"\xff\xfe"),
    ("config.json", b""), ("result.json", b"{"),
])
def test_a_broken_file_costs_its_own_run_alone(tmp_path, file, content):
    joint(tmp_path, "ave", "mmlora-all-r1-s0", 0.9)
    broken = joint(tmp_path, "ave", "mmlora-all-r1-s1", 0.9)
    (broken / file).write_bytes(content)
    printed = call("paper.tables", 10, out=tmp_path)
    [told] = [line for line in printed.splitlines() if "left out" in line]
    assert str(broken / file) in told or str(broken / "config.json") in told
    assert ["ours", "90.0 (1)"] in blocks(printed)[0]


def test_a_table_says_which_runs_are_of_other_code(tmp_path):
    joint(tmp_path, "ave", "mmlora-all-r1-s0", 0.9, code={"lora.py": "other"})
    joint(tmp_path, "ave", "mmlora-all-r4-s0", 0.8, rank=4)
    joint(tmp_path, "ave", "mmlora-audio-r1-s0", 0.8, lora=["audio"], code={"lora.py": "other"})
    printed = call("paper.tables", 10, out=tmp_path)
    assert "90.0 (1)" in printed and "80.0 (1)" in printed
    told = [line for line in printed.splitlines() if "since it was trained" in line]
    assert told == [f"{tmp_path}/ave/mmlora-all-r1-s0: lora.py has changed since it was trained"]


# ---------------------------------------------------------------------------- asked of a toy
@pytest.mark.parametrize("number, columns, count", [
    (1, ["toy"], 2), (3, ["toy RGB", "toy Audio"], 2), (4, ["toy RGB", "toy Audio"], 2),
    (5, ["toy"], 9), (8, ["toy RGB", "toy Audio"], 2),
    (9, ["toy RGB", "toy Audio", "toy Both"], 1), (10, ["UME", "1", "2", "4", "8", "64"], 1),
    (13, ["toy"], 2)])
def test_tables_asked_of_the_toy(number, columns, count):
    rows = tables.rows_of(arguments(number, "runs", "toy"))
    assert len(rows) == count
    for row in rows:
        assert [cell.column for cell in row] == columns
        for cell in row:
            assert cell.paper is None and not cell.quoted
            assert set(cell.encoders.values()) <= {"vit_toy", "audio_vit_toy"}
            command = results.command(cell)
            assert "--dataset toy" in command or "--run RUN" in command
            assert "--encoder" not in command and "--pretrained" not in command


@pytest.mark.parametrize("words, told", [
    ([2], "there is no Table 2, but 1, 3, 4, "), (["five"], "there is no Table five, but 1, 3"),
    ([6, "--dataset", "toy"], "these it can: 1, 3, 4, 5, 8, 9, 10, 13"),
    ([5, "--dataset", "ave"], "no toy is called ave; there are toy, "),
    ([5, "--dataset", "toy_mimic"], "there are toy_mimics, "),
    ([10, "--epochs", 3], "--epochs 3: options of training need --fill"),
    ([10, "--fill", "--rank", 3], "--rank: the table sets it"),
    ([10, "--fill", "--encoder=vit_l14"], "--encoder=vit_l14: the table sets it"),
    ([10, "--fill", "--seed", 3], "--seed: the table sets it"),
])
def test_wrong_words_end_in_one_line(words, told, capsys):
    with pytest.raises(SystemExit):
        call("paper.tables", *words)
    assert told in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------- --fill, on the toy
def in_this_process(words, env=None, **options):
    """For `subprocess.run`, where that starts one of our scripts: torch takes seconds to import."""
    if words[0] != sys.executable:
        return run_process(words, env=env, **options)
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    script, *rest = words[1:]
    if script == "-m":
        script, *rest = rest
    else:
        script = str(Path(script).relative_to(ROOT))
    print(call(script, *rest))
    return SimpleNamespace(returncode=0)


run_process = subprocess.run


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(linear, "STRENGTHS", (0.1,))     # of four: the one solved soonest


@pytest.fixture(scope="module")
def step_1(root, tmp_path_factory):
    """A folder of runs with uni-modal models of one epoch, of two seeds."""
    out = tmp_path_factory.mktemp("tables") / "runs"
    for modality in BOTH:
        call("train_unimodal.py", "--modality", modality, "--epochs", 1, "--seeds", 0, 1, out=out,
             root=root)
    return out


def test_the_paired_difference_to_ume(tmp_path, monkeypatch, capsys):
    """Of the seeds that have both: +1, +2 and +4 points. Mean 7/3, standard error sqrt(7)/3."""
    for seed, gain in enumerate((0.01, 0.02, 0.04)):
        for m, encoder in VIT.items():
            unimodal(tmp_path, "ave", m, seed, 0.8, encoder)
        ume = 0.9 + seed / 1000
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", ume + gain, ume=ume)
    baseline(tmp_path, "ave", "concat-s0", 0.91, "concat")
    baseline(tmp_path, "ave", "concat-s5", 0.2, "concat")         # UME has no seed 5
    args = arguments(5, tmp_path)
    found, _ = tables.read_runs(args)
    told = {cell.row: tables.difference(cell, found) for row in tables.rows_of(args)
            for cell in row if cell.column == "AVE" and not cell.start}
    assert told["MMLoRA (ours)"] == "+2.33 +- 0.88 (3)"
    assert told["Multi-Modal Baseline*"] == "+1.00" and told["UME*"] == told["MBT"] == ""
    args.seeds, args.data_root, args.device = None, "data", None
    tables.show(args)
    assert re.search(r"- UME +\+2\.33 \+- 0\.88 \(3\)", capsys.readouterr().out)


def started(printed):
    """The commands that --fill has run."""
    return re.findall(r"^\$ (.*)", printed, re.M)


def test_fill_keeps_its_own_options(root, tmp_path, quick, monkeypatch):
    """It once swallowed --out: it trained into that folder, and printed the table of another."""
    monkeypatch.chdir(tmp_path)
    words = "--dataset toy --seeds 0 1 --fill --out runs9 --epochs 1 --umft-epochs 1 --device cpu"
    printed = call("paper.tables", 9, *words.split(), "--data-root", root)
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "runs9/toy/mmlora-visual-r1-s1/result.json").exists()
    where = f"--out runs9 --seeds 0 1 --data-root {root} --device cpu --epochs 1 --umft-epochs 1"
    assert started(printed) == [f"python train_joint.py --dataset toy --lora {m} {where}"
                                for m in ("visual", "audio", "all")]
    table = printed[printed.index("Table 9, asked of toy"):]
    assert ", from runs9." in table and len(re.findall(r"\d \(2\)", table)) == 6
    assert "    - UME" in table
    assert "Not run yet" not in table


def test_fill_runs_what_is_missing_and_no_more(root, step_1, quick):
    """Every table that can be asked of a toy: each cell gets both seeds, and holds what the runs of
    its method say."""
    out, shown = step_1, {}
    for number in (10, 9, 13, 5, 8, 4, 3):
        words = [number, *"--dataset toy --device cpu --seeds 0 1 --fill --epochs 1".split(),
                 "--batch-size", 200]
        printed = call("paper.tables", *words, out=out, root=root)
        shown[number] = started(printed)
        assert "Not run yet" not in printed and "left out" not in printed
        found = filled(number, out, "toy")
        rows = tables.rows_of(arguments(number, out, "toy"))
        assert len(found) == sum(map(len, rows))
        assert all(values.keys() == {0, 1} for values in found.values())
        assert not started(call("paper.tables", *words, out=out, root=root))
    where = f"--data-root {root} --device cpu"
    assert len(shown[10]) == 5 and "--rank 64" in shown[10][-1]
    assert all(line.endswith(f" --out {out} --seeds 0 1 {where} --epochs 1 --batch-size 200")
               for line in shown[10])
    assert len(shown[9]) == 2
    assert [line.split(" --out")[0] for line in shown[13]] == [
        "python -m baselines.no_umft --dataset toy --lora all"]
    assert len(shown[5]) == 7                       # all but UME and MMLoRA
    probes = [line for number in (8, 4, 3) for line in shown[number]]
    assert all(line.startswith("python evaluate.py --probe") for line in probes)
    assert len(probes) == 3 + 2 + 1                 # concat was trained for Table 5

    def of_run(name, prediction="prob"):
        return pytest.approx(100 * result(out, f"toy/{name}")["test"][prediction]["accuracy"])

    assert filled(10, out, "toy")["toy", "4"][1] == (of_run("mmlora-all-r4-s1"),)
    assert filled(13, out, "toy")["MMLoRA (w/o UMFT)", "toy"][0] == (of_run("no-umft-all-r1-s0"),)
    assert filled(5, out, "toy")["PMR", "toy"][1] == (of_run("pmr-s1", "joint"),)
    assert filled(5, out, "toy")["Fully Fine-tuned UME", "toy"][1] == (of_run("full-s1"),)


def test_fill_trains_anew_what_other_code_has_made(root, step_1, tmp_path, quick):
    """On a toy, as the training scripts do."""
    out = shutil.copytree(step_1, tmp_path / "runs")
    words = [13, *"--dataset toy --fill --epochs 1 --batch-size 200".split()]
    call("paper.tables", *words, out=out, root=root)
    config = out / "toy/mmlora-all-r1-s0/config.json"
    made = json.loads(config.read_text())
    made["fingerprint"]["code"]["lora.py"] = "edited since"
    config.write_text(json.dumps(made))
    shown = call("paper.tables", 13, "--dataset", "toy", out=out, root=root)
    assert f"{config.parent}: lora.py has changed since it was trained" in shown
    printed = call("paper.tables", *words, out=out, root=root)
    assert len(started(printed)) == 1 and "train_joint.py" in started(printed)[0]
    assert "since it was trained" not in printed[printed.index("Table 13"):]


def test_fill_stops_at_what_fails(tmp_path, root, capfd):
    words = [10, *"--dataset toy --fill --epochs 0".split()]
    told = error("paper.tables", *words, out=tmp_path, root=root)
    assert "that command failed, and --fill stops" in told
    assert "argument --epochs: 0 is not above zero" in capfd.readouterr().err


# ---------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("number", results.TABLES)
def test_pictures_show_the_numbers(number, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for seed, accuracy in enumerate((0.9, 0.92, 0.97)):
        joint(tmp_path, "ave", f"mmlora-all-r1-s{seed}", accuracy, ume=0.9)
    dots, bars = [], []
    plot, errorbar = pyplot.Axes.plot, pyplot.Axes.errorbar

    def plot_and_note(axes, x, y, **style):
        dots.extend(y)
        return plot(axes, x, y, **style)

    def errorbar_and_note(axes, x, y, deviation, **style):
        bars.extend(zip(y, deviation))
        return errorbar(axes, x, y, deviation, **style)

    axes, close = [], pyplot.close

    def close_and_note(figure):
        axes.extend(figure.axes)
        close(figure)

    monkeypatch.setattr(pyplot, "close", close_and_note)
    monkeypatch.setattr(pyplot.Axes, "plot", plot_and_note)
    monkeypatch.setattr(pyplot.Axes, "errorbar", errorbar_and_note)
    printed = call("paper.tables", number, "--plot", out=tmp_path)
    file = tmp_path / f"table{number}.png"
    assert printed.endswith(f"wrote {file}\n") and file.read_bytes().startswith(b"\x89PNG")
    published = {cell.paper[0] for row in results.cells(number) for cell in row if cell.paper}
    assert published <= set(dots)
    if number in (9, 10, 13):           # the cell of AVE, rank 1, LoRA on both
        assert (pytest.approx(93), pytest.approx(100 * 0.0360555)) in bars
    one, = axes
    assert one.get_ylabel().startswith("test ") and "standard deviation" in one.get_title()
    assert ("rank" in one.get_xlabel()) == (number == 10)
    # Beside the axes: over no dot.
    assert one.get_legend().get_window_extent().x0 > one.get_window_extent().x1
