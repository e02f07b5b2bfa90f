"""A page about one finished run, to look at and to listen to.

    python evaluate.py --run runs/toy/mmlora-all-r1-s0 --page

One HTML file that needs no network: the result, who is confused where, the training curves, and
test samples with what each model says of them. All of it comes from the files of the run (stored
logits, log, result) and from the prepared data; no model is loaded. The style and the script of the
page are in page.html.

Shapes: N test samples, C classes.
"""
import base64
import io
import json
import math
import wave
from collections import Counter
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
from harness import files, metrics, report, runs, stored
from prepare import creatures, toy
from prepare.media import VOCABULARIES
from pretrained import checkpoints
from pretrained.tokenizer import load_tokenizer

FILE = "page.html"                                    # in the folder of the run
SAMPLES = 60                                          # in the gallery
SIDE = 112                                            # of a picture, in pixels, at most
FRAMES = 3                                            # of a video, at most
FEW = 12                                              # classes that are shown all
WORDS = 120                                           # of a text, at most


class Model(NamedTuple):
    """What a model, or an average of models, says of the test samples."""
    name: str
    p: torch.Tensor                     # probabilities, (N, C)
    after: torch.Tensor | None = None   # of a model of step 1: what the run made of it, (N, C)


class Test(NamedTuple):
    """The test split, and who is right where."""
    info: dict
    split: data.Split
    ids: list[str]
    models: list[Model]
    right: torch.Tensor                 # bool (N, models)


def write(folder: Path, where: Path, vocabulary: list | None = None) -> Path:
    """Write page.html into the folder of a finished run. -> the file.

    where: the prepared data; vocabulary: the files of their tokenizer, if it is one's own.
    Raises ValueError where the run has learnt from other data, or its files are damaged.
    """
    run, info = runs.Run.open(folder), data.check(where)
    run.data_folder, run.info = where, info
    for base in run.settings.get("unimodal", {}).values():
        stored.check_finished(folder.parent / base["run"])
    split = data.Split(where, "test")
    models = predictions(run, len(split))
    right = torch.stack([is_right(model.p, split.labels) for model in models], 1)
    ids = (where / "test" / "ids.txt").read_text(encoding="utf-8").splitlines()
    test = Test(info, split, ids, models, right)

    parts = [head(run), result(run), confusions(test), curves(run), gallery(run, test, vocabulary)]
    page, file = Path(__file__).with_name("page.html").read_text(encoding="utf-8"), folder / FILE
    page = page.replace("<!--title-->", escape(f"{folder.name}, {info['name']}"))
    files.write_text(file, page.replace("<!--content-->", "\n".join(parts)))
    return file


# ---- What the models say ----

def predictions(run, n: int) -> list[Model]:
    """Each modality alone, UME, the run itself, from the stored logits of n test samples.

    A method with a head of its own may have no models of the modalities. Raises ValueError where
    the logits are not those of these samples.
    """
    settings, multilabel = run.settings, run.info["multilabel"]
    own, shape = {}, (n, len(run.info["classes"]))
    for name, z in run.tensors("logits.safetensors").items():
        if name.startswith("test."):
            own[name.removeprefix("test.")] = z
            if z.shape != shape:
                raise ValueError(f"{run.folder / 'logits.safetensors'} is of {len(z)} test samples,"
                                 f" but there are {n}: the run has learnt from other data")

    def probabilities(z):
        return metrics.fuse({"": z}, multilabel=multilabel)

    fusion = settings.get("fusion")
    needed = ["joint"] if fusion == "joint" else stored.encoders_of(settings)
    for name in needed:
        if name not in own:
            raise ValueError(f"{run.folder / 'logits.safetensors'} lacks the logits test.{name}")
    found, step_1 = [], {}
    if "unimodal" in settings:
        step_1 = stored.logits_of_step_1(run.folder, settings, "test", n)
    for m in stored.encoders_of(settings):
        after = probabilities(own[m]) if m in own else None
        if m in step_1:
            found.append(Model(m, probabilities(step_1[m]), after))
        elif after is not None:
            found.append(Model(m, after))
    if step_1:
        found.append(Model("UME", metrics.fuse(step_1, "prob", multilabel)))
    if fusion == "joint":
        found.append(Model(name_of(run), probabilities(own["joint"])))
    elif fusion:
        parts = {m: own[m] for m in settings["encoders"]}
        found.append(Model(name_of(run), metrics.fuse(parts, fusion, multilabel)))
    return found


