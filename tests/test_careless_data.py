"""Careless and hostile data: one line that names the file, at once, and nothing that runs or leaks."""
import json
import os
import pickle
import shutil

import numpy as np
import pytest

import data
from running import error

N, SPLITS = 6, ("train", "val", "test")
KINDS = {"visual": "image", "flow": "flow", "audio": "audio", "text": "text"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A hand-made data set of all kinds, as it should be."""
    folder = tmp_path_factory.mktemp("whole") / "birds"
    arrays = dict(visual=np.full((N, 1, 3, 8, 8), 7, np.uint8), flow=np.full((N, 2, 4, 8, 8), 128, np.uint8),
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
    monkeypatch.setattr(data, "check_values", lambda file, *rest: looked.append(file) or read(file, *rest))
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
    ("name", None, "'name' must be a text"), ("name", "../x", "'name' may have letters"), ("name", "", "'name'"),
    ("classes", None, "'classes' must be a list"), ("classes", [], "must not be empty"),
    ("classes", ["a", "a", "b"], "'classes' must be different"), ("classes", ["a", 1, []], "'classes' must be"),
    ("classes", ["a", "b"], r"labels.npy: numbers 0 to 2, but dataset.json allows 0 to 1"),
    ("multilabel", "no", "'multilabel' must be true or false"), ("multilabel", True, r"must be uint8 \(6, 3\)"),
    ("modalities", ["audio"], "'modalities' must be an object"), ("modalities", {}, "must not be empty"),
    ("modalities", {"../../x": "audio"}, r"'modalities': .*'../../x'"), ("modalities", {"": "audio"}, "'modalities'"),
    ("modalities", {"a/b": "audio"}, "'modalities'"), ("modalities", {"a.b": "audio"}, "'modalities'"),
    ("modalities", {"..": "audio"}, "'modalities'"), ("modalities", {"keys": "audio"}, "'modalities'"),
    ("modalities", {"labels": "audio"}, "'modalities'"), ("modalities", {"a\nb": "audio"}, "'modalities'"),
    ("modalities", {"audio": "sound"}, "audio must be one of frames"), ("modalities", {"audio": []}, "must be one of"),
    ("modalities", {"smell": "audio"}, "'shapes' must have a list of numbers for smell"),
    ("shapes", None, "'shapes' must be an object"), ("shapes", {}, "'shapes' must have a list"),
    ("shapes", {"visual": [1, 3, 9, 8], **dict.fromkeys(KINDS, [1])}, r"visual.npy: shape \[6, 1, 3, 8, 8\]"),
    ("shapes", dict.fromkeys(KINDS, [1.0]), "'shapes' must have a list of numbers"),
    ("counts", {"train": 7}, "dataset.json: 'counts' says 7 train samples, but there are 6"), ("counts", 3, "'counts'"),
    ("tokenizer", None, "text is text, so 'tokenizer' must say"), ("tokenizer", {"kind": "wordpiece"}, "vocab_size"),
    ("tokenizer", dict(kind="wordpiece", vocab_size=9), r"train/text.npy: token ids not below"),
    ("other_tokenizers", [dict(kind="../up", vocab_size=9)], "kind"), ("other_tokenizers", [None], "kind"),
    ("other_tokenizers", [dict(kind="byte_bpe", vocab_size=19)], "text.byte_bpe.npy: token ids not below"),
    ("groups", {"a": [0, 3]}, "'groups': 'a' must list class numbers 0 to 2"), ("groups", {"a": 0}, "'groups'"),
    ("groups", [0], "'groups' must be an object"), ("sample_groups", [1], "'sample_groups' must be"),
    ("sample_groups", ["a", "b"], "groups.npy: no such file"), ("sha256", 3, "'sha256' must be"),
    ("made_by", {"../../etc/passwd": "x"}, "'made_by'"), ("made_by", {"/dev/zero": "x"}, "'made_by'"),
])
def test_every_key_of_dataset_json(birds, key, value, told):
    info = json.loads((birds / "dataset.json").read_text())
    if key == "shapes" and value and "visual" in value and value["visual"] != [1.0]:
        value = info["shapes"] | {"visual": [1, 3, 9, 8]}
    (birds / "dataset.json").write_text(json.dumps(info | {key: value}))
    with pytest.raises(ValueError, match=told):
        data.check(birds)
    say(birds)
    info.pop(key, None)
    (birds / "dataset.json").write_text(json.dumps(info))
    if key in data.KEYS:
        assert f"'{key}' must be" in say(birds)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 10 ** 5, b"{}\x00", b"null"])
def test_dataset_json_that_is_none(birds, text):
    (birds / "dataset.json").write_bytes(text)
    assert "dataset.json" in say(birds)


@pytest.mark.parametrize("name, spoil, told", [
    ("labels", lambda a: change(a, 1, 3), r"numbers 0 to 3, but dataset.json allows 0 to 2"),
    ("labels", lambda a: change(a, 1, -1), "numbers -1 to 2"), ("labels", lambda a: a[:, None], r"int64 \(6, 1\)"),
    ("labels", lambda a: a.astype(np.float32), "float32"), ("labels", lambda a: a.astype(">i8"), ">i8|int64"),
    ("labels", lambda a: a[:0], "no samples|cut short"), ("labels", lambda a: a[:5], "6 ids, but 5 labels"),
    ("labels", lambda a: a[0], "header|cut short"),
    ("visual", lambda a: (a / 255).astype(np.float32), r"float32 \(6, 1, 3, 8, 8\), but image is uint8"),
    ("visual", lambda a: a.astype(np.int16), "int16"), ("visual", lambda a: a[:, :, :1], r"\(6, 1, 1, 8, 8\), but image"),
    ("visual", lambda a: a[:, 0], r"\(6, 3, 8, 8\), but"), ("visual", lambda a: a[..., :6], r"8, 6\), but image is"),
    ("visual", lambda a: a[:, :0], "but image is|cut short"), ("visual", lambda a: a[:5], "shape .5, 1, 3, 8, 8., but"),
    ("visual", lambda a: a.transpose(0, 1, 3, 4, 2), "but image is"), ("flow", lambda a: a[:, :, :3], "but flow is"),
    ("audio", lambda a: change(a, (4, 0, 3, 3), np.nan), "NaN or infinity in samples 0 to 5"),
    ("audio", lambda a: change(a, (0, 0, 0, 0), -np.inf), "NaN"), ("audio", lambda a: a.astype(np.int16), "int16"),
    ("audio", lambda a: a[..., :9], "'shapes'"), ("audio", lambda a: a.astype(complex), "complex"),
    ("text", lambda a: change(a, (1, 1), 10), "token ids"), ("text", lambda a: change(a, (1, 1), -1), "token ids"),
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
    spoilt = [pickle.dumps(Boom()), (tmp_path / "objects.npy").read_bytes(), (tmp_path / "zip.npz").read_bytes(), b"",
              good[:-1], good + b"x", good[:70], b"\x93NUMPY", good.replace(b"'shape': (6", b"'shape': (9"),
              good.replace(b"'shape': (6", b"'shape': (-"), good.replace(b"'descr': '<f2'", b"'descr': '|O'   "),
              good.replace(b"{'descr'", b"[[[[[[[["), good.replace(b"(6, 1,", b"(6**9,"), b"\x93NUMPY\x09" + good[7:]]
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
    assert capsys.readouterr().out.count("2 classes have no train sample, nothing can learn them: owl, tit\n") == 1
    info = json.loads((birds / "dataset.json").read_text())
    (birds / "dataset.json").write_text(json.dumps(info | dict(sample_groups=["clean", "noisy"])))
    assert "train/groups.npy: numbers 0 to 2" in say(birds)
    (birds / "dataset.json").write_text(json.dumps(info | dict(multilabel=True)))
    for split in SPLITS:
        np.save(birds / split / "labels.npy", np.zeros((N, 3), np.uint8))
    assert "train/labels.npy: no sample has any class" in say(birds)


def test_the_scripts_look_before_any_work(birds, tmp_path):
    np.save(birds / "val" / "visual.npy", np.zeros((N, 1, 3, 8, 8), np.float32))
    words = ["--dataset", "birds", "--encoder", "resnet_small", "text=bert_small", "--pretrained", "none"]
    for script in ("train_joint.py", "train_unimodal.py", "baselines.concat"):
        more = ["--modality", "visual"] if script == "train_unimodal.py" else []
        told = error(script, *words, *more, out=tmp_path / "runs", root=tmp_path)
        assert told.startswith(f"error: {birds}/val/visual.npy: float32") and not (tmp_path / "runs").exists()
