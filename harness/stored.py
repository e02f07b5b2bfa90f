"""Runs on the disk: their files are read and checked here, for whoever shows or uses them.

Whatever is wrong with a file ends in a ValueError or an OSError that names it. No name in a run's
files leads out of its folder.
"""
import json
from pathlib import Path

import data
from encoders import BUILD
from harness import files, metrics
from data import read_json
from pretrained import configs

# Such a run stores only what it has trained: A and B, or as little.
ADAPTED = ("mmlora", "separate", "logits", "drop_modality", "all_linear", "small")
HUGE = 1e300                                          # no loss and no time is as large
NAMED_IN_RESULT = ("method", "dataset", "seed", "modality", "encoder", "encoders", "fusion")
# What a setting is, where it is there; without these nobody can use a run.
KINDS = dict(method=str, dataset=str, seed=int, precision=str, frames=int, audio_shift=int,
             modality=str, encoder=str, encoders=dict, fusion=str, lora=list, rank=int,
             unimodal=dict, classes=list, samples=(dict, type(None)), epochs=int, batch_size=int,
             lr=(float, int), drop_path=(float, int))
NEEDED = ("method", "dataset", "seed", "precision", "frames", "audio_shift")


def check_finished(folder: Path) -> None:
    """Raises ValueError for a folder without a finished run; it names those there are. Also for a
    result that is damaged or of another run."""
    if (folder / "result.json").exists():
        read_result(folder, read_config(folder)["settings"])
        return
    there = sorted(str(file.parent) for file in folder.parent.glob("*/result.json"))
    if not there:
        there = sorted(str(file.parent) for file in folder.parent.parent.glob("*/*/result.json"))
    told = f"finished: {', '.join(there)}" if there else "nothing is finished there"
    raise ValueError(f"{folder} holds no finished run (no result.json); {told}")


# ---- config.json ----

def read_config(folder: Path) -> dict:
    """config.json of a run: "settings", "data", "fingerprint".

    Raises ValueError or OSError where it is damaged or not one of ours.
    """
    file = folder / "config.json"
    config = read_json(file)
    try:
        check_settings(config["settings"])
        made, info = config.get("fingerprint"), config.get("data")
        if made is not None:
            for key in ("version", "python", "data"):
                made[key]
            dict(made["code"]), Path(made["data_folder"])
        if info is not None:
            data.check_info(file, info)
            if info["classes"] != config["settings"].get("classes", info["classes"]):
                raise ValueError("its data have other classes than its settings")
            for m in encoders_of(config["settings"]):
                info["modalities"][m]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not the config.json of a run: {error!r}") from None
    return config


def check_settings(settings: dict) -> None:
    """Raises KeyError, TypeError or ValueError where these are no settings of a run."""
    for key in NEEDED:
        settings[key]
    for key, kind in KINDS.items():
        if key in settings and not isinstance(settings[key], kind):
            raise TypeError(f"{key} {settings[key]!r}")
    encoders, unimodal = encoders_of(settings), settings.get("unimodal")
    names = [settings["method"], settings["dataset"], *encoders, *encoders.values()]
    if unimodal is not None:
        names += [unimodal[m]["run"] for m in encoders]
    for name in names:
        files.check_plain(name, "name")
    if "encoders" in settings and settings["fusion"] not in (*metrics.FUSIONS, "joint"):
        raise ValueError(f"fusion {settings['fusion']}")
    if settings["method"] in ADAPTED:
        settings["unimodal"]
    if not set(settings.get("lora", ())) <= encoders.keys():
        raise ValueError(f"lora {settings['lora']}")
    for name in encoders.values():
        if name not in BUILD and name.partition("-")[0] not in configs.FAMILIES:
            raise ValueError(f"no encoder is called {name}")
    sizes = settings.get("sizes") or {}
    if "encoders" not in settings:                        # a uni-modal run has those of its own
        sizes = {settings["modality"]: sizes}
    for m in encoders:
        of_one = sizes.get(m) or {}
        if "width" in of_one:
            configs.checked("its sizes", of_one)
    if "lora" in settings and not 1 <= settings["rank"] <= configs.MOST["width"]:
        raise ValueError(f"rank {settings['rank']}")


def encoders_of(settings: dict) -> dict[str, str]:
    """Modality -> encoder, of a uni-modal or a joint run."""
    return settings.get("encoders") or {settings["modality"]: settings["encoder"]}


def experiment_of(folder: Path, settings: dict) -> str:
    """What runs of one experiment share: all settings but the seed, also those of step 1."""
    kept = {k: v for k, v in settings.items() if k not in ("seed", "unimodal")}
    for m, base in settings.get("unimodal", {}).items():
        step_1 = folder.parent / base["run"]
        if (step_1 / "config.json").exists():
            kept[m] = experiment_of(step_1, read_config(step_1)["settings"])
    return json.dumps(kept, sort_keys=True)


