"""Step 1 of MMLoRA: fine-tune one encoder, with a linear head, on one modality alone (Eq. 1).

    python train_unimodal.py --modality audio                                       # the toy, under a minute on a laptop
    python train_unimodal.py --dataset crema_d --modality visual                    # OpenCLIP ViT-B/16, learning rate of App. A.1
    python train_unimodal.py --dataset crema_d --modality audio --encoder resnet18 --pretrained none

Defaults (encoder, learning rate, batch size, epochs, optimiser) are the paper's, from `paper.py`. The epoch with the best validation score
is kept, the test split is used once, at the end. A run that was killed goes on from its last whole epoch.
"""
import argparse
import functools
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import checkpoints
import data
import evaluate
import paper
from lora import mean_prob_loss


# ------------------------------------------------------------------------------------------------ optimisation
class BertAdam(torch.optim.Optimizer):
    """The optimiser BERT was fine-tuned with (Sec. 4.1.2): Adam without bias correction, with warm-up, decay to zero and clipping inside.

    Gradients are clipped to norm 1 per tensor, not globally; epsilon 1e-6 stands outside the root; weight decay is added to the update and
    so does not pass through the moments; the learning rate rises linearly for the share `warmup` of `t_total` steps and then falls linearly to
    0 (the first step has rate 0). warmup or t_total of -1 turn that off. As in pytorch_pretrained_bert 0.6.2, which MMBT trains with.
    """

    def __init__(self, params, lr: float, warmup: float = -1, t_total: int = -1, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, warmup=warmup, t_total=t_total, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0), m=torch.zeros_like(p), v=torch.zeros_like(p))
                g = p.grad * torch.clamp(1 / (p.grad.norm() + 1e-6), max=1)
                state["m"].lerp_(g, 0.1)
                state["v"].lerp_(g * g, 0.001)
                update = state["m"] / (state["v"].sqrt() + 1e-6) + group["weight_decay"] * p
                p -= group["lr"] * self.factor(int(state["step"]), group) * update
                state["step"] += 1
        return loss

    @staticmethod
    def factor(step: int, group: dict) -> float:
        if group["t_total"] < 0:
            return 1.0
        x, warmup = step / group["t_total"], group["warmup"]
        return x / warmup if x < warmup else max((x - 1) / (warmup - 1), 0.0)


def make_optimizer(name: str, model: torch.nn.Module, lr: float, weight_decay: float, steps: int) -> torch.optim.Optimizer:
    """`name`: adamw, bertadam (language) or sgd (optical flow), as Sec. 4.1.2 says. `steps`: of the whole run, for BertAdam's decay."""
    decayed, spared = [], []
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:      # decay pulls towards zero, where a bias or a norm's gain has no reason to be; BA has none to shrink back to W0 either
            (spared if p.ndim < 2 or parameter_name.endswith(("lora_A", "lora_B")) else decayed).append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=spared, weight_decay=0.0)]
    if name == "bertadam":
        return BertAdam(groups, lr, warmup=0.1, t_total=steps)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr, fused=True)


