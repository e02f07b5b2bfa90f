"""The command line of the training scripts: arguments, settings, seeds, learning rates.

A script builds its parser with `parser`, adds its own arguments, and hands it to `main` together
with a function `train(args, seed) -> Run`. Settings are what the arguments say, else what the paper
says (`paper/settings.py`).
"""
import argparse
import difflib
import importlib
import math
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import torch

import data
from encoders import BUILD
from harness import files, fingerprint, report, runs, stored
from paper import settings as paper
from prepare import locks, toy
from pretrained import checkpoints, configs

PREPARED = ("ave", "crema_d", "food101", "kinetics_sound", "mm_imdb", "ucf101")    # by prepare/
DATASETS = f"{', '.join(toy.WORLDS)} (generated), {', '.join(PREPARED)}, or your own"
RECIPE = ("schedule", "weight_decay", "crop", "flip", "frames", "audio_shift")     # of the paper


# ---- The command line ----

def parser(doc: str, script: str) -> argparse.ArgumentParser:
    """What every training script takes."""
    path = Path(script).resolve()
    command = f"python {path.name}"
    if path.parent != fingerprint.PROJECT:
        command = f"python -m {path.parent.name}.{path.stem}"
    p = argparse.ArgumentParser(prog=command, description=doc, formatter_class=Help)
    data = p.add_argument_group("data")
    data.add_argument("--dataset", default="toy", metavar="NAME",
                      help=f"{DATASETS}; default: toy")
    data.add_argument("--data-root", default="data", metavar="FOLDER",
                      help="folder of the prepared data sets; default: data")
    data.add_argument("--seed", type=seed_number, default=0,
                      help="initial weights, order, augmentation; of a toy also the world;"
                           " default: 0")
    data.add_argument("--seeds", type=seed_number, nargs="+", metavar="SEED",
                      help="train one run for each of these; the table shows mean and deviation;"
                           " default: the one of --seed")
    data.add_argument("--share", type=share, default=1.0,
                      help="train on this share of the training samples, drawn with the seed: 0.3 ="
                           " 30 %% of them; also in step 1; default: 1")

    model = p.add_argument_group("encoders")
    model.add_argument("--encoder", nargs="+", default=[], metavar="[M=]NAME",
                       help=f"for all modalities, or for modality M: {', '.join(BUILD)}; default:"
                            " those of Table 2")
    model.add_argument("--pretrained", nargs="+", default=[], metavar="[M=]PATH",
                       help="a public checkpoint, or the folder of one, whose config.json says the"
                            " encoder; or none for random weights; default: the public one,"
                            " downloaded on first use")
    model.add_argument("--drop-path", type=rate, metavar="RATE",
                       help="of AudioViT, wherever all its weights are trained (never under LoRA);"
                            " 0 turns it off; default: ImageBind's, 0.1 in audio_vit_b")

    how = p.add_argument_group("training")
    how.add_argument("--epochs", type=positive(int),
                     help="default: as paper/settings.py says for the data set")
    how.add_argument("--batch-size", type=positive(int),
                     help="default: 64, or 160 for image and text (Sec. 4.1.2)")
    how.add_argument("--micro-batch", type=positive(int),
                     help="forward and backward so many samples at a time, when the batch does not"
                          " fit into memory; the same gradients, except with BatchNorm (ResNets),"
                          " which takes its statistics from what it sees at a time; default: the"
                          " whole batch")
    how.add_argument("--lr", type=positive(float), nargs="+",
                     help="learning rate; of several the best on validation is shown; default:"
                          " App. A")
    add_device(how)
    how.add_argument("--precision", choices=("fp32", "bf16"),
                     help="bf16 is autocast; default: bf16 on cuda, fp32 on the CPU")

    out = p.add_argument_group("results")
    out.add_argument("--out", default="runs", metavar="FOLDER",
                     help="folder of all runs; default: runs")
    out.add_argument("--again", action="store_true",
                     help="train anew what was made with other code, data or settings; the old run"
                          " is moved aside")
    out.add_argument("--plot", action="store_true",
                     help="draw the training curves into the run's folder (needs matplotlib)")
    return p


def add_device(p) -> None:
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu")


def add_step_1(p: argparse.ArgumentParser) -> None:
    """For scripts that start from uni-modal fine-tuning (UMFT) and train it where it is missing."""
    step_1 = p.add_argument_group("step 1, uni-modal fine-tuning (UMFT)")
    step_1.add_argument("--umft-epochs", type=positive(int),
                        help="default: as paper/settings.py says for the data set")
    step_1.add_argument("--umft-lr", type=positive(float), help="default: App. A of the paper")


