"""Careless and hostile data: one line that names the file, and nothing that runs or leaks."""
import fcntl
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch

import data
from prepare import ave, custom, food101, kinetics_sound, media, mm_imdb, options, toy, write
from running import error

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
N, SPLITS = 6, ("train", "val", "test")
KINDS = {"visual": "image", "flow": "flow", "audio": "audio", "text": "text"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A hand-made data set of all kinds, as it should be."""
    folder = tmp_path_factory.mktemp("whole") / "birds"
    arrays = dict(visual=np.full((N, 1, 3, 8, 8), 7, np.uint8),
                  flow=np.full((N, 2, 4, 8, 8), 128, np.uint8),
                  audio=np.zeros((N, 1, 16, 20), np.float16), text=np.full((N, 5), 9, np.int32))
    arrays |= {"text.byte_bpe": np.full((N, 5), 19, np.int32), "labels": np.arange(N) % 3}
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        (folder / split / "ids.txt").write_text("".join(f"{split}{i}\n" for i in range(N)))
        for name, array in arrays.items():
            np.save(folder / split / f"{name}.npy", array)
    info = dict(name="birds", classes=["wren", "owl", "tit"], multilabel=False, modalities=KINDS,
                counts=dict.fromkeys(SPLITS, N), shapes={m: arrays[m].shape[1:] for m in KINDS},
                tokenizer=dict(kind="wordpiece", vocab_size=10, fingerprint="x"),
                other_tokenizers=[dict(kind="byte_bpe", vocab_size=20, fingerprint="y")])
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def birds(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "birds")


def say(folder):
    """The one line that `check` raises."""
    with pytest.raises(ValueError) as raised:
        data.check(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value), raised.value
    return str(raised.value)


def change(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def test_what_is_right_passes_and_is_read_once(birds, monkeypatch):
    read, looked = data.check_values, []

    def check_values(file, *rest):
        looked.append(file)
        read(file, *rest)
    monkeypatch.setattr(data, "check_values", check_values)
    info = data.check(birds)
    assert info == json.loads((birds / "dataset.json").read_text()) and looked
    data.CHECKED.clear()     # another process: checked.json remembers
    looked.clear()
    data.check(birds)
    assert not looked
    file = birds / "val" / "audio.npy"
    np.save(file, change(np.load(file), (0, 0, 0, 0), np.inf))
    assert "val/audio.npy: NaN or infinity in samples 0 to 5" in say(birds)     # a file has changed
    shutil.rmtree(birds / "val")
    assert "val/labels.npy: no such file" in say(birds)


def test_memory_is_no_way_out_of_the_folder(birds, tmp_path):
    """A stranger's checked.json may be a link, anything at all, or not be writable."""
    (tmp_path / "mine").write_text("years of work")
    (birds / "checked.json").symlink_to(tmp_path / "mine")
    data.check(birds)
    assert (tmp_path / "mine").read_text() == "years of work"
    for there in ("", "[", "[" * 10 ** 5, '{"version": 1}'):
        data.CHECKED.clear()
        (birds / "checked.json").write_text(there)
        np.save(birds / "test" / "audio.npy", np.full((N, 1, 16, 20), np.nan, np.float16))
        assert "test/audio.npy: NaN" in say(birds)
    np.save(birds / "test" / "audio.npy", np.zeros((N, 1, 16, 20), np.float16))
    (birds / "checked.json").unlink()
    (birds / "checked.json").mkdir()     # as on a disk that can't be written
    data.check(birds)


@pytest.mark.parametrize("key, value, told", [
    ("name", None, "'name' must be a text"), ("name", "../x", "'name' may have letters"),
    ("name", "", "'name'"),
    ("classes", None, "'classes' must be a list"), ("classes", [], "must not be empty"),
    ("classes", ["a", "a", "b"], "'classes' must be different"),
    ("classes", ["a", 1, []], "'classes' must be"),
    ("classes", ["a", "b"], r"labels.npy: numbers 0 to 2, but dataset.json allows 0 to 1"),
    ("multilabel", "no", "'multilabel' must be true or false"),
    ("multilabel", True, r"must be uint8 \(6, 3\)"),
    ("modalities", ["audio"], "'modalities' must be an object"),
    ("modalities", {}, "must not be empty"),
    ("modalities", {"../../x": "audio"}, r"'modalities': .*'../../x'"),
    ("modalities", {"": "audio"}, "'modalities'"),
    ("modalities", {"a/b": "audio"}, "'modalities'"),
    ("modalities", {"a.b": "audio"}, "'modalities'"),
    ("modalities", {"..": "audio"}, "'modalities'"),
    ("modalities", {"keys": "audio"}, "'modalities'"),
    ("modalities", {"labels": "audio"}, "'modalities'"),
    ("modalities", {"a\nb": "audio"}, "'modalities'"),
    ("modalities", {"audio": "sound"}, "audio must be one of frames"),
    ("modalities", {"audio": []}, "must be one of"),
    ("modalities", {"smell": "audio"}, "'shapes' must have a list of numbers for smell"),
    ("shapes", None, "'shapes' must be an object"), ("shapes", {}, "'shapes' must have a list"),
    ("shapes", "another size", r"visual.npy: shape \[6, 1, 3, 8, 8\], but"),
    ("shapes", dict.fromkeys(KINDS, [True]), "'shapes' must have a list of numbers"),
    ("tokenizer", dict(kind="wordpiece", vocab_size=10 ** 30), "vocab_size"),
    ("tokenizer", dict(kind="wordpiece", vocab_size=10.0), "vocab_size"),
    ("classes", ["\ud800", "b", "c"],
     "dataset.json is damaged: .*can't encode.*prepare the data set again"),
    ("shapes", dict.fromkeys(KINDS, [1.0]), "'shapes' must have a list of numbers"),
    ("counts", {"train": 7}, "dataset.json: 'counts' says 7 train samples, but there are 6"),
    ("counts", 3, "'counts'"),
    ("tokenizer", None, "'tokenizer' must say kind"),
    ("tokenizer", {"kind": "wordpiece"}, "vocab_size"),
    ("tokenizer", dict(kind="wordpiece", vocab_size=9), r"train/text.npy: token ids not below"),
    ("other_tokenizers", [dict(kind="../up", vocab_size=9)], "kind"),
    ("other_tokenizers", [None], "kind"),
    ("other_tokenizers", [dict(kind="byte_bpe", vocab_size=19)], "text.byte_bpe.npy: token ids"),
    ("groups", {"a": [0, 3]}, "'groups': 'a' must list class numbers 0 to 2"),
    ("groups", {"a": 0}, "'groups'"),
    ("groups", [0], "'groups' must be an object"),
    ("sample_groups", [1], "'sample_groups' must be"),
    ("sample_groups", ["a", "b"], "groups.npy: no such file"), ("sha256", 3, "'sha256' must be"),
    ("made_by", {"../../etc/passwd": "x"}, "'made_by'"),
    ("made_by", {"/dev/zero": "x"}, "'made_by'"),
])
def test_every_key_of_dataset_json(birds, key, value, told):
    info = json.loads((birds / "dataset.json").read_text())
    if value == "another size":
        value = info["shapes"] | {"visual": [1, 3, 9, 8]}
    (birds / "dataset.json").write_text(json.dumps(info | {key: value}))
    with pytest.raises(ValueError, match=told):
        data.check(birds)
    say(birds)
    info.pop(key, None)
    (birds / "dataset.json").write_text(json.dumps(info))
    if key in data.KEYS:
        assert f"'{key}' must be" in say(birds)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 10 ** 5, b"{}\0",
                                  b"null"])
