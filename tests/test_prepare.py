"""prepare/: raw media -> prepared arrays.

Generated media wherever they can show it; real clips (../shared/data) where only those can.
"""
import csv
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
import wave
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
from harness import arguments
from pretrained.tokenizer import load_tokenizer
from prepare import (ave, crema_d, custom, food101, kinetics_sound, media, mm_imdb, toy, ucf101,
                     write)
from running import call

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared/data"
FIXTURES = Path(__file__).parent / "fixtures/encoders/audio"
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"),
                                  reason="the ffmpeg program is not installed")
needs_real = pytest.mark.skipif(not (REAL / "grid_av").is_dir(),
                                reason="../shared/data/grid_av is not there")


def train_on(root, name, monkeypatch, *options):
    """What a user does next: both modalities for one epoch, MMLoRA for one,
    and the scores read back.

    Small encoders, random weights.
    """
    modalities = json.loads((root / name / "dataset.json").read_text())["modalities"]
    encoders = ["resnet_small", "text=bert_small"] if "text" in modalities else ["resnet_small"]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    printed = call("train_joint.py", "--dataset", name, "--device", "cpu", "--epochs", "1",
                   "--umft-epochs", "1", "--encoder", *encoders, "--pretrained", "none", *options,
                   out=root / "runs", root=root)
    assert "UME, probabilities averaged" in printed
    run, = (root / "runs" / name).glob("mmlora-*")
    result = json.loads((run / "result.json").read_text())
    printed = call("evaluate.py", "--run", run, "--device", "cpu", root=root)
    metric = "f1_micro" if "f1_micro" in result["test"]["prob"] else "accuracy"
    assert f"{100 * result['test']['prob'][metric]:.1f}" in printed.splitlines()[-1]
    return result


# ---- generated media ----
def make_wav(path, x, rate=16000, width=2):
    """x: float (n,) or (n, channels) in [-1, 1) -> integer PCM of `width` bytes,
    written sample by sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.asarray(x, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    with wave.open(str(path), "wb") as f:
        f.setnchannels(x.shape[1]), f.setsampwidth(width), f.setframerate(rate)
        integers = (np.floor(x.ravel() * 2 ** (8 * width - 1)).astype(int)
                    + (128 if width == 1 else 0))
        f.writeframes(b"".join(int(i).to_bytes(width, "little", signed=width > 1)
                               for i in integers))
    return path


def tone(seconds=1.0, hertz=440, rate=16000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def make_png(path, pixels):
    """pixels: uint8 (h, w), (h, w, 3) or (h, w, 4)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(pixels, np.uint8)
    h, w, channels = *pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1
    part = lambda tag, body: (struct.pack(">I", len(body)) + tag + body
                              + struct.pack(">I", zlib.crc32(tag + body)))
    head = struct.pack(">IIBBBBB", w, h, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels.reshape(h, -1)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows)
                     + part(b"IEND", b""))
    return path


def flat(value, h=20, w=30):
    return np.full((h, w, 3), value, np.uint8)


def small_index(folder, n=12, test=4, **changes):
    """An index of n + test samples of two classes, a picture (brightness 10 i) and a sound each;
    returns its path."""
    rows = []
    for i in range(n + test):
        make_png(folder / f"p/{i}.png", flat(10 * i))
        make_wav(folder / f"w/{i}.wav", tone(0.5, 200 + 40 * i))
        side = "train" if i < n else "test"
        rows.append({"id": f"s{i:02}", "split": side, "label": "ab"[i % 2],
                     "visual": f"p/{i}.png", "audio": f"w/{i}.wav"})
    return write_index(folder / "index.jsonl", rows)


def write_index(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return path


def write_vocab(path, words):
    """A vocab.txt as BERT has it: the special tokens are ids 0 to 4, then the words."""
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()])
                    + "\n")
    return path


def prepare_custom(index, root, *options):
    custom.main([str(index), "--name", "set", "--data-root", str(root), "--size", "16",
                 "--workers", "2", *options])
    return json.loads((root / "set/dataset.json").read_text())


# ---- sound ----
@pytest.mark.parametrize("name", ["short_sine", "overlap_noise", "stereo_mix"])
def test_clips_are_those_of_imagebind(name):
    reference = load_file(FIXTURES / f"{name}.safetensors")
    expected = reference.get("mel_clean", reference["mel"]).squeeze(1)     # (3, 128, 204)
    found = media.audio_clips(media.read_wave(FIXTURES / f"{name}.wav"))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width_is_channel_0_and_not_a_mix(tmp_path, width):
    x = tone(0.1)
    path = make_wav(tmp_path / "x.wav", np.stack([x, -0.3 * np.ones_like(x)], 1), width=width)
    np.testing.assert_allclose(media.read_wave(path), x, atol=1.01 / 2 ** (8 * width - 1) + 1e-7)


def test_other_rates_are_resampled(tmp_path):
    x = media.read_wave(make_wav(tmp_path / "x.wav", tone(1.0, rate=44100), rate=44100))
    np.testing.assert_allclose(x[500:-500], tone(1.0)[500:-500], atol=5e-3)


@needs_ffmpeg
def test_float_wav_goes_through_ffmpeg_and_is_channel_0(tmp_path):
    x = np.stack([tone(0.2), np.zeros(3200)], 1).astype("<f4")
    head = (b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 2, 16000, 128000, 8, 32)
            + b"data" + struct.pack("<I", x.nbytes))
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(head) + x.nbytes)
                                     + head + x.tobytes())
    np.testing.assert_allclose(media.read_wave(tmp_path / "x.wav"), x[:, 0], atol=1e-4)


def test_what_is_no_sound_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "text.wav").write_text("hello " * 300)
    for path in (tmp_path / "text.wav", make_wav(tmp_path / "empty.wav", np.zeros(0)),
                 tmp_path / "absent.wav"):
        with pytest.raises((ValueError, OSError, RuntimeError)) as error:
            media.read_wave(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_without_ffmpeg_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    (tmp_path / "x.mp4").write_bytes(bytes(2000))
    with pytest.raises(RuntimeError, match="x.mp4 needs the ffmpeg program.*install ffmpeg"):
        media.read_frames(tmp_path / "x.mp4", 3, 16)
    rows = [{"id": s, "split": s, "label": "a", "visual": "x.mp4"}
            for s in ("train", "val", "test")]
    index = write_index(tmp_path / "i.jsonl", rows)
    # and never counted as an unreadable item
    with pytest.raises(RuntimeError, match="install ffmpeg"):
        prepare_custom(index, tmp_path / "data", "--allow-missing", "1")


# ---- pictures ----
@pytest.mark.parametrize("h, w", [(30, 20), (20, 31), (8, 24), (16, 16), (133, 100)])
def test_pictures_are_resized_and_cropped_as_torchvision_does(tmp_path, h, w):
    from torchvision.transforms import v2
    pixels = np.random.RandomState(0).randint(0, 256, (h, w, 3))
    expected = v2.Compose([v2.Resize(16, v2.InterpolationMode.BICUBIC, antialias=True),
                           v2.CenterCrop(16)])(
        torch.tensor(pixels, dtype=torch.uint8).permute(2, 0, 1))
    assert torch.equal(media.read_image(make_png(tmp_path / "x.png", pixels), 16), expected)


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    for pixels in (np.full((20, 30), 7), np.dstack([flat(7), flat(99)[..., :1]])):
        x = media.read_frames(make_png(tmp_path / "x.png", pixels), 2, 16)
        assert x.shape == (2, 3, 16, 16) and x.dtype == np.uint8 and (x == 7).all()


@pytest.mark.parametrize("there, wanted, expected", [
    (12, 3, [2, 6, 10]), (2, 3, [0, 1, 1]), (1, 4, [0, 0, 0, 0]), (9, 9, list(range(9)))])
def test_frames_of_a_folder_are_in_the_order_of_numbers_and_evenly_spaced(tmp_path, there, wanted,
                                                                          expected):
    for i in range(there):
        make_png(tmp_path / f"frame_{i}.png", flat(i))     # not zero-padded: frame_10 after frame_9
    (tmp_path / "frame_0.bin").write_bytes(b"no picture")     # published flow has such neighbours
    assert media.read_frames(tmp_path, wanted, 16)[:, 0, 0, 0].tolist() == expected


def test_photos_are_turned_the_way_they_were_taken(tmp_path):
    from torchvision.io import encode_jpeg
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, :16] = 250     # bright above
    jpeg = encode_jpeg(pixels, quality=95).numpy().tobytes()
    # orientation 6: turn clockwise to view
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    (tmp_path / "x.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2)
                                     + exif + jpeg[2:])
    x = media.read_image(tmp_path / "x.jpg", 32).float()
    assert x[:, :, 20:].mean() > 200 and x[:, :, :12].mean() < 50     # bright on the right


