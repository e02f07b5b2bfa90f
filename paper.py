"""The paper as plain data: its settings (Table 2, Sec. 4.1.2, App. A) and its results (Tables 1 and 3-13).

"Improving Discriminative Multi-Modal Learning with Large-Scale Pre-Trained Models", the paper of MMLoRA. Part 1 is where the scripts take
their defaults from; part 2 is what `evaluate.py --table 5` prints beside our own runs, rows and columns in the paper's order, to be checked
against the PDF line by line. Every number carries its source; "ours: paper silent" marks what we had to choose.
"""

import re
from dataclasses import dataclass, field, replace

# ------------------------------------------------------------------------------------------------ part 1: settings
COMMON = dict(
    batch_size=64, rank=1, flip=True, max_length=512, multilabel=False,         # Sec. 4.1.2; max_length in tokens
    frames=3,                                                                   # Sec. 4.1.2 for audio-visual data; ours for UCF101
    crop=(0.5, 1.0),                                                            # ours: "randomly resize to 224x224"; shares of the area
    umft_epochs=20, epochs=10,                                                  # ours: paper silent, all data sets; step 1, step 2
    schedule="constant", weight_decay=0.01, audio_shift=0,                      # ours: paper silent; audio_shift in spectrogram frames
)
AUDIO_VISUAL = dict(COMMON, family="audio-visual", optimizer={"audio": "adamw", "visual": "adamw"},              # Sec. 4.1.2
                    encoders={"audio": "audio_vit_b", "visual": "vit_b16"},     # Table 2 says ViT-B; patch 16 is ours
                    lora=("audio", "visual"))                                   # Sec. 4.1.2: all modalities where nothing else is said
VISION_LANGUAGE = dict(COMMON, family="vision-language", optimizer={"visual": "adamw", "text": "bertadam"},      # Sec. 4.1.2
                       lora=("visual", "text"), batch_size=160,                 # Sec. 4.1.2
                       umft_epochs=10, frames=1,                                # ours: paper silent; there is one picture
                       schedule="plateau")                                      # App. A.2: halve after two epochs without improvement

# The toys are no part of the paper: every number of this block is ours and may be tuned.
TOY = dict(AUDIO_VISUAL, encoders={"audio": "audio_vit_toy", "visual": "vit_toy"}, schedule="cosine", flip=False,
           batch_size=64, umft_epochs=80, epochs=15, weight_decay=0.05,         # ours
           crop=((8 / 9) ** 2, (8 / 9) ** 2), audio_shift=4)                    # ours: 32 of 36 pixels, so a shift by up to 2, no zoom
TOY_LR = dict(umft=2e-3, lora=0.05, full=1e-3, joint=5e-3)                      # ours

SETTINGS = {   # data set -> the paper's own settings
    "crema_d": dict(AUDIO_VISUAL, lora=("audio",)),                             # Sec. 4.1.2: only the audio model
    "ave": dict(AUDIO_VISUAL), "kinetics_sound": dict(AUDIO_VISUAL),
    "mm_imdb": dict(VISION_LANGUAGE, encoders={"visual": "vit_l14", "text": "deberta_large"}, multilabel=True),  # Table 2, Sec. 4.1.1
    "food101": dict(VISION_LANGUAGE, encoders={"visual": "vit_l14", "text": "bert_base"}),                       # Table 2
    "ucf101": dict(COMMON, family="action", encoders={"visual": "vit_b16", "flow": "resnet18"},                  # Table 2
                   lora=("flow",), optimizer={"visual": "adamw", "flow": "sgd"},                                 # Sec. 4.1.2
                   weight_decay=1e-4),                                          # ours: paper silent; 0.01 is too much for SGD
    "toy": dict(TOY), "toy_noisy": dict(TOY),
    "custom": dict(AUDIO_VISUAL, schedule="cosine", audio_shift=8, lora=(),                        # ours: anyone's own data; (), all modalities it has
                   encoders={"audio": "audio_vit_b", "visual": "vit_b16", "text": "bert_base", "flow": "resnet18"},
                   optimizer={"audio": "adamw", "visual": "adamw", "text": "bertadam", "flow": "sgd"}, weight_decay=1e-4),     # ours
}