def test_dataset_json_that_is_none(birds, text):
    (birds / "dataset.json").write_bytes(text)
    assert "dataset.json" in say(birds)


@pytest.mark.parametrize("name, spoil, told", [
    ("labels", lambda a: change(a, 1, 3), r"numbers 0 to 3, but dataset.json allows 0 to 2"),
    ("labels", lambda a: change(a, 1, -1), "numbers -1 to 2"),
    ("labels", lambda a: a[:, None], r"int64 \(6, 1\)"),
    ("labels", lambda a: a.astype(np.float32), "float32"),
    ("labels", lambda a: a.astype(">i8"), ">i8|int64"),
    ("labels", lambda a: a[:0], "no samples|cut short"),
    ("labels", lambda a: a[:5], "6 ids, but 5 labels"),
    ("labels", lambda a: a[0], "header|cut short"),
    ("visual", lambda a: (a / 255).astype(np.float32),
     r"float32 .6, 1, 3, 8, 8., but image is uint8"),
    ("visual", lambda a: a.astype(np.int16), "int16"),
    ("visual", lambda a: a[:, :, :1], r"\(6, 1, 1, 8, 8\), but image"),
    ("visual", lambda a: a[:, 0], r"\(6, 3, 8, 8\), but"),
    ("visual", lambda a: a[..., :6], r"8, 6\), but image is"),
    ("visual", lambda a: a[:, :0], "but image is|cut short"),
    ("visual", lambda a: a[:5], "shape .5, 1, 3, 8, 8., but"),
    ("visual", lambda a: a.transpose(0, 1, 3, 4, 2), "but image is"),
    ("flow", lambda a: a[:, :, :3], "but flow is"),
    ("audio", lambda a: change(a, (4, 0, 3, 3), np.nan), "NaN or infinity in samples 0 to 5"),
    ("audio", lambda a: change(a, (0, 0, 0, 0), -np.inf), "NaN"),
    ("audio", lambda a: a.astype(np.int16), "int16"),
    ("audio", lambda a: a[..., :9], "'shapes'"), ("audio", lambda a: a.astype(complex), "complex"),
    ("text", lambda a: change(a, (1, 1), 10), "token ids"),
    ("text", lambda a: change(a, (1, 1), -1), "token ids"),
    ("text", lambda a: a.astype(np.uint8), "uint8"), ("text.byte_bpe", lambda a: a[:, :3], "shape"),
])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_array(birds, split, name, spoil, told):
    file = birds / split / f"{name}.npy"
    np.save(file, spoil(np.load(file)))
    with pytest.raises(ValueError, match=told):
        data.check(birds)
    assert f"{split}/" in say(birds)