def add_lora_arguments(p: argparse.ArgumentParser) -> None:
    lora = p.add_argument_group("LoRA, Eq. 2")
    lora.add_argument("--lora", nargs="+", metavar="MODALITY",
                      help="whose models get LoRA: audio, visual, text, flow, or all; default: the"
                           " paper's choice for the data set")
    lora.add_argument("--rank", type=positive(int), default=1, help="rank r of BA; default: 1")


class Help(argparse.RawDescriptionHelpFormatter):
    """Docstrings are as wide as our code. --help fits them to the terminal.

    Prose and lists are filled anew. Of a line that is indented, as a command or an equation, what
    does not fit goes below.
    """

    def _fill_text(self, text, width, indent):
        lines = []
        for paragraph in text.strip().split("\n\n"):
            if not paragraph.startswith("    "):
                for item in re.split(r"\n(?= \d+\. )", paragraph):
                    lines += fill(item, width, hang=4 if item.startswith(" ") else 0)
            else:
                for line in paragraph.splitlines():
                    parts = [line]
                    if len(line) > width:                 # "command     # comment"
                        parts = re.split(r"(?<=\S) {3,}(?=\S)(?!.* {3})", line)
                        parts[1:] = ["        " + part for part in parts[1:]]
                    for part in parts:
                        lines += fill(part, width, hang=8)
            lines.append("")
        return "\n".join(lines)


def fill(text: str, width: int, hang: int) -> list[str]:
    """Lines of at most `width` columns; from the second on they are indented by `hang`."""
    if max(map(len, text.splitlines())) <= width:
        return text.splitlines()
    before = text[:len(text) - len(text.lstrip())]
    return textwrap.wrap(" ".join(text.split()), width, initial_indent=before,
                         subsequent_indent=" " * hang)


def positive(kind):
    """An argparse type: a number above zero."""
    def number(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        if kind is int and value >= 2 ** 31:              # torch counts no further
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return value
    number.__name__ = kind.__name__                       # argparse: "invalid int value"
    return number


def from_zero(kind):
    """An argparse type: zero or a number above it."""
    def number(text):
        return kind(text) if float(text) == 0 else positive(kind)(text)
    number.__name__ = kind.__name__
    return number


def rate(text: str) -> float:
    """An argparse type: from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def share(text: str) -> float:
    """An argparse type: above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def seed_number(text: str) -> int:
    """An argparse type: what seeds a generator, also after `data.epoch_rng`."""
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2 ** 32 - 1}")
    return value


seed_number.__name__ = "seed"                             # argparse: "invalid seed value"


def each_once(what: str, values: list) -> list:
    """Raises ValueError for a value that is there twice: it would count as two."""
    if len(set(values)) < len(values):
        raise ValueError(f"{what} {' '.join(map(str, values))}: each {what} once")
    return values


def main(p: argparse.ArgumentParser, train) -> None:
    """Train one run a seed with `train(args, seed)`, then show the table of them all."""
    guard(lambda: train_all(p, train), "try --micro-batch 16")


def guard(work, hint: str = "try --device cpu") -> None:
    """work(), where wrong input, Ctrl-C and full memory end in one line.

    hint: what to do where the GPU's memory is full.
    """
    try:
        work()
    except KeyboardInterrupt:
        print("\n" + how_far(), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                               # ... | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError:
        sys.exit(f"error: it does not fit into the GPU's memory; {hint}")
    except MemoryError:
        sys.exit("error: it does not fit into memory")
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))
    except RuntimeError as error:                         # that is how torch says it on a CPU
        if not re.search("(out of|allocate|enough) memory|ALLOC_FAILED", str(error)):
            raise
        sys.exit("error: it does not fit into memory: " + str(error).splitlines()[0])
    finally:
        locks.unlock()


def how_far() -> str:
    run = runs.current
    if run is None or run.finished:
        return "stopped; the same command goes on"
    return f"stopped after epoch {run.saved()} of {run.folder}; the same command goes on"


def train_all(p: argparse.ArgumentParser, train) -> None:
    args = p.parse_args()
    args.default_of = p.get_default                       # for the names of run folders
    prepare_torch(args.dataset)
    seeds = each_once("seed", args.seeds or [args.seed])
    if "modality" in args and len(args.lr or ()) > 1:
        raise ValueError("--lr: step 1 has one learning rate, since joint scripts look for one"
                         " uni-modal run a seed; try others with another --out")
    tried = {}
    for lr in args.lr or [None]:
        one = argparse.Namespace(**{**vars(args), "lr": lr})
        tried[lr] = [train(one, seed) for seed in seeds]
    best = max(tried, key=lambda lr: report.validation(tried[lr]))
    if len(tried) > 1:
        told = ", ".join(f"{lr:g} {100 * report.validation(tried[lr])[0]:.1f}" for lr in tried)
        print(f"\nlearning rate {best:g}, best on validation: {told}")
    report.closing_table(tried[best])
    report.next_steps(tried[best])
    if args.plot:
        report.plot([run.folder for run in tried[best]])


