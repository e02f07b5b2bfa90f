"""Damaged files of every kind that the program reads: one line that names the file, or the same bits,
or a fingerprint that tells. Never a traceback, an endless wait, or silently something else.

FUZZ files of each kind, 50 if nobody says more. Number i of a kind is always the same file:

    FUZZ=1000 python -m pytest tests/test_fuzz.py -rP     # -rP prints how they ended
"""
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data
import evaluate
from encoders import BERT, DeBERTa, ViT
from harness import arguments, calibration, files, fingerprint, stored
from prepare import custom, media, toy, write
from prepare.media import Item
from pretrained import checkpoints, configs
from pretrained.tokenizer import load_tokenizer
from running import MMLORA, call
from test_careless_runs import AUDIO, new_run, small_model
from test_prepare import make_png, make_wav, tone, write_vocab

pytestmark = pytest.mark.fuzz
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
FUZZ = int(os.environ.get("FUZZ", 50))
SECONDS = 5                                           # more than that is a hang
FIXTURES = Path(__file__).parent / "fixtures/encoders"


# ---- Damage to bytes ----

def flip(r, content):
    changed = bytearray(content)
    for _ in range(r.randint(1, 8)):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def flip_head(r, content):
    changed = bytearray(content)
    for _ in range(r.randint(1, 4)):
        changed[r.randrange(min(64, len(changed)))] = r.choice([0, 1, 127, 128, 255, r.randrange(256)])
    return bytes(changed)


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
    return r.choice([b"\0" * 100, b"hello\n", b"{}", b"[]", b"null", b"\n", b'{"id": 1}\n', b"[" * 100_000,
                     (FIXTURES / "bert/config.json").read_bytes(), r.randbytes(500), b"<html>", b"\x89PNG\r\n\x1a\n",
                     (FIXTURES / "bert/lora.safetensors").read_bytes(), (FIXTURES / "tokenizer_wordpiece/vocab.txt").read_bytes()])


def byte_order_mark(r, content):
    return r.choice([b"\xef\xbb\xbf", b"\xff\xfe"]) + content


def no_utf8(r, content):
    at = r.randrange(len(content))
    return content[:at] + r.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0"]) + content[at:]


BYTES = [flip, flip, flip_head, flip_head, cut, lose, grow, swap, empty, of_another_file, byte_order_mark, no_utf8]


# ---- Damage to what a file says ----

VALUES = [float("nan"), float("inf"), -1, 10 ** 400, 0.3, 0, 1.5, 10 ** 30, -10 ** 30, 1e308, "", "x", "../x", "/etc/passwd", "\ud800", "a\nb",
          "\0", None, True, False, [], {}, [[]], [None], {"x": 1}, [-1], ["x"] * 3, 2 ** 31, 2 ** 63]


def edit_json(r, content):
    value = json.loads(content)
    places = []                                       # (container, key) of every value in it

    def walk(inner):
        for key in (inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()):
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    if not places:
        return b"7"
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        inner, key = r.choice(places)
        if key not in inner if isinstance(inner, dict) else key >= len(inner):
            continue
        kind = r.randrange(8)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[r.choice(["x", "../x", "", key + "2"])] = inner.pop(key)
        elif kind == 2 and isinstance(inner[key], (int, float)):
            inner[key] = r.choice([-inner[key], inner[key] + 1, float(inner[key]), str(inner[key]), 1000 * inner[key]])
        elif kind == 3:
            other, name = r.choice(places)
            if isinstance(other, dict) and name in other or isinstance(other, list) and name < len(other):
                inner[key] = json.loads(json.dumps(other[name]))
        else:
            inner[key] = r.choice(VALUES)
    text = json.dumps(value)
    if r.random() < 0.05:
        text = text.replace(":", ":" + '{"x":' * 5000, 1)     # deep
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
    lines = content.split(b"\n")
    at = r.randrange(len(lines) - 1)
    lines[at] = edit_json(r, lines[at])
    return b"\n".join(lines)