class Boom:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_pickle_runs_and_no_damaged_file_is_read(birds, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file, good = birds / "train" / "audio.npy", (birds / "train" / "audio.npy").read_bytes()
    np.save(tmp_path / "objects.npy", np.array([Boom()] * N), allow_pickle=True)
    np.savez(tmp_path / "zip.npz", audio=np.zeros(3))
    spoilt = [pickle.dumps(Boom()), (tmp_path / "objects.npy").read_bytes(),
              (tmp_path / "zip.npz").read_bytes(), b"", good[:-1], good + b"x", good[:70],
              b"\x93NUMPY", b"\x93NUMPY\x09" + good[7:]]
    for old, new in ((b"'shape': (6", b"'shape': (9"), (b"'shape': (6", b"'shape': (-"),
                     (b"'descr': '<f2'", b"'descr': '|O'   "), (b"{'descr'", b"[[[[[[[["),
                     (b"(6, 1,", b"(6**9,")):
        spoilt.append(good.replace(old, new))
    for name in ("audio", "labels"):
        for content in spoilt:
            file.with_name(f"{name}.npy").write_bytes(content)
            assert f"train/{name}.npy: " in say(birds)
    file.unlink()
    file.symlink_to("/dev/zero")
    say(birds)
    assert not (tmp_path / "ran").exists()


def test_ids_groups_and_classes(birds, capsys):
    (birds / "val" / "ids.txt").write_text("one\n")
    assert "val/ids.txt: 1 ids, but 6 labels" in say(birds)
    (birds / "val" / "ids.txt").write_bytes(b"\xff\n" * N)
    assert "val/ids.txt: no UTF-8 text" in say(birds)
    (birds / "val" / "ids.txt").unlink()
    assert "val/ids.txt: no such file" in say(birds)
    shutil.copy(birds / "test" / "ids.txt", birds / "val")
    for split in SPLITS:
        np.save(birds / split / "labels.npy", np.zeros(N, np.int64))
        np.save(birds / split / "groups.npy", np.arange(N) % 3)
    data.check(birds)
    data.check(birds)     # said once
    told = "2 classes have no train sample, nothing can learn them: owl, tit\n"
    assert capsys.readouterr().out.count(told) == 1
    info = json.loads((birds / "dataset.json").read_text())
    (birds / "dataset.json").write_text(json.dumps(info | dict(sample_groups=["clean", "noisy"])))
    assert "train/groups.npy: numbers 0 to 2" in say(birds)
    (birds / "dataset.json").write_text(json.dumps(info | dict(multilabel=True)))
    for split in SPLITS:
        np.save(birds / split / "labels.npy", np.zeros((N, 3), np.uint8))
    assert "train/labels.npy: no sample has any class" in say(birds)


def test_the_scripts_look_before_any_work(birds, tmp_path):
    np.save(birds / "val" / "visual.npy", np.zeros((N, 1, 3, 8, 8), np.float32))
    words = "--dataset birds --encoder resnet_small text=bert_small --pretrained none".split()
    for script in ("train_joint.py", "train_unimodal.py", "baselines.concat"):
        more = ["--modality", "visual"] if script == "train_unimodal.py" else []
        told = error(script, *words, *more, out=tmp_path / "runs", root=tmp_path)
        assert told.startswith(f"error: {birds}/val/visual.npy: float32")
        assert not (tmp_path / "runs").exists()


# ---- prepare: one bad file is one bad item ----

def riff(x, rate=16000, bits=16, kind=1):
    """A WAV file of any header, from numbers of any type."""
    raw, width = x.tobytes(), bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, 1, rate % 2 ** 32, rate * width % 2 ** 32,
                       width, bits)
    body = b"WAVE" + head + struct.pack("<4sI", b"data", len(raw)) + raw
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tone(rate=16000, seconds=0.5, hertz=440):
    return (9000 * np.sin(np.arange(int(rate * seconds)) * 2 * np.pi * hertz / rate)).astype("<i2")


