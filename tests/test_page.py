"""`evaluate.py --page`: what the page says, that it needs nothing but itself,
and, where a browser is installed, its filter and its player."""
import base64
import html
import io
import json
import re
import shutil
import subprocess
import wave
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
from harness import files, metrics, page, report
from prepare import toy
from pretrained.tokenizer import ByteBPE, WordPiece
from running import MMLORA, ROOT, call, error, table, tensors

VOID = {"meta", "link", "br", "img", "input", "rect", "circle"}
WORDPIECE = ROOT / "tests/fixtures/encoders/tokenizer_wordpiece/vocab.txt"
BPE = ROOT / "tests/fixtures/encoders/tokenizer_bpe/bpe_encoder.bin"


class Reader(HTMLParser):
    """Raises AssertionError for a tag that is closed in the wrong place;
    `tags`: (name, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_alone(text) -> Reader:
    """Well formed, small, and without any address but those within the page."""
    read = Reader(text)
    assert len(text) < 5 * 2 ** 20
    for tag, attributes in read.tags:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"https?:|@import|url\(", text)
    return read


def samples(text) -> dict[str, str]:
    """Id -> the HTML of its card."""
    cards = re.findall(r"<article class=sample.*?</article>", text)
    return {re.search(r"<div class=dim>([^ <]*)", card)[1]: card for card in cards}


@pytest.fixture(scope="module")
def made(base, root, tmp_path_factory):
    """The page of `base`, in a copy of its runs: (file, text)."""
    out = shutil.copytree(base.out, tmp_path_factory.mktemp("page") / "runs")
    told = call("evaluate.py", "--run", out / MMLORA, "--page", root=root)
    file = out / MMLORA / "page.html"
    assert told == f"wrote {file}\n"
    return file, file.read_text()


# ---- The page of a toy ----

def test_it_stands_alone(made):
    read = check_alone(made[1])
    assert len(read.all("article")) == len(read.all("audio")) == page.SAMPLES
    assert len(read.all("img")) == 2 * page.SAMPLES


def test_the_result_is_the_closing_table(made, base):
    text = made[1]
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", text.split("<h2 id=confusions")[0])
    shown = {html.unescape(name): re.findall(r"<td>(.*?)</td>", cells)
             for name, cells in rows if name}
    printed = table(base.printed)
    assert len(printed) == 6 and shown.keys() == printed.keys()
    for name, cells in printed.items():
        assert shown[name] == [cell.replace("+-", "±") for cell in cells]


def test_the_matrices_count_the_test_samples(made, base, root):
    text = made[1].split("<h2 id=confusions")[1].split("<h2 id=curves")[0]
    matrices = re.findall(r"<figure><h3>(.*?)</h3>(.*?)</figure>", text)
    assert [name for name, _ in matrices] == ["audio", "visual", "UME", "MMLoRA"]
    for (_, svg), (score, rule) in zip(matrices, [("ume", "audio"), ("ume", "visual"),
                                                  ("ume", "prob"), ("test", "prob")]):
        cells = re.findall(r"class='number(?: over)?' x=(\S+) y=(\S+)>(\d+)<", svg)
        assert sum(int(count) for _, _, count in cells) == 120
        of_test = base.result["ume"]["test"] if score == "ume" else base.result["test"]
        diagonal = sum(int(count) for x, y, count in cells if abs(float(x) - float(y) - 6) < 0.1)
        assert diagonal == round(120 * of_test[rule]["accuracy"])


def test_rows_are_true_classes():
    svg = page.matrix(torch.tensor([[0, 3], [0, 1]]))
    x, y, count = re.search(r"class='number over' x=(\S+) y=(\S+)>(\d)<", svg).groups()
    assert count == "3" and float(x) > 150 > float(y)     # right above: 0 is taken for 1
    assert (page.most_confused(torch.tensor([[0, 3], [0, 1]]), ["<a>", "b"])
            == "3 × &lt;a&gt; taken for b")


def test_the_bars_are_the_probabilities(made, base, root):
    """Of each model, before and after; the true class is marked and what is chosen is bold."""
    where = root / "toy-s0/test"
    ids, y = (where / "ids.txt").read_text().split(), np.load(where / "labels.npy")
    step_1 = {m: tensors(base.out, f"toy/unimodal-{m}-s0", "logits")[f"test.{m}"]
              for m in ("audio", "visual")}
    own = tensors(base.out, MMLORA, "logits")
    before = {m: z.softmax(1) for m, z in step_1.items()}
    after = {m: own[f"test.{m}"].softmax(1) for m in step_1}
    columns = [(before["audio"], after["audio"]), (before["visual"], after["visual"]),
               ((before["audio"] + before["visual"]) / 2, None),
               ((after["audio"] + after["visual"]) / 2, None)]
    for id, card in list(samples(made[1]).items())[::9]:
        i = ids.index(id)
        rows = re.findall(r"<tr( class=true)?><th>[^<]+</th>(.*?)</tr>", card)
        assert [c for c, (mark, _) in enumerate(rows) if mark] == [y[i]] and len(rows) == 8
        for c, (_, cells) in enumerate(rows):
            cells = re.findall(r"<td( class=chosen)? style='(.*?)' title='.*?'>(\d+)</td>", cells)
            for (p, later), (bold, style, number) in zip(columns, cells, strict=True):
                assert abs(int(number) - 100 * p[i, c]) <= 0.51 and f"--p:{number}%" in style
                assert bool(bold) == (c == p[i].argmax())
                if later is not None:
                    assert abs(int(style.split("--a:")[1][:-1]) - 100 * later[i, c]) <= 0.51


def test_a_sound_is_the_one_whose_spectrogram_is_stored(made, root):
    where = root / "toy-s0" / "test"
    ids, audio = (where / "ids.txt").read_text().split(), np.load(where / "audio.npy")
    cards = samples(made[1])
    for id in list(cards)[::7]:
        content = re.search("src='data:audio/wav;base64,(.*?)'", cards[id])[1]
        with wave.open(io.BytesIO(base64.b64decode(content))) as f:
            assert (f.getnchannels(), f.getframerate()) == (1, 16000)
            sound = np.frombuffer(f.readframes(f.getnframes()), "<i2").astype(np.float32) / 32767
        mel = data.log_mel(torch.from_numpy(sound), bins=32, frames=64).numpy()
        of = {other: np.abs(mel - audio[i, 0].astype(np.float32)).mean()
              for i, other in enumerate(ids)}
        assert min(of, key=of.get) == id and of[id] < 0.01


def test_a_sound_that_is_not_stored_is_not_played(base, root, monkeypatch):
    made = toy.recordings

    def other(name, seed, split, n):
        for y, sound, *rest in made(name, seed, split, n):
            sound[::2] = sound[::2].flip(1)
            yield y, sound, *rest

    monkeypatch.setattr(toy, "recordings", other)
    run = page.runs.Run.open(base.run)
    split = data.Split(root / "toy-s0", "test")
    test = page.Test(data.read_json(root / "toy-s0/dataset.json"), split, [], [], None)
    sounds, notes = page.sounds_of(run, test, list(range(10)))
    assert sorted(sounds) == [1, 3, 5, 7, 9] and notes[0].startswith("No player for 5 samples")


def test_the_menus_count_all_samples(made, base, root):
    text = made[1]
    kinds = json.loads(re.search(r"<script type='application/json' id=kinds>(.*?)</script>",
                                 text)[1])
    assert sum(kind["count"] for kind in kinds) == 120
    right = sum(kind["count"] for kind in kinds if kind["values"][4] == ["right"])
    assert right == round(120 * base.result["ume"]["test"]["prob"]["accuracy"])
    off = sum(kind["count"] for kind in kinds if kind["values"][0] == ["sound off"])
    assert off == int(data.Split(root / "toy-s0", "test").groups["sound off"].sum())
    # Every kind of who is right that there is has a sample on the page.
    there = {str([kind["values"][0], *kind["values"][2:]]) for kind in kinds}
    shown = {int(i) for i in re.findall(r"data-kind=(\d+)", text)}
    assert there == {str([kinds[i]["values"][0], *kinds[i]["values"][2:]]) for i in shown}


def test_the_curves_mark_the_chosen_epoch(made, base):
    text = made[1].split("<h2 id=curves")[1].split("<h2 id=samples")[0]
    assert text.count("class=chosen") == 6                # loss and scores of three runs
    x = 44 + 380 * base.result["best_epoch"] / 4
    first, _ = text.split("</figure>", 1)
    assert f"class=chosen d='M{x:.1f} " in first and ">epoch</text>" in first


def test_other_data_are_refused(base, root, tmp_path):
    shutil.copytree(root / "toy-s0", tmp_path / "toy-s0")
    labels = np.load(tmp_path / "toy-s0/test/labels.npy")
    np.save(tmp_path / "toy-s0/test/labels.npy", labels[::-1])
    told = error("evaluate.py", "--run", base.run, "--page", root=tmp_path)
    assert ("is not what" in told and "other samples" in told
            and not (base.run / "page.html").exists())


@pytest.mark.parametrize("words", [["--page"], ["--run", "RUN", "--page", "--fusion", "prob"],
                                   ["--run", "RUN", "--page", "--temperature"]])
def test_page_stands_alone_on_the_command_line(words, base, root):
    words = [base.run if word == "RUN" else word for word in words]
    assert "--page takes --run RUN" in error("evaluate.py", *words, root=root)


# ---- Every kind of data, made up ----

KINDS = {"frames": (4, 3, 80, 80), "image": (1, 3, 70, 70), "flow": (2, 6, 72, 72),
         "audio": (2, 128, 204), "text": (12,)}
NASTY = "<script>'\"&</title>"


def fabricate(folder, kinds, multilabel=False, classes=4, step_1=True, fusion="prob", n=7):
    """A prepared data set `made` of these kinds and a finished run on it, all random: its folder.

    kinds: modality -> kind.
    """
    rng, where = np.random.default_rng(0), folder / "data/made"
    info = dict(name="made", classes=[NASTY, *map("class {}".format, range(1, classes))],
                multilabel=multilabel, modalities=kinds,
                shapes={m: list(KINDS[kind]) for m, kind in kinds.items()}, tokenizer=None)
    if "text" in kinds.values():
        known = WordPiece(WORDPIECE)
        info["tokenizer"] = dict(kind=known.kind, vocab_size=known.vocab_size,
                                 fingerprint=known.fingerprint)
    y = (rng.random((n, classes)) < 0.4).astype(np.uint8) if multilabel else np.arange(n) % classes
    for split in ("train", "val", "test"):
        (where / split).mkdir(parents=True)
        np.save(where / split / "labels.npy", y)
        (where / split / "ids.txt").write_text("".join(f"{NASTY}{i}\n" for i in range(n)))
        for m, kind in kinds.items():
            array = rng.integers(0, 256, (n, *KINDS[kind])).astype(np.uint8)
            if kind == "audio":
                array = array.astype(np.float16) / 100
            if kind == "text":
                array = np.zeros((n, *KINDS[kind]), np.int32)
                array[:, :8] = [6, 278, 20, 276, 21, 273, 297, 7]      # Crème, re-cooking
            np.save(where / split / f"{m}.npy", array)
    (where / "dataset.json").write_text(json.dumps(info))

    labels = torch.from_numpy(y)
    common = dict(dataset="made", seed=0, precision="fp32", frames=3, audio_shift=0,
                  classes=info["classes"], epochs=2, batch_size=4, lr=0.1)

    def write_run(name, settings, names):
        run = folder / "runs/made" / name
        run.mkdir(parents=True)
        z = {m: torch.from_numpy(rng.normal(size=(n, classes)).astype(np.float32)) for m in names}
        scores = metrics.all_scores(z, labels, info)
        result = dict(best_epoch=1, trained_parameters=9, seconds=1, val=scores, test=scores)
        if "unimodal" in settings and settings["fusion"] != "joint":
            result["ume"] = dict(val=scores, test=scores)
        save_file({f"{s}.{m}": z[m].clone() for s in ("val", "test") for m in z},
                  run / "logits.safetensors")
        files.write_json(run / "config.json", dict(settings=settings))
        files.write_json(run / "result.json", result)
        for epoch in range(3):
            files.append_line(run / "log.jsonl", dict(epoch=epoch, loss=epoch or None, val=scores))
        return run

    for m in kinds:
        write_run(f"unimodal-{m}-s0",
                  {**common, "method": "unimodal", "modality": m, "encoder": "vit"}, [m])
    settings = {**common, "method": "concat", "encoders": dict.fromkeys(kinds, "vit"),
                "fusion": fusion}
    if step_1:
        settings["unimodal"] = {m: dict(run=f"unimodal-{m}-s0", sha256="") for m in kinds}
    return write_run("concat-s0", settings, ["joint"] if fusion == "joint" else list(kinds))


@pytest.mark.parametrize("multilabel", [False, True])
def test_every_kind_of_data(multilabel, tmp_path):
    kinds = {kind: kind for kind in KINDS}
    run = fabricate(tmp_path, kinds, multilabel)
    told = call("evaluate.py", "--run", run, "--page", "--tokenizer", WORDPIECE,
                root=tmp_path / "data")
    text = (run / "page.html").read_text()
    read = check_alone(text)
    assert told.count("\n") == 2 and "no fingerprint" in told      # this run was made by nobody
    assert len(read.all("article")) == 7 and len(read.all("img")) == 7 * 4 and not read.all("audio")
    assert text.count("creme , re - cooking") == 7
    assert "No player: the prepared data hold spectrograms, not the recordings." in text
    assert "All 7 test samples." in text and NASTY not in text
    assert ("confusion matrix is not defined" in text) == multilabel
    names = [menu["name"] for menu in read.all("select")]
    assert names == ["class", *kinds, "UME", report.NAMES["concat"]]


@pytest.mark.parametrize("step_1, names", [(False, []), (True, ["a", "b", "UME"])])
def test_a_method_with_a_head_of_its_own(step_1, names, tmp_path):
    """With many classes a sample shows the first three of each model, and its own."""
    run = fabricate(tmp_path, {"a": "audio", "b": "image"}, classes=101, step_1=step_1,
                    fusion="joint")
    call("evaluate.py", "--run", run, "--page", root=tmp_path / "data")
    text = (run / "page.html").read_text()
    read = check_alone(text)
    assert [menu["name"] for menu in read.all("select")][1:] == [*names, report.NAMES["concat"]]
    for card in samples(text).values():
        rows = card.count("<tr") - 1
        assert 3 <= rows <= 3 * (1 + len(names)) + 1 and card.count("<tr class=true>") == 1


def test_a_run_of_one_modality(base, copied, root):
    call("evaluate.py", "--run", copied / "toy/unimodal-visual-s0", "--page", root=root)
    read = check_alone((copied / "toy/unimodal-visual-s0/page.html").read_text())
    assert [menu["name"] for menu in read.all("select")] == ["group", "class", "visual"]


def test_texts_without_their_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                           # no checkpoints/ here
    run = fabricate(tmp_path, {"text": "text", "visual": "image"})
    call("evaluate.py", "--run", run, "--page", root=tmp_path / "data")
    text = (run / "page.html").read_text()
    assert "shown as token ids: the vocabulary" in text and "6 278 20 276 21 273 297 7" in text
    told = error("evaluate.py", "--run", run, "--page", "--tokenizer", BPE, root=tmp_path / "data")
    assert "prepared with another vocabulary" in told


def test_missing_logits_are_named(tmp_path):
    run = fabricate(tmp_path, {"a": "audio", "b": "image"}, fusion="joint", step_1=False)
    save_file({"test.a": torch.zeros(7, 4)}, run / "logits.safetensors")
    told = error("evaluate.py", "--run", run, "--page", root=tmp_path / "data")
    assert "logits.safetensors lacks the logits test.joint" in told
    save_file({"test.joint": torch.zeros(6, 4)}, run / "logits.safetensors")
    told = error("evaluate.py", "--run", run, "--page", root=tmp_path / "data")
    assert "is of 6 test samples, but there are 7" in told


@pytest.mark.parametrize("tokenizer, text", [
    (WordPiece(WORDPIECE), "creme , re - cooking"), (ByteBPE(BPE), "cooked café  “naïve” 🙂\n")])
def test_token_ids_back_to_text(tokenizer, text):
    assert tokenizer.decode([*tokenizer.encode(text), 0, 0]) == text


def test_flow_as_colour():
    """Opposite directions have opposite colours; what does not move is black,
    and speed is light."""
    x = torch.full((1, 2, 1, 4), 128, dtype=torch.uint8)
    # No motion, left, right, right at half speed.
    x[0, 0, 0] = torch.tensor([128, 28, 228, 178])
    still, left, right, slow = page.flow_colours(x)[0, :, 0].T
    assert still.tolist() == [0, 0, 0]
    assert torch.allclose(left + right, torch.full((3,), 255.0), atol=1)
    assert torch.allclose(slow, right / 2, atol=1) and right.max() > 250


# ---- In a browser ----

SCRIPT = """<script>addEventListener("load", async () => {
  const told = {}, menu = name => document.querySelector(`select[name="${name}"]`);
  const shown = () => cards.filter(card => card.offsetHeight > 0).map(card => +card.dataset.kind);
  told.fragment = [menu("audio").value, shown()];
  menu("UME").value = "right";
  menu("UME").dispatchEvent(new Event("input", {bubbles: true}));
  told.both = [location.hash, shown(), document.querySelector("#count").textContent];
  document.querySelector("#filter button").click();
  await new Promise(done => setTimeout(done, 50));
  told.all = shown().length;
  told.wide = document.documentElement.scrollWidth - innerWidth;
  const player = document.querySelector("audio");
  await new Promise(done => { player.onloadedmetadata = player.onerror = done; player.load(); });
  told.seconds = player.duration;
  document.body.innerHTML = `<pre id=told>${JSON.stringify(told)}</pre>`;
});</script>"""


def test_filter_and_player_in_a_browser(made, tmp_path):
    """As wide as a telephone; nothing stands out to the right."""
    browsers = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome here: apt-get install chromium")
    (tmp_path / "page.html").write_text(made[1].replace("</body>", SCRIPT + "</body>"))
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu",
             f"--user-data-dir={tmp_path}/u",
             "--window-size=400,900", "--virtual-time-budget=5000", "--dump-dom",
             f"file://{tmp_path}/page.html#audio=wrong&nobody=right"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    told = re.search("<pre id=\"told\">(.*?)</pre>", done.stdout)
    assert told, done.stderr[-500:]
    told = json.loads(html.unescape(told[1]))
    kinds = json.loads(re.search(r"id=kinds>(.*?)</script>", made[1])[1])
    on_page = [int(i) for i in re.findall(r"data-kind=(\d+)", made[1])]

    def fitting(**wanted):                                # menus: group, class, audio, visual, UME
        place = {"audio": 2, "UME": 4}
        fit = [all(kind["values"][place[m]] == [v] for m, v in wanted.items()) for kind in kinds]
        return ([i for i in on_page if fit[i]],
                sum(kind["count"] for kind, f in zip(kinds, fit) if f))

    assert told["fragment"] == ["wrong", fitting(audio="wrong")[0]]
    address, shown, sentence = told["both"]
    cards, count = fitting(audio="wrong", UME="right")
    assert address == "#audio=wrong&UME=right" and shown == cards and 0 < len(cards) < page.SAMPLES
    assert (sentence.startswith(f"{count} of 120 test samples")
            and f"{len(cards)} of them" in sentence)
    assert told["all"] == page.SAMPLES and told["wide"] <= 0
    assert told["seconds"] == pytest.approx(10240 / 16000, abs=0.01)


# ---- Pictures: --plot ----

def test_several_seeds_are_one_picture_with_bands(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="optional: pip install matplotlib")
    folders = []
    for seed in range(3):
        run = fabricate(tmp_path / str(seed), {"a": "image", "b": "image"}, n=4)
        folders.append(run.rename(run.with_name(f"concat-s{seed}")))
    bands, lines, close = [], [], pyplot.close
    monkeypatch.setattr(pyplot.Axes, "fill_between",
                        lambda axes, x, low, high, **style: bands.append((x, low, high)))

    def look(figure):
        for axes in figure.axes:
            lines.append([line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"])
            assert axes.get_xlabel() == "epoch" and axes.get_ylabel()
            # Below the axes: over no curve.
            assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    report.plot(folders)
    assert folders[0].with_name("concat-curves.png").read_bytes().startswith(b"\x89PNG")
    # The loss; a, b, prob, logits.
    assert [list(x) for x, _, _ in bands] == [[1, 2]] + [[0, 1, 2]] * 4
    for dashed in lines:
        assert [list(x) for x in dashed if len(x)] == [[1, 1]] * 3


def test_mean_and_band():
    pytest.importorskip("matplotlib")
    axes = report.import_pyplot().figure().subplots()
    report.draw_curve(axes, [[(0, 1.0), (1, 5.0)], [(0, 3.0), (1, 5.0), (2, 9.0)]], "loss")
    assert list(axes.lines[0].get_ydata()) == [2, 5]
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min() == pytest.approx(2 - 2 ** 0.5)
            and corners[:, 1].max() == pytest.approx(5))


def test_epoch_0_of_averaged_logits_is_not_called_ume():
    """UME on the page averages probabilities, so that run is not the same as UME."""
    settings = dict(method="logits", fusion="logits", encoders={"audio": "audio_vit_toy"})
    run = SimpleNamespace(settings=settings, info=dict(name="toy"), folder=Path("runs/toy/x-s0"),
                          result=dict(best_epoch=0, ume={}))
    assert "so the two are the same" not in page.head(run)
    settings["fusion"] = "prob"
    assert "so the two are the same" in page.head(run)
