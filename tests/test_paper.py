"""`paper/settings.py` and `paper/results.py` against the paper.

The numbers are typed a second time, the tables are compared with each other, and the commands that
fill them are checked word by word.
"""
import ast
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path

import pytest

from paper import results, settings

ROOT = Path(__file__).parents[1]
ENCODERS = set("vit_b16 vit_b32 vit_l14 audio_vit_b bert_base bert_large "
               "deberta_base deberta_large resnet18 resnet152".split())
TOYS = {"toy": {"vit_toy", "audio_vit_toy"}, "toy_mismatched": {"vit_toy", "audio_vit_toy"},
        "toy_mimics": {"vit_mini", "audio_vit_mini"}}
DATASETS = {"crema_d", "ave", "kinetics_sound", "mm_imdb", "food101", "ucf101"}
CELLS = [(n, cell) for n in results.TABLES for row in results.cells(n) for cell in row]

# The tables once more, typed from the PDF: a line a row, "-" for a dash, a/b for F1-Micro/F1-Macro.
TYPED = {
    1: """Recent Multi-modal Model | 68.1 63.1 65.3 66.7/61.7
          Fine-tuned Visual Model | 88.1 84.3 77.7 60.2/52.6
          Fine-tuned Audio / Language Model | 85.6 69.6 75.8 68.6/63.9""",
    3: """Multi-Modal Training | 83.3 79.8 78.7 67.9 70.3 64.8
          Uni-Modal Fine-Tuned | 88.1 85.6 84.3 69.6 77.7 75.8""",
    4: """linear eval | 87.6 82.1 79.0 66.2 51.2 60.6 48.7 22.1 81.8 21.2
          fine-tuning | 88.1 85.6 84.3 69.6 77.7 75.8 60.2 68.6 84.3 86.6""",
    5: """G-Blending | 65.5 62.2 58.7 62.1
          OGM-GE | 76.9 63.1 62.2 67.4
          PMR | 74.3 - 65.3 -
          UME* | 85.4 78.8 78.2 80.8
          MMLoRA (ours) | 86.9 79.4 81.9 82.7
          Multi-Modal Baseline* | 94.7 90.6 87.6 91.0
          Classifier on frozen features* | 93.7 90.1 85.3 89.7
          MBT | - 85.0 - -
          OGM-GE* | 95.5 90.4 88.4 91.4
          UME* | 95.4 90.8 87.8 91.3
          Fully Fine-tuned UME* | 95.2 91.3 87.5 91.3
          MMLoRA (ours) | 96.2 91.4 88.6 92.1""",
    6: """MMBT | 92.1 66.8/61.6
          MMLoRA (ours) | 93.2 67.2/61.7
          Baseline | 93.29 64.9/59.6
          PMF | 91.51 64.5/58.8
          PMF-L | 91.68 66.7/61.7
          MBT | 93.6 64.8/59.6
          MMBT | 94.10 66.1/60.8
          MMLoRA (ours) | 95.9 71.7/67.5""",
    7: """MM Baseline | 82.3
          G-Blending | 83.0
          OGM-GE | 84.0
          UME | 86.8
          MMLoRA | 87.1
          UME* | 93.0
          MMLoRA | 93.4""",
    8: """Uni-Modal Fine-Tuned | 88.1 85.6 84.3 69.6 77.7 75.8
          MMLoRA (ours) | 88.1 86.4 85.3 69.8 78.1 75.7""",
    9: "MMLoRA | 95.7 96.2 96.2 91.3 91.3 91.4 87.9 88.6 88.3",
    10: """AVE | 95.4 96.2 96.5 96.5 96.2 95.2
           Kinetics-Sound | 90.8 91.4 91.3 91.4 91.3 91.1""",
    11: "UPMC food101 | 86.6 86.7 86.6 86.8",
    12: "CREMA-D | 77.7 75.5",
    13: """MMLoRA (w/o UMFT) | 94.0 89.5 83.7
           MMLoRA (w UMFT) | 96.2 91.4 88.3""",
}


def rows(number: int) -> list[list[results.Cell]]:
    """The rows of a table as the paper has them: what is asked with two starts stands once."""
    return [row for row in results.cells(number) if row[0].start != results.PUBLIC_WEIGHTS]


def value(number: int, column: str, row: int = -1) -> float:
    """The (first) number of a cell; rows count as in a list."""
    return next(cell.paper[0] for cell in rows(number)[row] if cell.column == column)


