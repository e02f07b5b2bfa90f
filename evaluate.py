"""Metrics and fusion rules; the evaluation of finished runs.

    python evaluate.py --run runs/toy/mmlora-all-r1-s0                              # test scores again, from the stored weights
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --fusion entropy --plot
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --drop audio                 # as if nothing could be heard
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --drop audio --missing 0 0.3 0.7 1      # as if some could not be heard
    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --probe                      # linear evaluation of its encoders (Tables 3, 8)
    python evaluate.py --probe --dataset ave --modality visual                      # of a pre-trained encoder (Table 4)
    python evaluate.py --run runs/ave/mmlora-all-r1-s0 --clip talk.mp4              # one recording, every model's opinion of it
    python evaluate.py --run runs/ave/mmlora-all-r1-s0 --export exported            # LoRA merged, in the files' public layouts
    python evaluate.py --table 5                                                    # what of it was run, and how to run the rest: paper_tables.py

The prediction of a sample never depends on the other samples of its batch, whatever the fusion rule.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import checkpoints
import data
import paper
from lora import mean_log_prob, mean_logits, mean_prob_loss

FUSIONS = ("prob", "logits", "entropy")


# ------------------------------------------------------------------------------------------------ predictions
def check_device(device: str) -> None:
    """Raises ValueError in one line for a device that torch does not know or have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None


@torch.no_grad()
def predict(model, split: data.Split, modality: str, device: str, setting: dict, precision: str = "fp32", batch_size: int = 256,
            features: bool = False) -> torch.Tensor:
    """Logits (N, C), or features (N, D), float32 on the CPU, of the deterministic test view of every sample."""
    model.eval()
    out = []
    for index in data.batches(len(split), batch_size):
        x = data.model_input(split, modality, index, model.encoder, device, setting)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16"):
            out.append((model.features(x) if features else model(x)).float().cpu())
    return torch.cat(out)


def fuse(logits: dict[str, torch.Tensor], rule: str = "prob", multilabel: bool = False) -> torch.Tensor:
    """Class probabilities (N, C) of all modalities together.

    prob      the average of the probabilities: UME and MMLoRA, Sec. 3.2
    logits    the probabilities of the averaged logits: a product of experts
    entropy   probabilities weighted by softmax over modalities of minus their entropy, per sample: a sure modality counts more
              (test-time fusion of MLA, Zhang et al. 2024)
    """
    if rule == "logits":
        logits = mean_logits(logits)
    p = torch.stack([z.sigmoid() if multilabel else z.softmax(-1) for z in logits.values()])            # (M, N, C)
    if rule != "entropy":
        return p.mean(0)
    entropy = (torch.special.entr(p) + torch.special.entr(1 - p)).sum(-1) if multilabel else torch.special.entr(p).sum(-1)
    return (entropy.neg().softmax(0).unsqueeze(-1) * p).sum(0)


def fuse_missing(logits: dict[str, torch.Tensor], drop: list[str], share: float, rule: str = "prob", multilabel: bool = False) -> torch.Tensor:
    """`fuse` when `share` of the samples lack the modalities `drop` (0.7 = 70 % lack them) and are predicted from those they have.

    Which samples is a fixed draw: the first of one random order, so that whoever lacks a modality at 30 % lacks it at 70 %, too.
    """
    p = fuse(logits, rule, multilabel)
    lost = torch.randperm(len(p), generator=torch.Generator().manual_seed(0))[:round(share * len(p))]
    p[lost] = fuse({m: z for m, z in logits.items() if m not in drop}, rule, multilabel)[lost]
    return p


# ------------------------------------------------------------------------------------------------ metrics
def metric(info: dict) -> str:
    """The score that selects epochs: accuracy, or F1-micro where a sample has several labels."""
    return "f1_micro" if info["multilabel"] else "accuracy"


def count_right(logits: dict, y: torch.Tensor) -> torch.Tensor:
    """How many samples of a batch the averaged prediction gets right; with several labels a sample, the sum of the shares of right labels."""
    if y.ndim == 1:
        return (mean_log_prob(logits).argmax(-1) == y).float().sum()
    return ((fuse(logits, multilabel=True) > 0.5) == y.bool()).float().mean(-1).sum()