def lr_factor(schedule: str, step: int, steps: int, history: list[float]) -> float:
    """What the learning rate is multiplied with before `step` of `steps`. history: the validation score of every epoch so far.

    "plateau": halved when two epochs in a row brought no improvement (App. A.2). "cosine": 5 % warm-up, then to zero. "constant": 1.
    """
    if schedule == "cosine":
        warmup = max(1, steps // 20)
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    factor, best, flat = 1.0, -math.inf, 0
    for score in history if schedule == "plateau" else ():
        best, flat = (score, 0) if score > best else (best, flat + 1)
        if flat == 2:
            factor, flat = factor / 2, 0
    return factor


# ------------------------------------------------------------------------------------------------ arguments
def positive(kind):
    """An argparse type: a number above zero."""
    def number(text):
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value
    return number


def common_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every training script takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    a = parser.add_argument
    a("--dataset", default="toy", help="toy, toy_noisy, a data set of the paper, or the name of your own prepared one")
    a("--seed", type=int, default=0, help="initial weights, order, augmentation; for the toys also the generated world")
    a("--seeds", type=int, nargs="+", metavar="SEED", help="run all of these and report mean and standard deviation")
    a("--epochs", type=positive(int), help="default: paper.py")
    a("--batch-size", type=positive(int), help="default: 64, or 160 for image and text (Sec. 4.1.2)")
    a("--micro-batch", type=positive(int), help="forward and backward this many samples at a time when the batch does not fit into memory; same gradients")
    a("--lr", type=positive(float), nargs="+", help="learning rate; default: App. A. Of several, joint training keeps the best on validation")
    a("--encoder", nargs="+", metavar="[MODALITY=]NAME", default=[], help="another backbone than Table 2's, e.g. resnet18, or audio=resnet18")
    a("--pretrained", nargs="+", metavar="[MODALITY=]PATH", default=[], help="a public checkpoint, or none for random weights; default: the public one, downloaded")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--precision", choices=("fp32", "bf16"), help="bf16 = autocast; default: bf16 on cuda, fp32 on the CPU, where bf16 is slower")
    a("--out", default="runs", help="folder of all runs; results with other settings go to another one")
    a("--data-root", default="data", help="folder of the prepared data sets")
    a("--plot", action="store_true", help="draw the training curves into the run's folder (needs matplotlib)")
    return parser


def tuned(args, train) -> list[checkpoints.Run]:
    """One finished run a seed, of `train(args, seed)`. Of several --lr, the one with the best mean validation score over the seeds; test plays no part."""
    tried = []
    for lr in args.lr or [None]:
        tried.append((lr, [train(argparse.Namespace(**{**vars(args), "lr": lr}), seed) for seed in args.seeds or [args.seed]]))
    lr, best = max(tried, key=lambda t: validation(t[1]))
    if len(tried) > 1:
        print(f"\nlearning rate {lr:g}, best on validation: " + ", ".join(f"{lr:g} {100 * validation(runs)[0]:.1f}" for lr, runs in tried), end="")
    return best


def validation(runs: list[checkpoints.Run]) -> tuple[float, float]:
    """What learning rates are compared by: the mean validation score of joint runs over seeds; of equals the lower loss."""
    val = [r.result["val"][r.result["fusion"]] for r in runs]
    return sum(v.get("accuracy", v.get("f1_micro")) for v in val) / len(val), -sum(v["loss"] for v in val)


def of_modality(values: list[str], modality: str, default=None):
    """`["audio=resnet18", "vit_b32"]` -> resnet18 for audio, vit_b32 for all others."""
    named = dict(v.split("=", 1) for v in values if "=" in v)
    return named.get(modality, next((v for v in values if "=" not in v), default))


def open_data(args, seed: int) -> tuple[Path, dict]:
    """-> the folder of the prepared data and its dataset.json; with what else can be checked of the command line before any work."""
    evaluate.check_device(args.device)
    if args.plot:
        evaluate.import_pyplot()
    folder = data.find(args.data_root, args.dataset, seed)
    info = json.loads((folder / "dataset.json").read_text())
    for value in [*args.encoder, *args.pretrained]:
        if "=" in value and value.split("=")[0] not in info["modalities"]:
            raise ValueError(f"{value}: {args.dataset} has no modality {value.split('=')[0]}, but {', '.join(info['modalities'])}")
    return folder, info


def recipe(setting: dict) -> dict:
    """What of paper.py, beside the arguments, a result depends on: it belongs to the settings of a run."""
    return {k: setting[k] for k in ("schedule", "weight_decay", "crop", "flip", "frames", "audio_shift")}


def precision(args) -> str:
    return args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")


def peak_memory_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ------------------------------------------------------------------------------------------------ the loop
class Task(NamedTuple):
    """One run to be: what was asked for, the data, and where the results go."""
    args: argparse.Namespace
    seed: int
    folder: Path            # of the prepared data
    info: dict              # its dataset.json
    setting: dict           # of paper.py, for this data set
    run: checkpoints.Run
    split: Callable         # split("val") -> data.Split, opened when first asked for: before the end, nobody asks for "test"
    state: dict             # how far training got, see `epochs`

    @property
    def modalities(self) -> list[str]:
        return list(self.info["modalities"])


def new_task(args, seed: int, folder: Path, info: dict, setting: dict, run: checkpoints.Run) -> Task:
    return Task(args, seed, folder, info, setting, run, functools.cache(lambda name: data.Split(folder, name)), {})


def loader(task: Task, models: torch.nn.ModuleDict) -> Callable:
    """-> load(split, index, rng=None), the inputs of samples `index`, modality -> tensor on the device; with rng augmented."""
    def load(split, index, rng=None):
        return {m: data.model_input(task.split(split), m, index, models[m].encoder, task.args.device, task.setting, rng) for m in task.modalities if m in models}
    return load


class Epoch:
    """One pass over the training samples `subset`: iterating gives batches, each a list of parts (x, y, share of the batch)."""

    def __init__(self, task: Task, optimizer, number: int, load: Callable, subset: torch.Tensor, bar=None):
        self.task, self.optimizer, self.number, self.load, self.subset, self.bar = task, optimizer, number, load, subset, bar
        self.rng = data.epoch_rng(task.seed, number)      # from here on: all randomness of this epoch
        self.seen, self.total, self.notes = 0, torch.zeros(2, device=task.args.device), {}                 # total: loss, right

    def __iter__(self):
        task, settings = self.task, self.task.run.settings
        batches = [self.subset[index] for index in data.batches(len(self.subset), settings["batch_size"], self.rng)]
        steps, schedule, history = settings["epochs"] * len(batches), task.setting["schedule"], task.state["history"]
        if isinstance(self.optimizer, BertAdam) and schedule == "cosine":
            schedule = "constant"                         # it anneals by itself
        for step, batch in enumerate(batches, (self.number - 1) * len(batches)):
            for group in self.optimizer.param_groups:
                group["lr"] = settings["lr"] * lr_factor(schedule, step, steps, history)
            x, y = self.load("train", batch, self.rng), task.split("train").labels[batch].to(task.args.device)
            parts = torch.arange(len(batch)).split(task.args.micro_batch or len(batch))      # their gradients add up to the batch's own
            yield [({m: v[i] for m, v in x.items()}, y[i], len(i) / len(batch)) for i in parts] if len(parts) > 1 else [(x, y, 1.0)]
            if self.bar:
                self.bar.update()
                if step % 10 == 0:      # reading a number off a GPU makes the program wait for it; in between it can fetch the next batch
                    loss, right = (self.total / self.seen).tolist()
                    self.bar.set_postfix_str(f"loss {loss:.3f} train {100 * right:.1f} best val {100 * task.state['best'][0]:.1f}", refresh=False)

    def count(self, loss: torch.Tensor, z: dict | torch.Tensor, y: torch.Tensor) -> None:
        """For the log: the loss and the logits of one part of a batch, joint (B, C) or modality -> (B, C), which are averaged."""
        self.seen += len(y)
        self.total += torch.stack([loss.detach() * len(y), evaluate.count_right(z if isinstance(z, dict) else {"": z.detach()}, y)])

    def note(self, **values) -> None:
        """For the log: numbers of the method's own, averaged over the epoch's batches."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(float(value))


def epochs(task: Task, models: torch.nn.ModuleDict, optimizer, judge: Callable, load: Callable, kept: Callable, subset: torch.Tensor | None = None):
    """Yield one `Epoch` after another, from where a killed run stopped. Between two: validation, log, saving. At the end the best weights are back.

    judge() -> (validation scores, key): the epoch with the greatest key is the best, the first of equals; epoch 0, before any step, is a
    candidate. kept() -> the tensors worth storing. subset: the samples of train to use, all by default. What an epoch does depends on `models`,
    the optimiser and the epoch's number alone, all of which are saved: a run that was killed goes on bit for bit as it would have.
    """
    run = task.run
    subset = torch.arange(len(task.split("train"))) if subset is None else subset
    steps = math.ceil(len(subset) / run.settings["batch_size"])                                                      # of one epoch
    tensors, state = run.resume(optimizer)
    if state:
        models.load_state_dict(tensors, strict=False)
    else:
        now, best = judge()
        run.log(dict(epoch=0, loss=None, val=now))
        run.save_tensors("model.safetensors", kept())
        state = dict(lines=1, best=best, best_epoch=0, history=[], seconds=0.0)
    task.state.update(state)
    with tqdm(total=run.settings["epochs"] * steps, initial=len(task.state["history"]) * steps, desc=f"{task.args.dataset}: {run.folder.name}",
              unit="step", dynamic_ncols=True) as bar:
        for number in range(task.state["lines"], run.settings["epochs"] + 1):
            began = time.time()
            models.train()                                # what is frozen stays in eval mode: see Encoder.train
            epoch = Epoch(task, optimizer, number, load, subset, bar)
            yield epoch
            loss, right = (epoch.total / epoch.seen).tolist()
            if not math.isfinite(loss):
                raise ValueError(f"{run.folder}: training diverged, the loss of epoch {number} is {loss}; delete the folder and try a smaller --lr")
            now, key = judge()
            improved, seconds = key > task.state["best"], time.time() - began
            task.state.update(lines=number + 1, best=max(key, task.state["best"]), best_epoch=number if improved else task.state["best_epoch"],
                              history=task.state["history"] + [key[0]], seconds=task.state["seconds"] + seconds)
            run.log(dict(epoch=number, loss=loss, train=right, val=now, seconds=seconds, samples_per_second=len(subset) / seconds,
                         **{k: sum(v) / len(v) for k, v in epoch.notes.items()}))
            run.save(kept(), optimizer, task.state, improved)
    models.load_state_dict(run.tensors("model.safetensors"), strict=False)


def fit(args, run: checkpoints.Run, models: torch.nn.ModuleDict, objective, info: dict, folder: Path, setting: dict,
        fusion: str = "prob", stored=None, optimizer: str = "adamw") -> dict:
    """Train what requires a gradient in `models` (modality -> UnimodalModel), keep the epoch with the best validation score.

    objective(x, y) -> (loss, logits) is the method: x and logits are dicts over the modalities. `stored()` gives the tensors worth keeping,
    all of them by default. Epoch 0 is a candidate: for MMLoRA it is the uni-modal ensemble.
    -> the state after the last epoch: `best_epoch`, `seconds`. The best weights are back in `models`, and in the run's model.safetensors.
    """
    task, settings, logits = new_task(args, run.settings["seed"], folder, info, setting, run), run.settings, {}
    steps = settings["epochs"] * math.ceil(len(task.split("train")) / settings["batch_size"])
    optimizer = make_optimizer(optimizer, models, settings["lr"], setting["weight_decay"], steps)
    frozen = [m for m in models if not any(p.requires_grad for p in models[m].parameters())]

    def judge():
        logits.update({m: evaluate.predict(models[m], task.split("val"), m, args.device, setting, settings["precision"])
                       for m in models if m not in logits or m not in frozen})                         # what is frozen says the same every time
        now = evaluate.all_scores(logits, task.split("val").labels, info)
        chosen = now[fusion if len(models) > 1 else next(iter(models))]
        return now, [chosen[evaluate.metric(info)], -chosen["loss"]]                                   # equal accuracy: the lower loss

    for epoch in epochs(task, models, optimizer, judge, loader(task, models), stored or models.state_dict):
        for batch in epoch:
            optimizer.zero_grad()
            for x, y, share in batch:
                with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=settings["precision"] == "bf16"):
                    loss, z = objective(x, y)
                (share * loss).backward()
                epoch.count(loss, z, y)
            optimizer.step()
    return task.state


# ------------------------------------------------------------------------------------------------ Eq. 1
def train(args, modality: str, seed: int, epochs: int | None = None, lr: float | None = None, reuse: bool = False) -> checkpoints.Run:
    """Fine-tune one modality's encoder, or return its run if that is finished already.

    reuse: take a finished run as it is, however it was trained, as far as the command line does not ask for something else.
    """
    folder, info = open_data(args, seed)
    if modality not in info["modalities"]:
        raise ValueError(f"--modality {modality}: {args.dataset} has {', '.join(info['modalities'])}")
    setting = paper.settings_for(args.dataset)
    default = paper.encoders_for(args.dataset).get(modality)
    encoder = encoder_of(args, modality)
    settings = dict(method="unimodal", dataset=args.dataset, modality=modality, encoder=encoder, seed=seed, classes=info["classes"], samples=info.get("counts"),
                    pretrained=pretrained_of(args, modality, encoder),
                    epochs=epochs or setting["umft_epochs"], batch_size=args.batch_size or setting["batch_size"],
                    lr=lr or paper.umft_lr(args.dataset, encoder, modality), optimizer=setting["optimizer"].get(modality, "adamw"), precision=precision(args), **recipe(setting))
    there = Path(args.out) / args.dataset / f"unimodal-{modality}{'' if encoder == default else '-' + encoder}-s{seed}"
    if reuse and (there / "result.json").exists():
        asked = dict(epochs=epochs, lr=lr, pretrained=of_modality(args.pretrained, modality))
        before = checkpoints.read_json(there / "config.json")["settings"]
        settings.update({k: v for k, v in before.items() if k not in ("dataset", "encoder", "seed", "classes", "samples") and asked.get(k) is None})
    run = checkpoints.Run(there, settings, info)
    if run.result:
        return run
    torch.manual_seed(seed)
    model = pretrained_model(settings["pretrained"], encoder, info, modality).to(args.device)
    models = torch.nn.ModuleDict({modality: model})

    def objective(x, y):
        z = {modality: model(x[modality])}
        return mean_prob_loss(z, y), z                                      # Eq. 1: Eq. 3 with one modality, the cross-entropy

    state = fit(args, run, models, objective, info, folder, setting, optimizer=settings["optimizer"])
    run.finish(dict(method="unimodal", dataset=args.dataset, modality=modality, encoder=encoder, seed=seed,
                    **final_scores(args, run, models, info, folder, setting), best_epoch=state["best_epoch"],
                    trained_parameters=sum(p.numel() for p in model.parameters()), seconds=state["seconds"], peak_memory_mib=peak_memory_mib(args.device)))
    return run


def encoder_of(args, modality: str) -> str:
    """The encoder asked for, or the one of Table 2."""
    encoder = of_modality(args.encoder, modality, paper.encoders_for(args.dataset).get(modality))
    if not encoder:
        raise ValueError(f"no encoder is known for modality {modality} of {args.dataset}: name one, --encoder {modality}=NAME")
    return encoder


def pretrained_of(args, modality: str, encoder: str) -> str:
    """What the encoder starts from: the file asked for, or "none"; by default its own name, which stands for the public checkpoint."""
    return of_modality(args.pretrained, modality, encoder if encoder in checkpoints.PUBLIC else "none")


def pretrained_model(pretrained: str, encoder: str, info: dict, modality: str):
    """Encoder and new head. pretrained: a file, "none", or the encoder's own name for its public checkpoint (downloaded once)."""
    model = checkpoints.new_model(encoder, info, modality)
    if pretrained != "none":
        checkpoints.load_public(model.encoder, checkpoints.download(encoder) if pretrained == encoder else Path(pretrained))
    return model


def final_scores(args, run, models, info, folder, setting) -> dict:
    """Scores of the chosen epoch on validation and on test, which is opened here and nowhere else in training. The logits are kept, too."""
    out, kept = {}, {}
    for name in ("val", "test"):
        split = data.Split(folder, name)
        logits = {m: evaluate.predict(models[m], split, m, args.device, setting, run.settings["precision"]) for m in models}
        out[name] = evaluate.all_scores(logits, split.labels, info)
        kept.update({f"{name}.{m}": z for m, z in logits.items()})
    run.save_tensors("logits.safetensors", kept)
    return out


def run(main: Callable) -> None:
    """main(), where what is wrong with the input is told in one line, with exit code 1."""
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError:
        sys.exit("error: the batch does not fit into the GPU's memory; --micro-batch 16, say, gives the same gradients piece by piece")


def main():
    parser = common_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--modality", required=True, help="audio, visual, text or flow")
    args = parser.parse_args()
    if len(args.lr or ()) > 1:
        raise ValueError("--lr: one learning rate here, since joint runs look for one uni-modal run a seed; try others with another --out")
    runs = [train(args, args.modality, seed, args.epochs, args.lr and args.lr[0]) for seed in args.seeds or [args.seed]]
    rows = [(f"{args.modality} alone, {runs[0].settings['encoder']}", [(r.result["test"][args.modality], r.result) for r in runs])]
    evaluate.print_table(rows, *open_data(args, runs[0].settings["seed"]))
    for run in runs if args.plot else ():
        evaluate.plot(run.folder)


if __name__ == "__main__":
    run(main)
