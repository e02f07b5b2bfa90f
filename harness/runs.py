"""The folder of one training run: what was asked for, how far it got, the best epoch, the result.

    config.json          settings; dataset.json of the data, so that a run can be used without them;
                         fingerprint of code and data, command line, commit, versions
    log.jsonl            one line an epoch
    last.safetensors     what is needed to go on from the last whole epoch; gone at the end
    model.safetensors    the best epoch so far
    logits.safetensors   validation and test logits of the best epoch
    result.json          written last: a run that has it is finished

Every file is written under another name first and then renamed. A run that is killed at any moment
finds whole files when it is started again, and on a CPU ends in the same bits. While it trains, a
lock beside the folder keeps other processes out (`prepare/locks.py`).
"""
import datetime
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
from harness import files, fingerprint, metrics, stored
from harness.files import write_json, write_tensors, write_text
from prepare import locks

SIGNS = ("config.json", "last.safetensors", "result.json")     # of a run in a folder
current = None     # the run that is being trained: for the line that Ctrl-C ends with


class Run:
    """One training run. A training script calls, in this order:

        run = Run(args, name, settings, data_folder, info, __file__)
        if run.finished: return run                       # the same command has been run before
        epoch = run.resume(models, optimizer)             # where to start
        for index in run.progress(batches, epoch): ...    # one epoch, with a line on the screen
            run.count(loss, logits, y)
        run.end_of_epoch(epoch, logits of val, tensors worth keeping)
        run.load_best(models)
        run.finish(logits of val and test, models)

    Raises ValueError where the folder holds a run with other settings, of other code or on other
    data, or a damaged one; with --again that run is moved aside. Toys are trained anew without
    being asked. Raises ValueError, too, while another process trains the run.
    """

    def __init__(self, args, name: str, settings: dict, data_folder: Path, info: dict, script: str):
        self.folder = Path(args.out) / args.dataset / name
        self.settings = json.loads(json.dumps(settings))     # as it will be read back
        self.data_folder, self.info, self.device = data_folder, info, args.device
        self.fingerprint = fingerprint.of_run(script, data_folder)
        self.history, self.scores, self.bar = [], {}, None
        self.start_counting()
        if not self.finished:
            locks.lock(self.folder)
        if any((self.folder / name).exists() for name in SIGNS):
            self.compare_with_earlier(args.again)
        if self.finished:
            last = self.folder / "last.safetensors"
            if last.exists():                             # it was killed just before
                last.unlink()
            print(f"{self.folder}: trained on {self.date()}, nothing to do", flush=True)

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """A finished run, to be shown: `settings`, `result`, `tensors(name)`."""
        run = cls.__new__(cls)
        run.folder = folder
        run.settings = stored.read_config(folder)["settings"]
        return run

    # ---- Before training ----

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def result(self) -> dict | None:
        return stored.read_result(self.folder, self.settings) if self.finished else None

    def date(self) -> str:
        seconds = (self.folder / "result.json").stat().st_mtime
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")

    def compare_with_earlier(self, again: bool) -> None:
        """What to do with the run that is in the folder already."""
        damaged = stored.damage(self.folder)
        if damaged and not again:
            raise ValueError(f"{damaged}; --again moves the run aside and trains anew")
        if damaged:
            print(f"{damaged}: training anew (the old run is now {self.move_aside()})", flush=True)
            return
        config = stored.read_config(self.folder)
        before, now = dict(config["settings"]), dict(self.settings)
        changes = fingerprint.differences(config.get("fingerprint"), self.fingerprint)
        if before.pop("unimodal", None) != now.pop("unimodal", None):
            changes.append("its uni-modal models")
        other = []
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                other.append(f"{key} {before.get(key)} (now {now.get(key)})")
        if other and not again:
            raise ValueError(f"{self.folder} is a run with {', '.join(other)}; use another --out,"
                             " or --again, which moves it aside and trains anew")
        if other:
            changes.append("settings")
        if not changes:
            return
        said = fingerprint.sentence(changes)
        toy = "made_by" in self.info                      # generated, and trained in seconds
        if not again and not toy:
            raise ValueError(f"{self.folder}: {said} since it was trained; --again moves it aside"
                             " and trains anew")
        aside = self.move_aside()
        print(f"{said}: training {self.folder} anew (the old run is now {aside})", flush=True)

    def move_aside(self) -> Path:
        """Into runs/<dataset>/old/, where tables do not look."""
        locks.lock(self.folder)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        aside, n = self.folder.parent / "old" / f"{self.folder.name}-{stamp}", 1
        while aside.exists():
            n += 1
            aside = aside.with_name(f"{self.folder.name}-{stamp}-{n}")
        aside.parent.mkdir(exist_ok=True)
        os.replace(self.folder, aside)
        return aside

    def begin(self) -> None:
        """Make the folder, with config.json in it; remove what a killed process was writing.

        Not earlier: a mistake that shows before training leaves nothing behind.
        """
        for half in self.folder.glob(".*.[0-9]*"):
            half.unlink()
        if (self.folder / "config.json").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        made = {k: v for k, v in self.info.items() if k not in ("unreadable", "sha256")}
        versions = dict(python=sys.version.split()[0], torch=torch.__version__,
                        numpy=np.__version__)
        config = dict(settings=self.settings, data=made, fingerprint=self.fingerprint,
                      command=" ".join(sys.argv), commit=commit(), versions=versions)
        write_json(self.folder / "config.json", config)

    def resume(self, models: nn.ModuleDict, optimizer) -> int:
        """-> the first epoch to train; 0 for a new run.

        Fills `models` and `optimizer` from the last whole epoch, and cuts the log back to it.
        """
        global current
        current = self
        self.optimizer = optimizer
        self.begin()
        reset_peak_memory(self.device)
        self.best, self.best_epoch, self.seconds = None, 0, 0.0
        self.start_counting()
        last, log = self.folder / "last.safetensors", self.folder / "log.jsonl"
        if last.exists():
            try:
                state, tensors, moments = self.read_last(models, optimizer)
            except (ValueError, FileNotFoundError) as error:
                print(f"{error}: {self.folder} begins again", flush=True)
                last.unlink()
        if not last.exists():
            log.unlink(missing_ok=True)
            return 0
        write_text(log, self.cut_log(state["lines"]))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        models.load_state_dict(tensors, strict=False)
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.history, self.seconds = state["history"], state["seconds"]
        print(f"{self.folder}: going on from epoch {state['lines']}", flush=True)
        return state["lines"]

    def read_last(self, models: nn.ModuleDict, optimizer) -> tuple[dict, dict, dict]:
        """-> state, tensors, and moments of the optimiser, of the last whole epoch.

        Raises ValueError where last.safetensors is damaged or of another run, and where
        model.safetensors, the best epoch so far, does not go with it.
        """
        file = self.folder / "last.safetensors"
        best, _ = files.read_tensors(self.folder / "model.safetensors")
        tensors, metadata = files.read_tensors(file)
        moments = {}
        try:
            for key in list(tensors):
                if key.startswith("optimizer/"):
                    _, parameter, name = key.split("/")
                    moments.setdefault(int(parameter), {})[name] = tensors.pop(key)
            check_moments(moments, optimizer)
            state = json.loads(metadata["state"])
            check_state(state)
            same = state["settings"] == self.settings
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from None
        ours = {name: (t.shape, t.dtype) for name, t in models.state_dict().items()}
        saved = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {name for name, p in models.named_parameters() if id(p) in steps}
        fits = all(ours.get(name, shape) == shape for name, shape in saved.items())
        if not (same and fits and trained <= saved.keys()):
            raise ValueError(f"{file} is of another run")
        # The best epoch may hold more: before a joint baseline is tested, it is saved whole.
        if not saved.items() <= {name: (t.shape, t.dtype) for name, t in best.items()}.items():
            raise ValueError(f"{self.folder / 'model.safetensors'} is of another run")
        return state, tensors, moments

    def cut_log(self, lines: int) -> str:
        """The first `lines` lines of log.jsonl. Raises ValueError where they are not there."""
        log = self.folder / "log.jsonl"
        kept = log.read_bytes().splitlines(True)[:lines] if log.exists() else []
        try:
            epochs = [json.loads(line)["epoch"] for line in kept]
        except (ValueError, KeyError, TypeError):
            epochs = []
        if epochs != list(range(lines)):
            raise ValueError(f"{log} is damaged: it lacks some of the epochs 0 to {lines - 1}; put"
                             f" it back, or delete {self.folder} and train anew")
        return b"".join(kept).decode()

    # ---- One epoch ----

    def start_counting(self) -> None:
        # Not time.time(): somebody may set the clock.
        self.began, self.training_seconds = time.perf_counter(), 0.0
        self.seen, self.total, self.notes = 0, torch.zeros(2, device=self.device), {}
        self.step, self.losses = 0, []                        # (step, loss), not yet looked at

    def progress(self, batches: list, epoch: int):
        """The batches of one epoch, with a line on the screen. `break` may leave the loop."""
        began = time.perf_counter()
        self.seen, self.total, self.notes = 0, torch.zeros(2, device=self.device), {}
        if self.bar is None:
            done = (epoch - 1) * len(batches)
            self.bar = tqdm(total=self.settings["epochs"] * len(batches), initial=done,
                            leave=False, disable=None, dynamic_ncols=True,
                            bar_format="{desc} {remaining} {bar}")
        self.show(epoch)
        try:
            for i, index in enumerate(batches):
                self.step = i + 1
                yield index
                self.bar.update()
                if i % 10 == 0:
                    self.check_losses(epoch)
                    self.show(epoch)
        finally:
            self.bar.n = epoch * len(batches)                 # also after `break`
            # Reading a number off a GPU waits for it: what was queued belongs to training.
            self.total = self.total.cpu()
            self.training_seconds = time.perf_counter() - began

    def count(self, loss: torch.Tensor, logits: dict, y: torch.Tensor) -> None:
        """For the log: the loss and the logits, name -> (B, C), of one part of a batch."""
        if "joint" in logits:                             # a method with a head of its own
            logits = {"joint": logits["joint"]}
        right = metrics.count_right({name: z.detach() for name, z in logits.items()}, y)
        self.seen += len(y)
        self.losses.append((self.step, loss.detach()))
        self.total += torch.stack([loss.detach() * len(y), right])

    def note(self, **values) -> None:
        """For the log: numbers of the method's own, averaged over the batches of the epoch."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(float(value))

    def end_of_epoch(self, epoch: int, logits: dict, tensors: dict) -> None:
        """Score the validation logits, write the log, save `tensors` where the epoch is the best.

        Epoch 0, before any step, is a candidate like the others. Raises ValueError when the loss
        is not finite, on train or on val.
        """
        counted = dict(loss=None)
        if epoch > 0:
            counted = self.counted(epoch)
        self.scores = self.score(logits, "val")
        chosen = self.scores[self.fusion(self.scores)]
        if not math.isfinite(chosen["loss"]):
            self.stop(f"the validation loss of epoch {epoch}", chosen["loss"], "val")
        # Of equal scores the lower loss.
        key = [chosen[metrics.metric(self.info)], -chosen["loss"]]
        improved = self.best is None or key > self.best
        if improved:
            self.best, self.best_epoch = key, epoch
        self.log(dict(epoch=epoch, **counted, val=self.scores))
        self.show(epoch)
        if improved:
            self.save_tensors("model.safetensors", tensors)
        if epoch > 0:
            self.history.append(key[0])
            self.save_last(tensors, epoch)
        self.start_counting()

    def counted(self, epoch: int) -> dict:
        """What was counted in this epoch, for the log. `seconds` include validation, the speed
        does not."""
        self.check_losses(epoch)
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        if self.seen == 0:                                # `break` came before the first batch
            return dict(loss=None, seconds=seconds)
        loss, right = (self.total / self.seen).tolist()
        notes = {name: sum(values) / len(values) for name, values in self.notes.items()}
        speed = self.seen / max(self.training_seconds, 1e-9)
        return dict(loss=loss, train=right, seconds=seconds, samples_per_second=speed, **notes)

    def check_losses(self, epoch: int) -> None:
        """Raises ValueError for the first step whose loss is not finite."""
        if not self.losses:
            return
        steps, losses = zip(*self.losses)
        self.losses = []
        for step, loss in zip(steps, torch.stack(losses).tolist()):     # one wait for the GPU
            if not math.isfinite(loss):
                self.stop(f"the loss of epoch {epoch}, step {step},", loss, "train")

    def stop(self, what: str, loss: float, split: str) -> None:
        """Raises ValueError: a loss is not finite, and whose fault it is."""
        for name, array in data.Split(self.data_folder, split).arrays.items():
            bad = data.not_finite(array)
            if bad:
                where = self.data_folder / split / f"{name}.npy"
                raise ValueError(f"{self.folder}: {what} is {loss}, because the data are not"
                                 f" finite: {where}, {bad}; prepare them again")
        raise ValueError(f"{self.folder}: {what} is {loss}. The data are finite, so the weights are"
                         " not: training diverged; try a smaller --lr, with --again")

    def fusion(self, scores: dict) -> str:
        """The name of the prediction that chooses the epoch."""
        return self.settings.get("fusion") or next(iter(scores))

    def log(self, line: dict) -> None:
        files.append_line(self.folder / "log.jsonl", line)

    def saved(self) -> int:
        """The epoch that a next start goes on behind: what the disk says, also after Ctrl-C within
        `save_last`."""
        file = self.folder / "last.safetensors"
        if not file.exists():
            return 0
        return json.loads(files.read_metadata(file)["state"])["lines"] - 1

    def save_last(self, tensors: dict, epoch: int) -> None:
        state = dict(settings=self.settings, lines=epoch + 1, best=self.best,
                     best_epoch=self.best_epoch, history=self.history, seconds=self.seconds)
        moments = {}
        for i, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    moments[f"optimizer/{i}/{name}"] = torch.as_tensor(value)
        file = self.folder / "last.safetensors"
        write_tensors(file, tensors | moments, {"state": json.dumps(state)})

    # ---- The line on the screen ----

    def show(self, epoch: int) -> None:
        """Epoch, loss, learning rate, validation of each modality and of all, the best so far.

        With two modalities it fits 80 columns.
        """
        if self.bar is None:
            return
        what = self.settings.get("modality") or self.settings["method"]
        words = [f"{what} {epoch}/{self.settings['epochs']}"]
        if self.seen:
            words.append(f"loss {float(self.total[0]) / self.seen:.2f}")
        words.append(f"lr {self.optimizer.param_groups[0]['lr']:.0e}")
        for name, score in self.scores.items():
            percent = f"{100 * score[metrics.metric(self.info)]:.1f}"
            if name == self.settings.get("fusion"):
                words.append(f"all {percent}")
            elif name not in ("prob", "logits"):
                words.append(f"{name} {percent}")
        if self.best:
            words.append(f"best {100 * self.best[0]:.1f}")
        self.bar.set_description_str(" ".join(words), refresh=False)

    # ---- After training ----

    def load_best(self, models: nn.ModuleDict) -> None:
        """Put the weights of the best epoch back into `models`."""
        if self.bar is not None:
            self.bar.close()
        models.load_state_dict(self.tensors("model.safetensors"), strict=False)

    def finish(self, logits: dict[str, dict], models: nn.ModuleDict) -> "Run":
        """Write the result. logits: {"val": ..., "test": ...} of the best epoch, from `predict`."""
        settings, trained = self.settings, 0
        for p in models.parameters():
            if p.requires_grad:
                trained += p.numel()
        result = {}
        for key in stored.NAMED_IN_RESULT:
            if key in settings:
                result[key] = settings[key]
        tensors = {}
        for split in logits:
            result[split] = self.score(logits[split], split)
            for name, z in logits[split].items():
                tensors[f"{split}.{name}"] = z
        result |= dict(best_epoch=self.best_epoch, trained_parameters=trained, seconds=self.seconds,
                       peak_memory_mib=peak_memory_mib(self.device))
        if "unimodal" in settings and settings["fusion"] != "joint":
            result["ume"] = self.scores_of_ume(logits)
        self.save_tensors("logits.safetensors", tensors)
        write_json(self.folder / "result.json", result)
        (self.folder / "last.safetensors").unlink(missing_ok=True)
        locks.unlock(self.folder)
        self.say_how_it_ended()
        return self

    def scores_of_ume(self, splits) -> dict:
        """The ensemble the run started from, out of the stored logits of its uni-modal runs."""
        out = {}
        for split, ours in splits.items():
            n = len(next(iter(ours.values())))
            logits = stored.logits_of_step_1(self.folder, self.settings, split, n)
            out[split] = self.score(logits, split)
        return out

    def say_how_it_ended(self) -> None:
        score = f"validation {100 * self.best[0]:.1f}"
        epochs = self.settings["epochs"]
        print(f"{self.folder}: best epoch {self.best_epoch} of {epochs}, {score}", flush=True)

    # ---- Files ----

    def score(self, logits: dict, split: str) -> dict:
        there = data.Split(self.data_folder, split)
        return metrics.all_scores(logits, there.labels, self.info, there.groups)

    def save_tensors(self, name: str, tensors: dict) -> None:
        write_tensors(self.folder / name, tensors)

    def tensors(self, name: str) -> dict:
        return files.read_tensors(self.folder / name)[0]


def check_state(state: dict) -> None:
    """Raises ValueError, KeyError or TypeError where `save_last` has not written this."""
    stored.check_number(state["seconds"])
    score, loss = state["best"]
    for rate in (score, *state["history"]):
        stored.check_number(rate, top=1)
    stored.check_number(-loss)
    if state["best_epoch"] not in range(state["lines"]):
        raise ValueError(f"no epoch {state['best_epoch']}")
    if len(state["history"]) != state["lines"] - 1:
        raise ValueError("not all epochs have a score")


def check_moments(moments: dict, optimizer) -> None:
    """Raises ValueError or IndexError where the optimiser has not these parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in moments.items():
        for name, value in values.items():
            right = value.shape == parameters[i].shape and value.is_floating_point()
            right = right or value.shape == ()            # the number of steps
            if not right or values.keys() != next(iter(moments.values())).keys():
                raise ValueError(f"optimizer/{i}/{name} does not fit")


@functools.cache
def commit() -> str | None:
    """The commit of this project when the program started, where git knows it."""
    git = shutil.which("git")
    if git is None:
        return None
    asked = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True,
                           cwd=fingerprint.PROJECT)
    return asked.stdout.strip() or None


# ---- Memory ----

def reset_peak_memory(device: str) -> None:
    """From here on the peak is that of this run, not that of step 1 in the same process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):     # Linux
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: str) -> float | None:
    """Peak memory on the device, or of this process on the CPU; None where nobody tells."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2 ** 10
    return None