def f1(predicted: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """(micro, macro) F1 of bool (N, C). Micro pools the counts of all classes; macro averages the classes' F1, where a class that
    occurs neither in `true` nor in `predicted` counts 0 (as scikit-learn's default does)."""
    hit, either = (predicted & true).sum(0).double(), (predicted.sum(0) + true.sum(0)).double()         # F1 = 2 TP / (2 TP + FP + FN)
    return float(2 * hit.sum() / either.sum().clamp(min=1)), float((2 * hit / either.clamp(min=1)).mean())


def rates(p: torch.Tensor, labels: torch.Tensor, info: dict) -> dict:
    """Of probabilities (N, C): `accuracy` (and `groups`, accuracy per group of classes, where dataset.json names groups), or `f1_micro` and
    `f1_macro` at threshold 0.5."""
    if info["multilabel"]:
        return dict(zip(("f1_micro", "f1_macro"), f1(p > 0.5, labels.bool())))
    right = p.argmax(-1) == labels
    out = dict(accuracy=float(right.float().mean()))
    if info.get("groups"):
        out["groups"] = {g: float(right[torch.isin(labels, torch.tensor(classes))].float().mean()) for g, classes in info["groups"].items()}
    return out


def scores(logits: dict[str, torch.Tensor], labels: torch.Tensor, info: dict, fusion: str = "prob") -> dict:
    """All numbers of one prediction: its `rates`, and `loss`, Eq. 3 (of the averaged logits when those are fused)."""
    loss = float(mean_prob_loss(mean_logits(logits) if fusion == "logits" else logits, labels))
    return dict(rates(fuse(logits, fusion, info["multilabel"]), labels, info), loss=loss)


def all_scores(logits: dict, labels: torch.Tensor, info: dict) -> dict:
    """Each modality alone, under its name; with more than one also their averages, under "prob" and "logits"."""
    out = {m: scores({m: z}, labels, info) for m, z in logits.items()}
    return out if len(logits) == 1 else {**out, **{rule: scores(logits, labels, info, rule) for rule in ("prob", "logits")}}


# ------------------------------------------------------------------------------------------------ tables and curves
def mean_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def print_table(rows: list, folder: Path, info: dict) -> None:
    """rows: (label, [(scores, result)] one per seed). One seed: score +- binomial standard error; more: mean +- standard deviation."""
    name, n, seeds = metric(info), len(data.Split(folder, "test")), len(rows[0][1])
    print(f"\n{info['name']}, test split, {n} samples, {len(info['classes'])} classes. "
          + (f"Mean +- standard deviation of {seeds} seeds." if seeds > 1 else "" if info["multilabel"] else "+- is the binomial standard error of one test run."))
    extra, width = list(info.get("groups") or (["f1_macro"] if info["multilabel"] else [])), max(40, *(len(label) for label, _ in rows))
    print(f"{'':{width}}{name:>14}" + "".join(f"{g:>14}" for g in extra) + f"{'trained':>12}{'seconds':>9}")
    for label, per_seed in rows:
        cells = []
        for key in [name] + extra:
            values = [100 * (s["groups"][key] if key in s.get("groups", {}) else s[key]) for s, _ in per_seed]
            mean, std = mean_std(values)
            if seeds == 1:
                std = 100 * math.sqrt(mean / 100 * (1 - mean / 100) / n) if key == "accuracy" else None
            cells.append(f"{mean:.1f}" + (f" +- {std:.1f}" if std is not None else ""))
        result = [r for _, r in per_seed if r]
        tail = f"{result[0]['trained_parameters']:>12,}{mean_std([r['seconds'] for r in result])[0]:>9.0f}" if result else ""
        print(f"{label:{width}}" + "".join(f"{c:>14}" for c in cells) + tail)


def import_pyplot():
    """matplotlib is optional: asked for before any work, so that nobody trains for hours and then learns that it is absent."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        return pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None


def plot(folder: Path) -> None:
    """Training curves of a run -> curves.png in its folder: loss, and the validation score of each modality and of all together."""
    pyplot = import_pyplot()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    _, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot([line["epoch"] for line in log if line["loss"] is not None], [line["loss"] for line in log if line["loss"] is not None])
    left.set(xlabel="epoch", ylabel="training loss")
    for name in log[0]["val"]:
        key = "f1_micro" if "f1_micro" in log[0]["val"][name] else "accuracy"
        right.plot([line["epoch"] for line in log], [100 * line["val"][name][key] for line in log], label={"prob": "probabilities averaged", "logits": "logits averaged"}.get(name, name))
    right.set(xlabel="epoch", ylabel=f"validation {key} (%)")
    right.legend(loc="best")
    pyplot.suptitle(folder.name)
    pyplot.tight_layout()
    pyplot.savefig(folder / "curves.png", dpi=120)
    pyplot.close()
    print(f"wrote {folder / 'curves.png'}")


# ------------------------------------------------------------------------------------------------ linear evaluation
PROBE_L2 = (1e-1, 1e-2, 1e-3, 1e-4)      # ours: the paper says no more than that a linear layer is trained on the frozen encoder (Sec. 3.1)


def logistic_regression(x: torch.Tensor, y: torch.Tensor, classes: int, l2: float, start: nn.Linear | None = None) -> nn.Linear:
    """The linear layer that minimises cross-entropy + l2/2 |W|^2. x: (N, D) float64; y: (N,), or (N, C) multi-hot: a binary problem a class.

    The problem is convex, so it is solved, not trained: L-BFGS on all samples at once, from zero or from `start`, until the gradient
    vanishes. No learning rate, no epochs, no seed: two encoders compared by it differ in their features and in nothing else.
    """
    layer = nn.Linear(x.shape[1], classes, dtype=x.dtype, device=x.device)
    layer.load_state_dict(start.state_dict() if start else {name: torch.zeros_like(p) for name, p in layer.named_parameters()})
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=2000, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        z = layer(x)
        loss = F.cross_entropy(z, y) if y.ndim == 1 else F.binary_cross_entropy_with_logits(z, y.to(z), reduction="sum") / len(z)
        loss = loss + l2 / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return layer


@torch.no_grad()
def standardise(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Every feature with mean 0 and deviation 1 over `like`, so that one L2 strength means the same to all; constant ones become 0."""
    std = like.std(0)
    return (x - like.mean(0)) / std.where(std > 1e-6, torch.inf)


def probe(model, where: Path, info: dict, modality: str, device: str, setting: dict, precision: str) -> dict:
    """Linear evaluation of a frozen encoder: the L2 strength is chosen on validation, test used once, at the end."""
    begin, solver = time.time(), device if device.startswith("cuda") else "cpu"
    splits = {name: data.Split(where, name) for name in ("train", "val", "test")}
    x = {name: predict(model, split, modality, device, setting, precision, features=True).to(solver, torch.float64) for name, split in splits.items()}
    x = {name: standardise(features, x["train"]) for name, features in x.items()}

    @torch.no_grad()
    def score(layer, name):
        return scores({modality: layer(x[name]).cpu()}, splits[name].labels, info)

    layer, tried = None, []
    for l2 in PROBE_L2:         # strongest first: its solution is a good start for the next
        layer = logistic_regression(x["train"], splits["train"].labels.to(solver), len(info["classes"]), l2, layer)
        tried.append((l2, layer, score(layer, "val")))
    l2, layer, val = max(tried, key=lambda t: (t[2][metric(info)], -t[2]["loss"]))
    return dict(l2=l2, val=val, test=score(layer, "test"), trained_parameters=sum(p.numel() for p in layer.parameters()), seconds=time.time() - begin)


# ------------------------------------------------------------------------------------------------ finished runs
def but_seed(settings: dict) -> str:
    """What runs of one experiment share."""
    return json.dumps({k: v for k, v in settings.items() if k not in ("seed", "unimodal")}, sort_keys=True)


def open_run(folder: Path, args) -> tuple:
    """-> (the run's folder, that of the prepared data, its dataset.json, the settings, the models by modality)."""
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} holds no finished run (no result.json)")
    settings = checkpoints.read_json(folder / "config.json")["settings"]
    if not args.probe and settings["method"] not in ("unimodal", "mmlora", "separate", "no-umft", "full"):
        raise ValueError(f"{folder} is a run of baselines/{settings['method']}.py, which alone can predict with it; --probe can test its encoders")
    where = data.find(args.data_root, settings["dataset"], settings["seed"])
    info = checkpoints.read_json(where / "dataset.json")
    return folder, where, info, *checkpoints.load_run(folder, info, encoders_only=args.probe)


