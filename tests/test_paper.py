"""`paper.py` against the paper: its numbers typed a second time, its tables against each other, and the commands that fill them."""

import ast
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path

import pytest

import paper

SOURCE = Path(paper.__file__).read_text()
ENCODERS = set("vit_b16 vit_b32 vit_l14 audio_vit_b bert_base bert_large deberta_base deberta_large resnet18 resnet152".split())
TOYS = {"vit_toy", "audio_vit_toy"}
DATASETS = {"crema_d", "ave", "kinetics_sound", "mm_imdb", "food101", "ucf101"}
CELLS = [(number, cell) for number in paper.TABLES for row in paper.cells(number) for cell in row]

# The tables once more, typed from the PDF: one line a row, "-" for a dash, a/b for F1-Micro/F1-Macro.
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


def value(number: int, column: str, row: int = -1) -> float:
    """The (first) number of a cell; rows count as in a list."""
    return next(cell.paper[0] for cell in paper.cells(number)[row] if cell.column == column)


# ------------------------------------------------------------------------------------------------ part 1: settings
def test_imports_the_standard_library_only():
    names = [a.name for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.ImportFrom)]
    assert names and {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_every_number_of_the_settings_has_its_source_beside_it():
    part = SOURCE[SOURCE.index("COMMON = dict("):SOURCE.index("def settings_for")]
    tokens = list(tokenize.generate_tokens(io.StringIO(part).readline))
    sourced = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and re.search("Sec\\.|App\\.|Table|ours", t.string)}
    numbers = {t.start[0] for t in tokens if t.type == tokenize.NUMBER}
    assert len(numbers) > 20
    assert not [part.splitlines()[n - 1] for n in sorted(numbers - sourced)]


@pytest.mark.parametrize("dataset", paper.SETTINGS)
def test_settings_are_complete_and_agree_with_themselves(dataset):
    s = paper.SETTINGS[dataset]
    assert set(s) == set("encoders lora family batch_size umft_epochs epochs optimizer schedule weight_decay rank "
                         "crop flip frames audio_shift max_length multilabel".split())
    assert set(s["encoders"]) == set(s["optimizer"]) and set(s["lora"]) <= set(s["encoders"])
    assert bool(s["lora"]) == (dataset != "custom")     # nobody can know the modalities of data of one's own
    assert set(s["encoders"].values()) <= (TOYS if dataset.startswith("toy") else ENCODERS)
    for m, optimizer in s["optimizer"].items():         # Sec. 4.1.2
        assert optimizer == {"text": "bertadam", "flow": "sgd"}.get(m, "adamw")
    assert s["family"] in paper.BACKBONES and s["schedule"] in ("constant", "plateau", "cosine")
    assert (s["schedule"] == "cosine") == (dataset.startswith("toy") or dataset == "custom")
    assert (s["schedule"] == "plateau") == (s["family"] == "vision-language")                                # App. A.2
    assert s["batch_size"] == (160 if s["family"] == "vision-language" else 64) and s["multilabel"] == (dataset == "mm_imdb")
    assert 0 < s["crop"][0] <= s["crop"][1] <= 1


def test_encoders_are_those_of_table_2_and_lora_goes_where_sec_4_1_2_says():
    audio_visual = {"audio": "audio_vit_b", "visual": "vit_b16"}
    assert {d: paper.encoders_for(d) for d in DATASETS} == {
        "ave": audio_visual, "kinetics_sound": audio_visual, "crema_d": audio_visual,
        "food101": {"visual": "vit_l14", "text": "bert_base"},
        "mm_imdb": {"visual": "vit_l14", "text": "deberta_large"}, "ucf101": {"visual": "vit_b16", "flow": "resnet18"}}
    assert {d for d in DATASETS if len(paper.SETTINGS[d]["lora"]) == 1} == {"crema_d", "ucf101"}
    assert paper.SETTINGS["crema_d"]["lora"] == ("audio",) and paper.SETTINGS["ucf101"]["lora"] == ("flow",)
    paper.encoders_for("ave")["audio"] = "resnet18"     # the caller's copy: no other data set may notice
    assert paper.encoders_for("kinetics_sound") == audio_visual