def edit_npy(r, content):
    import io
    array = np.load(io.BytesIO(content))
    kind = r.randrange(10)
    if kind == 0:
        array = array.astype(r.choice(["f4", "f8", "f2", "i2", "u4", "i8", ">i8", ">f2", "?", "c8", "O", "U5", "u1"]))
    elif kind == 1:
        array = r.choice([array[:-1], array[None], array[..., None], array[:0], array.reshape(-1), array[0], array.T,
                          np.concatenate([array, array]), array[..., :-1], np.array(7)])
    elif kind == 2:
        array = np.asfortranarray(array)
    elif kind in (3, 4):
        array = array[::-1]
    elif kind == 5:
        array = np.array([{"x": 1}] * len(array), object)
    elif kind == 6:
        array = np.zeros(len(array), [("x", "i4"), ("y", "f4")])
    else:
        array = array.copy()
        if array.size:
            worst = ([np.nan, np.inf, -np.inf, 6e4] if array.dtype.kind == "f" else
                     [np.iinfo(array.dtype).min, np.iinfo(array.dtype).max, 2, 1])
            array.flat[r.randrange(array.size)] = r.choice(worst)
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def edit_tensors(r, content):
    """A .safetensors file: its header, or one of its tensors."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8:8 + length], bytearray(content[8 + length:])
    kind = r.randrange(6)
    value = json.loads(header)
    if kind == 0 and "__metadata__" in value:
        for key, text in value["__metadata__"].items():
            value["__metadata__"][key] = edit_json(r, text).decode() if text.startswith("{") else "x"
        header = json.dumps(value).encode()
    elif kind < 3:
        header = edit_json(r, header)
    else:
        name = r.choice([key for key in value if key != "__metadata__"])
        start, end = value[name]["data_offsets"]
        if kind == 3 and end - start >= 4:            # NaN, infinity, huge
            body[start:start + 4] = r.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"])
        elif kind == 4:
            value[name]["dtype"] = r.choice(["I32", "U32", "F16", "BF16", "I64", "F64", "F8_E4M3", "BOOL", "X"])
            if value[name]["dtype"] in ("F16", "BF16"):
                value[name]["shape"] = [*value[name]["shape"][:-1], 2 * (value[name]["shape"] or [1])[-1]]
        else:
            value[name]["shape"] = r.choice([[], [-1], value[name]["shape"][::-1], [*value[name]["shape"], 1], [2 ** 62, 4], [0]])
        header = json.dumps(value).encode()
    return len(header).to_bytes(8, "little") + header + bytes(body)


EDITS = {".json": edit_json, ".jsonl": edit_jsonl, ".npy": edit_npy, ".txt": edit_lines, ".safetensors": edit_tensors}


def mutated(r, file, content):
    """-> what was done, and the new content."""
    edit = EDITS.get(file.suffix)
    if edit and r.random() < 0.6:
        return edit.__name__, edit(r, content)
    how = r.choice(BYTES)
    return how.__name__, how(r, content)


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
    return repr(value)


def ending(read, names, right, tells):
    """-> (how it ended, what was said). names: one of them must be in what is said."""
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        value = bits(read())
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Hang:
        return "HANG", ""
    except (ValueError, OSError) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        said = str(error)
        if "\n" in said.replace("\n  line ", " ").replace("\n  and ", " "):
            return "SEVERAL LINES", said
        return ("refused" if any(name in said for name in names) else "NAMES NO FILE"), said
    except BaseException as error:
        return "TRACEBACK", repr(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() - began > SECONDS:
        return "HANG", ""
    if value == right:
        return "the same", ""
    if tells is None:
        return "in range", ""                         # nobody can know that it was another number
    return ("noticed" if tells() else "SILENT"), ""


@pytest.fixture
def fuzz(tmp_path, capsys, request):
    """fuzz(files, read, tells): damage each of the files in turn and look how read() ends.

    tells() is what notices a change that reads well: a fingerprint, which differs. None: nothing can.
    """
    def work(damaged, read, tells=None, names=lambda file: [str(file)]):
        counts, failures = Counter(), []
        right, before = bits(read()), tells and tells()
        whole = {file: file.read_bytes() for file in damaged}
        for i in range(FUZZ):
            file = damaged[i % len(damaged)]
            r = random.Random(f"{request.node.name} {i}")
            how, content = mutated(r, file, whole[file])
            file.write_bytes(content)
            os.utime(file, ns=(i + 1, i + 1))         # as if time had passed
            end, said = ending(read, names(file), right, tells and (lambda: tells() != before))
            if content == whole[file]:
                end = "unchanged"
            counts[end] += 1
            if end.isupper():
                shutil.copy(file, tmp_path / f"{i}-{file.name}")
                failures.append(f"{end}: {tmp_path}/{i}-{file.name}, {how}: {said[:300]}")
            file.write_bytes(whole[file])
        capsys.readouterr()
        print(f"OUTCOMES {request.node.name.removeprefix('test_')}: "
              + ", ".join(f"{n} {end}" for end, n in sorted(counts.items())))
        assert not failures, f"{len(failures)} of {FUZZ}:\n" + "\n".join(failures[:40])

    before = signal.signal(signal.SIGALRM, alarm)
    yield work
    signal.signal(signal.SIGALRM, before)


# ---- Prepared data ----

KINDS = {"visual": "image", "flow": "flow", "audio": "audio", "text": "text"}


@pytest.fixture
def birds(tmp_path):
    folder, rng, n = tmp_path / "birds", np.random.default_rng(0), 6
    for split in ("train", "val", "test"):
        arrays = dict(visual=rng.integers(0, 256, (n, 1, 3, 8, 8), np.uint8),
                      flow=rng.integers(0, 256, (n, 2, 4, 8, 8), np.uint8),
                      audio=rng.normal(size=(n, 1, 16, 20)).astype(np.float16),
                      text=rng.integers(1, 10, (n, 5), np.int32), labels=np.arange(n) % 3, groups=np.arange(n) % 2)
        (folder / split).mkdir(parents=True)
        (folder / split / "ids.txt").write_text("".join(f"{split}{i}\n" for i in range(n)))
        for name, array in arrays.items():
            np.save(folder / split / f"{name}.npy", array)
    info = dict(name="birds", classes=["wren", "owl", "tit"], multilabel=False, modalities=KINDS,
                counts=dict(train=n, val=n, test=n), shapes={m: arrays[m].shape[1:] for m in KINDS},
                tokenizer=dict(kind="wordpiece", vocab_size=10, fingerprint="x"), other_tokenizers=[],
                sample_groups=["loud", "quiet"], made_by={"data.py": "0"})
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def read_data(folder):
    """What a training run takes from the data, and a first layer that takes it."""
    data.CHECKED.clear()
    (folder / "checked.json").unlink(missing_ok=True)
    arguments.why_anew(folder, {"data.py": "0"})
    info = data.check(folder)
    settings, encoder = dict(frames=1, audio_shift=0), SimpleNamespace(image_size=None, pixels=ViT.pixels, tokenizer="wordpiece")
    models = {m: SimpleNamespace(encoder=encoder) for m in info["modalities"]}
    found = {key: info.get(key) for key in ("name", "classes", "multilabel", "modalities", "shapes", "groups", "tokenizer")}
    for name in ("train", "val", "test"):
        split = data.Split(folder, name)
        x, y = data.inputs(split, torch.arange(len(split)), models, "cpu", settings)
        for m, kind in info["modalities"].items():
            if kind == "text":
                x[m] = nn.functional.embedding(x[m], torch.zeros(info["tokenizer"]["vocab_size"], 1))
            assert x[m].isfinite().all()
        logits = torch.zeros(len(split), len(info["classes"]))
        loss = nn.functional.cross_entropy if y.ndim == 1 else nn.functional.binary_cross_entropy_with_logits
        assert loss(logits, y if y.ndim == 1 else y.float()).isfinite()
        found[name] = x, y, split.groups, (folder / name / "ids.txt").read_text(encoding="utf-8").splitlines()
    return found


def of_data(folder):
    return fingerprint.of_data.__wrapped__(folder)


def test_npy(fuzz, birds):
    arrays = sorted(birds.glob("*/*.npy"))
    fuzz(arrays, lambda: read_data(birds), lambda: of_data(birds))


def test_dataset_json(fuzz, birds):
    file = birds / "dataset.json"
    fuzz([file], lambda: read_data(birds), lambda: of_data(birds), lambda _: ["dataset.json", "birds/t", "birds/v"])


def test_ids_txt(fuzz, birds):
    fuzz(sorted(birds.glob("*/ids.txt")), lambda: read_data(birds), lambda: of_data(birds))


# ---- Recordings ----

def fuzz_media(fuzz, file, kind, **options):
    args = SimpleNamespace(size=8, frames=2, clips=1, **options)
    item = Item("a", "b", {"x": file})

    def read():
        row = media.read_item(item, {"x": kind}, args)["x"]
        data.check_format(file, row[None], kind, [1, *shape])
        data.check_values(file, row[None], kind, None, None)
        return row

    shape = (1, 128, 204) if kind == "audio" else (1 if kind == "image" else 2, 3, 8, 8)
    fuzz([file], read)


@needs_ffmpeg
@pytest.mark.parametrize("width", [1, 2, 3])
def test_wav(fuzz, tmp_path, width):
    fuzz_media(fuzz, make_wav(tmp_path / "a.wav", np.stack([tone(0.1, 300), tone(0.1)], 1), 22050, width), "audio")


def test_png(fuzz, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3))
    fuzz_media(fuzz, make_png(tmp_path / "a.png", pixels), "image")


def test_jpg(fuzz, tmp_path):
    from torchvision.io import write_jpeg
    torch.manual_seed(0)
    write_jpeg(torch.randint(256, (3, 24, 20), dtype=torch.uint8), str(tmp_path / "a.jpg"))
    fuzz_media(fuzz, tmp_path / "a.jpg", "image")


@needs_ffmpeg
def test_video(fuzz, tmp_path):
    file = tmp_path / "a.mp4"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=s=16x16:d=0.2:r=10", str(file)], check=True)
    fuzz_media(fuzz, file, "frames")


# ---- Lists ----

def test_index(fuzz, tmp_path):
    rows = []
    for i in range(6):
        rows.append(dict(id=f"s{i}", split=["train", "train", "test"][i % 3], label="ab"[i % 2], text=f"x y {i}", visual=f"{i}.png"))
        make_png(tmp_path / f"{i}.png", np.full((3, 3, 3), 9 * i))
    index, words = tmp_path / "index.jsonl", write_vocab(tmp_path / "vocab.txt", "x y 1 2 3 4 5")
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = ["--name", "set", "--data-root", str(tmp_path / "data"), "--overwrite"]

    def read():
        custom.main([str(index), *place, "--size", "4", "--max-length", "6", "--workers", "1", "--tokenizer", str(words)])
        info = json.loads((tmp_path / "data/set/dataset.json").read_text())
        kept = {key: info[key] for key in ("classes", "modalities", "shapes")}
        return kept | {str(f): f.read_bytes() for f in sorted((tmp_path / "data/set").glob("*/*"))}

    fuzz([index], read, lambda: of_data(tmp_path / "data/set"), lambda file: [str(tmp_path)])


# ---- Vocabularies ----

TEXTS = ("She's cooked the crème", "re-cooking \U0001f600 a  b", "")


@pytest.mark.parametrize("names", ["wordpiece/vocab.txt", "bpe/vocab.json bpe/merges.txt", "bpe/bpe_encoder.bin"])
def test_vocabulary(fuzz, tmp_path, names):
    paths = [shutil.copy(FIXTURES / f"tokenizer_{name}", tmp_path) for name in names.split()]
    args = SimpleNamespace(max_length=30)

    def read():
        tokenizer = load_tokenizer(*paths)
        rows = {}
        for i, text in enumerate(TEXTS):
            rows[i] = media.token_ids(text, tokenizer, args.max_length)
            assert 0 <= rows[i].min() <= rows[i].max() < tokenizer.vocab_size
        described = write.describe(tokenizer)
        json.dumps(described)
        return rows | described

    def tells():
        tokenizer = load_tokenizer(*paths)
        return tokenizer.fingerprint, tokenizer.vocab_size

    fuzz([Path(path) for path in paths], read, tells)


# ---- Public checkpoints ----

TEXT = dict(width=32, depth=3, heads=4, mlp_width=128, max_length=24)


@pytest.mark.parametrize("name", ["bert/model.safetensors", "deberta/pytorch_model.bin", "openclip/open_clip_pytorch_model.bin"])
def test_checkpoint(fuzz, tmp_path, name):
    file = Path(shutil.copy(FIXTURES / name, tmp_path))
    make = {"bert": lambda: BERT(67, **TEXT), "deberta": lambda: DeBERTa(71, **TEXT), "openclip": lambda: ViT(32, 8, 32, 3, 4)}[name.split("/")[0]]
    encoder = make()
    start = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}

    def read():
        encoder.load_state_dict(start)
        state = checkpoints.load_public(encoder, file).state_dict()
        assert all(tensor.isfinite().all() for tensor in state.values())
        return {key: tensor.clone() for key, tensor in state.items()}

    fuzz([file], read, lambda: fingerprint.of_files([file]))


@pytest.mark.parametrize("name", ["bert/config.json", "deberta/config.json", "openclip/open_clip_config.json"])
def test_hub_config(fuzz, tmp_path, name):
    file = Path(shutil.copy(FIXTURES / name, tmp_path))
    weights = next((FIXTURES / name).parent.glob("*model.*"))
    shutil.copy(weights, tmp_path)

    def read():
        state = checkpoints.load_folder(tmp_path).state_dict()
        return configs.read_config(tmp_path), state

    fuzz([file], read, lambda: fingerprint.of_files(configs.files_of(tmp_path)), lambda _: [str(tmp_path)])


# ---- Runs ----

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of MMLoRA and those of its step 1, on a toy of 8 samples: where data and runs are."""
    root = tmp_path_factory.mktemp("trained")
    sizes, toy.SIZES = toy.SIZES, {"toy": {"train": 8, "val": 8, "test": 8}}
    try:
        call("train_joint.py", "--umft-epochs", 1, "--epochs", 1, "--batch-size", 8, out=root / "runs", root=root / "data")
    finally:
        toy.SIZES = sizes
    return root


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return SimpleNamespace(folder=tmp_path / "runs" / MMLORA, step_1=tmp_path / "runs" / AUDIO, data=trained / "data")