BACKBONES = {  # family -> the paper's second choice of encoders, those of the earlier methods
    "audio-visual": {"audio": "resnet18", "visual": "resnet18"},                # Table 5
    "vision-language": {"visual": "resnet152", "text": "bert_base"},            # App. A.2
    "action": {"visual": "resnet18", "flow": "resnet18"},                       # Table 7
}
UMFT_LR = {    # kind of encoder, or (family, kind), or "flow" -> learning rate of uni-modal fine-tuning
    "vit": 1e-5,                                # App. A.1 and A.3 (ViT-B), A.2 (ViT-L)
    "audio": 1e-5,                              # App. A.1
    "bert": 5e-5, "deberta": 5e-5,              # App. A.2
    "resnet": 1e-4,                             # App. A.1; ours for RGB of UCF101: paper silent
    ("vision-language", "resnet"): 5e-5,        # App. A.2
    "flow": 1e-2,                               # ours: paper silent; SGD
    "toy": TOY_LR["umft"], "small": 1e-3,       # ours: both start from random weights, hence far larger
}
LORA_LR = {    # family or data set -> learning rate of MMLoRA's adaptation (of large pre-trained encoders, of BACKBONES)
    "audio-visual": (1e-4, 1e-6),               # App. A.1
    "food101": (5e-4, 1e-4),                    # App. A.2
    "mm_imdb": (5e-6, 1e-5),                    # App. A.2
    "ucf101": (1e-4, 1e-5),                     # App. A.3
}
JOINT_LR = {"joint": 1e-5,                      # App. A.1; ours for vision-language and UCF101: paper silent. Ours for ResNets: as UMFT
            "full": 1e-5}                       # ours: paper silent on Fully Fine-tuned UME; as joint training


def settings_for(dataset: str) -> dict:
    """The settings of one of the data sets above; those of "custom" for any other."""
    return SETTINGS.get(dataset, SETTINGS["custom"])


def encoders_for(dataset: str) -> dict[str, str]:
    """Modality -> encoder (Table 2), a fresh dict. For "custom": kind of modality -> encoder."""
    return dict(settings_for(dataset)["encoders"])


def encoder_kind(encoder: str) -> str:
    """What the learning rates go by: "vit", "audio", "bert", "deberta", "resnet"; or "toy", "small" for what is trained from scratch."""
    kind = encoder.rsplit("_")[-1] if encoder.endswith(("_toy", "_small")) else re.match("[a-z]*", encoder)[0]
    if kind not in UMFT_LR:
        raise ValueError(f"no learning rate is known for encoder {encoder!r}: add its kind to UMFT_LR in paper.py")
    return kind


def umft_lr(dataset: str, encoder: str, modality: str | None = None) -> float:
    """Learning rate of uni-modal fine-tuning (App. A). Without `modality`: of the one that has this encoder in Table 2.

    The modality matters where SGD trains it (flow): the rate of SGD is not AdamW's, though both may train a ResNet-18.
    """
    setting, kind = settings_for(dataset), encoder_kind(encoder)
    modality = modality or next((m for m, e in setting["encoders"].items() if e == encoder), None)
    if setting["optimizer"].get(modality) == "sgd":
        return UMFT_LR["flow"]
    return UMFT_LR.get((setting["family"], kind), UMFT_LR[kind])