def open_pretrained(args, seed: int) -> tuple:
    """The same for the encoder of --modality as it is before any training of ours; its folder is runs/<dataset>/probe-..."""
    import train_unimodal as step1        # not above: it imports this file
    where, info = step1.open_data(args, seed)
    m, default = args.modality, paper.encoders_for(args.dataset).get(args.modality)
    if m not in info["modalities"]:
        raise ValueError(f"--modality {m}: {args.dataset} has {', '.join(info['modalities'])}")
    encoder = step1.of_modality(args.encoder, m, default)
    start = step1.pretrained_of(args, m, encoder)
    torch.manual_seed(seed)               # the weights, where nothing is pre-trained
    models = nn.ModuleDict({m: step1.pretrained_model(start, encoder, info, m)})
    run = checkpoints.Run(Path(args.out) / args.dataset / f"probe-{m}-{encoder}-s{seed}",
                          dict(method="pretrained", dataset=args.dataset, modality=m, encoder=encoder, seed=seed, pretrained=start, precision="fp32", classes=info["classes"]), info)
    run.begin()
    return run.folder, where, info, run.settings, models


def probe_rows(args, folder, where, info, settings, models) -> list:
    """Linear evaluation of the run's encoders (of one, with --modality) -> probe.json in its folder, and the rows to print."""
    if args.modality and args.modality not in models:
        raise ValueError(f"--modality {args.modality}: {folder} has {', '.join(models)}")
    found = {m: probe(models[m].to(args.device), where, info, m, args.device, paper.settings_for(settings["dataset"]), settings["precision"])
             for m in models if args.modality in (None, m)}
    old = checkpoints.read_json(folder / "probe.json") if (folder / "probe.json").exists() else {}
    checkpoints.write_json(folder / "probe.json", {**old, **found})
    print(f"\n{folder}: linear evaluation of the frozen encoders; L2 strength chosen on validation: "
          + ", ".join(f"{m} {r['l2']:g} (validation {100 * r['val'][metric(info)]:.1f})" for m, r in found.items()), end="")
    return [(f"{m}, linear evaluation", [(r["test"], r)]) for m, r in found.items()]


