"""The settings of the paper (Table 2, Sec. 4.1.2, App. A): the defaults of every script.

The paper is "Improving Discriminative Multi-Modal Learning with Large-Scale Pre-Trained Models",
arXiv 2310.05193. Every number carries its source. "ours": the paper does not say it, we chose it.
"""
import re

# ---- Settings of each data set ----
COMMON = dict(
    batch_size=64, rank=1, flip=True, multilabel=False,     # Sec. 4.1.2
    max_length=512,                     # Sec. 4.1.2: tokens of a text
    frames=3,                           # Sec. 4.1.2 for audio-visual data; ours for UCF101
    crop=(0.5, 1.0),                    # ours: "randomly resize to 224x224"; shares of the area
    umft_epochs=20, epochs=10,          # ours: step 1 and step 3, for all data sets
    schedule="constant", weight_decay=0.01, audio_shift=0,      # ours; shift in spectrogram frames
)
AUDIO_VISUAL = dict(
    COMMON, family="audio-visual",
    encoders={"audio": "audio_vit_b", "visual": "vit_b16"},     # Table 2: ViT-B; patch 16 is ours
    optimizer={"audio": "adamw", "visual": "adamw"},            # Sec. 4.1.2
    lora=("audio", "visual"),           # Sec. 4.1.2: all modalities where nothing else is said
)
VISION_LANGUAGE = dict(
    COMMON, family="vision-language",
    optimizer={"visual": "adamw", "text": "bertadam"},          # Sec. 4.1.2
    lora=("visual", "text"), batch_size=160,                    # Sec. 4.1.2
    umft_epochs=10, frames=1,           # ours: there is one picture
    schedule="plateau",                 # App. A.2: halve after two epochs without improvement
)
TOY = dict(                             # no part of the paper: all numbers are ours
    AUDIO_VISUAL, encoders={"audio": "audio_vit_toy", "visual": "vit_toy"},
    schedule="cosine", flip=False,
    batch_size=32, umft_epochs=40, epochs=15, weight_decay=0.05,        # ours
    crop=((8 / 9) ** 2, (8 / 9) ** 2),  # ours: 32 of 36 pixels: a shift by up to 2 pixels, no zoom
    audio_shift=4,                      # ours
)
TOY_LR = {      # ours: pre-trained encoders; chosen on validation of seeds 0 and 1 (results/)
    "toy": dict(lora=0.01, full=1e-4, joint=3e-3),                      # ours
    "toy_mismatched": dict(lora=0.03, full=3e-3, joint=1e-3),           # ours
}
SMALL_LR = dict(umft=2e-3, lora=0.05, full=1e-3, joint=5e-3)            # ours: from random weights

SETTINGS = {
    "crema_d": dict(AUDIO_VISUAL, lora=("audio",)),             # Sec. 4.1.2: only the audio model
    "ave": dict(AUDIO_VISUAL), "kinetics_sound": dict(AUDIO_VISUAL),
    "mm_imdb": dict(
        VISION_LANGUAGE, multilabel=True,                       # Sec. 4.1.1
        encoders={"visual": "vit_l14", "text": "deberta_large"}),               # Table 2
    "food101": dict(
        VISION_LANGUAGE, encoders={"visual": "vit_l14", "text": "bert_base"}),  # Table 2
    "ucf101": dict(
        COMMON, family="action",
        encoders={"visual": "vit_b16", "flow": "resnet18"},     # Table 2
        optimizer={"visual": "adamw", "flow": "sgd"},           # Sec. 4.1.2
        lora=("flow",),                                         # Sec. 4.1.2
        # App. A.3 refers to Du et al. (2023) for all but the learning rates
        weight_decay=1e-4),                                     # ours: 0.01 is too much for SGD
    "toy": dict(TOY),
    "toy_mismatched": dict(TOY, epochs=20),                             # ours: half the samples
    "toy_mimics": dict(TOY, batch_size=64, umft_epochs=80,              # ours
                       encoders={"audio": "audio_vit_mini", "visual": "vit_mini"}),
    "custom": dict(                     # anyone's own data. lora=(): all modalities it has
        AUDIO_VISUAL, lora=(), schedule="cosine",
        encoders={"audio": "audio_vit_b", "visual": "vit_b16",                  # ours
                  "text": "bert_base", "flow": "resnet18"},                     # ours
        optimizer={"audio": "adamw", "visual": "adamw", "text": "bertadam", "flow": "sgd"},
        audio_shift=8, weight_decay=1e-4),                      # ours
}