def prepare_torch(dataset: str) -> None:
    if dataset in toy.WORLDS:
        # So small a model is no faster on several threads, and many times slower on a busy machine.
        # With one thread the bits do not depend on the number of cores.
        torch.set_num_threads(1)


# ---- Data ----

def open_data(args, seed: int) -> tuple[Path, dict]:
    """-> the folder of the prepared data and its dataset.json.

    Checks whatever can be checked before any work.
    """
    check_device(args.device)
    if args.plot:
        report.import_pyplot()
    folder = find(args.data_root, args.dataset, seed)
    info = data.check(folder)
    for value in [*args.encoder, *args.pretrained]:
        if "=" in value and value.split("=")[0] not in info["modalities"]:
            raise ValueError(f"{value}: {has(args.dataset, info, value.split('=')[0])}")
    for value in args.encoder:                            # of all modalities, before any training
        check_encoder(value.split("=")[-1])
    return folder, info


def find(root: str, name: str, seed: int = 0) -> Path:
    """The folder of the prepared data set `name`. A toy is generated, a new world for every seed.

    Raises FileNotFoundError whose one line says how to get the data.
    """
    files.check_plain(name, "--dataset")
    if name in toy.WORLDS:
        return find_toy(Path(root) / f"{name}-s{seed}", name, seed)
    folder = Path(root) / name
    if (folder / "dataset.json").exists():
        return folder
    if name in PREPARED:                                  # what to download and where to put it
        how = importlib.import_module(f"prepare.{name}").HELP
    else:
        there = [file.parent.name for file in Path(root).glob("*/dataset.json")
                 if not re.fullmatch(rf"({'|'.join(toy.WORLDS)})-s\d+", file.parent.name)]
        names = nearest_first(name, {*toy.WORLDS, *PREPARED, *there})
        how = (f"There are {', '.join(names)}. Make your own with: python -m prepare.custom"
               f" INDEX.jsonl --name {name} --data-root {root}")
    raise FileNotFoundError(f"no prepared data in {folder}. {how}. Without any download:"
                            " --dataset toy")


def find_toy(folder: Path, name: str, seed: int) -> Path:
    """The generated world; made anew where the code that makes it has changed.

    Raises ValueError while another process makes it.
    """
    made_by = {}
    for file in ("prepare/toy.py", "prepare/creatures.py", "data.py"):
        made_by[file] = fingerprint.hash_of_code(fingerprint.PROJECT / file)
    if not why_anew(folder, made_by):
        return folder
    locks.lock(folder)
    try:
        why = why_anew(folder, made_by)                   # another process may just have made it
        if why:
            print(why, flush=True)
            if folder.exists():                           # toy.make never overwrites
                old = folder.with_name(f".{folder.name}.0")     # toy.make clears it away
                shutil.rmtree(old, ignore_errors=True)    # of a process that was killed just here
                os.replace(folder, old)
            with files.naming(folder):
                toy.make(folder, name, seed, made_by)
    finally:
        locks.unlock(folder)
    return folder


def why_anew(folder: Path, made_by: dict) -> str:
    """Why a world must be made, as it is told; "" where it is there and of the same code."""
    if not (folder / "dataset.json").exists():
        return f"making {folder} (some seconds)"
    before = data.read_json(folder / "dataset.json").get("made_by")
    if not isinstance(before, dict):
        before = {}
    changed = [file for file in made_by if before.get(file) != made_by[file]]
    if not changed:
        return ""
    why = fingerprint.sentence(changed) if before else "nobody wrote down which code made it"
    return f"{why}: making {folder} anew"


def has(dataset: str, info: dict, modality: str) -> str:
    """What a data set has, for a modality that it has not."""
    return f"{dataset} has {', '.join(nearest_first(modality, info['modalities']))}"


def nearest_first(name: str, names) -> list[str]:
    near = difflib.get_close_matches(name, names, n=3)
    return near + sorted(set(names) - set(near))


