"""`evaluate.py --clip`: one recording, prepared and predicted as its data set was, which is not there any more."""
import json
import re
import shutil
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import data
import evaluate
import paper
import train_joint
from prepare import custom

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a small brown bird sings at night".split()
ENCODERS = "--encoder visual=resnet_small audio=resnet_small text=bert_small --pretrained none --device cpu --batch-size 8".split()


def call(main, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *map(str, words)])
        main()


@pytest.fixture(scope="module", params=["one label", "several labels"])
def birds(request, tmp_path_factory):
    """A folder with media and runs, but without the data set they were made into: (folder, run, ids of the test split, classes)."""
    folder, rng = tmp_path_factory.mktemp("birds"), np.random.default_rng(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "other.txt").write_text("\n".join(WORDS[:-1]))
    rows, several = [], request.param == "several labels"
    from torchvision.io import write_png
    for i in range(16):
        with wave.open(str(folder / f"{i}.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
            f.writeframes((np.sin(np.arange(40000) * (0.05 + 0.1 * (i % 3))) * 9000 + rng.normal(0, 900, 40000)).astype("<i2").tobytes())
        (folder / str(i)).mkdir()
        for n in range(3):
            write_png(torch.from_numpy(rng.integers(0, 80 * (1 + i % 3), (3, 50, 60), dtype=np.uint8)), str(folder / str(i) / f"{n}.png"))
        label = ["wren", "owl", "tit"][i % 3]
        rows.append(dict(id=str(i), split=["train", "train", "val", "test"][i // 4], label=[label, "bird"] if several else label, visual=str(i), audio=f"{i}.wav",
                         text=" ".join(rng.choice(WORDS[5:], 4))))
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        custom.main(["birds.jsonl", "--name", "birds", "--frames", "3", "--size", "40", "--clips", "2", "--max-length", "8", "--tokenizer", "vocab.txt"])
        call(train_joint.main, "--dataset", "birds", *ENCODERS, "--epochs", 2, "--umft-epochs", 2)
    info = json.loads((folder / "data/birds/dataset.json").read_text())
    run, = folder.glob("runs/birds/mmlora-*")
    torch.manual_seed(0)      # as if it had learnt something
    save_file({k: t + 0.3 * torch.randn(t.shape) for k, t in load_file(run / "model.safetensors").items()}, run / "model.safetensors")
    models, test = checkpoints.load_run(run, info)[1], data.Split(folder / "data/birds", "test")
    save_file({f"test.{m}": evaluate.predict(models[m], test, m, "cpu", paper.settings_for("birds")) for m in models}, run / "logits.safetensors")
    shutil.rmtree(folder / "data")
    return folder, run, rows, info["classes"]


def columns(printed, names):
    """Column -> [(class, per cent)], from what was printed."""
    lines = [re.split(r"\s{2,}(?=[A-Za-z])", line.strip()) for line in printed.strip().splitlines()[2:]]
    assert lines[0] == names
    split = lambda cell: (cell.split()[0], float(cell.split()[1]))
    return {name: [split(line[i]) for line in lines[1:]] for i, name in enumerate(names)}


def likeliest(p, classes):
    order = p.argsort(descending=True)[:5]
    return [(classes[c], pytest.approx(100 * float(p[c]), abs=0.051)) for c in order]


def test_a_clip_is_predicted_as_the_sample_of_the_data_set_was(birds, monkeypatch, capsys):
    folder, run, rows, classes = birds
    monkeypatch.chdir(folder)
    of = torch.sigmoid if "bird" in classes else lambda z: z.softmax(-1)
    stored = {m: load_file(next(folder.glob(f"runs/birds/unimodal-{m}-*")) / "logits.safetensors")[f"test.{m}"] for m in ("visual", "audio", "text")}
    joint = load_file(run / "logits.safetensors")
    for i, row in enumerate(r for r in rows if r["split"] == "test"):
        call(evaluate.main, "--run", run, "--clip", f"visual={row['visual']}", f"audio={row['audio']}", "--text", row["text"], "--tokenizer", "vocab.txt")
        shown = columns(capsys.readouterr().out, ["visual alone", "audio alone", "text alone", "UME", "MMLoRA"])
        for m, z in stored.items():
            assert shown[f"{m} alone"] == likeliest(of(z[i]), classes)
        assert shown["UME"] == likeliest(sum(of(z[i]) for z in stored.values()) / 3, classes)
        assert shown["MMLoRA"] == likeliest(sum(of(joint[f"test.{m}"][i]) for m in stored) / 3, classes)
    assert shown["MMLoRA"] != shown["UME"]


def test_what_is_not_given_is_left_out(birds, monkeypatch, capsys):
    folder, run, rows, classes = birds
    monkeypatch.chdir(folder)
    call(evaluate.main, "--run", run, "--clip", "audio=13.wav", "visual=13")
    printed = capsys.readouterr().out
    assert "; no text" in printed
    shown = columns(printed, ["visual alone", "audio alone", "UME", "MMLoRA"])
    top = {name: dict(cells) for name, cells in shown.items()}
    for c in classes:
        assert top["UME"][c] == pytest.approx((top["visual alone"][c] + top["audio alone"][c]) / 2, abs=0.11)
    call(evaluate.main, "--run", next(folder.glob("runs/birds/unimodal-text-*")), "--text", "a bird", "--tokenizer", "vocab.txt")
    columns(capsys.readouterr().out, ["text alone"])


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
def test_one_video_serves_picture_and_sound(birds, monkeypatch, capsys):
    folder, run, rows, classes = birds
    monkeypatch.chdir(folder)
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-framerate", "2", "-i", "14/%d.png", "-i", "14.wav", "talk.avi"], check=True)
    call(evaluate.main, "--run", run, "--clip", "talk.avi")
    columns(capsys.readouterr().out, ["visual alone", "audio alone", "UME", "MMLoRA"])


@pytest.mark.parametrize("words, told", [
    ("--clip gone.mp4", "gone.mp4: no such file"), ("--clip a.mp4 b.mp4", "visual=a.mp4 audio=b.mp4"), ("--clip audio=13.wav visual=gone", "without visual: --clip audio=13.wav"),
    ("--text bird", "--tokenizer"), ("--text bird --tokenizer other.txt", "vocabulary"), ("--clip audio=13.wav --probe", "not allowed with"),
    ("--clip audio=birds.jsonl", "audio: "),
])
def test_bad_clips_are_one_line(birds, words, told, monkeypatch, capsys):
    folder, run, *_ = birds
    monkeypatch.chdir(folder)

    def offline(name):
        raise FileNotFoundError("no network; --tokenizer FILE")
    monkeypatch.setattr(checkpoints, "download", offline)
    with pytest.raises((ValueError, OSError, SystemExit)) as stop:
        call(evaluate.main, "--run", run, *words.split())
    message = capsys.readouterr().err.splitlines()[-1] if isinstance(stop.value, SystemExit) else str(stop.value)
    assert told in message and "\n" not in message


def test_a_toy_has_no_recordings(birds, tmp_path):
    folder, run, *_ = birds
    config = json.loads((run / "config.json").read_text())
    config["data"]["name"] = config["settings"]["dataset"] = "toy"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="learnt toy, which no recording looks or sounds like"):
        call(evaluate.main, "--run", tmp_path, "--clip", "talk.mp4")