BACKBONES = {   # family -> the paper's second choice of encoders, those of the earlier methods
    "audio-visual": {"audio": "resnet18", "visual": "resnet18"},        # Table 5
    "vision-language": {"visual": "resnet152", "text": "bert_base"},    # App. A.2
    "action": {"visual": "resnet18", "flow": "resnet18"},               # Table 7
}

# ---- Learning rates ----
UMFT_LR = {     # uni-modal fine-tuning: kind of encoder, or (family, kind), or "flow"
    "vit": 1e-5,                            # App. A.1 and A.3 (ViT-B), A.2 (ViT-L)
    "audio": 1e-5,                          # App. A.1
    "bert": 5e-5, "deberta": 5e-5,          # App. A.2
    "resnet": 1e-4,                         # App. A.1; ours for RGB of UCF101
    ("vision-language", "resnet"): 5e-5,    # App. A.2
    "flow": 1e-2,                           # ours: of SGD, hence larger
    "toy": 1e-3,                            # ours
    "mini": SMALL_LR["umft"], "small": 1e-3,            # ours: from random weights, hence larger
}
LORA_LR = {     # MMLoRA: family or data set -> (of large encoders, of BACKBONES)
    "audio-visual": (1e-4, 1e-6),           # App. A.1
    "food101": (5e-4, 1e-4),                # App. A.2
    "mm_imdb": (5e-6, 1e-5),                # App. A.2
    "ucf101": (1e-4, 1e-5),                 # App. A.3
}
JOINT_LR = {    # joint training of all weights
    "joint": 1e-5,                          # App. A.1; ours for vision-language and UCF101
    "full": 1e-5,                           # ours: as "joint"
}


def settings_for(dataset: str) -> dict:
    """Settings of a data set; those of "custom" for a data set that is not in the paper."""
    return SETTINGS.get(dataset, SETTINGS["custom"])


def encoders_for(dataset: str) -> dict[str, str]:
    """Modality -> encoder (Table 2), a new dict. "custom": every kind of modality -> encoder."""
    return dict(settings_for(dataset)["encoders"])


def encoder_kind(encoder: str) -> str:
    """What the learning rate depends on: vit, audio, bert, deberta, resnet; toy, mini, small.

    "bert-all-MiniLM-L6-v2", the encoder of a folder, has that of its family, whatever its size.
    """
    if "-" not in encoder and encoder.endswith(("_toy", "_mini", "_small")):
        kind = encoder.split("_")[-1]
    else:
        kind = re.match("[a-z]*", encoder)[0]
    if kind not in UMFT_LR:
        raise ValueError(f"no learning rate is known for encoder {encoder!r}: is the name right? "
                         "(A new kind of encoder needs a line in UMFT_LR of paper/settings.py.)")
    return kind


def umft_lr(dataset: str, encoder: str, modality: str | None = None) -> float:
    """Learning rate of uni-modal fine-tuning (App. A).

    `modality` matters for flow: SGD trains it, and SGD needs a larger rate than AdamW.
    Without `modality`: the modality that has this encoder in Table 2.
    """
    settings = settings_for(dataset)
    kind = encoder_kind(encoder)
    if modality is None:
        modality = next((m for m, e in settings["encoders"].items() if e == encoder), None)
    if settings["optimizer"].get(modality) == "sgd":
        return UMFT_LR["flow"]
    return UMFT_LR.get((settings["family"], kind), UMFT_LR[kind])


def joint_lr(dataset: str, encoders: dict[str, str], tune: str = "lora") -> float:
    """Learning rate of joint training (App. A).

    tune: "lora"   LoRA alone
          "full"   all weights of fine-tuned models
          "joint"  all weights of pre-trained models
    """
    kinds = {encoder_kind(e) for e in encoders.values()}
    if kinds == {"toy"}:
        return TOY_LR.get(dataset, TOY_LR["toy"])[tune]
    if kinds <= {"toy", "mini", "small"}:
        return SMALL_LR[tune]
    # ViT-B and ResNet-18 (UCF101) count as large encoders, ResNet-152 and BERT do not.
    backbones = "resnet" in kinds and not kinds & {"vit", "audio"}
    if tune == "lora":
        of_large, of_backbones = LORA_LR.get(dataset, LORA_LR["audio-visual"])
        return of_backbones if backbones else of_large
    if tune == "joint" and backbones:
        # 1e-5 is for large pre-trained encoders. Ours for ResNets: as in uni-modal fine-tuning.
        family = settings_for(dataset)["family"]
        return UMFT_LR.get((family, "resnet"), UMFT_LR["resnet"])
    return JOINT_LR[tune]
