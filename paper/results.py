"""The results of the paper as data (Tables 1 and 3-13), and the command line that fills each cell.

Rows and columns stand in the paper's order, so that they can be checked against the PDF line by
line. `python -m paper.tables 5` prints them with our own runs beneath.
"""
from dataclasses import dataclass, field, replace

from paper.settings import BACKBONES, COMMON, encoders_for, settings_for

# A table has columns {heading: spec} and rows (method, backbone, values, spec). The specs of row
# and column together say which run of ours fills the cell; their words are the fields of `Cell`.
# A value is a percentage, a pair (F1-Micro, F1-Macro), or None where the paper has a dash.
# quoted=True: published by other authors, maybe under other settings.
AVE, KS, CREMA = dict(dataset="ave"), dict(dataset="kinetics_sound"), dict(dataset="crema_d")
IMDB, FOOD, UCF = dict(dataset="mm_imdb"), dict(dataset="food101"), dict(dataset="ucf101")
RGB, AUDIO, TEXT = dict(modality="visual"), dict(modality="audio"), dict(modality="text")
ON_RGB, ON_AUDIO, ON_BOTH = dict(lora=("visual",)), dict(lora=("audio",)), dict(lora="all")
MICRO, MMLORA = dict(dataset="mm_imdb", metrics=("f1_micro",)), dict(method="mmlora")
PAIRS = {
    "AVE RGB": AVE | RGB, "AVE Audio": AVE | AUDIO,
    "KS RGB": KS | RGB, "KS Audio": KS | AUDIO,
    "CREMA-D RGB": CREMA | RGB, "CREMA-D Audio": CREMA | AUDIO,
}

# Ours: the paper does not say what the ResNet-18s of Table 5 start from. The authors of OGM-GE and
# PMR took random weights. With those 85.4 on AVE is hardly possible, so UME and MMLoRA are asked
# with both.
RANDOM_WEIGHTS, PUBLIC_WEIGHTS = "random weights", "public weights"
RES18 = dict(encoders=BACKBONES["audio-visual"], starts=(PUBLIC_WEIGHTS, RANDOM_WEIGHTS))
SCRATCH = dict(RES18, starts=(RANDOM_WEIGHTS,), quoted=True)
RES152 = dict(encoders=BACKBONES["vision-language"])
UCF18 = dict(encoders=BACKBONES["action"])
# Ours: Table 6 does not name the encoders of Li et al.
BASE = dict(encoders={"visual": "vit_b16", "text": "bert_base"}, quoted=True)
LARGE = dict(encoders={"visual": "vit_l14", "text": "bert_large"}, quoted=True)