def score_rows(args, folder, where, info, settings, models) -> list:
    """Test scores of every modality alone and of all together, of UME and of what training made of it: without the modalities of --drop, or
    with the share --missing of the samples lacking them."""
    kept = [m for m in models if m not in args.drop]
    if unknown := set(args.drop) - set(models):
        raise ValueError(f"--drop {' '.join(unknown)}: {folder} has {', '.join(models)}")
    if not kept:
        raise ValueError(f"--drop leaves no modality of {folder}")
    test, setting, shares, fusion = data.Split(where, "test"), paper.settings_for(settings["dataset"]), args.missing, args.fusion or settings.get("fusion", "prob")
    shown, rows = [m for m in models if shares or m in kept], []
    ensembles = {"UME": {m: load_file(folder.parent / base["run"] / "logits.safetensors")[f"test.{m}"] for m, base in settings["unimodal"].items() if m in shown}
                 } if "unimodal" in settings else {}                # what the run started from
    ensembles["together"] = {m: predict(models[m].to(args.device), test, m, args.device, setting, settings["precision"]) for m in shown}
    for name, logits in ensembles.items():
        rows += [(f"{m} alone" + " (UMFT)" * (name == "UME"), [(scores({m: z}, test.labels, info), None)]) for m, z in logits.items()]
        if len(logits) > 1:
            rows.append((f"{name}, fusion {fusion}", [(scores(logits, test.labels, info, fusion), None)]))
        for share in shares:
            p = fuse_missing(logits, args.drop, share, fusion, info["multilabel"])
            rows.append((f"{name}, {' and '.join(args.drop)} missing in {100 * share:g} %", [(rates(p, test.labels, info), None)]))
    print(f"\n{folder}" + (f", without {', '.join(args.drop)}" if args.drop and not shares else ""), end="")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--run", nargs="+", type=Path, metavar="RUN", help="folders of finished runs; of those that differ only in the seed also the mean")
    a("--fusion", choices=FUSIONS, help="what is averaged over modalities; default: what the run was trained with")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--drop", nargs="+", default=[], metavar="MODALITY", help="leave these modalities out of the average")
    a("--missing", nargs="+", type=float, default=[], metavar="SHARE", help="shares of the samples that lose --drop: 0.7 = 70 %% of the samples lose it")
    a("--plot", action="store_true", help="draw each run's training curves, or the table (needs matplotlib)")
    one("--probe", action="store_true", help="linear evaluation: of the encoders of --run, or of the pre-trained one of --dataset and --modality")
    one("--export", type=Path, metavar="DIR", help="write the encoders of --run, LoRA merged, as public checkpoints into a new folder")
    one("--table", type=int, choices=list(paper.TABLES), metavar="N", help="the paper's Table N and our runs under --out; with --dataset toy, the toy's")
    one("--clip", nargs="+", default=[], metavar="[MODALITY=]FILE", help="the likeliest classes of one video, picture or sound that is in no data set")
    a("--text", help="with --clip or alone: its text")
    a("--tokenizer", nargs="+", metavar="FILE", help="for --text: vocabulary files, where the data were not prepared with the public one")
    a("--fill", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="with --table, and last: first run what it lacks, with these further arguments to all training")
    a("--dataset", help="for --probe without --run; toy or toy_noisy for --table")
    a("--modality", help="for --probe; default: all that --run has")
    a("--encoder", nargs="+", default=[], metavar="NAME", help="for --probe: another one than Table 2's")
    a("--pretrained", nargs="+", default=[], metavar="PATH", help="for --probe: a public checkpoint, or none for random weights; default: the public one, downloaded")
    a("--seed", type=int, default=0, help="for --probe: of random weights, and of the toy's world")
    a("--seeds", type=int, nargs="+", metavar="SEED", help="all of these, for --probe --dataset and for --fill")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--out", default="runs", help="folder of all runs")
    a("--data-root", default="data", help="folder of the prepared data sets")
    args = parser.parse_args()
    if args.plot:
        import_pyplot()
    check_device(args.device)
    if args.run and (args.clip or args.text is not None):
        import one_clip        # not above: it imports this file
        for folder in args.run:
            one_clip.show(folder, args)
        return
    if args.export and len(args.run or ()) != 1:
        raise ValueError("--export takes one --run")
    if [bool(args.run), args.table is not None, bool(args.probe and args.dataset and args.modality)].count(True) != 1:
        raise ValueError("give one of: --run RUN, --table N, --probe --dataset NAME --modality NAME")
    if args.fill is not None and not args.table:
        raise ValueError("--fill goes with --table N")
    if args.missing and not (args.drop and all(0 <= share <= 1 for share in args.missing)):
        raise ValueError("--missing needs --drop MODALITY and shares from 0 to 1: 0.7 = 70 % of the samples lose that modality")
    if args.table:
        if args.dataset not in (None, *data.WORLDS):
            raise ValueError(f"--table asks {args.dataset} nothing: its data sets are the paper's, or with --dataset one of {', '.join(data.WORLDS)}")
        import paper_tables        # not above: it imports this file
        if args.dataset and args.table not in paper_tables.TOY_TABLES:
            raise ValueError(f"--table {args.table} cannot be asked of a toy, which has one encoder for sound and one for pictures; those that can: {', '.join(map(str, paper_tables.TOY_TABLES))}")
        if args.fill is not None:
            paper_tables.fill(args.table, args.dataset, args.seeds or [args.seed], ["--out", args.out, "--data-root", args.data_root, "--device", args.device], args.fill)
        paper_tables.show(args.table, Path(args.out), args.dataset)
        return print(f"\nwrote {paper_tables.draw(args.table, Path(args.out), args.dataset)}") if args.plot else None
    same = {}
    for what in args.run or args.seeds or [args.seed]:
        folder, where, info, settings, models = opened = open_run(what, args) if args.run else open_pretrained(args, what)
        if args.export:
            checkpoints.export_run(folder, settings, models, info, args.export)
            continue
        rows = (probe_rows if args.probe else score_rows)(args, *opened)
        print_table(rows, where, info)
        same.setdefault(but_seed(settings), []).append((folder.name, rows, where, info))
        if args.plot:
            plot(folder)
    for runs in same.values():
        if len(runs) > 1:
            print("\n" + ", ".join(name for name, *_ in runs), end="")
            print_table([(rows[0][0], [score for _, scores in rows for score in scores]) for rows in zip(*(rows for _, rows, _, _ in runs))], *runs[0][2:])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
