"""Damaged files of every kind that the program reads. Each ends in one line that names the file, or
reads as before, or a fingerprint tells. None ends in a traceback, an endless wait, or silently in
other shapes, ranges, NaN or labels.

FUZZ files of each kind, 50 if nobody says more. Number i of a kind is always the same file:

    FUZZ=1000 python -m pytest tests/test_fuzz.py -rP     # -rP prints how they ended
"""
import copy
import io
import json
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import evaluate
from encoders import BERT, DeBERTa, ViT
from harness import arguments, calibration, fingerprint, from_logits, models, stored
from prepare import custom, locks, media, toy, write
from prepare.media import Item
from pretrained import checkpoints, configs
from pretrained.tokenizer import load_tokenizer
from running import MMLORA, call
from test_careless_runs import AUDIO, new_run, small_model
from test_prepare import make_png, make_wav, tone, write_vocab

pytestmark = pytest.mark.fuzz
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
FUZZ = int(os.environ.get("FUZZ", 50))
# More is a hang: seconds of this process, and of the clock, since the machine may be busy.
OWN_SECONDS, SECONDS = 5, 60
FIXTURES = Path(__file__).parent / "fixtures/encoders"


# ---- Damage to bytes ----

def flip(r, content):
    changed = bytearray(content)
    for _ in range(r.randint(1, 8)):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def head(r, content):
    changed = bytearray(content)
    for _ in range(r.randint(1, 4)):
        at = r.randrange(min(64, len(changed)))
        changed[at] = r.choice([0, 1, 127, 128, 255, r.randrange(256)])
    return bytes(changed)


def digit(r, content):
    """Another digit, as a finger may slip; in a file without any, another byte."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    at = r.choice(places or range(len(content)))
    return content[:at] + str(r.randrange(10)).encode() + content[at + 1:]


def cut(r, content):
    return content[:r.randrange(1, len(content))]


def lose(r, content):
    start = r.randrange(len(content))
    return content[:start] + content[start + r.randint(1, 64):]


def grow(r, content):
    start = r.choice([0, len(content), r.randrange(len(content))])
    return content[:start] + r.randbytes(r.randint(1, 64)) + content[start:]


def swap(r, content):
    size = max(1, len(content) // r.randint(4, 16))
    blocks = [content[i:i + size] for i in range(0, len(content), size)]
    a, b = r.randrange(len(blocks)), r.randrange(len(blocks))
    blocks[a], blocks[b] = blocks[b], blocks[a]
    return b"".join(blocks)


def empty(r, content):
    return b""


def of_another_file(r, content):
    files = ("bert/config.json", "bert/lora.safetensors", "tokenizer_wordpiece/vocab.txt")
    return r.choice([b"\0" * 100, b"hello\n", b"{}", b"[]", b"null", b"\n", b'{"id": 1}\n',
                     b"[" * 100_000, b"<html>", b"\x89PNG\r\n\x1a\n", r.randbytes(500),
                     *((FIXTURES / name).read_bytes() for name in files)])


def byte_order_mark(r, content):
    return r.choice([b"\xef\xbb\xbf", b"\xff\xfe"]) + content


def no_utf8(r, content):
    at = r.randrange(len(content))
    return content[:at] + r.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0"]) + content[at:]


BYTES = [flip, flip, head, head, digit, cut, lose, grow, swap, empty, of_another_file,
         byte_order_mark, no_utf8]


# ---- Damage to what a file says ----

VALUES = [float("nan"), float("inf"), -1, 0, 0.3, 1.5, 10 ** 30, -10 ** 30, 10 ** 400, 1e308,
          2 ** 31, 2 ** 63, "", "x", "../x", "/etc/passwd", "\ud800", "a\nb", "\0", None, True,
          False, [], {}, [[]], [None], {"x": 1}, [-1], ["x"] * 3]


def places_in(value):
    """(container, key) of every value within a value of JSON."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    found = []
    for key in keys:
        found += [(value, key), *places_in(value[key])]
    return found