def png(w, h, depth=8, pixels=None):
    """Grey pictures. Without pixels the file holds nothing but its header."""
    def part(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    rows = b"" if pixels is None else b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", w, h, depth, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows))
            + part(b"IEND", b""))


def write_index(folder, key, files, n=8):
    """An index of n good train files and one val and test, but for `files`: number -> content."""
    good = riff(tone()) if key == "audio" else png(8, 8, 8, np.full((8, 8), 9, np.uint8))
    suffix, lines = ("wav" if key == "audio" else "png"), []
    for i in range(n + 2):
        (folder / f"{i}.{suffix}").write_bytes(files.get(i, good))
        split = "train" if i < n else ("val", "test")[i - n]
        row = {"id": f"s{i}", "split": split, "label": "a", key: f"{i}.{suffix}"}
        lines.append(json.dumps(row))
    (folder / "index.jsonl").write_text("\n".join(lines))
    return folder / "index.jsonl"


def prepare(index, *words):
    custom.main([str(index), "--name", "set", "--data-root", str(index.parent / "data"), "--size",
                 "8", "--workers", "2", *words])
    return index.parent / "data" / "set"


NO_LENGTH = riff(tone())[:16] + b"\xff\xff\xff\x7f" + riff(tone())[20:]     # F4


@pytest.mark.parametrize("key, content", [
    ("audio", NO_LENGTH), ("audio", riff(tone())[:8000]), ("audio", riff(tone(), rate=0)),
    ("audio", riff(tone(), rate=2 ** 32 - 1)),
    ("audio", riff(tone(), rate=7)), ("audio", riff(tone())[:30]), ("audio", b"RIFF"),
    ("audio", riff(tone(), bits=40)), ("audio", b"no sound"), ("audio", riff(tone()[:9])),
    ("audio", riff(tone()[:0])), ("visual", png(50_000, 50_000)), ("visual", png(8, 8)),
    ("visual", png(1, 5000, 8, np.zeros((5000, 1), np.uint8))), ("visual", b"\xff\xd8" * 20),
    ("visual", b"GIF89a" + b"\xff" * 20), ("visual", png(0, 9)), ("visual", b"\x89PNG"),
    ("visual", b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff" + b"\0" * 20),
])
def test_whatever_is_wrong_with_one_file_counts_against_it(tmp_path, capsys, monkeypatch, key,
                                                           content):
    """It needs no ffmpeg to see it."""
    monkeypatch.setattr(media.shutil, "which", lambda program: None)
    index = write_index(tmp_path, key, {3: content})
    began = time.monotonic()
    folder = prepare(index, "--allow-missing", "0.2")
    assert time.monotonic() - began < 5
    info = json.loads((folder / "dataset.json").read_text())
    assert info["unreadable"]["train"] == ["s3"] and info["counts"]["train"] == 7
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train:")]
    assert line.startswith(f"train: 7 items, 1 left out, the first: {tmp_path}/3.")
    with pytest.raises(ValueError, match=r"1 of 8 train items cannot be read.*/3\."):
        prepare(index, "--overwrite")
    assert sorted(f.name for f in folder.parent.iterdir()) == ["set"]     # the old one is whole


@pytest.mark.parametrize("kind", ["a word", "no word"])
def test_what_a_decoder_raises_counts_against_the_item(tmp_path, monkeypatch, kind):
    real = media.read_frames

    def read_frames(path, *rest):
        if path.name == "3.png":
            raise KeyError("Huffman\nat 7") if kind == "a word" else MemoryError
        return real(path, *rest)
    monkeypatch.setattr(media, "read_frames", read_frames)
    with pytest.raises(ValueError, match=r"3\.png: ('Huffman|MemoryError)") as raised:
        prepare(write_index(tmp_path, "visual", {}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="it needs the ffmpeg program")
def test_a_cut_film_is_told_from_a_whole_one(tmp_path, suffix):
    """ffmpeg reads what is there and ends with 0."""
    film, faststart = tmp_path / f"film.{suffix}", ["-movflags", "+faststart"]
    make = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=10:duration=6", "-f", "lavfi", "-i",
            "sine=duration=6", *(faststart if suffix == "mp4" else []), str(film)]
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *make], check=True)
    assert len(media.read_wave(film)) > 5 * 16000
    film.write_bytes(film.read_bytes()[:film.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"film.{suffix} is cut short"):
        media.read_wave(film)


def test_a_sound_of_hours_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "HOURS", 1e-4)
    (tmp_path / "x.wav").write_bytes(riff(tone()))
    with pytest.raises(ValueError, match="more than 0.0001 hours"):
        media.read_wave(tmp_path / "x.wav")