@needs_ffmpeg
def test_an_animated_gif_counts_as_its_first_frame(tmp_path):
    raw = np.repeat(np.uint8([200, 0, 0, 0]), 32 * 32 * 3).tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x32", "-r", "5", "-i", "-"]
    subprocess.run(["ffmpeg", "-v", "error", *source, str(tmp_path / "x.gif")], input=raw,
                   check=True)
    (tmp_path / "x.gif").rename(tmp_path / "x.jpg")     # a usual thing among pictures from the web
    x = media.read_image(tmp_path / "x.jpg", 16)
    assert x.shape == (3, 16, 16) and x.float().mean() > 190


def test_frames_of_a_long_video_take_bounded_memory(tmp_path, monkeypatch):
    n, size, frames = 20_000, 8, 3
    frame = lambda i: np.full(3 * size * size, i * 256 // n, np.uint8).tobytes()
    monkeypatch.setattr(media, "ffmpeg", lambda *_: (frame(i) for i in range(n)))
    (tmp_path / "x.mp4").write_bytes(b"x")
    tracemalloc.start()
    x = media.read_frames(tmp_path / "x.mp4", frames, size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * frames * 3 * size * size, (
        "more than some 16 frames per frame wanted were kept")
    np.testing.assert_allclose(x[:, 0, 0, 0], [256 / 6, 128, 256 * 5 / 6], atol=256 / (16 * frames))


@needs_ffmpeg
def test_frames_of_a_video(tmp_path):
    # 2 s at 25 fps that grow brighter
    raw = np.repeat(np.arange(50, dtype=np.uint8) * 4, 64 * 96 * 3).tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64", "-r", "25", "-i", "-"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-q:v", "1", str(tmp_path / "x.avi")],
                   input=raw, check=True)
    x = media.read_frames(tmp_path / "x.avi", 5, 32).astype(int)
    assert x.shape == (5, 3, 32, 32)
    np.testing.assert_allclose(x.mean((1, 2, 3)), [4 * i for i in (5, 15, 25, 35, 45)], atol=4)
    # seconds: frames 25 to 49
    late = media.read_frames(tmp_path / "x.avi", 2, 32, span=(1.0, 2.0)).astype(int)
    np.testing.assert_allclose(late.mean((1, 2, 3)), [4 * 31, 4 * 43], atol=6)


@pytest.mark.parametrize("layout", ["u_v", "flow_xy"])
def test_flow_is_interleaved_and_clamped(tmp_path, layout):
    x, y = (("u/frame%06d.png", "v/frame%06d.png") if layout == "u_v"
            else ("flow_x_%05d.png", "flow_y_%05d.png"))
    for i in range(1, 9):
        make_png(tmp_path / (x % i), np.full((20, 30), 100 + i))
        make_png(tmp_path / (y % i), np.full((20, 30), 200 + i))
    (tmp_path / (y % 8)).unlink()     # u and v need not be equally many
    for name in (x, y):
        (tmp_path / (name % 1)).with_suffix(".bin").write_bytes(b"raw flow")
    stacks = media.read_flow(tmp_path, 2, 3, 16)
    assert stacks.shape == (2, 6, 16, 16) and stacks.dtype == np.uint8
    assert stacks[..., 0, 0].tolist() == [[102, 202, 103, 203, 104, 204],
                                          [104, 204, 105, 205, 106, 206]]
    long = media.read_flow(tmp_path, 1, 10, 16)
    assert long[0, ::2, 0, 0].tolist() == [101, 102, 103, 104, 105, 106, 107, 107, 107, 107]


# ---- validation ----
def test_carve_val_is_stratified_and_depends_on_ids_alone():
    items = [media.Item(f"x{i}", "a" if i < 60 else "b" if i < 90 else "c", {}) for i in range(91)]
    train, val = write.carve_val(items)
    # the only c stays where it can be learnt
    assert [sum(i.label == c for i in val) for c in "abc"] == [6, 3, 0]
    assert [i.id for i in val] == sorted(i.id for i in val)
    assert not {i.id for i in train} & {i.id for i in val} and len(train + val) == 91
    assert write.carve_val(items[::-1]) == (train, val)
    # one file missing: at most one other moves
    fewer = {i.id for i in write.carve_val(items[1:])[1]}
    assert len(fewer - {i.id for i in val}) <= 1
    assert write.carve_val(items, seed=1)[1] != val


# ---- custom ----
def test_custom_writes_what_data_reads(tmp_path):
    info = prepare_custom(small_index(tmp_path, n=20, test=4), tmp_path / "data")
    assert info["classes"] == ["a", "b"] and not info["multilabel"]
    assert info["modalities"] == {"visual": "image", "audio": "audio"}
    assert info["counts"] == {"train": 18, "val": 2, "test": 4}
    assert info["tokenizer"] is None and "other_tokenizers" not in info
    assert (info["command"].startswith("python -m prepare.custom ")
            and "--size 16" in info["command"])
    seen = []
    for name, n in info["counts"].items():
        split = data.Split(tmp_path / "data/set", name)
        ids = (tmp_path / f"data/set/{name}/ids.txt").read_text().split()
        seen += ids
        assert len(split) == n == len(ids) and split.labels.dtype == torch.int64
        assert (split.arrays["visual"].shape == (n, 1, 3, 16, 16)
                and split.arrays["visual"].dtype == np.uint8)
        assert (split.arrays["audio"].shape == (n, 3, 128, 204)
                and split.arrays["audio"].dtype == np.float16)
        for row, id in enumerate(ids):     # every row belongs to its id
            assert (split.arrays["visual"][row, 0, 0, 0, 0] == 10 * int(id[1:])
                    and split.labels[row] == int(id[1:]) % 2)
            expected = media.audio_clips(
                media.read_wave(tmp_path / f"w/{int(id[1:])}.wav")).half().numpy()
            assert np.array_equal(split.arrays["audio"][row], expected)
    assert sorted(seen) == [f"s{i:02}" for i in range(24)]