def joint_lr(dataset: str, encoders: dict[str, str], tune: str = "lora") -> float:
    """Learning rate of joint training (App. A). tune: "lora"; "full", all weights of fine-tuned models; "joint", of pre-trained models."""
    kinds = {encoder_kind(e) for e in encoders.values()}
    if kinds <= {"toy", "small"}:
        return TOY_LR[tune]
    large, backbones = LORA_LR.get(dataset, LORA_LR["audio-visual"])
    resnets = "resnet" in kinds and not kinds & {"vit", "audio"}     # ViT-B/Res18 of UCF101 counts as large, ResNet152/BERT does not
    if tune == "joint" and resnets:      # 1e-5 is for large pre-trained encoders; those of Table 5's upper half start from random weights
        return UMFT_LR.get((settings_for(dataset)["family"], "resnet"), UMFT_LR["resnet"])
    return (backbones if resnets else large) if tune == "lora" else JOINT_LR[tune]


# ------------------------------------------------------------------------------------------------ part 2: results
# A table: columns {heading: spec} and rows (method, backbone, values, spec). The specs of row and column together say which run of ours
# fills the cell, in the fields of `Cell`; `cells` fills in the defaults. A value is a percentage, a pair F1-Micro, F1-Macro, or None where
# the paper has a dash. quoted=True: published by other authors, maybe under other settings (Tables 5 and 7 star what was re-run).
AVE, KS, CREMA = dict(dataset="ave"), dict(dataset="kinetics_sound"), dict(dataset="crema_d")
IMDB, FOOD, UCF = dict(dataset="mm_imdb"), dict(dataset="food101"), dict(dataset="ucf101")
RGB, AUDIO, TEXT = dict(modality="visual"), dict(modality="audio"), dict(modality="text")
RES18 = dict(encoders=BACKBONES["audio-visual"], pretrained="none")      # ours, paper silent: from scratch, as OGM-GE and PMR
RES152, UCF18 = dict(encoders=BACKBONES["vision-language"]), dict(encoders=BACKBONES["action"])
BASE = dict(encoders={"visual": "vit_b16", "text": "bert_base"}, quoted=True)       # ours: Table 6 does not name the encoders of Li et al.
LARGE = dict(encoders={"visual": "vit_l14", "text": "bert_large"}, quoted=True)     # ours, likewise
MICRO = dict(dataset="mm_imdb", metrics=("f1_micro",))
PAIRS = {"AVE RGB": AVE | RGB, "AVE Audio": AVE | AUDIO, "KS RGB": KS | RGB, "KS Audio": KS | AUDIO,
         "CREMA-D RGB": CREMA | RGB, "CREMA-D Audio": CREMA | AUDIO}