def name_of(run) -> str:
    return report.NAMES.get(run.settings["method"], run.settings["method"])


def is_right(p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool (N,). Of several labels a sample all must be right."""
    if labels.ndim == 1:
        return p.argmax(1) == labels
    return ((p > 0.5) == labels.bool()).all(1)


# ---- The run, and its result ----

def head(run) -> str:
    settings, info = run.settings, run.info
    told = [f"{key} {settings[key]}" for key in ("seed", "epochs", "batch_size", "lr", "rank")
            if key in settings]
    encoders = [f"{m} {name}" for m, name in stored.encoders_of(settings).items()]
    best = run.result["best_epoch"]
    stayed = ""
    if best == 0 and "ume" in run.result and settings["fusion"] == "prob":
        stayed = " Training did not improve on UME: the chosen epoch is 0, so the two are the same."
    return (f"<h1>{escape(name_of(run))} on {escape(info['name'])}</h1>"
            f"<p class=dim>{escape(str(run.folder))}<br>{escape(', '.join(told + encoders))}<br>"
            f"chosen epoch {best}.{stayed}</p>"
            "<nav><a href='#result'>Result</a><a href='#confusions'>Confusions</a>"
            "<a href='#curves'>Curves</a><a href='#samples'>Samples</a></nav>")


def result(run) -> str:
    """The table at the end of training, with all groups."""
    rows, info = report.closing_rows([run]), run.info
    n = len(data.Split(run.data_folder, "test"))
    groups = ["f1_macro"] if info["multilabel"] else list(rows[0][1][0][0].get("groups", {}))
    heading, lines = report.cells(rows, n, info, groups)
    body = []
    for label, *texts in lines:
        texts += [""] * (len(heading) - 1 - len(texts))
        body.append(f"<tr><th>{escape(label)}</th>{in_cells(texts)}</tr>")
    names = "".join(f"<th>{escape(name)}</th>" for name in heading)
    error = "" if info["multilabel"] else " ± is the binomial standard error of one test run."
    if info["multilabel"] and "ume" in run.result:
        error = " UME, one temperature: not defined for several labels a sample."
    return (f"<h2 id=result>Result</h2><p class=dim>In %, on {n} test samples of"
            f" {len(info['classes'])} classes.{error} trained: parameters; s: seconds of training."
            f"</p><div class=wide><table class=result><thead><tr>{names}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>")


def in_cells(texts: list[str]) -> str:
    return "".join(f"<td>{escape(text).replace('+-', '±')}</td>" for text in texts)


# ---- Confusions ----

def confusions(test: Test) -> str:
    """A matrix a model, and its most frequent confusions in words."""
    start = "<h2 id=confusions>Confusions</h2>"
    if test.info["multilabel"]:
        return start + "<p>Several labels a sample: a confusion matrix is not defined.</p>"
    classes = test.info["classes"]
    figures, labels = [], test.split.labels
    for model in test.models:
        pairs = labels * len(classes) + model.p.argmax(1)
        count = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1)
        figures.append(f"<figure><h3>{escape(model.name)}</h3>{matrix(count)}"
                       f"<figcaption>{most_confused(count, classes)}</figcaption></figure>")
    numbers = "; numbers are test samples" if len(classes) <= FEW else ""
    return (f"{start}<p class=dim>Each row is a true class, each column what the model says. The"
            f" stronger the colour, the larger the share of the row{numbers}.</p>"
            f"<div class=beside>{''.join(figures)}</div>{numbered(classes)}")


def matrix(count: torch.Tensor) -> str:
    """An SVG of counts (C, C). Cells of one strength are one path: a hundred classes stay small."""
    size, share = len(count), count / count.sum(1, keepdim=True).clamp(min=1)
    cell = 300 / size
    paths, numbers = {}, []
    for row, column in count.nonzero().tolist():
        strength = math.ceil(20 * float(share[row, column])) / 20
        x, y = 24 + column * cell, 18 + row * cell
        square = f"M{x:.4g} {y:.4g}h{cell:.4g}v{cell:.4g}h-{cell:.4g}z"
        paths.setdefault(strength, []).append(square)
        if size <= FEW:
            over = " over" if strength > 0.6 else ""
            numbers.append(f"<text class='number{over}' x={x + cell / 2:.4g} y={y + cell / 2:.4g}>"
                           f"{int(count[row, column])}</text>")
    for i in range(0, size, int(nice(max(1, size / 16)))):
        at = (i + 0.5) * cell
        numbers.append(f"<text class=number x={24 + at:.4g} y=9>{i}</text>"
                       f"<text class=number x=12 y={18 + at:.4g}>{i}</text>")
    drawn = [f"<path class=cells opacity={o:g} d='{''.join(d)}'/>" for o, d in paths.items()]
    return (f"<svg viewBox='0 0 326 320' role=img aria-label='confusion matrix'>"
            f"<rect class=frame x=24 y=18 width=300 height=300 />{''.join(drawn + numbers)}</svg>")


def most_confused(count: torch.Tensor, classes: list[str]) -> str:
    wrong = count.clone().fill_diagonal_(0)
    values, places = wrong.flatten().topk(min(3, wrong.numel()))
    told = []
    for value, place in zip(values.tolist(), places.tolist()):
        if value:
            true, said = divmod(place, len(classes))
            told.append(f"{value} × {escape(classes[true])} taken for {escape(classes[said])}")
    return "<br>".join(told) or "no confusion"


def numbered(classes: list[str]) -> str:
    items = "".join(f"<li>{escape(name)}</li>" for name in classes)
    listed = f"<ol class=classes start=0>{items}</ol>"
    if len(classes) <= 32:
        return listed
    return f"<details><summary>The {len(classes)} classes</summary>{listed}</details>"


# ---- Curves ----

def curves(run) -> str:
    """Of the run; beneath it of the models that it started from."""
    parts = [curves_of(run.folder, run.result["best_epoch"], name_of(run))]
    for m in run.settings.get("unimodal", {}):
        base = report.unimodal_of(run, m)
        parts.append(curves_of(base.folder, base.result["best_epoch"], f"Step 1, {m} alone"))
    return (f"<h2 id=curves>Training curves</h2><p class=dim>The dashed line marks the epoch that"
            " validation chose. Epoch 0 is before any training.</p>"
            f"<div class=beside>{''.join(parts)}</div>")


def curves_of(folder: Path, best: int, title: str) -> str:
    losses, scores = report.curves(stored.read_log(folder))
    name = escape(title)
    return (f"<figure><h3>{name}: training loss</h3>{chart(losses, best)}</figure>"
            f"<figure><h3>{name}: validation, %</h3>{chart(scores, best)}</figure>")


def chart(series: dict[str, list], best: int) -> str:
    """An SVG of curves, name -> [(epoch, value)], and their names below it."""
    points = [point for curve in series.values() for point in curve]
    if not points:
        return "<p>Nothing was trained.</p>"
    right = max(1, best, *(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    step = nice((high - low) / 4 or 1)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step

    def at(x, y):                                         # in pixels
        return 44 + 380 * x / right, 10 + 180 * (high - y) / (high - low)

    drawn = []
    for i in range(round((high - low) / step) + 1):
        y = at(0, low + i * step)[1]
        drawn.append(f"<path class=grid d='M44 {y:.1f}h380'/><text x=38 y={y + 4:.1f}"
                     f" text-anchor=end>{low + i * step:.4g}</text>")
    for epoch in range(0, right + 1, max(1, int(nice(right / 5)))):
        drawn.append(f"<text class=number x={at(epoch, low)[0]:.1f} y=205>{epoch}</text>")
    x = at(best, low)[0]
    drawn.append(f"<path class=chosen d='M{x:.1f} 10v180'/>"
                 "<text x=424 y=222 text-anchor=end>epoch</text>")
    names = []
    for i, (name, curve) in enumerate(series.items()):
        places = [at(*point) for point in curve]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dots = "".join(f"<circle cx={x:.1f} cy={y:.1f} r=2.2 />" for x, y in places)
        drawn.append(f"<g style='color:var(--{i % 5})'><path class=curve d='M{line}'/>"
                     f"<g class=dots>{dots}</g></g>")
        names.append(f"<span class=key style='color:var(--{i % 5})'><span>{escape(name)}</span>"
                     "</span>")
    shown = "".join(names) if len(names) > 1 else ""
    return (f"<svg viewBox='0 0 430 226' role=img aria-label='curves'>{''.join(drawn)}</svg>"
            f"<figcaption>{shown}</figcaption>")


def nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= step * 0.999)


# ---- Samples ----

def gallery(run, test: Test, vocabulary: list | None) -> str:
    kinds = kinds_of(test)
    chosen = choose(kinds)
    sounds, notes = sounds_of(run, test, chosen)
    tokenizer = None
    if "text" in test.info["modalities"].values():
        tokenizer = tokenizer_of(test.info, vocabulary)
        if tokenizer is None:
            notes.append("Texts are shown as token ids: the vocabulary that made them is not here;"
                         " name its files, --tokenizer FILE.")
    index = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    cards = []
    for i in chosen:
        cards.append(f"<article class=sample data-kind={index[kinds[i]]}>{caption(test, i)}"
                     f"<div class=media>{media(test, i, sounds, tokenizer)}</div>"
                     f"{bars(test, i)}</article>")
    n = len(test.split)
    how = f"All {n} test samples."
    if len(chosen) < n:
        group = "each group and " if test.split.groups else ""
        how = (f"{len(chosen)} of {n} test samples, drawn in turn from {group}each kind of who is"
               " right and who is wrong, so that rare ones are there, too. Their shares are not"
               " those of the test split.")
    right = " Right means that all labels are right." if test.info["multilabel"] else ""
    notes = "".join(f"<p class=dim>{escape(note)}</p>" for note in notes)
    return (f"<h2 id=samples>Samples</h2><p class=dim>{how}{right}</p>{notes}"
            f"<p class=dim>{legend(test)}</p>{menus(test, kinds)}"
            f"<script type='application/json' id=kinds>{in_json(index, kinds, test)}</script>"
            f"<div class=cards>{''.join(cards)}</div>")


def kinds_of(test: Test) -> list[tuple]:
    """For each sample its groups, its classes, and who is right: what the menus ask for."""
    labels, kinds = test.split.labels, []
    for i in range(len(test.split)):
        groups = tuple(name for name, members in test.split.groups.items() if members[i])
        kinds.append((groups, tuple(classes_of(labels[i])), tuple(test.right[i].tolist())))
    return kinds


def classes_of(label: torch.Tensor) -> list[int]:
    return [int(label)] if label.ndim == 0 else label.nonzero()[:, 0].tolist()


def choose(kinds: list[tuple]) -> list[int]:
    """Which samples are shown: from each kind, but for the class, one after another in turn."""
    left = {}                                             # kind -> samples, in a fixed random order
    rng = torch.Generator().manual_seed(0)
    for i in torch.randperm(len(kinds), generator=rng).tolist():
        groups, _, right = kinds[i]
        left.setdefault((groups, right), []).append(i)
    chosen = []
    while len(chosen) < min(SAMPLES, len(kinds)):
        for samples in left.values():
            if samples and len(chosen) < SAMPLES:
                chosen.append(samples.pop())
    return sorted(chosen)


def menus(test: Test, kinds: list[tuple]) -> str:
    """The filter. `in_json` has what each kind says to these menus, in the same order."""
    asked = {}
    if test.split.groups:
        asked["group"] = list(test.split.groups)
    there = {c for _, classes, _ in kinds for c in classes}
    asked["class"] = [name for c, name in enumerate(test.info["classes"]) if c in there]
    for model in test.models:
        asked[model.name] = ["right", "wrong"]
    made = []
    for name, values in asked.items():
        options = "".join(f"<option>{escape(value)}</option>" for value in values)
        made.append(f"<label>{escape(name)}<select name='{escape(name)}'><option value=''>any"
                    f"</option>{options}</select></label>")
    return (f"<form id=filter>{''.join(made)}<button type=reset>all</button>"
            "<output id=count></output></form>")


def in_json(index: dict, kinds: list[tuple], test: Test) -> str:
    count, found = Counter(kinds), []
    for kind in index:
        groups, classes, right = kind
        values = [[test.info["classes"][c] for c in classes]]
        if test.split.groups:
            values.insert(0, groups)
        values += [["right" if is_so else "wrong"] for is_so in right]
        found.append({"values": values, "count": count[kind]})
    return json.dumps(found).replace("<", "\\u003c")      # no </script> in the name of a class


def legend(test: Test) -> str:
    told = "<span class=swatch>probability, in %</span>"
    if any(model.after is not None for model in test.models):
        told += "<span class='swatch adapted'>the same model in the run</span>"
    return told + " The true class has a frame; what a model chooses is bold."


def caption(test: Test, i: int) -> str:
    names = [test.info["classes"][c] for c in classes_of(test.split.labels[i])]
    groups = [name for name, members in test.split.groups.items() if members[i]]
    badges = []
    for model, is_so in zip(test.models, test.right[i].tolist()):
        word, sign = ("right", "✓") if is_so else ("wrong", "✗")
        badges.append(f"<span class='badge {word}'>{escape(model.name)} {sign}</span>")
    told = " · ".join([test.ids[i], *groups])
    return (f"<h3>{escape(', '.join(names) or 'no label')}</h3><div class=dim>{escape(told)}</div>"
            f"<div>{''.join(badges)}</div>")


def bars(test: Test, i: int) -> str:
    """Rows are classes, columns are models. Of many classes: the true ones, and each model's first
    three."""
    true = classes_of(test.split.labels[i])
    rows = range(len(test.info["classes"]))
    if len(rows) > FEW:
        likely = {c for model in test.models for c in model.p[i].topk(3).indices.tolist()}
        last = test.models[-1].p[i]
        rows = sorted(likely | set(true), key=lambda c: -float(last[c]))
    names = "".join(f"<th>{escape(model.name)}</th>" for model in test.models)
    lines = []
    for c in rows:
        cells = "".join(bar(model, i, c, test.info["multilabel"]) for model in test.models)
        mark = " class=true" if c in true else ""
        lines.append(f"<tr{mark}><th>{escape(test.info['classes'][c])}</th>{cells}</tr>")
    return (f"<table class=bars><thead><tr><th></th>{names}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>")


def bar(model: Model, i: int, c: int, multilabel: bool) -> str:
    p = float(model.p[i, c])
    chosen = p > 0.5 if multilabel else c == int(model.p[i].argmax())
    style, title = f"--p:{100 * p:.0f}%", f"{100 * p:.1f}"
    if model.after is not None:
        after = 100 * float(model.after[i, c])
        style, title = f"{style};--a:{after:.0f}%", f"{title}, then {after:.1f}"
    mark = " class=chosen" if chosen else ""
    return f"<td{mark} style='{style}' title='{title}'>{100 * p:.0f}</td>"


# ---- What one sees and hears ----

def media(test: Test, i: int, sounds: dict, tokenizer) -> str:
    """Every modality of a sample, and a player where there is its sound."""
    row, parts = int(test.split.rows[i]), []
    for m, kind in test.info["modalities"].items():
        array = test.split.arrays[m][row]
        if kind == "text":
            shown = f"<blockquote>{escape(words(array, tokenizer))}</blockquote>"
        elif kind == "audio":
            shown = image(spectrogram(array), m)
        else:
            shown = image(strip(array, kind), m)
        if kind == "audio" and i in sounds:
            shown += f"<audio controls preload=none src='{sounds[i]}'></audio>"
        parts.append(f"<figure>{shown}<figcaption>{escape(m)}</figcaption></figure>")
    return "".join(parts)


def strip(array: np.ndarray, kind: str) -> torch.Tensor:
    """Frames, pictures or flow of a sample, (V, C, H, W) uint8 -> side by side, (3, h, w) uint8."""
    views = data.pick_views(1, len(array), min(FRAMES, len(array)))[0].numpy()
    x = torch.from_numpy(np.array(array[views]))
    x = flow_colours(x) if kind == "flow" else x.float()
    if max(x.shape[-2:]) > SIDE:
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return torch.cat(list(x.round().clamp(0, 255).to(torch.uint8)), dim=2)


def flow_colours(x: torch.Tensor) -> torch.Tensor:
    """Flow (V, 2L, H, W) uint8, 128 is no motion -> colours (V, 3, H, W), 0 to 255, of the middle
    of each stack: the hue is the direction, the brightness is the speed."""
    middle = x.shape[1] // 4 * 2
    across, down = x[:, middle].float() - 128, x[:, middle + 1].float() - 128
    speed = (across ** 2 + down ** 2).sqrt()
    fastest = speed.flatten().quantile(0.98).clamp(min=8)
    angle = torch.atan2(down, across)
    colours = [0.5 + 0.5 * torch.cos(angle - 2 * math.pi * k / 3) for k in range(3)]
    return 255 * torch.stack(colours, 1) * (speed / fastest).clamp(max=1)[:, None]


def spectrogram(array: np.ndarray) -> torch.Tensor:
    """(clips, bins, frames) -> (3, bins, width) uint8, clips side by side, low tones at the bottom.

    Black is what 3 % of it lie below: the noise. What is silence by padding is grey, as stored.
    """
    x = torch.cat(list(torch.from_numpy(np.array(array)).float().flip(1)), dim=1)
    low, high = x.flatten().quantile(0.03), x.max()
    x = ((x - low) / (high - low).clamp(min=1e-6)).clamp(min=0)
    return (255 * x).round().to(torch.uint8).expand(3, -1, -1)


def image(x: torch.Tensor, name: str) -> str:
    """(3, h, w) uint8 -> <img>. Small ones are PNG, pixel by pixel; large ones JPEG, a tenth of the
    bytes."""
    from torchvision.io import encode_jpeg, encode_png    # it takes seconds to import

    small = x.shape[1] <= 64
    file, kind = (encode_png(x), "png") if small else (encode_jpeg(x, quality=80), "jpeg")
    mark = " class=pixels" if small else ""
    return f"<img{mark} alt='{escape(name)}' src='{address(bytes(file.numpy()), f'image/{kind}')}'>"


def address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def sounds_of(run, test: Test, chosen: list[int]) -> tuple[dict[int, str], list[str]]:
    """-> sample -> its sound, as the address of a WAV file; and what must be said.

    A toy makes its sounds again. Only what has the very spectrogram that is stored is played.
    """
    audio = [m for m, kind in test.info["modalities"].items() if kind == "audio"]
    if not audio:
        return {}, []
    if test.info["name"] not in toy.WORLDS:
        return {}, ["No player: the prepared data hold spectrograms, not the recordings."]
    array, start, sounds = test.split.arrays[audio[0]], 0, {}
    made = toy.recordings(test.info["name"], run.settings["seed"], "test", len(test.split))
    for y, wave_forms, _, _ in made:
        here = [i - start for i in chosen if start <= i < start + len(y)]
        mel = data.log_mel(wave_forms[here], *array.shape[2:])
        for k, x in zip(here, mel):
            there = torch.from_numpy(np.array(array[start + k, 0])).float()
            if torch.allclose(x, there, atol=0.02):
                sounds[start + k] = address(wav(wave_forms[k]), "audio/wav")
        start += len(y)
    silent = len(chosen) - len(sounds)
    return sounds, [f"No player for {silent} samples: this code no longer makes the sound whose"
                    " spectrogram is stored."] if silent else []


def wav(sound: torch.Tensor) -> bytes:
    """(n,) float32 in [-1, 1] at 16 kHz -> a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as f:
        f.setparams((1, 2, creatures.RATE, 0, "NONE", ""))
        f.writeframes((sound.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
    return file.getvalue()


def tokenizer_of(info: dict, vocabulary: list | None):
    """The tokenizer that made the token ids; None where its vocabulary is not on this machine.

    Raises ValueError where `vocabulary` is another one.
    """
    made_by = info["tokenizer"]
    if vocabulary is None:
        public = VOCABULARIES.get(made_by["kind"])
        if public is None or not checkpoints.place(public).is_file():
            return None
        vocabulary = [checkpoints.place(public)]
        found = load_tokenizer(*vocabulary)
        return found if found.fingerprint == made_by.get("fingerprint") else None
    found = load_tokenizer(*vocabulary)
    if found.fingerprint != made_by.get("fingerprint"):
        raise ValueError(f"--tokenizer {' '.join(map(str, vocabulary))}: {info['name']} was"
                         " prepared with another vocabulary")
    return found


def words(ids: np.ndarray, tokenizer) -> str:
    ids = [int(id) for id in ids if id != 0]
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    first = text.split(" ")
    return " ".join(first[:WORDS]) + (" ..." if len(first) > WORDS else "")