def test_custom_multi_label_text_and_frames(tmp_path):
    write_vocab(tmp_path / "vocab.txt", "a storm calm sea")
    for i in range(3):
        make_png(tmp_path / f"frames/{i}.png", flat(50 * i))
    films = [("train", ["drama", "war"], "a storm"), ("train", ["comedy"], ""),
             ("val", ["war"], "calm sea calm sea"), ("test", [], "sea")]
    rows = [{"id": str(i), "split": split, "label": label, "visual": "frames", "text": text}
            for i, (split, label, text) in enumerate(films)]
    options = "--frames", "2", "--tokenizer", str(tmp_path / "vocab.txt"), "--max-length", "5"
    info = prepare_custom(write_index(tmp_path / "index.jsonl", rows), tmp_path / "data", *options)
    assert info["multilabel"] and info["classes"] == ["comedy", "drama", "war"]
    assert info["tokenizer"]["vocab_size"] == 9 and info["other_tokenizers"] == []
    load = lambda split, name: np.load(tmp_path / f"data/set/{split}/{name}.npy")
    assert (load("train", "labels").tolist() == [[0, 1, 1], [1, 0, 0]]
            and load("train", "labels").dtype == np.uint8)
    assert load("test", "labels").tolist() == [[0, 0, 0]]
    assert load("train", "text").tolist() == [[2, 5, 6, 3, 0], [2, 3, 0, 0, 0]]
    assert load("train", "text").dtype == np.int32
    assert load("val", "text").tolist() == [[2, 7, 8, 7, 3]]
    assert load("train", "visual").shape == (2, 2, 3, 16, 16)
    assert load("val", "visual")[0, :, 0, 0, 0].tolist() == [0, 100]
    with pytest.raises(ValueError, match="text needs --tokenizer"):
        custom.main([str(tmp_path / "index.jsonl"), "--name", "other",
                     "--data-root", str(tmp_path / "data")])


GOOD = [{"id": "a", "split": "train", "label": "x", "text": "t"},
        {"id": "b", "split": "test", "label": "x", "text": "t"}]


@pytest.mark.parametrize("line, problem", [
    ("{'id': 1}", r"line 3: not JSON .*double quotes"),
    ("[1]", "line 3: not an object"),
    ({"id": "c", "text": "t"}, "line 3: no 'split', 'label': every line needs"),
    ({"id": 7, "split": "train", "label": "x", "text": "t"}, "line 3: id 7 is no text"),
    ({"id": "a", "split": "train", "label": "x", "text": "t"}, "line 3: id 'a' is also on line 1"),
    ({"id": "c", "split": "dev", "label": "x", "text": "t"},
     "line 3: split 'dev': write train, val or test"),
    ({"id": "c", "split": "train", "label": 3, "text": "t"},
     "line 3: label 3: write a class name"),
    ({"id": "c", "split": "train", "label": ["x"], "text": "t"},
     "line 1: label 'x' is one name, but line 3 has a list"),
    ({"id": "c", "split": "train", "label": "x"}, "line 3: no modality"),
    ({"id": "c", "split": "train", "label": "x", "text": "t", "audio": "a.wav"},
     "line 1: no audio, which other lines have"),
    ({"id": "c", "split": "train", "label": "x", "text": "t", "audio": None},
     "line 3: audio is None: write a path"),
    ({"id": "c", "split": "test", "label": "rare", "text": "t"},
     "line 3: class 'rare' has no train line"),
])
def test_bad_lines_are_reported_with_their_number_and_what_to_do(tmp_path, line, problem):
    with pytest.raises(ValueError, match=problem):
        index = write_index(tmp_path / "index.jsonl", [*GOOD, line])
        prepare_custom(index, tmp_path / "data", "--tokenizer", "none.txt")
    assert not (tmp_path / "data").exists()


def test_all_bad_lines_are_reported_at_once(tmp_path):
    with pytest.raises(ValueError, match="(?s)line 2: .*line 4: .*line 5: "):
        custom.read_index(write_index(tmp_path / "index.jsonl",
                                      [GOOD[0], "oops", GOOD[1], GOOD[0], "{}"]))
    with pytest.raises(ValueError, match="no line had split 'test'"):
        custom.read_index(write_index(tmp_path / "index.jsonl", GOOD[:1]))