def started_from(folder: Path, settings: dict, modality: str) -> str | None:
    """What an encoder of a run was before any training of ours: a file, "none" (random weights), or
    its own name, which stands for the public checkpoint. None: nobody wrote it down."""
    if "unimodal" in settings:                            # a joint run leaves that to step 1
        step_1 = folder.parent / settings["unimodal"][modality]["run"]
        if not (step_1 / "config.json").exists():
            return None
        settings = read_config(step_1)["settings"]
    start = settings.get("pretrained")
    if isinstance(start, dict):
        return start.get(modality)
    return start


# ---- Results ----

def read_result(folder: Path, settings: dict) -> dict:
    """result.json of a finished run. Raises ValueError where it is damaged or of another run."""
    file = folder / "result.json"
    result = read_json(file)
    for key in NAMED_IN_RESULT:
        if key in result and result[key] != settings.get(key):
            raise ValueError(f"{file} is the result of another run: {key} {result[key]!r:.60}")
    try:
        for key in ("best_epoch", "trained_parameters", "seconds"):
            check_number(result[key])
        for part in (result, result["ume"]) if "ume" in result else (result,):
            for split in ("val", "test"):
                for scores in part[split].values():
                    scores["loss"]
                    check_scores(scores)
        result["test"][settings.get("fusion") or settings["modality"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None
    return result


def read_probe(folder: Path) -> dict:
    """probe.json: modality -> what `linear.probe` found. Raises ValueError where it is damaged."""
    file = folder / "probe.json"
    found = read_json(file)
    try:
        for of_modality in found.values():
            check_scores(of_modality["test"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None
    return found


def read_log(folder: Path) -> list[dict]:
    """The lines of log.jsonl. Raises ValueError where one is damaged or lacks its scores."""
    file = folder / "log.jsonl"
    log = files.read_lines(file)
    try:
        names = log[0]["val"].keys()
        for line in log:
            check_number(line["epoch"])
            check_number(line.get("loss") or 0)
            for name in names:
                check_scores(line["val"][name])
    except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None
    return log


def check_scores(scores: dict) -> None:
    """A loss, rates from 0 to 1, and groups: name -> rate. Raises KeyError or ValueError."""
    scores["accuracy" if "accuracy" in scores else "f1_micro"]
    for key, value in scores.items():
        for number in value.values() if key == "groups" else [value]:
            check_number(number, top=HUGE if key == "loss" else 1)


def check_number(value, top: float = HUGE) -> None:
    """Raises ValueError for anything but a number from 0 to `top`."""
    if type(value) not in (int, float) or not 0 <= value <= top:
        raise ValueError(f"{str(value)[:20]!r} is no number from 0 to {top}")


# ---- Tensors ----

def logits_of_step_1(folder: Path, settings: dict, split: str, n: int | None) -> dict:
    """Modality -> logits (n, C) that the uni-modal runs of a run have stored. n as in
    `read_logits`."""
    logits = {}
    for m, base in settings["unimodal"].items():
        logits |= read_logits(folder.parent / base["run"], settings, split, n, [m])
    return logits


def read_logits(folder: Path, settings: dict, split: str, n: int | None, names: list) -> dict:
    """Name -> logits (n, C) that a run has stored. Raises ValueError where they are not there.

    n is None where nobody has counted the samples.
    """
    file, logits = folder / "logits.safetensors", {}
    tensors, _ = files.read_tensors(file)
    for name in names:
        z = tensors.get(f"{split}.{name}")
        right = z is not None and z.is_floating_point() and z.ndim == 2
        if right and n is None:
            n = len(z)
        if not right or z.shape != (n, len(settings.get("classes", ()))):
            raise ValueError(f"{file} does not hold the logits of {name} for the {n} samples of"
                             f" {split}")
        logits[name] = z
    return logits


def damage(folder: Path) -> str:
    """What is wrong with the files of a run; "" where nothing is."""
    try:
        settings = read_config(folder)["settings"]
        if (folder / "result.json").exists():
            read_result(folder, settings)
            for name in ("model.safetensors", "logits.safetensors"):
                files.read_tensors(folder / name)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def check_own_prediction(folder: Path, settings: dict) -> None:
    """ValueError for a method whose prediction is not an average of its modalities."""
    if settings["method"] not in ("unimodal", "no-umft", "full", "separate_full", *ADAPTED):
        raise ValueError(f"{folder} is a run of baselines/{settings['method']}.py, which alone can"
                         " predict with it; --probe can test its encoders")