def edit_json(r, content):
    value = json.loads(content)
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        places = places_in(value)
        if not places:
            return b"7"
        inner, key = r.choice(places)
        kind, now = r.randrange(8), inner[key]
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[r.choice(["x", "../x", "", key + "2"])] = inner.pop(key)
        elif kind in (1, 2) and type(now) in (int, float):
            inner[key] = r.choice([-now, now + 1, float(now), str(now), 1000 * now])
        elif kind == 3:
            other, name = r.choice(places)
            inner[key] = copy.deepcopy(other[name])
        else:
            inner[key] = copy.deepcopy(r.choice(VALUES))
    text = json.dumps(value)
    if r.random() < 0.05:
        text = text.replace(":", ":" + '{"x":' * 5000, 1)
    return text.encode().replace(b"Infinity", b"1e999")


def edit_lines(r, content):
    lines = content.split(b"\n")
    at, other = r.randrange(len(lines)), r.randrange(len(lines))
    kind = r.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[other])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines.insert(at, b"")
    elif kind == 4:
        return content.replace(b"\n", r.choice([b"\r\n", b"\r", b"\n\n", "\u2028".encode()]))
    elif kind == 5:
        lines[at] = r.choice([b"\t", b" ", b"a b c", b"x" * 10_000, "\u2028".encode(), b"[SEP]"])
    else:
        lines[at] = lines[at].swapcase()
    return b"\n".join(lines)


def edit_jsonl(r, content):
    if r.random() < 0.3:
        return edit_lines(r, content)
    lines = content.split(b"\n")
    at = r.randrange(len(lines) - 1)
    lines[at] = edit_json(r, lines[at])
    return b"\n".join(lines)


def edit_npy(r, content):
    array = np.load(io.BytesIO(content))
    kind = r.randrange(10)
    if kind == 0:
        array = array.astype(r.choice(["f4", "f8", "f2", "i2", "u4", "i8", ">i8", ">f2", "?", "c8",
                                       "O", "U5", "u1"]))
    elif kind == 1:
        array = r.choice([array[:-1], array[None], array[..., None], array[:0], array.reshape(-1),
                          array[0], array.T, np.concatenate([array, array]), array[..., :-1],
                          np.array(7)])
    elif kind == 2:
        array = np.asfortranarray(array)
    elif kind in (3, 4):
        array = array[::-1]
    elif kind == 5:
        array = np.array([{"x": 1}] * len(array), object)     # a pickle
    elif kind == 6:
        array = np.zeros(len(array), [("x", "i4"), ("y", "f4")])
    else:
        worst = [np.nan, np.inf, -np.inf, 6e4]
        if array.dtype.kind != "f":
            worst = [np.iinfo(array.dtype).min, np.iinfo(array.dtype).max, 2, 1]
        array.flat[r.randrange(array.size)] = r.choice(worst)
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def edit_tensors(r, content):
    """A .safetensors file: its header, or one of its tensors."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:8 + length]), bytearray(content[8 + length:])
    told = header.get("__metadata__", {})
    tensor = header[r.choice([key for key in header if key != "__metadata__"])]
    start, end = tensor["data_offsets"]
    kind = r.randrange(7)
    if kind == 0 and told:
        key = r.choice(list(told))
        told[key] = edit_json(r, told[key]).decode() if told[key].startswith("{") else "x"
    elif kind < 3:
        header = json.loads(edit_json(r, json.dumps(header)))
    elif kind == 3:
        body[r.randrange(start, end)] ^= 1 << r.randrange(8)
    elif kind == 4:                                   # NaN, infinity, 3e38
        body[start:start + 4] = r.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"])
    elif kind == 5:
        tensor["dtype"] = r.choice(["I32", "U32", "F16", "BF16", "I64", "F64", "F8_E4M3", "X"])
        if tensor["dtype"] in ("F16", "BF16") and tensor["shape"]:
            tensor["shape"][-1] *= 2
    else:
        shape = tensor["shape"]
        tensor["shape"] = r.choice([[], [-1], shape[::-1], [*shape, 1], [2 ** 62, 4], [0]])
    said = json.dumps(header).encode()
    return len(said).to_bytes(8, "little") + said + bytes(body)


EDITS = {".json": edit_json, ".jsonl": edit_jsonl, ".npy": edit_npy, ".txt": edit_lines,
         ".safetensors": edit_tensors}


def damage(r, file, content):
    """-> what was done, and the new content."""
    edit = EDITS.get(file.suffix)
    if not edit or r.random() < 0.4:
        edit = r.choice(BYTES)
    try:
        return edit.__name__, edit(r, content)
    except RecursionError:                            # deep JSON that was to be edited once more
        return "empty", b""


# ---- How it ends ----

class Hang(BaseException):
    """No Exception, so that nothing in the program takes it for one that it expects."""


def alarm(*_):
    raise Hang


def bits(value):
    """Equal for equal types, shapes and bits."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(inner) for inner in value]
    return value