@pytest.mark.parametrize("dataset, encoder, modality, rate", [
    # App. A.1
    ("ave", "vit_b16", "visual", 1e-5), ("crema_d", "audio_vit_b", "audio", 1e-5), ("crema_d", "vit_l14", "visual", 1e-5),
    ("kinetics_sound", "resnet18", "audio", 1e-4), ("ave", "resnet18", None, 1e-4),
    # App. A.2
    ("food101", "bert_base", "text", 5e-5), ("mm_imdb", "deberta_large", "text", 5e-5), ("food101", "vit_l14", "visual", 1e-5),
    ("mm_imdb", "resnet152", "visual", 5e-5), ("food101", "resnet152", None, 5e-5),
    # App. A.3, then ours
    ("ucf101", "vit_b16", "visual", 1e-5),
    ("ucf101", "resnet18", "flow", 1e-2), ("ucf101", "resnet18", None, 1e-2), ("ucf101", "resnet18", "visual", 1e-4),
    ("my_data", "bert_base", "text", 5e-5), ("my_data", "resnet18", "flow", 1e-2), ("my_data", "resnet18", "visual", 1e-4),
    ("toy", "vit_toy", "visual", paper.TOY_LR["umft"]), ("my_data", "audio_vit_toy", "audio", paper.TOY_LR["umft"]),
    ("my_data", "vit_small", "visual", 1e-3), ("my_data", "deberta_small", "text", 1e-3),
])
def test_umft_lr(dataset, encoder, modality, rate):
    assert paper.umft_lr(dataset, encoder, modality) == rate


@pytest.mark.parametrize("dataset, large, backbones", [          # App. A.1, A.2, A.3
    ("ave", 1e-4, 1e-6), ("kinetics_sound", 1e-4, 1e-6), ("crema_d", 1e-4, 1e-6), ("food101", 5e-4, 1e-4), ("mm_imdb", 5e-6, 1e-5),
    ("ucf101", 1e-4, 1e-5), ("my_data", 1e-4, 1e-6)])
def test_joint_lr(dataset, large, backbones):
    encoders, small = paper.encoders_for(dataset), paper.BACKBONES[paper.settings_for(dataset)["family"]]
    assert paper.joint_lr(dataset, encoders) == large and paper.joint_lr(dataset, small) == backbones
    assert paper.joint_lr(dataset, encoders, "full") == paper.joint_lr(dataset, small, "full") == paper.joint_lr(dataset, encoders, "joint") == 1e-5
    assert paper.joint_lr(dataset, small, "joint") == paper.umft_lr(dataset, small["visual"], "visual")     # as one of its ResNets alone
    assert paper.joint_lr("toy", paper.encoders_for("toy")) == paper.TOY_LR["lora"] != large
    assert paper.joint_lr("my_data", {"visual": "vit_small", "text": "bert_small"}, "full") == paper.TOY_LR["full"]


def test_a_learning_rate_nobody_knows_is_an_error():
    for rate in (lambda: paper.umft_lr("ave", "swin_b"), lambda: paper.joint_lr("ave", {"audio": "vit_b16", "visual": "swin_b"})):
        with pytest.raises(ValueError, match="swin_b"):
            rate()
    with pytest.raises(KeyError):
        paper.joint_lr("ave", paper.encoders_for("ave"), "lor")


# ------------------------------------------------------------------------------------------------ part 2: results
@pytest.mark.parametrize("number", TYPED)
def test_numbers_are_those_of_the_paper(number):
    rows = [line.strip().split(" | ") for line in TYPED[number].splitlines()]
    typed = [(name, [None if v == "-" else tuple(map(float, v.split("/"))) for v in values.split()]) for name, values in rows]
    assert typed == [(row[0].row, [cell.paper for cell in row]) for row in paper.cells(number)]