# ---- whole or not at all ----
def test_git_lfs_pointers_are_recognised_before_anything_is_decoded(tmp_path):
    index = small_index(tmp_path)
    pointer = ("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64
               + "\nsize 72862\n")
    (tmp_path / "w/3.wav").write_text(pointer)
    problem = (r"1 of 10 train items cannot be read.*3\.wav is a Git-LFS pointer"
               r".*run `git lfs pull` in")
    with pytest.raises(ValueError, match=problem):
        prepare_custom(index, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    index = small_index(tmp_path)
    monkeypatch.setattr(media.shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB and the disk has 0\.0 GB free"):
        prepare_custom(index, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*"))


def test_unreadable_items_are_counted_and_left_out_up_to_the_share(tmp_path):
    index = small_index(tmp_path, n=20)
    (tmp_path / "p/5.png").unlink()     # seen before decoding
    (tmp_path / "p/7.png").write_bytes(b"no picture at all " * 100)     # seen while decoding
    make_wav(tmp_path / "w/9.wav", tone(0.01))     # shorter than one spectrogram frame
    for allowed in ("0.01", "0.1"):
        with pytest.raises(ValueError,
                           match="train items cannot be read, more than --allow-missing"):
            prepare_custom(index, tmp_path / "data", "--allow-missing", allowed)
        assert not list((tmp_path / "data").glob("*"))
    info = prepare_custom(index, tmp_path / "data", "--allow-missing", "0.5")
    assert (sum(len(ids) for ids in info["unreadable"].values()) == 3
            and sum(info["counts"].values()) == 21)
    for split, n in info["counts"].items():
        ids = (tmp_path / f"data/set/{split}/ids.txt").read_text().split()
        visual = np.load(tmp_path / f"data/set/{split}/visual.npy")
        assert len(ids) == n and visual[:, 0, 0, 0, 0].tolist() == [10 * int(id[1:]) for id in ids]


def test_a_split_is_never_empty(tmp_path):
    index = small_index(tmp_path, n=12, test=1)
    (tmp_path / "p/12.png").unlink()
    with pytest.raises(ValueError, match="1 of 1 test items cannot be read"):
        prepare_custom(index, tmp_path / "data", "--allow-missing", "1")


def test_second_run_changes_nothing_and_overwrite_does(tmp_path, capsys):
    index, root = small_index(tmp_path), tmp_path / "data"
    prepare_custom(index, root)
    before = (root / "set/dataset.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        prepare_custom(index, root)
    assert stop.value.code == 0 and "already there" in capsys.readouterr().out
    assert (root / "set/dataset.json").stat().st_mtime_ns == before
    info = prepare_custom(index, root, "--overwrite", "--size", "8")
    assert info["shapes"]["visual"] == [1, 3, 8, 8] and [f.name for f in root.iterdir()] == ["set"]


def test_a_folder_that_is_no_prepared_data_is_never_touched(tmp_path):
    index = small_index(tmp_path)
    (tmp_path / "data/set").mkdir(parents=True)
    (tmp_path / "data/set/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no prepared data set"):
        prepare_custom(index, tmp_path / "data", "--overwrite")
    assert (tmp_path / "data/set/thesis.txt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_nothing_new_and_the_old_whole(tmp_path, monkeypatch, overwrite):
    index, root, calls = small_index(tmp_path), tmp_path / "data", []
    if overwrite:
        prepare_custom(index, root)
    real = media.read_item

    def read_item(item, *rest):
        calls.append(item)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(item, *rest)
    monkeypatch.setattr(media, "read_item", read_item)
    with pytest.raises(KeyboardInterrupt):
        prepare_custom(index, root, *["--overwrite"][:overwrite])
    assert [f.name for f in root.rglob("set")] == ["set"][:overwrite]
    if overwrite:
        assert len(data.Split(root / "set", "train")) == 10


def test_every_file_has_its_hash_in_dataset_json(tmp_path):
    info = prepare_custom(small_index(tmp_path), tmp_path / "data")
    files = [f for f in (tmp_path / "data/set").rglob("*/*") if f.is_file()]
    found = {str(f.relative_to(tmp_path / "data/set")): hashlib.sha256(f.read_bytes()).hexdigest()
             for f in files}
    assert info["sha256"] == found
    names = ("audio.npy", "ids.txt", "labels.npy", "visual.npy")
    assert sorted(found) == sorted(f"{split}/{name}" for split in ("train", "val", "test")
                                   for name in names)


def test_trouble_in_the_very_last_step_brings_the_old_data_back(tmp_path, monkeypatch):
    index, root, rename = small_index(tmp_path), tmp_path / "data", Path.rename
    prepare_custom(index, root)

    def fails_once(path, target):
        if target.name == "set" and not path.name.endswith("-old"):
            raise OSError("no space left on device")
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="no space"):
        prepare_custom(index, root, "--overwrite")
    assert ([f.name for f in root.iterdir()] == ["set"]
            and len(data.Split(root / "set", "train")) == 10)


# ---- real clips ----
@needs_real
@needs_ffmpeg
def test_custom_on_original_video_files(tmp_path):
    clips = sorted((REAL / "grid_av/VideoMPG").glob("*.mpg"))[:6]
    (tmp_path / "real").symlink_to(REAL)
    paths = [f"real/grid_av/VideoMPG/{c.name}" for c in clips]
    rows = [{"id": c.stem, "split": ["train", "val", "test"][i % 3], "label": "clip",
             "visual": path, "audio": path}
            for i, (c, path) in enumerate(zip(clips, paths))]
    index = write_index(tmp_path / "index.jsonl", rows)
    info = prepare_custom(index, tmp_path / "data", "--size", "64", "--frames", "4")
    assert info["shapes"] == {"visual": [4, 3, 64, 64], "audio": [3, 128, 204]}
    # The word cut out of the sound track by somebody else's ffmpeg is in our decoding of the
    # track, sample for sample up to rounding.
    whole, word = (media.read_wave(clips[0]),
                   media.read_wave(REAL / f"grid_av/AudioWAV/{clips[0].stem}.wav"))
    n = len(whole) + len(word)
    match = torch.fft.irfft(torch.fft.rfft(whole, n) * torch.fft.rfft(word, n).conj(),
                            n)[:len(whole) - len(word) + 1]
    at = int(match.argmax())
    assert match[at] / (whole[at:at + len(word)].norm() * word.norm()) > 0.99


@needs_real
def test_custom_on_frames_sound_and_flow(tmp_path):
    clips = sorted(f.name for f in (REAL / "grid_av/Flow").iterdir())[:6]
    (tmp_path / "real").symlink_to(REAL / "grid_av")
    rows = [{"id": c, "split": ["train", "val", "test"][i % 3], "label": "clip",
             "visual": f"real/Frames/{c}", "audio": f"real/AudioWAV/{c}.wav",
             "flow": f"real/Flow/{c}"} for i, c in enumerate(clips)]
    index = write_index(tmp_path / "index.jsonl", rows)
    info = prepare_custom(index, tmp_path / "data", "--size", "64", "--stacks", "2",
                          "--flow-length", "5")
    assert info["shapes"] == {"visual": [3, 3, 64, 64], "audio": [3, 128, 204],
                              "flow": [2, 10, 64, 64]}
    flow = np.load(tmp_path / "data/set/train/flow.npy").astype(float)
    assert abs(flow.mean() - 128) < 10 and flow.std() > 2     # small motions around "none"


@pytest.fixture(scope="module")
def crema_folder(tmp_path_factory):
    """CREMA-D's layout, .flv and .wav: 16 real clips of another corpus under names of CREMA-D.

    4 of them are official test names.
    """
    if not (REAL / "grid_av").is_dir() or not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg and ../shared/data/grid_av")
    folder = tmp_path_factory.mktemp("crema")
    (folder / "AudioWAV").mkdir(), (folder / "VideoFlash").mkdir()
    test_names = (ROOT / "prepare/splits/crema_d_test.txt").read_text().split()
    for i, clip in enumerate(sorted((REAL / "grid_av/VideoMPG").glob("*.mpg"))[:16]):
        name = test_names[i] if i % 4 == 0 else f"{2000 + i}_IEO_{crema_d.CLASSES[i % 6]}_LO"
        to_flv = ["-t", "0.7", "-c:v", "flv", "-ac", "1", "-ar", "44100",
                  str(folder / f"VideoFlash/{name}.flv")]
        to_wav = ["-t", "0.7", "-ac", "1", "-ar", "16000", str(folder / f"AudioWAV/{name}.wav")]
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", str(clip), *to_flv, *to_wav],
                       check=True)
    return folder


def test_crema_d(crema_folder, tmp_path, capsys, monkeypatch):
    options = ["--source", str(crema_folder), "--data-root", str(tmp_path), "--size", "32"]
    with pytest.raises(ValueError, match="16 items, but 7,442 are published"):
        crema_d.main(options)
    crema_d.main([*options, "--allow-missing", "1", "--frames", "2"])
    assert "test 4 (published 744)" in capsys.readouterr().out
    info = json.loads((tmp_path / "crema_d/dataset.json").read_text())
    assert info["classes"] == ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]
    assert info["shapes"] == {"audio": [3, 128, 204], "visual": [2, 3, 32, 32]}
    assert info["counts"]["test"] == 4 and info["counts"]["train"] + info["counts"]["val"] == 12
    official = set((ROOT / "prepare/splits/crema_d_test.txt").read_text().split())
    for split in ("train", "val", "test"):
        ids = (tmp_path / f"crema_d/{split}/ids.txt").read_text().split()
        labels = np.load(tmp_path / f"crema_d/{split}/labels.npy")
        assert [info["classes"][k] for k in labels] == [id.split("_")[2] for id in ids]
        assert (set(ids) <= official) == (split == "test")
        audio = np.load(tmp_path / f"crema_d/{split}/audio.npy")
        expected = media.audio_clips(
            media.read_wave(crema_folder / f"AudioWAV/{ids[0]}.wav")).half().numpy()
        assert np.array_equal(audio[0], expected)
    result = train_on(tmp_path, "crema_d", monkeypatch, "--lora", "audio")
    # without LoRA it stays as it was
    assert result["test"]["visual"] == result["ume"]["test"]["visual"]


def test_crema_d_prefers_extracted_frames_and_needs_no_ffmpeg_then(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    names = (ROOT / "prepare/splits/crema_d_test.txt").read_text().split()[:2]
    names += [f"2000_IEO_{c}_X" for c in crema_d.CLASSES] + ["2001_IEO_ANG_XX"]
    for i, name in enumerate(names):
        make_wav(tmp_path / f"AudioWAV/{name}.wav", tone())
        make_png(tmp_path / f"Image-01-FPS/{name}/00001.png", flat(10 * i))
        (tmp_path / "VideoFlash").mkdir(exist_ok=True)
        (tmp_path / f"VideoFlash/{name}.flv").write_bytes(b"never opened" * 100)
    where = ["--source", str(tmp_path), "--data-root", str(tmp_path / "data")]
    crema_d.main([*where, "--size", "8", "--allow-missing", "1"])
    assert (np.load(tmp_path / "data/crema_d/test/visual.npy")[:, :, 0, 0, 0].tolist()
            == [[0] * 9, [10] * 9])


# ---- the other data sets of the paper ----
def run_script(script, source, root, *options):
    script.main(["--source", str(source), "--data-root", str(root), "--size", "16",
                 "--allow-missing", "1", *options])
    folder = root / script.__name__.split(".")[-1]
    info = json.loads((folder / "dataset.json").read_text())
    labels = {s: np.load(folder / s / "labels.npy").tolist() for s in info["counts"]}
    ids = {s: (folder / s / "ids.txt").read_text().splitlines() for s in info["counts"]}
    return info, ids, labels, lambda split, modality: np.load(folder / split / f"{modality}.npy")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five real clips of 3 s, face and voice, as .mp4."""
    if not (REAL / "grid_av").is_dir() or not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg and ../shared/data/grid_av")
    folder = tmp_path_factory.mktemp("clips")
    for i, clip in enumerate(sorted((REAL / "grid_av/VideoMPG").glob("*.mpg"))[:5]):
        copy = ["-i", str(clip), "-c", "copy", str(folder / f"{i}.mp4")]
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *copy], check=True)
    return sorted(folder.iterdir())


def test_ave(clips, tmp_path, capsys, monkeypatch):
    names = ["-abcdefghij", "b", "c", "d", "e"]
    (tmp_path / "AVE").mkdir()
    for clip, name in zip(clips, names):
        shutil.copy(clip, tmp_path / f"AVE/{name}.mp4")
    male, bell = "Male speech, man speaking", "Church bell"
    lines = f"{male}&-abcdefghij&good&0&1\n{bell}&-abcdefghij&good&1&3\n{bell}&b&good&0&10\n"
    (tmp_path / "trainSet.txt").write_text(lines)
    (tmp_path / "valSet.txt").write_text(f"{male}&c&good&0&10\n{male}&b&good&0&10\n")
    (tmp_path / "testSet.txt").write_text(f"{bell}&d&bad&0&10\n{male}&e&good&2&3\n")
    info, ids, labels, array = run_script(ave, tmp_path, tmp_path / "whole")
    assert info["classes"] == [bell, male]
    assert ids["train"] == ["-abcdefghij", "-abcdefghij_1", "b"] and labels["train"] == [1, 0, 0]
    assert (info["shapes"] == {"audio": [3, 128, 204], "visual": [9, 3, 16, 16]}
            and "whole clips" in info["source"])
    assert "train and val 1, train and test 0" in capsys.readouterr().out
    # the same clip
    assert np.array_equal(array("train", "visual")[0], array("train", "visual")[1])
    train_on(tmp_path / "whole", "ave", monkeypatch)
    _, _, _, event = run_script(ave, tmp_path, tmp_path / "event", "--event-span")
    # two spans of it
    assert not np.array_equal(event("train", "visual")[0], event("train", "visual")[1])
    padding = (0 + 4.268) / 9.138     # a second of sound fills 98 columns of 204
    sound = event("train", "audio")[0]
    assert (np.allclose(sound[:, :, 98:], padding, atol=1e-3)
            and not np.allclose(sound[:, :, 90], padding, atol=1e-3))
    (tmp_path / "valSet.txt").write_text("Church bell,c,good\n")
    with pytest.raises(ValueError, match="valSet.txt, line 1: expected class&id&quality&start&end"):
        run_script(ave, tmp_path, tmp_path / "other")


@needs_real
def test_published_ave_lists_are_read_whole():
    found = {s: ave.read_list(REAL / f"splits/ave/{s}Set.txt", Path("AVE"), True)
             for s in ("train", "val", "test")}
    assert {s: len({i.id for i in items}) for s, items in found.items()} == ave.PUBLISHED
    assert len({i.label for items in found.values() for i in items}) == 28
    assert sum(i.span == (0, 10) for items in found.values() for i in items) == 2750


def kinetics_folder(folder, clips):
    """Kinetics-400 in class folders; names, times and blanks as they are there."""
    places = ["train/playing organ/-a_000001_000011", "train/playing organ/b_000010_000020",
              "train/strumming guitar/c_000001_000011", "train/abseiling/d_000001_000011",
              "val/playing organ/e_000002_000012"]
    for clip, place in zip(clips, places):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / f"{place}.mp4")


def test_kinetics_sound_from_folders_and_from_annotations(clips, tmp_path, capsys, monkeypatch):
    kinetics_folder(tmp_path, clips)
    info, ids, labels, array = run_script(kinetics_sound, tmp_path, tmp_path / "folders")
    assert len(info["classes"]) == 32 and info["classes"] == sorted(info["classes"])
    assert info["counts"] == {"train": 2, "val": 1, "test": 1}
    assert sorted(ids["train"] + ids["val"]) == ["-a_000001_000011", "b_000010_000020",
                                                 "c_000001_000011"]
    assert ids["test"] == ["e_000002_000012"]
    assert [info["classes"][k] for k in labels["test"]] == ["playing_organ"]
    assert array("test", "visual").shape == (1, 9, 3, 16, 16)
    train_on(tmp_path / "folders", "kinetics_sound", monkeypatch)
    (tmp_path / "annotations").mkdir()
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    rows = ("playing organ,-a,1,11,train,0\nplaying organ,b,10,20,train,0\n"
            "abseiling,d,1,11,train,0\n")
    (tmp_path / "annotations/train.csv").write_text(header + rows)
    rows = "playing organ,e,2,12,val,0\nplaying organ,gone,2,12,val,0\n"
    (tmp_path / "annotations/val.csv").write_text(header + rows)
    listed = run_script(kinetics_sound, tmp_path, tmp_path / "listed")
    assert listed[0]["counts"] == {"train": 1, "val": 1, "test": 1}
    assert listed[0]["unreadable"]["test"] == ["gone_000002_000012"]


def test_kinetics_sound_from_31_class_lists_and_extracted_media(tmp_path):
    for i, clip in enumerate(["-a_000001_000011", "b_000001_000011", "c_0"]):
        make_wav(tmp_path / f"audio/{clip}.wav", tone())
        make_png(tmp_path / f"visual/{clip}/frame_00001.png", flat(10 * i))
    (tmp_path / "train.txt").write_text("-a_000001_000011,10,27\r\nb_000001_000011,10,27\r\n")
    (tmp_path / "test.txt").write_text("c_0 10 28\n")
    lists = ["--lists", str(tmp_path / "train.txt"), str(tmp_path / "test.txt")]
    info, ids, labels, array = run_script(kinetics_sound, tmp_path, tmp_path / "data", *lists)
    assert len(info["classes"]) == 31 and info["classes"][27] == "tap_dancing"
    assert labels == {"train": [27], "val": [27], "test": [28]}
    assert array("test", "visual")[0, :, 0, 0, 0].tolist() == [20] * 9
    (tmp_path / "test.txt").write_text("c_0,10,32\n")
    with pytest.raises(ValueError, match="class numbers go up to 32"):
        run_script(kinetics_sound, tmp_path, tmp_path / "other", *lists)


@needs_real
def test_published_kinetics_sound_lists_are_read_whole():
    for side, n in kinetics_sound.PUBLISHED[31].items():
        rows = kinetics_sound.read_list(REAL / f"splits/kinetics_sound/my_{side}.txt")
        assert len(dict(rows)) == len(rows) == n
        assert {label for _, label in rows} == set(range(31))
    classes = (REAL / "splits/kinetics_sound/classes_31.txt").read_text().split()
    assert [c for c in kinetics_sound.CLASSES if c != "strumming_guitar"] == classes


@pytest.fixture
def vocab(tmp_path):
    words = "the a green pepper sweet during different than sold mayonnaise tuna oz add"
    return ["--tokenizer", str(write_vocab(tmp_path / "vocab.txt", words))]


@needs_real
def test_mm_imdb_on_recipes_in_its_layout(tmp_path, monkeypatch, vocab, capsys):
    recipes = [json.loads(f.read_text()) for f in (REAL / "recipes_ml/dataset").glob("*.json")]
    tags = sorted({genre for recipe in recipes for genre in recipe["genres"]})
    monkeypatch.setattr(mm_imdb, "GENRES", tags[1:])
    info, ids, labels, array = run_script(mm_imdb, REAL / "recipes_ml", tmp_path / "data",
                                          *vocab, "--max-length", "64")
    lists = json.loads((REAL / "recipes_ml/split.json").read_text())
    assert info["multilabel"] and info["modalities"] == {"visual": "image", "text": "text"}
    assert ids == {"train": lists["train"], "val": lists["dev"], "test": lists["test"]}
    assert f"genres dropped: {tags[0]} (" in capsys.readouterr().out
    for id, row in zip(ids["test"], labels["test"]):
        film = json.loads((REAL / f"recipes_ml/dataset/{id}.json").read_text())
        assert ([tags[1:][k] for k, on in enumerate(row) if on]
                == sorted(set(film["genres"]) - {tags[0]}))
    assert array("val", "visual").shape == (6, 1, 3, 16, 16)
    assert array("val", "text").shape == (6, 64) and (array("val", "text")[:, 0] == 2).all()
    result = train_on(tmp_path / "data", "mm_imdb", monkeypatch)
    assert set(result["test"]["text"]) == {"f1_micro", "f1_macro", "loss"}


def test_mm_imdb_takes_the_longest_plot_and_counts_missing_files(tmp_path, vocab):
    (tmp_path / "dataset").mkdir()
    films = {"1": ["News", "Drama"], "2": ["Short"], "3": ["News"], "4": ["War", "Drama"]}
    for film, genres in films.items():
        info = {"genres": genres, "plot": ["green", "the sweet pepper", "a"]}
        (tmp_path / f"dataset/{film}.json").write_text(json.dumps(info))
        make_png(tmp_path / "x.png", flat(7)).rename(tmp_path / f"dataset/{film}.jpeg")
    (tmp_path / "split.json").write_text(
        json.dumps({"train": ["1", "2", "5"], "dev": ["3"], "test": ["4"]}))
    info, ids, labels, array = run_script(mm_imdb, tmp_path, tmp_path / "data",
                                          *vocab, "--max-length", "6")
    assert info["unreadable"]["train"] == ["5"] and len(info["classes"]) == 23
    assert array("train", "text")[0].tolist() == [2, 5, 9, 8, 3, 0]
    named = {s: [[info["classes"][k] for k, on in enumerate(row) if on] for row in rows]
             for s, rows in labels.items()}
    assert named == {"train": [["Drama"], ["Short"]], "val": [[]], "test": [["Drama", "War"]]}


@needs_real
def test_food101_on_groceries_in_the_layout_of_the_mirror(tmp_path, vocab, capsys, monkeypatch):
    info, ids, labels, array = run_script(food101, REAL / "grocery_it", tmp_path / "data",
                                          *vocab, "--max-length", "8")
    assert (info["classes"] == (REAL / "grocery_it/classes.txt").read_text().split()
            and "titles" in info["source"])
    assert (info["counts"]["test"] == 320
            and info["counts"]["train"] + info["counts"]["val"] == 576)
    assert (np.bincount(labels["val"]).tolist() == [4] * 16
            and np.bincount(labels["train"]).tolist() == [32] * 16)
    assert array("test", "visual").shape == (320, 1, 3, 16, 16)
    assert len(set(array("test", "visual").mean((1, 2, 3, 4)))) > 300
    with open(REAL / "grocery_it/texts/test_titles.csv", newline="") as file:
        titles = {Path(name).stem: text for name, text, _ in csv.reader(file)}
    for id, row in zip(ids["test"], array("test", "text")):
        tokens = load_tokenizer(vocab[1]).encode(titles[id], 8)
        assert row.tolist() == tokens + [0] * (8 - len(tokens))
    train_on(tmp_path / "data", "food101", monkeypatch)


def test_food101_titles_with_commas_and_whole_pages(tmp_path, vocab):
    """Two files of each class to train with, one to test;
    the pages say other words than the titles."""
    titles = {"train": [], "test": []}
    photos = [("train", "tacos"), ("train", "tacos"), ("train", "pie"), ("train", "pie"),
              ("test", "pie")]
    for i, (side, dish) in enumerate(photos):
        # web pictures often are not what their name says
        make_png(tmp_path / f"images/{side}/{dish}/{dish}_{i}.jpg", flat(10 * i))
        titles[side].append(f'{dish}_{i}.jpg,"the, green",{dish}\n' if i
                            else f"{dish}_{i}.jpg,,{dish}\n")
        (tmp_path / f"texts_txt/{dish}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"texts_txt/{dish}/{dish}_{i}.txt").write_text("pepper\n\npepper")
    pages, _, _, array = run_script(food101, tmp_path, tmp_path / "pages",
                                    *vocab, "--max-length", "5")
    assert "pages" in pages["source"] and array("test", "text").tolist() == [[2, 8, 8, 3, 0]]
    (tmp_path / "texts").mkdir()
    for side, rows in titles.items():
        (tmp_path / f"texts/{side}_titles.csv").write_text("".join(rows))
    info, ids, labels, array = run_script(food101, tmp_path, tmp_path / "titles",
                                          *vocab, "--max-length", "6")
    assert "titles" in info["source"] and info["classes"] == ["pie", "tacos"]
    assert ids["test"] == ["pie_4"] and labels["test"] == [0]
    assert (array("test", "text").tolist() == [[2, 5, 1, 7, 3, 0]]
            and array("test", "visual")[0, 0, 0, 0, 0] == 40)
    texts = [*array("train", "text").tolist(), *array("val", "text").tolist()]
    everything = dict(zip(ids["train"] + ids["val"], texts))
    assert everything["tacos_0"] == [2, 3, 0, 0, 0, 0]     # no title at all
    assert run_script(food101, tmp_path, tmp_path / "chosen",
                      *vocab, "--text", "pages")[0]["source"].endswith("pages")


# ---- both vocabularies: Tables 6 and 11 need BERT and DeBERTa on the same data ----
@pytest.fixture
def public(tmp_path, monkeypatch):
    """Two tiny vocabularies in the place of the public ones: name -> tokenizer.
    Nothing is downloaded."""
    files = {"bert_vocab": write_vocab(tmp_path / "bert.txt", "the a green pepper sweet cake"),
             "deberta_vocab": ROOT / "tests/fixtures/encoders/tokenizer_bpe/bpe_encoder.bin"}
    monkeypatch.setattr(media.checkpoints, "download", lambda name: files[name])
    return {name: load_tokenizer(file) for name, file in files.items()}


def rows_of(tokenizer, texts, length):
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts):
        ids = tokenizer.encode(text, length)
        row[:len(ids)] = ids
    return rows


def described(tokenizer):
    return {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size}


def few_films(folder, plots):
    """MM-IMDB's layout: films a, b, ... with these plots, two to validate, one to test."""
    (folder / "dataset").mkdir(parents=True)
    names = [chr(ord("a") + i) for i in range(len(plots))]
    for name, plot in zip(names, plots):
        (folder / f"dataset/{name}.json").write_text(
            json.dumps({"genres": ["Drama"], "plot": [plot]}))
        make_png(folder / "x.png", flat(7)).rename(folder / f"dataset/{name}.jpeg")
    lists = {"train": names[:-3], "dev": names[-3:-1], "test": names[-1:]}
    (folder / "split.json").write_text(json.dumps(lists))
    return dict(zip(names, plots))


def few_dishes(folder, titles):
    """Food-101's layout, with titles: all but the last dish to train with."""
    (folder / "texts").mkdir(parents=True)
    for i, title in enumerate(titles):
        side = "test" if i == len(titles) - 1 else "train"
        make_png(folder / f"images/{side}/pie/{i}.jpg", flat(i))
        with open(folder / f"texts/{side}_titles.csv", "a", newline="") as file:
            csv.writer(file).writerow([f"{i}.jpg", title, "pie"])
    return {str(i): title for i, title in enumerate(titles)}


TEXTS = ["the green pepper", "", "sweet sweet cake, a sweet cake for all of us", "crème brûlée",
         "A cake!", "pepper"]
TWO_VOCABULARIES = [(food101, few_dishes, "bert_vocab", "deberta_vocab"),
                    (mm_imdb, few_films, "deberta_vocab", "bert_vocab")]


@pytest.mark.parametrize("script, layout, own, other", TWO_VOCABULARIES, ids=["food101", "mm_imdb"])
def test_texts_are_stored_for_both_public_vocabularies(script, layout, own, other, tmp_path,
                                                       public):
    text = layout(tmp_path / "raw", TEXTS)
    info, ids, _, array = run_script(script, tmp_path / "raw", tmp_path / "data",
                                     "--max-length", "9")
    kind = public[other].kind
    assert kind in ("wordpiece", "byte_bpe") and kind != public[own].kind
    assert (info["tokenizer"] == described(public[own])
            and info["other_tokenizers"] == [described(public[other])])
    assert info["modalities"]["text"] == "text" and set(info["shapes"]) == {"visual", "text"}
    for split, n in info["counts"].items():
        texts = [text[id] for id in ids[split]]
        first, second = array(split, "text"), array(split, f"text.{kind}")
        assert first.shape == second.shape == (n, 9) and first.dtype == second.dtype == np.int32
        assert np.array_equal(first, rows_of(public[own], texts, 9))
        assert np.array_equal(second, rows_of(public[other], texts, 9))
        assert np.array_equal(
            data.Split(tmp_path / "data" / info["name"], split).arrays[f"text.{kind}"], second)
    assert (array("train", f"text.{kind}")[:, -1] != 0).any()     # one text was cut


@pytest.mark.parametrize("script, layout, own, other", TWO_VOCABULARIES, ids=["food101", "mm_imdb"])
def test_with_a_vocabulary_of_ones_own_there_is_one_array_and_a_warning(
        script, layout, own, other, tmp_path, public, vocab, capsys):
    layout(tmp_path / "raw", TEXTS)
    info, _, _, array = run_script(script, tmp_path / "raw", tmp_path / "data", *vocab)
    said = [line for line in capsys.readouterr().out.splitlines()
            if "another vocabulary can't read these data" in line]
    assert len(said) == 1 and "wordpiece" in said[0]
    assert info["other_tokenizers"] == [] and info["tokenizer"]["kind"] == "wordpiece"
    folder = tmp_path / "data" / info["name"] / "train"
    assert sorted(f.name for f in folder.iterdir()) == ["ids.txt", "labels.npy", "text.npy",
                                                        "visual.npy"]


def test_rows_of_both_vocabularies_belong_to_the_items_that_could_be_read(tmp_path, public):
    text = few_films(tmp_path / "raw", TEXTS)
    # Seen while decoding.
    (tmp_path / "raw/dataset/a.jpeg").write_bytes(b"no picture at all " * 100)
    info, ids, _, array = run_script(mm_imdb, tmp_path / "raw", tmp_path / "data",
                                     "--max-length", "9")
    assert info["unreadable"]["train"] == ["a"] and ids["train"] == ["b", "c"]
    expected = rows_of(public["bert_vocab"], [text["b"], text["c"]], 9)
    assert np.array_equal(array("train", "text.wordpiece"), expected)


def test_both_vocabularies_count_for_the_disk(tmp_path, public, monkeypatch):
    few_films(tmp_path / "raw", TEXTS)
    # Picture and one array of ids; the second one is 512 * 4 bytes more.
    one_row = 3 * 16 * 16 + 512 * 4
    free = lambda path: shutil._ntuple_diskusage(10**9, 0, len(TEXTS) * one_row + 1)
    monkeypatch.setattr(write.shutil, "disk_usage", free)
    with pytest.raises(ValueError, match="the disk has"):
        run_script(mm_imdb, tmp_path / "raw", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*"))


def test_a_vocabulary_that_cannot_be_had_stops_before_anything_is_written(tmp_path, public,
                                                                          monkeypatch):
    few_films(tmp_path / "raw", TEXTS)
    have = media.checkpoints.download

    def download(name):
        if name == "bert_vocab":
            raise ConnectionError("cannot download vocab.txt")
        return have(name)
    monkeypatch.setattr(media.checkpoints, "download", download)
    with pytest.raises(ConnectionError, match="cannot download"):
        run_script(mm_imdb, tmp_path / "raw", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_one_recording_is_read_with_one_tokenizer(public):
    """What `evaluate.py --clip` does: only the options that a text needs,
    and no other vocabulary."""
    item = media.Item("clip", "", {"text": "the green pepper"})
    row = media.read_item(item, {"text": "text"}, SimpleNamespace(max_length=7),
                          public["bert_vocab"])
    assert list(row) == ["text"] and row["text"].tolist() == [2, 5, 7, 8, 3, 0, 0]


@needs_real
def test_ucf101_on_real_frames_and_flow(tmp_path, capsys, monkeypatch):
    """Real frames and flow under names of UCF101, with its traps.

    Two spellings of one class, .bin files, u and v of unequal length.
    """
    written = ["HandStandPushups", "JumpRope", "JumpingJack"]
    # test, train, train, val of split 1
    names = [f"v_{c}_g{g:02}_c01" for c in written for g in (1, 8, 9, 25)]
    for name, clip in zip(names, sorted((REAL / "grid_av/Flow").iterdir())):
        for i in range(1, 9):
            frames = tmp_path / "jpegs_256" / name.replace("HandStand", "Handstand")
            place = {REAL / f"grid_av/Frames/{clip.name}/{i:05}.jpg": frames,
                     clip / f"flow_x_{i:05}.jpg": tmp_path / "tvl1_flow/u" / name,
                     clip / f"flow_y_{i:05}.jpg": tmp_path / "tvl1_flow/v" / name}
            for source, folder in place.items():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / f"frame{i:06}.jpg")
        (tmp_path / "tvl1_flow/v" / name / "frame000008.jpg").unlink()
        (tmp_path / "tvl1_flow/u" / name / "frame000001.bin").write_bytes(b"floats")
    info, ids, labels, array = run_script(ucf101, tmp_path, tmp_path / "one")
    classes = ["HandstandPushups", "JumpingJack", "JumpRope"]     # the order of the official list
    assert info["classes"] == classes
    assert ({id: classes[k] for id, k in zip(ids["test"], labels["test"])}
            == {f"v_{c}_g01_c01": c for c in classes})
    assert sorted(ids["val"]) == sorted(f"v_{c}_g25_c01" for c in classes)
    assert info["counts"] == {"train": 6, "val": 3, "test": 3}
    assert info["shapes"] == {"visual": [9, 3, 16, 16], "flow": [3, 20, 16, 16]}
    assert not any(info["unreadable"].values())
    first = [media.read_image(tmp_path / f"tvl1_flow/{axis}/{names[0]}/frame000001.jpg", 16, "GRAY")
             for axis in "uv"]
    assert np.array_equal(array("test", "flow")[0, 0, :2], torch.cat(first))
    train_on(tmp_path / "one", "ucf101", monkeypatch)
    two = run_script(ucf101, tmp_path, tmp_path / "two", "--split", "2", "--stacks", "1",
                     "--flow-length", "5")
    assert sorted(two[1]["test"]) == sorted(f"v_{c}_{g}_c01" for c in classes
                                            for g in ("g08", "g09"))
    assert two[0]["shapes"]["flow"] == [1, 10, 16, 16]


def test_ucf101_from_the_videos_themselves(clips, tmp_path):
    for clip, group in zip(clips, ("g01", "g08", "g25")):
        video = tmp_path / f"v_YoYo_{group}_c01.avi"
        cut = ["-i", str(clip), "-t", "0.5", "-an", str(video)]
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *cut], check=True)
        for axis in "uv":
            make_png(tmp_path / f"tvl1_flow/{axis}/v_YoYo_{group}_c01/frame000001.jpg",
                     np.full((20, 30), 128))
    info, _, _, array = run_script(ucf101, tmp_path, tmp_path / "data", "--frames", "2")
    assert info["counts"] == {"train": 1, "val": 1, "test": 1}
    assert array("test", "visual").std() > 10 and (array("test", "flow") == 128).all()


@needs_real
def test_ucf101_groups_are_the_official_lists():
    names = lambda path: {line.split()[0].split("/")[1][:-4].replace("HandStand", "Handstand")
                          for line in path.open()}
    lists = {(k, side): names(REAL / f"splits/ucf101/{side}list0{k}.txt")
             for k in (1, 2, 3) for side in ("train", "test")}
    for k, sides in ucf101.PUBLISHED.items():
        everything = lists[k, "train"] | lists[k, "test"]
        split = {"train": set(), "val": set(), "test": set()}
        for name in everything:
            split[ucf101.side_of(name, k)].add(name)
        assert (split["test"] == lists[k, "test"]
                and {side: len(lists[k, side]) for side in sides} == sides)
        assert 0.09 < len(split["val"]) / sides["train"] < 0.12
        assert len({name.split("_")[1] for name in split["val"]}) == 101
    classes = [line.split()[1] for line in (REAL / "splits/ucf101/classInd.txt").open()]
    assert sorted({name.split("_")[1] for name in everything}, key=str.lower) == classes


# ---- the toys ----
@pytest.fixture
def small_toys(monkeypatch):
    monkeypatch.setattr(toy, "SIZES",
                        dict.fromkeys(toy.WORLDS, {"train": 24, "val": 12, "test": 36}))


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("world", toy.WORLDS)
def test_a_toy_is_a_prepared_data_set_and_depends_on_the_seed_alone(world, tmp_path, small_toys):
    toy.make(tmp_path / "one", world, 3)
    toy.make(tmp_path / "two", world, 3)
    toy.make(tmp_path / "other", world, 4)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two") and [f.name for f in tmp_path.glob(".*")] == []
    assert one["train/audio.npy"] != files_of(tmp_path / "other")["train/audio.npy"]
    info = json.loads(one["dataset.json"])
    assert (info["counts"] == toy.SIZES[world]
            and info["source"] == "generated by prepare/toy.py, seed 3")
    assert info["name"] == world and "made_by" not in info
    for split, n in toy.SIZES[world].items():
        assert len(data.Split(tmp_path / "one", split)) == n


def test_a_toy_keeps_the_fingerprint_of_what_made_it(tmp_path, small_toys):
    toy.make(tmp_path / "one", "toy", 0, made_by={"data.py": "abc"})
    assert json.loads((tmp_path / "one/dataset.json").read_text())["made_by"] == {"data.py": "abc"}


def test_toy_as_a_program(tmp_path, small_toys, capsys):
    toy.main(["--world", "toy_mimics", "--seed", "5", "--data-root", str(tmp_path)])
    toy.make(tmp_path / "expected", "toy_mimics", 5)
    assert files_of(tmp_path / "toy_mimics-s5") == files_of(tmp_path / "expected")
    assert capsys.readouterr().out == f"made {tmp_path / 'toy_mimics-s5'}\n"
    before = (tmp_path / "toy_mimics-s5/dataset.json").stat().st_mtime_ns
    toy.main(["--world", "toy_mimics", "--seed", "5", "--data-root", str(tmp_path)])
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "toy_mimics-s5/dataset.json").stat().st_mtime_ns == before


# ---- command line ----
SCRIPTS = [ave, crema_d, food101, kinetics_sound, mm_imdb, ucf101]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_without_the_download_one_line_says_what_to_get(script, tmp_path):
    assert ("\n" not in script.HELP
            and f"`python -m {script.__name__} --source downloads/" in script.HELP)
    with pytest.raises(FileNotFoundError) as error:
        script.main(["--source", str(tmp_path / "none"), "--data-root", str(tmp_path / "data")])
    assert (script.HELP in str(error.value) and "\n" not in str(error.value)
            and not (tmp_path / "data").exists())
    # train_joint.py --dataset says the same
    with pytest.raises(FileNotFoundError, match="no prepared data") as error:
        arguments.find(str(tmp_path), script.__name__.split(".")[-1])
    assert script.HELP in str(error.value)


@pytest.mark.parametrize("script", [*SCRIPTS, custom, toy], ids=lambda script: script.__name__)
def test_help_shows_the_command_as_typed_and_fits_the_screen(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: python -m {script.__name__} [-h]")
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_as_a_program(tmp_path):
    """Trouble is one line on stderr and exit code 1;
    help does not wait for torchvision and torchaudio."""
    program = lambda *arguments: subprocess.run([sys.executable, *arguments], cwd=ROOT,
                                                capture_output=True, text=True)
    done = program("-m", "prepare.crema_d", "--source", str(tmp_path / "none"),
                   "--data-root", str(tmp_path))
    assert done.returncode == 1 and done.stderr == (
        f"error: no AudioWAV/*.wav in {tmp_path / 'none'}. {crema_d.HELP}\n")
    imports = "import sys, prepare." + ", prepare.".join(s.__name__.split(".")[-1]
                                                         for s in [*SCRIPTS, custom])
    heavy = "any(m.split('.')[0] in ('torchvision', 'torchaudio') for m in sys.modules)"
    assert program("-c", f"{imports}; sys.exit({heavy})").returncode == 0