# ---------------------------------------------------------------------------- settings
@pytest.mark.parametrize("module, allowed", [(settings, set()), (results, {"paper"})])
def test_imports_little(module, allowed):
    tree = ast.parse(Path(module.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert names and {n.split(".")[0] for n in names} <= sys.stdlib_module_names | allowed


def test_every_number_of_the_settings_has_its_source_beside_it():
    source = Path(settings.__file__).read_text()
    part = source[source.index("COMMON = dict("):source.index("def settings_for")]
    tokens = list(tokenize.generate_tokens(io.StringIO(part).readline))
    sourced = {t.start[0] for t in tokens
               if t.type == tokenize.COMMENT and re.search("Sec\\.|App\\.|Table|ours", t.string)}
    numbers = {t.start[0] for t in tokens if t.type == tokenize.NUMBER}
    assert len(numbers) > 20
    assert not [part.splitlines()[n - 1] for n in sorted(numbers - sourced)]


@pytest.mark.parametrize("dataset", settings.SETTINGS)
def test_settings_are_complete_and_agree_with_themselves(dataset):
    s = settings.SETTINGS[dataset]
    toy = dataset.startswith("toy")
    words = s["family"] == "vision-language"
    assert set(s) == set(
        "encoders lora family batch_size umft_epochs epochs optimizer schedule weight_decay rank "
        "crop flip frames audio_shift max_length multilabel".split())
    assert set(s["encoders"]) == set(s["optimizer"]) and set(s["lora"]) <= set(s["encoders"])
    assert bool(s["lora"]) == (dataset != "custom")     # nobody can know what own data have
    assert set(s["encoders"].values()) <= TOYS.get(dataset, ENCODERS)
    for m, optimizer in s["optimizer"].items():         # Sec. 4.1.2
        assert optimizer == {"text": "bertadam", "flow": "sgd"}.get(m, "adamw")
    assert s["family"] in settings.BACKBONES and s["schedule"] in ("constant", "plateau", "cosine")
    assert (s["schedule"] == "cosine") == (toy or dataset == "custom")
    assert (s["schedule"] == "plateau") == words                                    # App. A.2
    small = dataset in ("toy", "toy_mismatched")        # few samples
    assert s["batch_size"] == (160 if words else 32 if small else 64)
    assert s["multilabel"] == (dataset == "mm_imdb")
    assert 0 < s["crop"][0] <= s["crop"][1] <= 1


def test_encoders_are_those_of_table_2_and_lora_goes_where_sec_4_1_2_says():
    audio_visual = {"audio": "audio_vit_b", "visual": "vit_b16"}
    assert {d: settings.encoders_for(d) for d in DATASETS} == {
        "ave": audio_visual, "kinetics_sound": audio_visual, "crema_d": audio_visual,
        "food101": {"visual": "vit_l14", "text": "bert_base"},
        "mm_imdb": {"visual": "vit_l14", "text": "deberta_large"},
        "ucf101": {"visual": "vit_b16", "flow": "resnet18"}}
    lora = {d: settings.SETTINGS[d]["lora"] for d in DATASETS}
    one = {d: modalities for d, modalities in lora.items() if len(modalities) == 1}
    assert one == {"crema_d": ("audio",), "ucf101": ("flow",)}
    settings.encoders_for("ave")["audio"] = "resnet18"      # the caller's copy: nobody else notices
    assert settings.encoders_for("kinetics_sound") == audio_visual


@pytest.mark.parametrize("dataset, encoder, modality, rate", [
    # App. A.1
    ("ave", "vit_b16", "visual", 1e-5), ("crema_d", "audio_vit_b", "audio", 1e-5),
    ("crema_d", "vit_l14", "visual", 1e-5), ("kinetics_sound", "resnet18", "audio", 1e-4),
    ("ave", "resnet18", None, 1e-4),
    # App. A.2
    ("food101", "bert_base", "text", 5e-5), ("mm_imdb", "deberta_large", "text", 5e-5),
    ("food101", "vit_l14", "visual", 1e-5), ("mm_imdb", "resnet152", "visual", 5e-5),
    ("food101", "resnet152", None, 5e-5),
    # App. A.3
    ("ucf101", "vit_b16", "visual", 1e-5),
    # ours
    ("ucf101", "resnet18", "flow", 1e-2), ("ucf101", "resnet18", None, 1e-2),
    ("ucf101", "resnet18", "visual", 1e-4), ("my_data", "bert_base", "text", 5e-5),
    ("my_data", "resnet18", "flow", 1e-2), ("my_data", "resnet18", "visual", 1e-4),
    ("toy", "vit_toy", "visual", settings.UMFT_LR["toy"]),
    ("toy_mismatched", "audio_vit_toy", "audio", settings.UMFT_LR["toy"]),
    ("my_data", "audio_vit_toy", "audio", settings.UMFT_LR["toy"]),
    ("toy_mimics", "vit_mini", "visual", settings.SMALL_LR["umft"]),
    ("my_data", "audio_vit_mini", "audio", settings.SMALL_LR["umft"]),
    ("my_data", "vit_small", "visual", 1e-3), ("my_data", "deberta_small", "text", 1e-3),
])
def test_umft_lr(dataset, encoder, modality, rate):
    assert settings.umft_lr(dataset, encoder, modality) == rate


@pytest.mark.parametrize("dataset, large, backbones", [         # App. A.1, A.2, A.3
    ("ave", 1e-4, 1e-6), ("kinetics_sound", 1e-4, 1e-6), ("crema_d", 1e-4, 1e-6),
    ("food101", 5e-4, 1e-4), ("mm_imdb", 5e-6, 1e-5), ("ucf101", 1e-4, 1e-5),
    ("my_data", 1e-4, 1e-6)])
def test_joint_lr(dataset, large, backbones):
    encoders = settings.encoders_for(dataset)
    small = settings.BACKBONES[settings.settings_for(dataset)["family"]]
    assert settings.joint_lr(dataset, encoders) == large
    assert settings.joint_lr(dataset, small) == backbones
    assert settings.joint_lr(dataset, encoders, "full") == 1e-5
    assert settings.joint_lr(dataset, small, "full") == 1e-5
    assert settings.joint_lr(dataset, encoders, "joint") == 1e-5
    alone = settings.umft_lr(dataset, small["visual"], "visual")        # one of its ResNets
    assert settings.joint_lr(dataset, small, "joint") == alone


def test_joint_lr_of_small_encoders():
    for dataset in ("toy", "toy_mismatched"):
        for tune, rate in settings.TOY_LR[dataset].items():
            if tune != "umft":
                assert settings.joint_lr(dataset, settings.encoders_for(dataset), tune) == rate
    pretrained = settings.encoders_for("toy")           # on anybody's data
    assert settings.joint_lr("my_data", pretrained) == settings.TOY_LR["toy"]["lora"]
    mini = settings.encoders_for("toy_mimics")          # from random weights
    for tune in ("lora", "full", "joint"):
        assert settings.joint_lr("toy_mimics", mini, tune) == settings.SMALL_LR[tune]
    mixed = {"audio": "audio_vit_toy", "visual": "vit_mini"}
    assert settings.joint_lr("toy", mixed) == settings.SMALL_LR["lora"]
    assert settings.joint_lr("toy", {"visual": "vit_b16"}) == 1e-4
    small = {"visual": "vit_small", "text": "bert_small"}
    assert settings.joint_lr("my_data", small, "full") == settings.SMALL_LR["full"]


def test_a_learning_rate_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="swin_b"):
        settings.umft_lr("ave", "swin_b")
    with pytest.raises(ValueError, match="swin_b"):
        settings.joint_lr("ave", {"audio": "vit_b16", "visual": "swin_b"})
    with pytest.raises(KeyError):
        settings.joint_lr("ave", settings.encoders_for("ave"), "lor")


# ---------------------------------------------------------------------------- results
@pytest.mark.parametrize("number", TYPED)
def test_numbers_are_those_of_the_paper(number):
    lines = [line.strip().split(" | ") for line in TYPED[number].splitlines()]
    typed = []
    for name, values in lines:
        numbers = [None if v == "-" else tuple(map(float, v.split("/"))) for v in values.split()]
        typed.append((name, numbers))
    assert typed == [(row[0].row, [cell.paper for cell in row]) for row in rows(number)]


def test_all_tables_of_results_are_there():
    assert set(results.TABLES) == set(TYPED) == {1, *range(3, 14)}
    assert sum(len(row) for number in TYPED for row in rows(number)) == 160
    assert all(t["caption"] and t["source"] for t in results.TABLES.values())


def test_average_accuracy_of_table_5():
    for *parts, average in rows(5):
        assert average.dataset is None and average.column == "Avg Acc."
        if None in [cell.paper for cell in parts]:
            assert average.paper is None        # no mean of two
        else:
            mean = sum(cell.paper[0] for cell in parts) / 3
            assert abs(mean - average.paper[0]) <= 0.05 + 1e-9, average.row


def test_what_the_paper_claims_in_words():
    # MMLoRA leads its backbones
    for number, first, last in ((5, 0, 4), (5, 5, 11), (6, 0, 1), (6, 2, 7), (7, 0, 4), (7, 5, 6)):
        *others, mmlora = rows(number)[first:last + 1]
        assert mmlora[0].method == "mmlora"
        for row in others:
            for ours, other in zip(mmlora, row, strict=True):
                if other.paper is not None:
                    assert all(a > b for a, b in zip(ours.paper, other.paper, strict=True)), other
    # Sec. 3.1, Sec. 4.2.1, App. C
    for number in (3, 4, 13):
        worse, better = rows(number)
        assert all(b.paper > w.paper for w, b in zip(worse, better, strict=True))
    # Sec. 4.3: all of Table 9 beats UME
    for name in ("AVE", "KS", "CREMA-D"):
        for which in ("RGB", "Audio", "Both"):
            assert value(9, f"{name} {which}") > value(5, name, 9)
    assert value(10, "64", 0) < value(10, "UME", 0)             # Sec. 4.3: rank 64 on AVE
    assert value(8, "CREMA-D Audio") < value(8, "CREMA-D Audio", 0)     # the one that loses


def test_one_run_has_one_number():
    """Cells that the same run of ours would fill carry the same number in all tables."""
    found = {}
    for number in TYPED:
        for cell in [cell for row in rows(number) for cell in row]:
            if cell.dataset and cell.method and cell.paper:
                run = (cell.dataset, cell.method, cell.of, cell.modality, cell.start, cell.lora,
                       tuple(cell.encoders.items()), cell.rank)
                if cell.method == "ume":            # one ensemble, whatever carries LoRA
                    run = run[:5] + run[6:]
                found.setdefault(run, []).append((number, cell.paper[0]))
    shared = {run: where for run, where in found.items() if len(where) > 1}
    tables = {number for where in shared.values() for number, _ in where}
    assert tables >= {1, 3, 4, 5, 8, 9, 10, 11, 12, 13}
    assert not {run: where for run, where in shared.items() if len({v for _, v in where}) > 1}


def test_tables_1_3_4_and_8_agree_on_uni_modal_fine_tuning():
    of_3, of_8, of_4 = rows(3)[1], rows(8)[0], rows(4)[1][:6]
    numbers = [[cell.paper for cell in row] for row in (of_3, of_8, of_4)]
    of_1 = [cell.paper for visual_audio in zip(*rows(1)[1:]) for cell in visual_audio][:6]
    assert numbers[0] == numbers[1] == numbers[2] == of_1
    assert value(1, "MM-IMDB", 1) == value(4, "MM-IMDB RGB")
    assert value(1, "MM-IMDB", 2) == value(4, "MM-IMDB Text")
    assert value(11, "BERT-Base") == value(4, "Food101 Text")
    assert value(12, "ViT-B") == value(1, "CREMA-D", 1)


def test_quoted_rows_are_those_of_other_authors():
    quoted = {n: [i for i, row in enumerate(rows(n)) if row[0].quoted] for n in TYPED}
    assert {n: of_table for n, of_table in quoted.items() if of_table} == {
        1: [0], 5: [0, 1, 2, 7], 6: [0, 2, 3, 4, 5, 6], 7: [0, 1, 2, 3]}
    assert not any(cell.quoted and "*" in cell.row for _, cell in CELLS)


def test_resnets_of_table_5_are_asked_with_both_starts():
    """The paper does not say what its own ResNets started from; the quoted ones: random weights."""
    starts = {}
    for row in results.cells(5):
        starts.setdefault((row[0].row, row[0].backbone), []).append(row[0].start)
        assert len({cell.start for cell in row}) == len({cell.backbone for cell in row}) == 1
    both, random = [results.PUBLIC_WEIGHTS, results.RANDOM_WEIGHTS], [results.RANDOM_WEIGHTS]
    assert {row[0]: s for row, s in starts.items() if row[1].startswith("ResNet18")} == {
        "G-Blending": random, "OGM-GE": random, "PMR": random, "UME*": both, "MMLoRA (ours)": both}
    assert all(s == [""] for row, s in starts.items() if not row[1].startswith("ResNet18"))
    assert not any(cell.start for number, cell in CELLS if number != 5)


def steps(cell: results.Cell) -> list[str]:
    """All commands of a cell, in order."""
    before = results.trained_before(cell)
    lines = [results.command(before)] if before else []
    return [line for line in [*lines, results.command(cell)] if line]


def after(words: list[str], option: str) -> list[str]:
    """The words that belong to an option of a command line; [] without it."""
    if option not in words:
        return []
    rest = words[words.index(option) + 1:]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]


