"""`evaluate.py --clip`: one recording, prepared and predicted as its data set was, which is not
there any more."""
import json
import re
import shutil
import subprocess
import wave

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.io import write_png

import data
from harness import clip, models
from data import read_json
from prepare import custom
from pretrained import checkpoints
from running import call, error

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a small brown bird sings at night".split()
ENCODERS = ["--encoder", "visual=resnet_small", "audio=resnet_small", "text=bert_small",
            "--pretrained", "none"]


def show(*words):
    return call("evaluate.py", *words, "--device", "cpu")


@pytest.fixture(scope="module", params=["one label", "several labels"])
def birds(request, tmp_path_factory):
    """A folder with media and runs, but without the data set they were made into: (folder, run,
    lines of the index, classes)."""
    folder, rng = tmp_path_factory.mktemp("birds"), np.random.default_rng(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "other.txt").write_text("\n".join(WORDS[:-1]))
    rows = []
    for i in range(16):
        with wave.open(str(folder / f"{i}.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
            tone = np.sin(np.arange(40000) * (0.05 + 0.1 * (i % 3))) * 9000
            f.writeframes((tone + rng.normal(0, 900, 40000)).astype("<i2").tobytes())
        (folder / str(i)).mkdir()
        for n in range(3):
            picture = rng.integers(0, 80 * (1 + i % 3), (3, 50, 60), dtype=np.uint8)
            write_png(torch.from_numpy(picture), str(folder / str(i) / f"{n}.png"))
        label = ["wren", "owl", "tit"][i % 3]
        if request.param == "several labels":
            label = [label, "bird"]
        rows.append(dict(id=str(i), split=["train", "train", "val", "test"][i // 4], label=label,
                         visual=str(i), audio=f"{i}.wav", text=" ".join(rng.choice(WORDS[5:], 4))))
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        custom.main("birds.jsonl --name birds --frames 3 --size 40 --clips 2 --max-length 8"
                    " --tokenizer vocab.txt".split())
        call("train_joint.py", "--dataset", "birds", *ENCODERS, "--device", "cpu",
             "--batch-size", 8, "--epochs", 2, "--umft-epochs", 2)
    info = read_json(folder / "data/birds/dataset.json")
    run, = folder.glob("runs/birds/mmlora-*")
    torch.manual_seed(0)      # as if it had learnt something
    learnt = {}
    for k, t in load_file(run / "model.safetensors").items():
        learnt[k] = t + 0.3 * torch.randn(t.shape)
    save_file(learnt, run / "model.safetensors")
    settings, adapted = models.load_run(run, info)
    test = data.Split(folder / "data/birds", "test")
    z = models.predict(adapted, test, "cpu", settings)
    save_file({f"test.{m}": z[m] for m in z}, run / "logits.safetensors")
    shutil.rmtree(folder / "data")
    return folder, run, rows, info["classes"]


def columns(printed, names):
    """Column -> [(class, per cent)], from what was printed."""
    lines = [line.strip() for line in printed.strip().splitlines()[2:]]
    lines = [re.split(r"\s{2,}(?=[A-Za-z])", line) for line in lines]
    assert lines[0] == names
    found = {name: [] for name in names}
    for line in lines[1:]:
        for name, cell in zip(names, line, strict=True):
            label, percent = cell.split()
            found[name].append((label, float(percent)))
    return found


def likeliest(p, classes):
    order = p.argsort(descending=True)[:5]
    return [(classes[c], pytest.approx(100 * float(p[c]), abs=0.051)) for c in order]


def test_a_clip_is_predicted_as_the_sample_of_the_data_set_was(birds, monkeypatch):
    folder, run, rows, classes = birds
    monkeypatch.chdir(folder)
    of = torch.sigmoid if "bird" in classes else lambda z: z.softmax(-1)
    stored, joint = {}, load_file(run / "logits.safetensors")
    for m in ("visual", "audio", "text"):
        alone = next(folder.glob(f"runs/birds/unimodal-{m}-*"))
        stored[m] = load_file(alone / "logits.safetensors")[f"test.{m}"]
    for i, row in enumerate(r for r in rows if r["split"] == "test"):
        printed = show("--run", run, "--clip", f"visual={row['visual']}", f"audio={row['audio']}",
                       "--text", row["text"], "--tokenizer", "vocab.txt")
        shown = columns(printed, [f"{m} alone (UMFT)" for m in stored] + ["UME", "MMLoRA"])
        for m in stored:
            assert shown[f"{m} alone (UMFT)"] == likeliest(of(stored[m][i]), classes)
        ume = sum(of(z[i]) for z in stored.values()) / 3
        assert shown["UME"] == likeliest(ume, classes)
        mmlora = sum(of(joint[f"test.{m}"][i]) for m in stored) / 3
        assert shown["MMLoRA"] == likeliest(mmlora, classes)
    assert shown["MMLoRA"] != shown["UME"]


def test_what_is_not_given_is_left_out(birds, monkeypatch):
    folder, run, rows, classes = birds
    monkeypatch.chdir(folder)
    printed = show("--run", run, "--clip", "audio=13.wav", "visual=13")
    assert "; no text" in printed
    shown = columns(printed, ["visual alone (UMFT)", "audio alone (UMFT)", "UME", "MMLoRA"])
    top = {name: dict(cells) for name, cells in shown.items()}
    for c in classes:
        mean = (top["visual alone (UMFT)"][c] + top["audio alone (UMFT)"][c]) / 2
        assert top["UME"][c] == pytest.approx(mean, abs=0.11)
    text = next(folder.glob("runs/birds/unimodal-text-*"))
    columns(show("--run", text, "--text", "a bird", "--tokenizer", "vocab.txt"), ["text alone"])


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
def test_one_video_serves_picture_and_sound(birds, monkeypatch):
    folder, run, rows, classes = birds
    monkeypatch.chdir(folder)
    command = "ffmpeg -v error -y -framerate 2 -i 14/%d.png -i 14.wav talk.avi"
    subprocess.run(command.split(), check=True)
    printed = show("--run", run, "--clip", "talk.avi")
    columns(printed, ["visual alone (UMFT)", "audio alone (UMFT)", "UME", "MMLoRA"])


@pytest.mark.parametrize("words, told", [
    ("--clip gone.mp4", "gone.mp4: no such file"),
    ("--clip a.mp4 b.mp4", "visual=a.mp4 audio=b.mp4"),
    ("--clip audio=13.wav visual=gone", "without visual: --clip audio=13.wav"),
    ("--text bird", "--tokenizer"), ("--text bird --tokenizer other.txt", "vocabulary"),
    ("--clip audio=birds.jsonl", "audio: "),
])
def test_bad_clips_are_one_line(birds, words, told, monkeypatch):
    folder, run, *_ = birds
    monkeypatch.chdir(folder)

    def offline(name):
        raise FileNotFoundError("no network; --tokenizer FILE")
    monkeypatch.setattr(checkpoints, "download", offline)
    assert told in error("evaluate.py", "--run", run, *words.split(), "--device", "cpu")


def test_a_clip_is_not_probed(birds, monkeypatch, capsys):
    folder, run, *_ = birds
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        show("--run", run, "--clip", "audio=13.wav", "--probe")
    assert "not allowed with" in capsys.readouterr().err.splitlines()[-1]


def test_a_toy_has_no_recordings(birds, tmp_path):
    folder, run, *_ = birds
    config = read_json(run / "config.json")
    config["data"]["name"] = config["settings"]["dataset"] = "toy"
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = read_json(run / "result.json") | {"dataset": "toy"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    told = error("evaluate.py", "--run", tmp_path, "--clip", "talk.mp4", "--device", "cpu")
    assert "learnt toy, which no recording looks or sounds like" in told


def test_a_clip_of_another_shape_than_the_arrays_is_refused(tmp_path):
    """Arrays of one's own may have any shape, but a clip is prepared as `prepare` does."""
    sound = wave.open(str(tmp_path / "a.wav"), "wb")
    sound.setparams((1, 2, 16000, 0, "NONE", ""))
    sound.writeframes(bytes(2 * 16000))
    sound.close()
    info = dict(name="mine", modalities={"audio": "audio"}, shapes={"audio": [1, 64, 100]})
    source = {"audio": str(tmp_path / "a.wav")}
    with pytest.raises(ValueError, match=r"it is \[1, 128, 204\], but mine holds \[1, 64, 100\]"):
        clip.read_clip(None, source, info, None)
    info["shapes"]["audio"] = [1, 128, 204]
    assert len(clip.read_clip(None, source, info, None)) == 1