def test_sound_at_odd_rates(tmp_path):
    """The usual rates bit for bit as torchaudio does it; others as it would with more memory."""
    import torchaudio
    for rate in (8000, 11025, 22050, 44100, 48000):
        (tmp_path / "x.wav").write_bytes(riff(tone(rate, 0.1), rate))
        x = torch.from_numpy(tone(rate, 0.1) / 2.0 ** 15).float()
        expected = torchaudio.functional.resample(x, rate, 16000)
        assert torch.equal(media.read_wave(tmp_path / "x.wav"), expected)
    for rate in (44_101, 16_001):
        (tmp_path / "x.wav").write_bytes(riff(tone(rate, 0.2), rate))
        x = media.read_wave(tmp_path / "x.wav")
        expected = torch.from_numpy(tone(16000, 0.2) / 2.0 ** 15).float()
        assert abs(len(x) - len(expected)) <= 1
        torch.testing.assert_close(x[50:1000], expected[50:1000], atol=5e-3, rtol=0)


def test_16_bits_a_channel_become_8(tmp_path):
    values = np.array([[0, 1, 128, 129], [257, 32767, 65407, 65535]], np.uint16).repeat(2, 0)
    (tmp_path / "x.png").write_bytes(png(4, 4, 16, values.astype(">u2")))
    x = media.read_image(tmp_path / "x.png", 4)
    assert x.dtype == torch.uint8 and x[0].tolist() == np.round(values / 257).astype(int).tolist()
    assert media.read_image(tmp_path / "x.png", 4, "GRAY").tolist() == x[:1].tolist()


def test_a_pipe_is_no_file(tmp_path):
    index = write_index(tmp_path, "audio", {})
    (tmp_path / "3.wav").unlink()
    os.mkfifo(tmp_path / "3.wav")
    with pytest.raises(ValueError, match=r"3\.wav is a pipe or a device"):
        prepare(index)


# ---- ffmpeg ----

@needs_ffmpeg
def test_sound_that_is_not_finite(tmp_path):
    x = np.zeros(9000, "<f4")
    for value in (np.nan, np.inf, 1e30):
        x[4000] = value
        with pytest.raises(ValueError, match=r"3\.wav: NaN, infinity or far too large"):
            prepare(write_index(tmp_path, "audio", {3: riff(x, bits=32, kind=3)}))