TABLES = {
    1: dict(
        caption="Uni-modal fine-tuning, and models of Fan et al. (AVE, CREMA-D), Peng et al. (KS), "
                "Li et al. (MM-IMDB)", source="Sec. 1",
        columns={"AVE": AVE, "Kinetics-Sound": KS, "CREMA-D": CREMA, "MM-IMDB": IMDB}, rows=[
        ("Recent Multi-modal Model", "", (68.1, 63.1, 65.3, (66.7, 61.7)),
         dict(method=None, quoted=True)),
        ("Fine-tuned Visual Model", "", (88.1, 84.3, 77.7, (60.2, 52.6)),
         dict(method="unimodal", modality="visual")),
        ("Fine-tuned Audio / Language Model", "", (85.6, 69.6, 75.8, (68.6, 63.9)),
         dict(method="unimodal", modality="other")),
    ]),
    3: dict(
        caption="Linear evaluation: encoders of multi-modal training and of UMFT",
        source="Sec. 3.1", columns=PAIRS, rows=[
        ("Multi-Modal Training", "", (83.3, 79.8, 78.7, 67.9, 70.3, 64.8),
         dict(method="probe", of="concat")),
        ("Uni-Modal Fine-Tuned", "", (88.1, 85.6, 84.3, 69.6, 77.7, 75.8),
         dict(method="probe", of="unimodal")),
    ]),
    4: dict(
        caption="Linear evaluation of pre-trained encoders against fine-tuning (MM-IMDB: F1-Micro)",
        source="Sec. 4.2.1",
        columns=PAIRS | {"MM-IMDB RGB": MICRO | RGB, "MM-IMDB Text": MICRO | TEXT,
                         "Food101 RGB": FOOD | RGB, "Food101 Text": FOOD | TEXT}, rows=[
        ("linear eval", "", (87.6, 82.1, 79.0, 66.2, 51.2, 60.6, 48.7, 22.1, 81.8, 21.2),
         dict(method="probe", of="pretrained")),
        ("fine-tuning", "", (88.1, 85.6, 84.3, 69.6, 77.7, 75.8, 60.2, 68.6, 84.3, 86.6),
         dict(method="unimodal")),
    ]),
    5: dict(
        caption="Audio-visual data sets (backbone: audio/visual)", source="Sec. 4.2.3",
        columns={"AVE": AVE, "KS": KS, "CREMA-D": CREMA, "Avg Acc.": dict(dataset=None)}, rows=[
        ("G-Blending", "ResNet18/ResNet18", (65.5, 62.2, 58.7, 62.1),
         SCRATCH | dict(method="g_blending")),
        ("OGM-GE", "ResNet18/ResNet18", (76.9, 63.1, 62.2, 67.4), SCRATCH | dict(method="ogm_ge")),
        ("PMR", "ResNet18/ResNet18", (74.3, None, 65.3, None), SCRATCH | dict(method="pmr")),
        ("UME*", "ResNet18/ResNet18", (85.4, 78.8, 78.2, 80.8), RES18 | dict(method="ume")),
        ("MMLoRA (ours)", "ResNet18/ResNet18", (86.9, 79.4, 81.9, 82.7), RES18 | MMLORA),
        ("Multi-Modal Baseline*", "ViT-B/ViT-B", (94.7, 90.6, 87.6, 91.0), dict(method="concat")),
        ("Classifier on frozen features*", "ViT-B/ViT-B", (93.7, 90.1, 85.3, 89.7),
         dict(method="frozen")),
        ("MBT", "ViT-B/ViT-B", (None, 85.0, None, None), dict(method="mbt", quoted=True)),
        ("OGM-GE*", "ViT-B/ViT-B", (95.5, 90.4, 88.4, 91.4), dict(method="ogm_ge")),
        ("UME*", "ViT-B/ViT-B", (95.4, 90.8, 87.8, 91.3), dict(method="ume")),
        ("Fully Fine-tuned UME*", "ViT-B/ViT-B", (95.2, 91.3, 87.5, 91.3), dict(method="full")),
        ("MMLoRA (ours)", "ViT-B/ViT-B", (96.2, 91.4, 88.6, 92.1), MMLORA),
    ]),
    6: dict(
        caption="Vision-language data sets (backbone Li et al.: as re-run by Li et al., 2023b)",
        source="Sec. 4.2.3", columns={"Food101": FOOD, "MM-IMDB": IMDB}, rows=[
        ("MMBT", "ResNet152/BERT-B", (92.1, (66.8, 61.6)),
         RES152 | dict(method="mmbt", quoted=True)),
        ("MMLoRA (ours)", "ResNet152/BERT-B", (93.2, (67.2, 61.7)), RES152 | MMLORA),
        ("Baseline", "Li et al.", (93.29, (64.9, 59.6)), BASE | dict(method="concat")),
        ("PMF", "Li et al.", (91.51, (64.5, 58.8)), BASE | dict(method="pmf")),
        ("PMF-L", "Li et al.", (91.68, (66.7, 61.7)), LARGE | dict(method="pmf")),
        ("MBT", "Li et al.", (93.6, (64.8, 59.6)), BASE | dict(method="mbt")),
        ("MMBT", "Li et al.", (94.10, (66.1, 60.8)), BASE | dict(method="mmbt")),
        ("MMLoRA (ours)", "Table 2", (95.9, (71.7, 67.5)), MMLORA),
    ]),
    7: dict(
        caption="UCF101 (backbone: RGB/flow; quotes from Du et al., 2023)",
        source="Sec. 4.2.3", columns={"Acc.": UCF}, rows=[
        ("MM Baseline", "Res18/Res18", (82.3,), UCF18 | dict(method="concat", quoted=True)),
        ("G-Blending", "Res18/Res18", (83.0,), UCF18 | dict(method="g_blending", quoted=True)),
        ("OGM-GE", "Res18/Res18", (84.0,), UCF18 | dict(method="ogm_ge", quoted=True)),
        ("UME", "Res18/Res18", (86.8,), UCF18 | dict(method="ume", quoted=True)),
        ("MMLoRA", "Res18/Res18", (87.1,), UCF18 | MMLORA),
        ("UME*", "ViT-B/Res18", (93.0,), dict(method="ume")),
        ("MMLoRA", "ViT-B/Res18", (93.4,), MMLORA),
    ]),
    8: dict(
        caption="Linear evaluation: encoders of UMFT and of MMLoRA on both modalities",
        source="Sec. 4.3", columns=PAIRS, rows=[
        ("Uni-Modal Fine-Tuned", "", (88.1, 85.6, 84.3, 69.6, 77.7, 75.8),
         dict(method="probe", of="unimodal")),
        ("MMLoRA (ours)", "", (88.1, 86.4, 85.3, 69.8, 78.1, 75.7),
         ON_BOTH | dict(method="probe", of="mmlora")),
    ]),
    9: dict(
        caption="LoRA on one modality or on both", source="Sec. 4.3",
        columns={
            "AVE RGB": AVE | ON_RGB, "AVE Audio": AVE | ON_AUDIO, "AVE Both": AVE | ON_BOTH,
            "KS RGB": KS | ON_RGB, "KS Audio": KS | ON_AUDIO, "KS Both": KS | ON_BOTH,
            "CREMA-D RGB": CREMA | ON_RGB, "CREMA-D Audio": CREMA | ON_AUDIO,
            "CREMA-D Both": CREMA | ON_BOTH}, rows=[
        ("MMLoRA", "", (95.7, 96.2, 96.2, 91.3, 91.3, 91.4, 87.9, 88.6, 88.3), MMLORA),
    ]),
    10: dict(
        caption="Rank of MMLoRA", source="Sec. 4.3",
        columns={"UME": dict(method="ume"), "1": MMLORA | dict(rank=1), "2": MMLORA | dict(rank=2),
                 "4": MMLORA | dict(rank=4), "8": MMLORA | dict(rank=8),
                 "64": MMLORA | dict(rank=64)}, rows=[
        ("AVE", "", (95.4, 96.2, 96.5, 96.5, 96.2, 95.2), AVE),
        ("Kinetics-Sound", "", (90.8, 91.4, 91.3, 91.4, 91.3, 91.1), KS),
    ]),
    11: dict(
        caption="Language models fine-tuned on the text of Food101", source="App. B",
        columns={"BERT-Base": TEXT | dict(encoders={"text": "bert_base"}),
                 "BERT-Large": TEXT | dict(encoders={"text": "bert_large"}),
                 "DeBERTa-Base": TEXT | dict(encoders={"text": "deberta_base"}),
                 "DeBERTa-Large": TEXT | dict(encoders={"text": "deberta_large"})}, rows=[
        ("UPMC food101", "", (86.6, 86.7, 86.6, 86.8), FOOD | dict(method="unimodal")),
    ]),
    12: dict(
        caption="Visual models fine-tuned on the frames of CREMA-D", source="App. B",
        columns={"ViT-B": RGB | dict(encoders={"visual": "vit_b16"}),
                 "ViT-L": RGB | dict(encoders={"visual": "vit_l14"})}, rows=[
        ("CREMA-D", "", (77.7, 75.5), CREMA | dict(method="unimodal")),
    ]),
    13: dict(
        caption="MMLoRA on both modalities with and without uni-modal fine-tuning (UMFT)",
        source="App. C", columns={"AVE": AVE, "KS": KS, "CREMA-D": CREMA}, rows=[
        ("MMLoRA (w/o UMFT)", "", (94.0, 89.5, 83.7), ON_BOTH | dict(method="no-umft")),
        ("MMLoRA (w UMFT)", "", (96.2, 91.4, 88.3), ON_BOTH | MMLORA),
    ]),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the numbers of the paper, and which run of ours fills it."""
    row: str                        # the method, in the paper's words
    backbone: str
    column: str
    paper: tuple | None             # in %, one number for each of `metrics`; None: a dash
    dataset: str | None             # None: the mean of the cells to its left (Table 5, Avg Acc.)
    method: str | None              # as in config.json, or "ume", "probe"; None: no run
    quoted: bool = False            # published by other authors
    metrics: tuple = ("accuracy",)  # of accuracy, f1_micro, f1_macro
    modality: str | None = None     # the one tested; None: all, fused
    encoders: dict = field(default_factory=dict)    # modality -> encoder, of all that is trained
    start: str = ""                 # of the encoders, where a row is asked with a certain one
    lora: tuple = ()                # modalities with LoRA
    rank: int = COMMON["rank"]
    of: str | None = None           # a probe tests the encoders of this method


def cells(number: int) -> list[list[Cell]]:
    """The rows of Table `number`. A row that is asked with two starts comes twice."""
    rows = []
    for method, backbone, values, spec in TABLES[number]["rows"]:
        for start in spec.get("starts", ("",)):
            row = []
            columns = TABLES[number]["columns"].items()
            for (column, column_spec), value in zip(columns, values, strict=True):
                if isinstance(value, float):
                    value = (value,)
                words = column_spec | spec | dict(row=method, backbone=backbone, column=column)
                words.pop("starts", None)
                row.append(_cell(words | dict(paper=value, start=start)))
            rows.append(row)
    return rows


def _cell(words: dict) -> Cell:
    """A cell with all its defaults. `words` are its fields, as the tables say them."""
    if words["dataset"] is None:
        return Cell(**words | dict(encoders={}))
    settings = settings_for(words["dataset"])
    encoders = encoders_for(words["dataset"]) | words.get("encoders", {})
    if settings["multilabel"]:
        words = dict(metrics=("f1_micro", "f1_macro")) | words
    if words.get("modality") == "other":        # Table 1: audio or text
        others = [m for m in encoders if m != "visual"]
        words["modality"] = others[0]
    trained = words.get("of") or words["method"]
    if trained in ("unimodal", "pretrained"):
        encoders = {words["modality"]: encoders[words["modality"]]}
    if trained in ("mmlora", "ume", "no-umft"):
        lora = words.get("lora", settings["lora"])
        if lora == "all":
            lora = tuple(encoders)
        words["lora"] = lora
    return Cell(**words | dict(encoders=encoders))


SCRIPTS = {     # method -> what `python` runs; the other methods are called like their file
    "unimodal": "train_unimodal.py", "ume": "train_joint.py", "mmlora": "train_joint.py",
    "full": "-m baselines.full_ume", "no-umft": "-m baselines.no_umft",
}


def trained_before(cell: Cell) -> Cell | None:
    """What has to be trained before a probe can test it, as a cell; None: nothing."""
    if cell.method != "probe" or cell.of == "pretrained":
        return None
    modality = cell.modality if cell.of == "unimodal" else None
    return replace(cell, method=cell.of, of=None, modality=modality)


def command(cell: Cell) -> str:
    """The command line that fills a cell, "" where none does.

    A probe tests a finished run, see `trained_before`: RUN stands for its folder.
    """
    if cell.dataset is None or cell.method is None:
        return ""
    if trained_before(cell):
        return "python evaluate.py --probe --run RUN"
    if cell.method == "probe":
        return f"python evaluate.py --probe --dataset {cell.dataset} --modality {cell.modality}"

    script = SCRIPTS.get(cell.method, f"-m baselines.{cell.method}")
    words = [f"python {script} --dataset {cell.dataset}"]
    if cell.method == "unimodal":
        words.append(f"--modality {cell.modality}")
    if cell.lora:
        everywhere = len(cell.lora) == len(cell.encoders)
        words.append("--lora all" if everywhere else f"--lora {' '.join(cell.lora)}")
    if cell.rank != COMMON["rank"]:
        words.append(f"--rank {cell.rank}")

    default = encoders_for(cell.dataset)
    changed = {m: e for m, e in cell.encoders.items() if e != default[m]}
    if changed and cell.method == "unimodal":
        words.append(f"--encoder {changed[cell.modality]}")
    elif changed:
        words.append("--encoder " + " ".join(f"{m}={e}" for m, e in changed.items()))
    if cell.start == RANDOM_WEIGHTS:
        words.append("--pretrained none")
    return " ".join(words)