TABLES = {
    1: dict(caption="Uni-modal fine-tuning and models of Fan et al. (AVE, CREMA-D), Peng et al. (KS), Li et al. (MM-IMDB)", source="Sec. 1",
            columns={"AVE": AVE, "Kinetics-Sound": KS, "CREMA-D": CREMA, "MM-IMDB": IMDB}, rows=[
        ("Recent Multi-modal Model",              "", (68.1, 63.1, 65.3, (66.7, 61.7)), dict(method=None, quoted=True)),
        ("Fine-tuned Visual Model",               "", (88.1, 84.3, 77.7, (60.2, 52.6)), dict(method="unimodal", modality="visual")),
        ("Fine-tuned Audio / Language Model",     "", (85.6, 69.6, 75.8, (68.6, 63.9)), dict(method="unimodal", modality="other"))]),
    3: dict(caption="Linear evaluation: encoders of multi-modal training and of UMFT", source="Sec. 3.1", columns=PAIRS, rows=[
        ("Multi-Modal Training",   "", (83.3, 79.8, 78.7, 67.9, 70.3, 64.8), dict(method="probe", of="concat")),
        ("Uni-Modal Fine-Tuned",   "", (88.1, 85.6, 84.3, 69.6, 77.7, 75.8), dict(method="probe", of="unimodal"))]),
    4: dict(caption="Linear evaluation of pre-trained encoders against fine-tuning (MM-IMDB: F1-Micro)", source="Sec. 4.2.1",
            columns=PAIRS | {"MM-IMDB RGB": MICRO | RGB, "MM-IMDB Text": MICRO | TEXT,
                             "Food101 RGB": FOOD | RGB, "Food101 Text": FOOD | TEXT}, rows=[
        ("linear eval", "", (87.6, 82.1, 79.0, 66.2, 51.2, 60.6, 48.7, 22.1, 81.8, 21.2), dict(method="probe", of="pretrained")),
        ("fine-tuning", "", (88.1, 85.6, 84.3, 69.6, 77.7, 75.8, 60.2, 68.6, 84.3, 86.6), dict(method="unimodal"))]),
    5: dict(caption="Audio-visual data sets (backbone: audio/visual)", source="Sec. 4.2.3",
            columns={"AVE": AVE, "KS": KS, "CREMA-D": CREMA, "Avg Acc.": dict(dataset=None)}, rows=[
        ("G-Blending",                     "ResNet18/ResNet18", (65.5, 62.2, 58.7, 62.1), RES18 | dict(method="g_blending", quoted=True)),
        ("OGM-GE",                         "ResNet18/ResNet18", (76.9, 63.1, 62.2, 67.4), RES18 | dict(method="ogm_ge", quoted=True)),
        ("PMR",                            "ResNet18/ResNet18", (74.3, None, 65.3, None), RES18 | dict(method="pmr", quoted=True)),
        ("UME*",                           "ResNet18/ResNet18", (85.4, 78.8, 78.2, 80.8), RES18 | dict(method="ume")),
        ("MMLoRA (ours)",                  "ResNet18/ResNet18", (86.9, 79.4, 81.9, 82.7), RES18 | dict(method="mmlora")),
        ("Multi-Modal Baseline*",          "ViT-B/ViT-B",       (94.7, 90.6, 87.6, 91.0), dict(method="concat")),
        ("Classifier on frozen features*", "ViT-B/ViT-B",       (93.7, 90.1, 85.3, 89.7), dict(method="frozen")),
        ("MBT",                            "ViT-B/ViT-B",       (None, 85.0, None, None), dict(method="mbt", quoted=True)),
        ("OGM-GE*",                        "ViT-B/ViT-B",       (95.5, 90.4, 88.4, 91.4), dict(method="ogm_ge")),
        ("UME*",                           "ViT-B/ViT-B",       (95.4, 90.8, 87.8, 91.3), dict(method="ume")),
        ("Fully Fine-tuned UME*",          "ViT-B/ViT-B",       (95.2, 91.3, 87.5, 91.3), dict(method="full")),
        ("MMLoRA (ours)",                  "ViT-B/ViT-B",       (96.2, 91.4, 88.6, 92.1), dict(method="mmlora"))]),
    6: dict(caption="Vision-language data sets (from Baseline to the second MMBT: as re-run by Li et al., 2023b)", source="Sec. 4.2.3",
            columns={"Food101": FOOD, "MM-IMDB": IMDB}, rows=[
        ("MMBT",          "ResNet152/BERT-B", (92.1, (66.8, 61.6)),  RES152 | dict(method="mmbt", quoted=True)),
        ("MMLoRA (ours)", "ResNet152/BERT-B", (93.2, (67.2, 61.7)),  RES152 | dict(method="mmlora")),
        ("Baseline",      "Li et al.",        (93.29, (64.9, 59.6)), BASE | dict(method="concat")),
        ("PMF",           "Li et al.",        (91.51, (64.5, 58.8)), BASE | dict(method="pmf")),
        ("PMF-L",         "Li et al.",        (91.68, (66.7, 61.7)), LARGE | dict(method="pmf")),
        ("MBT",           "Li et al.",        (93.6, (64.8, 59.6)),  BASE | dict(method="mbt")),
        ("MMBT",          "Li et al.",        (94.10, (66.1, 60.8)), BASE | dict(method="mmbt")),
        ("MMLoRA (ours)", "Table 2",          (95.9, (71.7, 67.5)),  dict(method="mmlora"))]),
    7: dict(caption="UCF101 (backbone: RGB/flow; quotes from Du et al., 2023)", source="Sec. 4.2.3", columns={"Acc.": UCF}, rows=[
        ("MM Baseline", "Res18/Res18", (82.3,), UCF18 | dict(method="concat", quoted=True)),
        ("G-Blending",  "Res18/Res18", (83.0,), UCF18 | dict(method="g_blending", quoted=True)),
        ("OGM-GE",      "Res18/Res18", (84.0,), UCF18 | dict(method="ogm_ge", quoted=True)),
        ("UME",         "Res18/Res18", (86.8,), UCF18 | dict(method="ume", quoted=True)),
        ("MMLoRA",      "Res18/Res18", (87.1,), UCF18 | dict(method="mmlora")),
        ("UME*",        "ViT-B/Res18", (93.0,), dict(method="ume")),
        ("MMLoRA",      "ViT-B/Res18", (93.4,), dict(method="mmlora"))]),
    8: dict(caption="Linear evaluation: encoders of UMFT and of MMLoRA on both modalities", source="Sec. 4.3", columns=PAIRS, rows=[
        ("Uni-Modal Fine-Tuned", "", (88.1, 85.6, 84.3, 69.6, 77.7, 75.8), dict(method="probe", of="unimodal")),
        ("MMLoRA (ours)",        "", (88.1, 86.4, 85.3, 69.8, 78.1, 75.7), dict(method="probe", of="mmlora", lora="all"))]),
    9: dict(caption="LoRA on one modality or on both", source="Sec. 4.3",
            columns={f"{name} {which}": spec | dict(lora=lora) for name, spec in (("AVE", AVE), ("KS", KS), ("CREMA-D", CREMA))
                     for which, lora in (("RGB", ("visual",)), ("Audio", ("audio",)), ("Both", "all"))}, rows=[
        ("MMLoRA", "", (95.7, 96.2, 96.2, 91.3, 91.3, 91.4, 87.9, 88.6, 88.3), dict(method="mmlora"))]),
    10: dict(caption="Rank of MMLoRA", source="Sec. 4.3",
             columns={"UME": dict(method="ume")} | {str(r): dict(method="mmlora", rank=r) for r in (1, 2, 4, 8, 64)}, rows=[
        ("AVE",            "", (95.4, 96.2, 96.5, 96.5, 96.2, 95.2), AVE),
        ("Kinetics-Sound", "", (90.8, 91.4, 91.3, 91.4, 91.3, 91.1), KS)]),
    11: dict(caption="Language models fine-tuned on the text of Food101", source="App. B",
             columns={name: TEXT | dict(encoders={"text": name.lower().replace("-", "_")})
                      for name in ("BERT-Base", "BERT-Large", "DeBERTa-Base", "DeBERTa-Large")}, rows=[
        ("UPMC food101", "", (86.6, 86.7, 86.6, 86.8), FOOD | dict(method="unimodal"))]),
    12: dict(caption="Visual models fine-tuned on the frames of CREMA-D", source="App. B",
             columns={"ViT-B": RGB | dict(encoders={"visual": "vit_b16"}), "ViT-L": RGB | dict(encoders={"visual": "vit_l14"})}, rows=[
        ("CREMA-D", "", (77.7, 75.5), CREMA | dict(method="unimodal"))]),
    13: dict(caption="MMLoRA on both modalities with and without uni-modal fine-tuning (UMFT)", source="App. C",
             columns={"AVE": AVE, "KS": KS, "CREMA-D": CREMA}, rows=[
        ("MMLoRA (w/o UMFT)", "", (94.0, 89.5, 83.7), dict(method="mmlora", lora="all", umft=False)),
        ("MMLoRA (w UMFT)",   "", (96.2, 91.4, 88.3), dict(method="mmlora", lora="all"))]),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the paper's numbers, and which run of ours fills it."""
    row: str                        # method as the paper calls it
    backbone: str
    column: str
    paper: tuple | None             # in %, one number for each of `metrics`; None: a dash
    dataset: str | None             # None: the mean of the cells to its left (Table 5, Avg Acc.)
    method: str | None              # unimodal; mmlora or ume (one run writes both); full; probe; a file of baselines/; None: no run
    quoted: bool = False            # published by other authors
    metrics: tuple = ("accuracy",)  # of accuracy, f1_micro, f1_macro
    modality: str | None = None     # the one tested; None: all, fused
    encoders: dict = field(default_factory=dict)    # modality -> encoder, of all that the run trains
    pretrained: str | None = None   # "none": from scratch
    lora: tuple = ()                # modalities with LoRA, of method (or `of`) mmlora and ume
    rank: int = COMMON["rank"]
    umft: bool = True               # False: LoRA on the pre-trained models (App. C)
    of: str | None = None           # whose encoders a probe tests: those of a method, or "pretrained"


def cells(number: int) -> list[list[Cell]]:
    """The rows of Table `number`, every cell with its defaults filled in."""
    columns = TABLES[number]["columns"]
    return [[_cell(where | how, value, row=row, backbone=backbone, column=column)
             for (column, where), value in zip(columns.items(), values, strict=True)]
            for row, backbone, values, how in TABLES[number]["rows"]]


def _cell(spec: dict, value, **place) -> Cell:
    place["paper"] = value if value is None or isinstance(value, tuple) else (value,)
    if spec["dataset"] is None:
        return Cell(**place, dataset=None, method=spec["method"], quoted=spec.get("quoted", False))
    setting, encoders = settings_for(spec["dataset"]), encoders_for(spec["dataset"]) | spec.get("encoders", {})
    spec = {"metrics": ("f1_micro", "f1_macro") if setting["multilabel"] else ("accuracy",)} | spec
    if spec.get("modality") == "other":                     # Table 1: audio or language, whichever the data set has
        spec["modality"] = next(m for m in encoders if m != "visual")
    trained = spec.get("of") or spec["method"]
    if trained in ("unimodal", "pretrained"):
        encoders = {spec["modality"]: encoders[spec["modality"]]}
    if trained in ("mmlora", "ume"):
        spec["lora"] = tuple(encoders) if spec.get("lora") == "all" else spec.get("lora", setting["lora"])
    return Cell(**place, **spec | {"encoders": encoders})


def commands(cell: Cell, run: str | None = None) -> str:
    """The command line that fills the cell, "" where none does. A probe needs a trained run: given its folder `run`, only the probe."""
    if cell.dataset is None or cell.method is None:
        return ""
    if cell.of == "pretrained":
        return f"python evaluate.py --probe --dataset {cell.dataset} --modality {cell.modality}"
    if cell.method == "probe":
        train = "" if run else commands(replace(cell, method=cell.of)) + " && "
        return f"{train}python evaluate.py --probe --run {run or 'RUN'}"
    scripts = dict(unimodal="train_unimodal.py", ume="train_joint.py", mmlora="train_joint.py", full="train_joint.py", frozen="-m baselines.concat")
    alone = cell.method == "unimodal"
    changed = [e if alone else f"{m}={e}" for m, e in cell.encoders.items() if e != encoders_for(cell.dataset)[m]]
    words = [f"python {scripts.get(cell.method, f'-m baselines.{cell.method}')} --dataset {cell.dataset}",
             alone and f"--modality {cell.modality}",
             cell.lora and f"--lora {'all' if len(cell.lora) == len(cell.encoders) else ' '.join(cell.lora)}",
             cell.method == "full" and "--tune full",
             cell.method == "frozen" and "--freeze",
             cell.rank != COMMON["rank"] and f"--rank {cell.rank}",
             not cell.umft and "--no-umft",
             changed and f"--encoder {' '.join(changed)}",
             cell.pretrained and f"--pretrained {cell.pretrained}"]
    return " ".join(filter(None, words))