@needs_ffmpeg
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat", "list.sdp", "list.mpd"])
def test_ffmpeg_opens_no_other_file_and_no_address(tmp_path, name):
    """What names other files: with a private one beside, and with a server that listens."""
    (tmp_path / "private.wav").write_bytes(riff(tone()))
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    address = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
    for target in (f"file:{tmp_path}/private.wav", address):
        texts = {"list.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
                 "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\n"
                             f"m=audio 9 RTP/AVP 0\na=control:{target}\n",
                 "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
                             'type="static"><Period><AdaptationSet><Representation><BaseURL>'
                             f"{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"}
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
        (tmp_path / name).write_text(texts.get(name, playlist))
        readers = [media.read_wave]
        if name == "list.mp4":
            readers.append(lambda path: media.read_frames(path, 1, 8))
        for read in readers:
            with pytest.raises(ValueError, match=f"{name}: ffmpeg cannot read it") as raised:
                read(tmp_path / name)
            assert len(str(raised.value)) < 300
    with pytest.raises(TimeoutError):     # nobody has called
        server.accept()
    server.close()


@needs_ffmpeg
def test_endless_files_end(tmp_path, monkeypatch):
    frames = np.zeros((3, 16, 16, 3), np.uint8).tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "16x16", "-r", "0.0001", "-i", "-"]
    command = ["ffmpeg", "-v", "error", *source, "-c:v", "copy", str(tmp_path / "x.nut")]
    subprocess.run(command, input=frames, check=True)
    monkeypatch.setattr(media, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"x\.nut: ffmpeg took over 0\.2 s"):
        media.read_frames(tmp_path / "x.nut", 1, 64)
    monkeypatch.setattr(media, "SECONDS", 60)
    monkeypatch.setattr(media, "HOURS", 0.0001)
    (tmp_path / "x.wav").write_bytes(riff(np.zeros(16000, "<f4"), bits=32, kind=3))
    with pytest.raises(ValueError, match=r"x\.wav: more than 0\.0001 hours of sound"):
        media.read_wave(tmp_path / "x.wav")


# ---- names and paths ----

@pytest.mark.parametrize("path", ["../x.wav", "/etc/passwd", "a/../../x.wav"])
def test_no_index_leads_out_of_its_folder(tmp_path, path):
    row = {"id": "a", "split": "train", "label": "x", "audio": path}
    (tmp_path / "i.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="line 1: audio .* leads out of the folder of the index"):
        custom.read_index(tmp_path / "i.jsonl")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train_titles.csv").write_text(f"{path},a title,dish\n")
    (tmp_path / "list.txt").write_text(f"Bell&{path}&good&0&10\n")
    for read in (lambda: food101.read_titles(tmp_path, "train"),
                 lambda: ave.read_list(tmp_path / "list.txt", tmp_path, False),
                 lambda: mm_imdb.read_film(tmp_path, path, {})):
        with pytest.raises(ValueError, match="leads out of"):
            read()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", ".hidden", "a b", "a\nb", "toy",
                                  "toy-s0", "toy_mimics-s12", "crema_d", "ave"])