def test_every_cell_has_a_command_that_names_known_things():
    silent = 0
    for number, cell in CELLS:
        assert set(cell.metrics) <= {"accuracy", "f1_micro", "f1_macro"}
        assert cell.paper is None or len(cell.paper) == len(cell.metrics)
        if not results.command(cell):
            silent += 1
            assert cell.dataset is None or cell.method is None
        for line in steps(cell):
            words = shlex.split(line)
            assert words[0] == "python"
            file = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
            assert (ROOT / file).exists(), file
            modalities = settings.encoders_for(cell.dataset)
            assert set(after(words, "--dataset")) <= DATASETS
            assert set(after(words, "--run")) <= {"RUN"}
            assert set(after(words, "--pretrained")) <= {"none"}
            assert set(after(words, "--modality")) <= set(modalities)
            assert set(after(words, "--lora")) <= {*modalities, "all"}
            for word in after(words, "--encoder"):
                modality, _, encoder = word.rpartition("=")
                assert encoder in ENCODERS
                assert modality in ({""} if file == "train_unimodal.py" else modalities)
    assert silent == 14 + 4         # Avg Acc. of Table 5, Recent Multi-modal Model of Table 1


RESNETS = "--encoder audio=resnet18 visual=resnet18"
PROBE = "python evaluate.py --probe"