def test_config_json(fuzz, run):
    args = SimpleNamespace(data_root=run.data, probe=False)

    def read():
        _, _, _, settings, models = evaluate.open_run(args, run.folder)
        evaluate.open_data_of(args, run.folder)
        config = stored.read_config(run.folder)
        evaluate.check_same_samples(run.folder, run.folder)
        stored.read_result(run.folder, settings), stored.but_seed(settings)
        if config.get("data"):
            data.check_info(run.folder, config["data"])
            assert config["data"]["classes"] == settings["classes"]
        return {key: config.get(key) for key in ("settings", "fingerprint")}

    def tells():                                      # the command that made it says so
        config = stored.read_config(run.folder)
        return config["settings"], config.get("fingerprint")

    fuzz([run.folder / "config.json"], read, tells)


def test_result_json(fuzz, run):
    settings = stored.read_config(run.folder)["settings"]

    def read():
        result = stored.read_result(run.folder, settings)
        for scores in (*result["test"].values(), *result["val"].values()):
            assert 0 <= scores["accuracy"] <= 1 and scores["loss"] >= 0
        return result

    fuzz([run.folder / "result.json"], read)


def test_log_jsonl(fuzz, run):
    def read():
        log = stored.read_log(run.folder)
        for line in log:
            for scores in line["val"].values():
                assert 0 <= scores["accuracy"] <= 1 and scores.get("loss", 0) >= 0
        return log

    fuzz([run.folder / "log.jsonl"], read)