def test_all_tables_of_results_are_there():
    assert set(paper.TABLES) == set(TYPED) == {1, *range(3, 14)} and len(CELLS) == 160
    assert all(t["caption"] and t["source"] for t in paper.TABLES.values())


def test_average_accuracy_of_table_5():
    for *parts, average in paper.cells(5):
        assert average.dataset is None and average.column == "Avg Acc."
        if None in [cell.paper for cell in parts]:
            assert average.paper is None        # no mean of two
        else:
            assert abs(sum(cell.paper[0] for cell in parts) / 3 - average.paper[0]) <= 0.05 + 1e-9, average.row


def test_what_the_paper_claims_in_words():
    for number, first, last in ((5, 0, 4), (5, 5, 11), (6, 0, 1), (6, 2, 7), (7, 0, 4), (7, 5, 6)):         # MMLoRA leads its backbones
        rows = paper.cells(number)[first:last + 1]
        assert rows[-1][0].method == "mmlora"
        for row in rows[:-1]:
            for ours, other in zip(rows[-1], row, strict=True):
                assert other.paper is None or all(a > b for a, b in zip(ours.paper, other.paper, strict=True)), (number, other)
    for number in (3, 4, 13):                                                               # Sec. 3.1, Sec. 4.2.1, App. C
        assert all(better.paper > worse.paper for worse, better in zip(*paper.cells(number), strict=True))
    for name in ("AVE", "KS", "CREMA-D"):                                                   # Sec. 4.3: all of Table 9 beats UME
        assert all(value(9, f"{name} {which}") > value(5, name, 9) for which in ("RGB", "Audio", "Both"))
    assert value(10, "64", 0) < value(10, "UME", 0)                                         # Sec. 4.3: rank 64 on AVE is below UME
    assert value(8, "CREMA-D Audio") < value(8, "CREMA-D Audio", 0)                         # Table 8: the one encoder that loses


def test_one_run_has_one_number():
    """Cells which the same run of ours would fill carry the same number in the paper, in whatever table they stand."""
    found = {}
    for number, cell in CELLS:
        if cell.dataset and cell.method and cell.paper:
            adaptation = (cell.lora, cell.rank, cell.umft) if "mmlora" in (cell.method, cell.of) else ()
            run = (cell.dataset, cell.method, cell.of, cell.modality, tuple(cell.encoders.items()), cell.pretrained, adaptation)
            found.setdefault(run, []).append((number, cell.paper[0]))
    shared = {run: where for run, where in found.items() if len(where) > 1}
    assert {n for where in shared.values() for n, _ in where} >= {1, 3, 4, 5, 8, 9, 10, 11, 12, 13}
    assert not {run: where for run, where in shared.items() if len({v for _, v in where}) > 1}


def test_tables_1_3_4_and_8_agree_on_uni_modal_fine_tuning():
    numbers = [[cell.paper for cell in row] for row in (paper.cells(3)[1], paper.cells(8)[0], paper.cells(4)[1][:6])]
    assert numbers[0] == numbers[1] == numbers[2] == [cell.paper for pair in zip(*paper.cells(1)[1:]) for cell in pair][:6]
    assert value(1, "MM-IMDB", 1) == value(4, "MM-IMDB RGB") and value(1, "MM-IMDB", 2) == value(4, "MM-IMDB Text")
    assert value(11, "BERT-Base") == value(4, "Food101 Text") and value(12, "ViT-B") == value(1, "CREMA-D", 1)


def test_quoted_rows_are_those_of_other_authors():
    quoted = {number: [i for i, row in enumerate(paper.cells(number)) if row[0].quoted] for number in paper.TABLES}
    assert {n: rows for n, rows in quoted.items() if rows} == {1: [0], 5: [0, 1, 2, 7], 6: [0, 2, 3, 4, 5, 6], 7: [0, 1, 2, 3]}
    assert not any(cell.quoted and "*" in cell.row for _, cell in CELLS)