def check_device(device: str) -> None:
    """Raises ValueError in one line for a device that torch does not know or have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None


# ---- Encoders ----

def of_modality(values: list[str], modality: str, default=None):
    """["audio=resnet18", "vit_b32"] -> resnet18 for audio, vit_b32 for all others."""
    named = dict(value.split("=", 1) for value in values if "=" in value)
    for value in values:
        if "=" not in value:
            default = value
    return named.get(modality, default)


def encoder_of(args, modality: str) -> str:
    """The encoder asked for, that of a folder in --pretrained, or the one of Table 2."""
    start = of_modality(args.pretrained, modality)
    if start and Path(start).is_dir():
        if any(value.startswith(f"{modality}=") for value in args.encoder):
            raise ValueError(f"--pretrained {start} is a folder and says its own encoder: leave"
                             f" --encoder {modality}=... out")
        return configs.encoder_name(Path(start))
    encoder = of_modality(args.encoder, modality, paper.encoders_for(args.dataset).get(modality))
    if not encoder:
        raise ValueError(f"no encoder is known for modality {modality} of {args.dataset}: name one,"
                         f" --encoder {modality}=NAME")
    check_encoder(encoder)
    return encoder


def check_encoder(name: str) -> None:
    if name not in BUILD:
        raise ValueError(f"no encoder is called {name}; there are"
                         f" {', '.join(nearest_first(name, BUILD))}")


def encoders_of(args, info: dict) -> dict[str, str]:
    return {m: encoder_of(args, m) for m in info["modalities"]}


def pretrained_of(args, modality: str, encoder: str) -> str:
    """What the encoder starts from: a file or folder, "none", or its own name for its public
    checkpoint."""
    public = encoder if encoder in checkpoints.PUBLIC else "none"
    return of_modality(args.pretrained, modality, public)


def start_settings(args, modality: str, encoder: str) -> dict:
    """What a run starts from. Of a file or folder also its hash, so that another one under the same
    path is noticed, and what it says of the encoder beyond its name."""
    start = pretrained_of(args, modality, encoder)
    settings = dict(pretrained=start)
    if start not in ("none", encoder):
        settings["pretrained_sha256"] = fingerprint.of_files(configs.files_of(Path(start)))
        if sizes := configs.sizes_in(Path(start), encoder):
            settings["sizes"] = sizes
    return settings


# ---- Settings: all that a result depends on, apart from code and data ----

def common_settings(args, seed: int, info: dict, epochs: int) -> dict:
    setting = paper.settings_for(args.dataset)
    on_gpu = args.device.startswith("cuda")
    settings = dict(dataset=args.dataset, seed=seed, epochs=epochs,
                    batch_size=args.batch_size or setting["batch_size"],
                    precision=args.precision or ("bf16" if on_gpu else "fp32"),
                    classes=info["classes"], samples=info.get("counts"),
                    **{key: setting[key] for key in RECIPE})
    if args.micro_batch:
        settings["micro_batch"] = args.micro_batch
    if args.drop_path is not None:
        settings["drop_path"] = args.drop_path
    if args.share < 1:
        settings["share"] = args.share
    return settings


def unimodal_settings(args, modality: str, seed: int, info: dict) -> dict:
    """Of step 1. A joint script takes a finished run as it is (`of_step_1`), as far as its own
    command line does not ask for something else."""
    if modality not in info["modalities"]:
        raise ValueError(f"--modality {modality}: {has(args.dataset, info, modality)}")
    setting, encoder = paper.settings_for(args.dataset), encoder_of(args, modality)
    settings = dict(method="unimodal", modality=modality, encoder=encoder,
                    **start_settings(args, modality, encoder),
                    lr=args.lr or paper.umft_lr(args.dataset, encoder, modality),
                    optimizer=setting["optimizer"].get(modality, "adamw"),
                    **common_settings(args, seed, info, args.epochs or setting["umft_epochs"]))
    folder = Path(args.out) / args.dataset / run_name(args, settings)
    as_step_1 = getattr(args, "as_step_1", False) and (folder / "result.json").exists()
    if as_step_1 and not stored.damage(folder):
        before = stored.read_config(folder)["settings"]
        start = of_modality(args.pretrained, modality)
        asked = dict(epochs=args.epochs, lr=args.lr, pretrained=start, pretrained_sha256=start,
                     sizes=start)
        say_what_stays(args, folder, before)
        fixed = ("dataset", "encoder", "seed", "classes", "samples")
        for key, value in before.items():
            if key not in fixed and asked.get(key) is None:
                settings[key] = value
        if "micro_batch" not in before:                   # it only saves memory
            settings.pop("micro_batch", None)
    return settings


def say_what_stays(args, folder: Path, before: dict) -> None:
    """One line where the finished step 1 has not what the command line says of all training."""
    asked = dict(batch_size=args.batch_size, precision=args.precision, drop_path=args.drop_path)
    for key, value in asked.items():
        if value is not None and key in before and before[key] != value:
            name = key.replace("_", " ")
            print(f"{folder}: taken as it is, its {name} is {before[key]}, not {value}")


def of_step_1(args) -> argparse.Namespace:
    """The arguments of a joint script as those of step 1."""
    changed = dict(epochs=getattr(args, "umft_epochs", None), lr=getattr(args, "umft_lr", None),
                   as_step_1=True)
    return argparse.Namespace(**{**vars(args), **changed})


def joint_settings(args, seed: int, info: dict, method: str, unimodal: dict | None = None,
                   tune: str = "joint", lr: float | None = None, lora: list | None = None,
                   fusion: str = "joint", options=()) -> dict:
    """Of a run with all modalities.

    tune: "lora" and "full" train as long as the paper's step 3, or, without uni-modal runs to
    start from, as long as steps 1 and 3; "joint" as long as step 1, so that every compared method
    has the budget of uni-modal training. lr: the method's own default. options: names of the
    method's own arguments.
    """
    if len(info["modalities"]) < 2:
        raise ValueError(f"{args.dataset} has only {', '.join(info['modalities'])}: {method} needs"
                         " two modalities or more")
    setting, encoders = paper.settings_for(args.dataset), encoders_of(args, info)
    epochs = setting["umft_epochs"] if tune == "joint" else setting["epochs"]
    if tune == "lora" and not unimodal:
        epochs += setting["umft_epochs"]
    lr = lr or paper.joint_lr(args.dataset, encoders, tune)
    args.default_lr = lr                                  # another one is named in the folder
    settings = dict(method=method, encoders=encoders, fusion=fusion, lr=args.lr or lr,
                    **common_settings(args, seed, info, args.epochs or epochs))
    if lora:
        settings.update(lora=sorted(lora), rank=args.rank)
    if options:
        settings["options"] = {name: getattr(args, name) for name in options}
    if unimodal:
        settings["unimodal"] = {}
        for m, run in unimodal.items():
            model = run.folder / "model.safetensors"
            settings["unimodal"][m] = dict(run=run.folder.name, sha256=fingerprint.sha256(model))
            if "sizes" in run.settings:
                settings.setdefault("sizes", {})[m] = run.settings["sizes"]
    else:
        for m, encoder in encoders.items():
            for key, value in start_settings(args, m, encoder).items():
                settings.setdefault(key, {})[m] = value
    return settings


def lora_modalities(args, info: dict) -> list[str]:
    """Whose models get LoRA: what --lora says, else the paper's choice for the data set."""
    there = list(info["modalities"])
    asked = args.lora or paper.settings_for(args.dataset)["lora"] or there
    if args.lora == ["all"]:
        asked = there
    unknown = sorted(set(asked) - set(there))
    if unknown:
        raise ValueError(f"--lora {' '.join(unknown)}: {has(args.dataset, info, unknown[0])}, or"
                         " all")
    return [m for m in there if m in asked]