def test_probe_json(fuzz, run):
    (run.folder / "probe.json").write_text(json.dumps({"audio": dict(l2=1.0, val=dict(accuracy=0.5), test=dict(accuracy=0.5, loss=1.0))}))
    fuzz([run.folder / "probe.json"], lambda: stored.read_probe(run.folder))


@pytest.mark.parametrize("of", ["folder", "step_1"])
def test_model(fuzz, run, of):
    """The model of step 1 has its hash in the run that started from it."""
    folder, args = getattr(run, of), SimpleNamespace(data_root=run.data, probe=False)

    def read():
        models = evaluate.open_run(args, run.folder)[-1]
        assert all(tensor.isfinite().all() for tensor in models.state_dict().values())
        return models.state_dict()

    fuzz([folder / "model.safetensors"], read, tells=None if of == "folder" else lambda: 0)


def test_logits(fuzz, run):
    def read():
        found = {}
        for split in ("val", "test"):
            found[split] = calibration.stored(run.folder, split)
            for z in (*found[split]["UME"].values(), *found[split]["run"].values()):
                assert z.isfinite().all() and z.shape == (8, 8) and z.is_floating_point()
        return found

    fuzz([run.step_1 / "logits.safetensors", run.folder / "logits.safetensors"], read)


def test_last(fuzz, root, tmp_path):
    models, optimizer = small_model()
    run, logits = new_run(tmp_path, root), {"audio": torch.randn(100, 8)}
    run.resume(models, optimizer)
    for epoch in range(3):
        optimizer.step()
        run.end_of_epoch(epoch, logits, models.state_dict())
    files.unlock()
    folder, start = tmp_path / AUDIO, optimizer.state_dict()

    def read():
        state, tensors, moments = run.read_last(models, optimizer)
        run.cut_log(state["lines"])
        optimizer.load_state_dict({**start, "state": moments})
        models.load_state_dict(tensors, strict=False)
        for p in models.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(t.isfinite().all() for t in models.state_dict().values())
        return state, tensors, moments, models.state_dict()

    names = [str(folder / name) for name in ("last.safetensors", "model.safetensors")]
    fuzz([folder / "last.safetensors", folder / "model.safetensors"], read, names=lambda _: names)