def test_names_that_no_data_set_may_have(tmp_path, name):
    index = write_index(tmp_path, "visual", {})
    with pytest.raises(ValueError, match="--name"):
        custom.main([str(index), "--name", name, "--data-root", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("line", [
    b"\xff\xfe", b'{"id": "\\ud800", "split": "train", "label": "x", "text": ""}', b"[" * 100_000,
    b'{"id": "a\\u2028b", "split": "train", "label": "x", "text": ""}',
    b'{"id": "a", "split": "train", "label": "x\\n"',
    b'{"id": "a", "split": "train", "label": "x\\ry", "text": ""}',
    b'{"id": "a\\n", "split": "train", "label": "x", "text": "t"}',
    b'{"id": "a", "split": "train", "label": "x\\u2028", "text": "t"}',
    b'{"id": 1' + b"1" * 5000 + b"}"])
def test_lines_that_cannot_be_stored(tmp_path, line):
    (tmp_path / "i.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"i\.jsonl (has bad lines(.|\n)*line 1|is no UTF-8)"):
        custom.read_index(tmp_path / "i.jsonl")


def test_lists_that_are_no_lists_name_their_file(tmp_path):
    (tmp_path / "texts").mkdir()
    for content in (b"\xff\xfe\0a", b'"' + b"x" * 200_000, b"a,b\n"):
        for name in ("texts/train_titles.csv", "trainSet.txt", "list.csv"):
            (tmp_path / name).write_bytes(content)
        for read in (lambda: food101.read_titles(tmp_path, "train"),
                     lambda: ave.read_list(tmp_path / "trainSet.txt", tmp_path, True),
                     lambda: kinetics_sound.read_list(tmp_path / "list.csv")):
            with pytest.raises(ValueError, match=r"(train_titles\.csv|trainSet\.txt|list\.csv)"):
                read()


def test_a_broken_film_counts_as_one_film(tmp_path):
    (tmp_path / "x.jpeg").write_bytes(png(8, 8, 8, np.zeros((8, 8), np.uint8)))
    for content in ("{", "[]", '{"genres": "Drama", "plot": ["a"]}', '{"genres": [], "plot": []}',
                    "[" * 10 ** 5, '{"genres": [], "plot": [1]}', '{"genres": []}'):
        (tmp_path / "x.json").write_text(content)
        film, fine = mm_imdb.read_film(tmp_path, "x", {}), media.Item("y", [], {"text": "fine"})
        bad = write.look_at_files("train", [film, fine], 1)
        assert list(bad) == ["x"] and "x.json: expected JSON with a list `genres`" in bad["x"]


# ---- two at once, and after a kill ----

def test_the_second_of_two_prepares_says_so(tmp_path):
    index = write_index(tmp_path, "visual", {})
    folder = prepare(index)
    with open(folder.with_name(".set.lock"), "w") as other:     # as another process holds it
        other.write("process 4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError,
                           match="set is in use by process 4711: wait until it is done"):
            prepare(index, "--overwrite")
    prepare(index, "--overwrite")
    assert [f.name for f in folder.parent.iterdir()] == ["set"] and data.check(folder)


def test_what_a_killed_prepare_left_is_cleared_away(tmp_path):
    index = write_index(tmp_path, "visual", {})
    folder = prepare(index)
    (folder.parent / "set.partial" / "train").mkdir(parents=True)
    (folder.parent / ".set.lock").touch()
    prepare(index, "--overwrite")
    assert [f.name for f in folder.parent.iterdir()] == ["set"]
    folder.rename(folder.parent / "set.partial-old")     # killed between its two renames
    with pytest.raises(ValueError, match="already there"):
        prepare(index)
    assert [f.name for f in folder.parent.iterdir()] == ["set"] and data.check(folder)


def test_toys_of_dead_processes_are_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SIZES", {"toy": {"train": 8, "val": 8, "test": 8}})
    half = tmp_path / ".toy-s0.4711" / "train"
    half.mkdir(parents=True)
    with open(tmp_path / ".toy-s0.lock", "w") as other:     # that process still works on it
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use"):
            toy.make(tmp_path / "toy-s0", "toy", 0)
        assert half.exists()
    toy.make(tmp_path / "toy-s0", "toy", 0)                 # now it is dead
    assert [f.name for f in tmp_path.iterdir()] == ["toy-s0"]
    assert data.check(tmp_path / "toy-s0")

    def full(*rest):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(toy, "write_info", full)
    with pytest.raises(OSError):
        toy.make(tmp_path / "toy-s1", "toy", 1)
    assert not list(tmp_path.glob(".toy-s1*"))


@pytest.mark.parametrize("error, told", [
    (OSError(28, "No space left on device"), "set: No space left on device; nothing was written"),
    (MemoryError(), "not enough memory"), (RuntimeError("a\nb"), "a")])
def test_a_full_disk_or_memory_is_one_line(tmp_path, monkeypatch, error, told):
    def fails(*rest):
        raise error
    index = write_index(tmp_path, "visual", {})
    monkeypatch.setattr(write, "write_split", fails)
    with pytest.raises(SystemExit) as end:
        options.run(lambda: prepare(index))
    assert told in end.value.code and "\n" not in end.value.code
    assert not list((tmp_path / "data").rglob("*"))