def test_every_cell_has_a_command_that_names_known_things():
    baselines = [f.stem for f in (Path(__file__).parents[1] / "baselines").glob("*.py")]
    scripts = {"train_unimodal.py", "train_joint.py", "evaluate.py"} | {f"baselines.{m}" for m in baselines}
    silent = 0
    for number, cell in CELLS:
        if not (line := paper.commands(cell)):
            silent += 1
            assert cell.dataset is None or cell.method is None
            continue
        assert set(cell.metrics) <= {"accuracy", "f1_micro", "f1_macro"} and (cell.paper is None or len(cell.paper) == len(cell.metrics))
        for words in (shlex.split(part) for part in line.split(" && ")):
            after = lambda flag: words[words.index(flag) + 1] if flag in words else None
            assert words[0] == "python" and (words[2] if words[1] == "-m" else words[1]) in scripts
            assert after("--dataset") in DATASETS | {None} and after("--run") in ("RUN", None) and after("--pretrained") in ("none", None)
            modalities = paper.encoders_for(cell.dataset)
            assert after("--modality") in {*modalities, None} and after("--lora") in {*modalities, "all", None}
            for word in words[words.index("--encoder") + 1:] if "--encoder" in words else []:
                if word.startswith("--"):
                    break
                modality, _, encoder = word.rpartition("=")
                assert encoder in ENCODERS and modality in ({""} if words[1] == "train_unimodal.py" else modalities)
    assert silent == 12 + 4          # Avg Acc. of Table 5, Recent Multi-modal Model of Table 1


@pytest.mark.parametrize("number, row, column, command", [
    (1, 1, "AVE", "python train_unimodal.py --dataset ave --modality visual"),
    (1, 2, "MM-IMDB", "python train_unimodal.py --dataset mm_imdb --modality text"),
    (3, 0, "AVE RGB", "python -m baselines.concat --dataset ave && python evaluate.py --probe --run RUN"),
    (4, 0, "KS Audio", "python evaluate.py --probe --dataset kinetics_sound --modality audio"),
    (5, 3, "CREMA-D", "python train_joint.py --dataset crema_d --lora audio --encoder audio=resnet18 visual=resnet18 --pretrained none"),
    (5, 6, "AVE", "python -m baselines.concat --dataset ave --freeze"),
    (5, 8, "AVE", "python -m baselines.ogm_ge --dataset ave"),
    (5, 10, "KS", "python train_joint.py --dataset kinetics_sound --tune full"),
    (5, 11, "CREMA-D", "python train_joint.py --dataset crema_d --lora audio"),
    (6, 4, "MM-IMDB", "python -m baselines.pmf --dataset mm_imdb --encoder text=bert_large"),
    (7, 4, "Acc.", "python train_joint.py --dataset ucf101 --lora flow --encoder visual=resnet18"),
    (8, 1, "CREMA-D RGB", "python train_joint.py --dataset crema_d --lora all && python evaluate.py --probe --run RUN"),
    (10, 0, "4", "python train_joint.py --dataset ave --lora all --rank 4"),
    (11, 0, "DeBERTa-Large", "python train_unimodal.py --dataset food101 --modality text --encoder deberta_large"),
    (13, 0, "KS", "python train_joint.py --dataset kinetics_sound --lora all --no-umft"),
])
def test_commands(number, row, column, command):
    cell = next(cell for cell in paper.cells(number)[row] if cell.column == column)
    assert paper.commands(cell) == command
    if cell.method == "probe" and cell.of != "pretrained":
        assert paper.commands(cell, "runs/x") == "python evaluate.py --probe --run runs/x"


def test_ume_is_filled_by_the_run_of_mmlora():
    for first, second in ((3, 4), (9, 11)):
        assert [paper.commands(c) for c in paper.cells(5)[first]] == [paper.commands(c) for c in paper.cells(5)[second]]