@pytest.mark.parametrize("number, row, column, command", [
    (1, 1, "AVE", "python train_unimodal.py --dataset ave --modality visual"),
    (1, 2, "MM-IMDB", "python train_unimodal.py --dataset mm_imdb --modality text"),
    (3, 0, "AVE RGB", f"python -m baselines.concat --dataset ave && {PROBE} --run RUN"),
    (4, 0, "KS Audio", f"{PROBE} --dataset kinetics_sound --modality audio"),
    (5, 2, "AVE", f"python -m baselines.pmr --dataset ave {RESNETS} --pretrained none"),
    (5, 3, "CREMA-D", f"python train_joint.py --dataset crema_d --lora audio {RESNETS}"),
    (5, 4, "AVE", f"python train_joint.py --dataset ave --lora all {RESNETS} --pretrained none"),
    (5, 8, "AVE", "python -m baselines.frozen --dataset ave"),
    (5, 10, "AVE", "python -m baselines.ogm_ge --dataset ave"),
    (5, 12, "KS", "python -m baselines.full_ume --dataset kinetics_sound"),
    (5, 13, "CREMA-D", "python train_joint.py --dataset crema_d --lora audio"),
    (6, 4, "MM-IMDB", "python -m baselines.pmf --dataset mm_imdb --encoder text=bert_large"),
    (7, 4, "Acc.", "python train_joint.py --dataset ucf101 --lora flow --encoder visual=resnet18"),
    (8, 1, "CREMA-D RGB",
     f"python train_joint.py --dataset crema_d --lora all && {PROBE} --run RUN"),
    (10, 0, "4", "python train_joint.py --dataset ave --lora all --rank 4"),
    (11, 0, "DeBERTa-Large", "python train_unimodal.py --dataset food101 --modality text "
                             "--encoder deberta_large"),
    (13, 0, "KS", "python -m baselines.no_umft --dataset kinetics_sound --lora all"),
])
def test_commands(number, row, column, command):
    cell = next(cell for cell in results.cells(number)[row] if cell.column == column)
    assert " && ".join(steps(cell)) == command


def test_ume_is_filled_by_the_run_of_mmlora():
    methods = {}
    for row in results.cells(5):
        if row[0].method in ("ume", "mmlora"):
            where = (row[0].backbone, row[0].start)
            methods.setdefault(where, []).append([results.command(cell) for cell in row])
    assert len(methods) == 3
    assert all(ume == mmlora for ume, mmlora in methods.values())