def ending(read, file, names, right, tells):
    """-> how it ended, and what was said, in which one of `names` must stand. Capitals: badly."""
    signal.setitimer(signal.ITIMER_PROF, OWN_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        value = bits(read(file))
    except Hang:
        return "HANG", ""
    except (ValueError, OSError) as error:
        said = str(error)
        if "\n" in said.replace("\n  line ", "").replace("\n  and ", ""):     # as prepare.custom
            return "SEVERAL LINES", said
        return "refused" if any(name in said for name in names) else "NAMES NO FILE", said
    except AssertionError as error:
        return "SILENT", str(error)
    except BaseException as error:
        return "TRACEBACK", repr(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if value == right:
        return "the same", ""
    if tells is None:
        return "in range", ""                         # nobody can know that it was another number
    return "noticed" if tells() else "SILENT", ""


@pytest.fixture
def fuzz(tmp_path, capsys, request):
    """fuzz(damaged, read, tells): damage each of the files in turn, and look how read(file) ends.

    tells() is what differs where a change reads well: a fingerprint. None: nothing can tell.
    names: what may be named instead of the file.
    """
    def work(damaged, read, tells=None, names=(), n=FUZZ):
        kind, counts, bad = request.node.name.removeprefix("test_"), Counter(), []
        right, before = {file: bits(read(file)) for file in damaged}, tells and tells()
        whole = {file: file.read_bytes() for file in damaged}
        for i in range(n):
            file = damaged[i % len(damaged)]
            how, content = damage(random.Random(f"{kind} {i}"), file, whole[file])
            file.write_bytes(content)
            os.utime(file, ns=(i, i))                 # as if time had passed
            differs = tells and (lambda: tells() != before)
            end, said = ending(read, file, (str(file), *names), right[file], differs)
            counts[end if content != whole[file] else "unchanged"] += 1
            if end.isupper():
                kept = shutil.copy(file, tmp_path / f"{i}-{file.name}")
                bad.append(f"{end}: {kept}, {how}: {said[:300]}")
            file.write_bytes(whole[file])
        capsys.readouterr()
        print(f"{kind}:", ", ".join(f"{n} {end}" for end, n in sorted(counts.items())))
        assert not bad, f"{len(bad)} of {n}:\n" + "\n".join(bad[:40])

    before = {kind: signal.signal(kind, alarm) for kind in (signal.SIGALRM, signal.SIGPROF)}
    yield work
    for kind, handler in before.items():
        signal.signal(kind, handler)


# ---- Prepared data ----

KINDS = {"visual": "image", "flow": "flow", "audio": "audio", "text": "text"}
USED = ("name", "classes", "multilabel", "modalities", "shapes", "groups", "tokenizer")


@pytest.fixture
def birds(tmp_path):
    folder, rng, n = tmp_path / "birds", np.random.default_rng(0), 6
    for split in ("train", "val", "test"):
        arrays = dict(visual=rng.integers(0, 256, (n, 1, 3, 8, 8), np.uint8),
                      flow=rng.integers(0, 256, (n, 2, 4, 8, 8), np.uint8),
                      audio=rng.normal(size=(n, 1, 16, 20)).astype(np.float16),
                      text=rng.integers(1, 10, (n, 5), np.int32),
                      labels=np.arange(n) % 3, groups=np.arange(n) % 2)
        (folder / split).mkdir(parents=True)
        (folder / split / "ids.txt").write_text("".join(f"{split}{i}\n" for i in range(n)))
        for name, array in arrays.items():
            np.save(folder / split / f"{name}.npy", array)
    info = dict(name="birds", classes=["wren", "owl", "tit"], multilabel=False, modalities=KINDS,
                counts=dict(train=n, val=n, test=n), shapes={m: arrays[m].shape[1:] for m in KINDS},
                tokenizer=dict(kind="wordpiece", vocab_size=10, fingerprint="x"),
                other_tokenizers=[], sample_groups=["loud", "quiet"], made_by={"data.py": "0"})
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def read_data(folder):
    """What a training run takes from the data, and a first layer and a loss that take it."""
    data.CHECKED.clear()
    (folder / "checked.json").unlink(missing_ok=True)
    arguments.why_anew(folder, {"data.py": "0"})
    info = data.check(folder)
    encoder = SimpleNamespace(image_size=None, pixels=ViT.pixels, tokenizer="wordpiece")
    readers = {m: SimpleNamespace(encoder=encoder) for m in info["modalities"]}
    found = {key: info.get(key) for key in USED}
    for name in ("train", "val", "test"):
        split, settings = data.Split(folder, name), dict(frames=1, audio_shift=0)
        x, y = data.inputs(split, torch.arange(len(split)), readers, "cpu", settings)
        for m, kind in info["modalities"].items():
            if kind == "text":
                words = torch.zeros(info["tokenizer"]["vocab_size"], 1)
                x[m] = nn.functional.embedding(x[m], words)
            assert x[m].isfinite().all(), m
        logits = torch.zeros(len(split), len(info["classes"]))
        if info["multilabel"]:
            assert nn.functional.binary_cross_entropy_with_logits(logits, y.float()).isfinite()
        else:
            assert nn.functional.cross_entropy(logits, y).isfinite()
        ids = (folder / name / "ids.txt").read_text(encoding="utf-8").splitlines()
        found[name] = x, y, split.groups, ids
    return found


def of_data(folder):
    return fingerprint.of_data.__wrapped__(folder)    # it remembers for as long as a process lives


def test_npy(fuzz, birds):
    arrays = sorted(birds.glob("*/*.npy"))
    fuzz(arrays, lambda _: read_data(birds), lambda: of_data(birds), ["labels.npy"])


def test_dataset_json(fuzz, birds):
    file = birds / "dataset.json"
    fuzz([file], lambda _: read_data(birds), lambda: of_data(birds), [str(birds)])


def test_ids_txt(fuzz, birds):
    ids = sorted(birds.glob("*/ids.txt"))
    fuzz(ids, lambda _: read_data(birds), lambda: of_data(birds))


# ---- Recordings ----

def read_as(kind, *shape):
    """A function that reads a recording as `prepare` does. Its array must be one of this kind."""
    args = SimpleNamespace(size=8, frames=2, clips=1)

    def read(file):
        row = media.read_item(Item("a", "b", {"x": file}), {"x": kind}, args)["x"]
        data.check_format(file, row[None], kind, [1, *shape])
        data.check_values(file, row[None], kind, None)
        return row

    return read


@needs_ffmpeg
def test_wav(fuzz, tmp_path):
    sound = np.stack([tone(0.1, 300), tone(0.1)], 1)
    files = [make_wav(tmp_path / f"{width}.wav", sound, 22050, width) for width in (1, 2, 3)]
    fuzz(files, read_as("audio", 1, 128, 204))


def test_png(fuzz, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3))
    fuzz([make_png(tmp_path / "a.png", pixels)], read_as("image", 1, 3, 8, 8))


def test_jpg(fuzz, tmp_path):
    from torchvision.io import write_jpeg
    torch.manual_seed(0)
    write_jpeg(torch.randint(256, (3, 24, 20), dtype=torch.uint8), str(tmp_path / "a.jpg"))
    fuzz([tmp_path / "a.jpg"], read_as("image", 1, 3, 8, 8))


@needs_ffmpeg
def test_video(fuzz, tmp_path):
    """Half as many: to start ffmpeg takes more time than all other kinds together."""
    film = ["-f", "lavfi", "-i", "testsrc=s=16x16:d=0.2:r=10", str(tmp_path / "a.mp4")]
    subprocess.run(["ffmpeg", "-v", "error", *film], check=True)
    fuzz([tmp_path / "a.mp4"], read_as("frames", 2, 3, 8, 8), n=FUZZ // 2)


# ---- Lists ----

def test_index(fuzz, tmp_path):
    rows = []
    for i in range(6):
        make_png(tmp_path / f"{i}.png", np.full((3, 3, 3), 9 * i))
        rows.append(dict(id=f"s{i}", split=["train", "train", "test"][i % 3], label="ab"[i % 2],
                         text=f"x y {i}", visual=f"{i}.png"))
    index, root = tmp_path / "index.jsonl", tmp_path / "data"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = write_vocab(tmp_path / "vocab.txt", "x y 1 2 3 4 5")
    options = ["--name", "set", "--data-root", root, "--overwrite", "--size", 4, "--max-length", 6,
               "--workers", 1, "--tokenizer", words]

    def read(_):
        custom.main([str(index), *map(str, options)])
        info = json.loads((root / "set/dataset.json").read_text())
        arrays = {str(file): file.read_bytes() for file in sorted(root.glob("set/*/*"))}
        return arrays | {key: info.get(key) for key in USED}

    fuzz([index], read, lambda: of_data(root / "set"), [str(tmp_path)])


# ---- Vocabularies ----

TEXTS = ("She's cooked the crème", "re-cooking \U0001f600 a  b", "")


@pytest.mark.parametrize("names", [
    ["wordpiece/vocab.txt"], ["bpe/vocab.json", "bpe/merges.txt"], ["bpe/bpe_encoder.bin"]],
    ids=["wordpiece", "bpe", "pickle"])
def test_vocabulary(fuzz, tmp_path, names):
    paths = [Path(shutil.copy(FIXTURES / f"tokenizer_{name}", tmp_path)) for name in names]

    def read(_):
        tokenizer = load_tokenizer(*paths)
        rows = [media.token_ids(text, tokenizer, 30) for text in TEXTS]
        for row in rows:
            assert 0 <= row.min() <= row.max() < tokenizer.vocab_size
        return rows, write.describe(tokenizer)

    def tells():
        return write.describe(load_tokenizer(*paths))

    fuzz(paths, read, tells)


# ---- Public checkpoints ----

TEXT = dict(width=32, depth=3, heads=4, mlp_width=128, max_length=24)
MAKE = {"bert": lambda: BERT(67, **TEXT), "deberta": lambda: DeBERTa(71, **TEXT),
        "openclip": lambda: ViT(32, 8, 32, 3, 4)}


@pytest.mark.parametrize("names", [
    ["bert/model.safetensors"],
    ["deberta/pytorch_model.bin", "openclip/open_clip_pytorch_model.bin"]], ids=["new", "pickle"])
def test_checkpoint(fuzz, tmp_path, names):
    encoders = {}
    for name in names:
        file = tmp_path / name.replace("/", "-")
        shutil.copy(FIXTURES / name, file)
        encoders[file] = MAKE[name.split("/")[0]]()

    def read(file):
        state = checkpoints.load_public(encoders[file], file).state_dict()
        assert all(tensor.isfinite().all() for tensor in state.values())
        return {key: tensor.clone() for key, tensor in state.items()}

    fuzz(list(encoders), read, lambda: fingerprint.of_files(list(encoders)))


@pytest.mark.parametrize("name", ["bert/config.json", "deberta/config.json",
                                  "openclip/open_clip_config.json"], ids=[*MAKE])
def test_hub_config(fuzz, tmp_path, name):
    file = Path(shutil.copy(FIXTURES / name, tmp_path))
    shutil.copy(next((FIXTURES / name).parent.glob("*model.*")), tmp_path)

    def read(_):
        return configs.read_config(tmp_path), checkpoints.load_folder(tmp_path).state_dict()

    fuzz([file], read, lambda: fingerprint.of_files(configs.files_of(tmp_path)), [str(tmp_path)])


# ---- Runs ----

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of MMLoRA and those of its step 1, on a toy of 8 samples: where data and runs are."""
    root = tmp_path_factory.mktemp("trained")
    sizes, toy.SIZES = toy.SIZES, {"toy": {"train": 8, "val": 8, "test": 8}}
    short = ["--umft-epochs", 1, "--epochs", 1, "--batch-size", 8]
    try:
        call("train_joint.py", *short, out=root / "runs", root=root / "data")
    finally:
        toy.SIZES = sizes
    return root


@pytest.fixture
def run(trained, tmp_path):
    out = shutil.copytree(trained / "runs", tmp_path / "runs")
    return SimpleNamespace(folder=out / MMLORA, step_1=out / AUDIO, data=trained / "data")


def test_config_json(fuzz, run):
    args = SimpleNamespace(data_root=run.data, probe=False)

    def read(_):
        settings = evaluate.open_run(args, run.folder)[3]
        from_logits.open_data_of(args, run.folder)
        from_logits.check_same_samples(run.folder, run.folder)
        stored.read_result(run.folder, settings)
        stored.experiment_of(run.folder, settings)
        info = stored.read_config(run.folder).get("data")
        if info:
            assert info["classes"] == settings.get("classes", info["classes"])
        return tells()

    def tells():                                      # the command that made it compares these
        config = stored.read_config(run.folder)
        return config["settings"], config.get("fingerprint")

    fuzz([run.folder / "config.json"], read, tells, [str(run.folder)])


def are_scores(scores):
    return 0 <= scores["accuracy"] <= 1 and 0 <= scores.get("loss", 0) < np.inf


def test_result_json(fuzz, run):
    settings = stored.read_config(run.folder)["settings"]

    def read(_):
        result = stored.read_result(run.folder, settings)
        assert all(map(are_scores, [*result["test"].values(), *result["val"].values()]))
        return result

    fuzz([run.folder / "result.json"], read)


def test_log_jsonl(fuzz, run):
    def read(_):
        log = stored.read_log(run.folder)
        for line in log:
            assert all(are_scores(line["val"][name]) for name in log[0]["val"])
        return log

    fuzz([run.folder / "log.jsonl"], read)


def test_probe_json(fuzz, run):
    file, scores = run.folder / "probe.json", dict(accuracy=0.5, loss=1.0)
    file.write_text(json.dumps({"audio": dict(l2=1.0, val=scores, test=scores)}))
    fuzz([file], lambda _: stored.read_probe(run.folder))


def test_model(fuzz, run):
    """The run knows the hash of the model of step 1. Its own model nobody knows."""
    info = stored.read_config(run.folder)["data"]
    own, first = (folder / "model.safetensors" for folder in (run.folder, run.step_1))
    of_first = fingerprint.sha256(first)

    def read(_):
        state = models.load_run(run.folder, info)[1].state_dict()
        assert fingerprint.sha256(first) == of_first
        assert all(tensor.isfinite().all() for tensor in state.values())
        return state

    fuzz([own, first], read)


def test_logits(fuzz, run):
    def read(_):
        found = [calibration.stored(run.folder, split) for split in ("val", "test")]
        for logits in found:
            for z in (*logits["UME"].values(), *logits["run"].values()):
                assert z.shape == (8, 8) and z.is_floating_point() and z.isfinite().all()
        return found

    fuzz([folder / "logits.safetensors" for folder in (run.step_1, run.folder)], read)


def test_last(fuzz, trained, tmp_path):
    """What a run goes on from, and a step from there."""
    net, optimizer = small_model()
    run, logits = new_run(tmp_path, trained / "data"), {"audio": torch.randn(8, 8)}
    run.resume(net, optimizer)
    for epoch in range(3):
        optimizer.step()
        run.end_of_epoch(epoch, logits, net.state_dict())
    locks.unlock()
    start = optimizer.state_dict()

    def read(_):
        state, tensors, moments = run.read_last(net, optimizer)
        run.cut_log(state["lines"])
        optimizer.load_state_dict({**start, "state": moments})
        net.load_state_dict(tensors, strict=False)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
        return state, tensors, moments

    both = [tmp_path / AUDIO / f"{name}.safetensors" for name in ("last", "model")]
    fuzz(both, read, names=[str(file) for file in both])