def run_name(args, settings: dict) -> str:
    """<method>[-options][-modality-encoder][-lr]-s<seed>; only what is not the default is named."""
    default = paper.encoders_for(args.dataset)
    words = [settings["method"]]
    if settings["method"] == "unimodal":
        words.append(settings["modality"])
        if settings["encoder"] != default.get(settings["modality"]):
            words.append(settings["encoder"])
        if "share" in settings:
            words.append(f"share{settings['share']:g}")
        return "-".join([*words, f"s{settings['seed']}"])
    if "lora" in settings:
        everyone = len(settings["lora"]) == len(settings["encoders"])
        words += ["all" if everyone else "+".join(settings["lora"]), f"r{settings['rank']}"]
    for name, value in settings.get("options", {}).items():
        if value != args.default_of(name):
            words.append(name.replace("_", "-"))
            if isinstance(value, list):
                words += [v if isinstance(v, str) else f"{v:g}" for v in value]
            elif value is not True:
                words.append(str(value))
    for m, encoder in settings["encoders"].items():
        if encoder != default.get(m):
            words.append(f"{m}-{encoder}")
    if "drop_path" in settings:
        words.append(f"drop-path{settings['drop_path']:g}")
    if "share" in settings:
        words.append(f"share{settings['share']:g}")
    if settings["lr"] != args.default_lr:
        words.append(f"lr{settings['lr']:g}")
    return "-".join([*words, f"s{settings['seed']}"])
