"""Reading, augmentation and the generated toys: what a batch holds,
where its randomness comes from, what the toys promise."""
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data import (Split, batches, centre_crop, epoch_rng, inputs, log_mel, model_input, parts,
                  pick_views, random_crop)
from encoders import UnimodalModel, build
from harness.arguments import PREPARED, find
from paper import settings
from prepare import creatures, toy

EVAL = dict(frames=3, crop=(0.5, 1.0), flip=True, audio_shift=4)     # what evaluation has to ignore
PLAIN = dict(frames=3, crop=(1, 1), flip=False, audio_shift=0)
VIT, RESNET, AUDIO = build("vit_toy"), build("resnet18"), build("audio_vit_toy")
BERT = build("bert_small", vocab_size=50)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def prepared(folder, kinds, labels=None, **arrays):
    """A Split "test" of a prepared data set made of these arrays; kinds: modality -> kind."""
    (folder / "test").mkdir()
    (folder / "dataset.json").write_text(json.dumps(dict(modalities=kinds)))
    if labels is None:
        labels = np.zeros(len(next(iter(arrays.values()))), np.int64)
    np.save(folder / "test" / "labels.npy", labels)
    for modality, array in arrays.items():
        np.save(folder / "test" / f"{modality}.npy", array)
    return Split(folder, "test")


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=rng(seed), dtype=torch.uint8)


# ---- reading ----
def test_split_maps_arrays_into_memory_and_checks_their_lengths(tmp_path):
    split = prepared(tmp_path, {"visual": "image"}, np.eye(4, dtype=np.uint8),
                     visual=pictures(4, 1, 3, 8, 8).numpy())
    assert len(split) == 4 and split.labels.dtype == torch.uint8
    assert isinstance(split.arrays["visual"], np.memmap)
    np.save(tmp_path / "test" / "labels.npy", np.zeros(5, np.int64))
    with pytest.raises(ValueError, match=r"5 labels, but 4 rows in visual\.npy"):
        Split(tmp_path, "test")


def test_find_says_how_to_get_the_data(tmp_path):
    def message(name):
        with pytest.raises(FileNotFoundError) as error:
            find(tmp_path, name)
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
        return str(error.value)

    told = message("birds")
    assert f"python -m prepare.custom INDEX.jsonl --name birds --data-root {tmp_path}" in told
    for name in PREPARED:
        assert importlib.import_module(f"prepare.{name}").HELP in message(name)
    (tmp_path / "birds").mkdir()
    message("birds")     # an empty folder is no data set
    (tmp_path / "birds" / "dataset.json").write_text("{}")
    assert find(tmp_path, "birds") == tmp_path / "birds"
    assert "There are birds, " in message("brids")     # the nearest name first
    assert "There are crema_d, " in message("cremad")


@pytest.mark.parametrize("name", ["custom", "media", "splits", "toy.py", "options"])
def test_find_of_a_name_that_only_looks_like_a_data_set(tmp_path, name):
    """`prepare/` holds more than one script a data set."""
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        find(tmp_path, name)


def test_batches_hold_every_sample_once():
    for n, size in [(10, 3), (12, 4), (5, 64), (1, 1)]:
        plain, shuffled = batches(n, size), batches(n, size, rng())
        assert torch.equal(torch.cat(plain), torch.arange(n))
        assert torch.equal(torch.cat(shuffled).sort().values, torch.arange(n))
        wanted = [min(size, n - i) for i in range(0, n, size)]
        assert [len(b) for b in plain] == [len(b) for b in shuffled] == wanted
        assert all(torch.equal(b, b.sort().values) for b in shuffled)     # which a disk likes
    assert not torch.equal(torch.cat(batches(50, 8, rng(1))), torch.cat(batches(50, 8, rng(2))))


def test_parts_of_a_batch():
    x, y = {"a": torch.arange(10).view(10, 1), "b": torch.arange(10) + 100}, torch.arange(10) * 2
    for size in (None, 10, 11):
        (x_1, y_1, share), = parts((x, y), size)
        assert x_1 is x and y_1 is y and share == 1
    pieces = parts((x, y), 4)
    assert [len(part_y) for _, part_y, _ in pieces] == [4, 4, 2]
    assert [share for *_, share in pieces] == [0.4, 0.4, 0.2]
    for m in x:
        assert torch.equal(torch.cat([part_x[m] for part_x, *_ in pieces]), x[m])
    assert torch.equal(torch.cat([part_y for _, part_y, _ in pieces]), y)


def test_randomness_of_an_epoch_depends_on_seed_and_epoch_only():
    def draws(seed, epoch):
        generator = epoch_rng(seed, epoch)
        return torch.rand(4, generator=generator), torch.rand(4)     # order and crops; dropout
    first = draws(0, 1)
    torch.rand(17)     # whatever came before
    assert all(torch.equal(a, b) for a, b in zip(draws(0, 1), first))
    for other in (draws(0, 2), draws(1, 1), draws(1, 0)):
        assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])


# ---- views, crops, flips ----
def test_evenly_spaced_views():
    # The middles of three equal parts, (0.5, 1.5, 2.5) * 8 / 3.
    assert pick_views(2, 8, 3).tolist() == [[1, 4, 6], [1, 4, 6]]
    assert pick_views(1, 8, 8).tolist() == [list(range(8))]
    assert pick_views(1, 10, 3).tolist() == [[1, 5, 8]]
    assert pick_views(1, 8, 1).tolist() == [[4]] and pick_views(1, 1, 1).tolist() == [[0]]


def test_random_views_are_distinct_in_order_and_all_equally_likely():
    views = pick_views(4000, 5, 3, rng())
    assert views.shape == (4000, 3) and (views.diff(dim=1) > 0).all()
    assert views.min() == 0 and views.max() == 4
    for v in range(5):
        assert abs((views == v).any(1).float().mean() - 3 / 5) < 0.03     # 3 sigma: 0.023
    assert not torch.equal(views[0], views[1]) or not torch.equal(views[1], views[2])


def test_centre_crop():
    x = pictures(2, 3, 3, 40, 40)
    assert torch.equal(centre_crop(x, 32), x[..., 4:36, 4:36].float())
    assert torch.equal(centre_crop(x, 40), x.float())
    assert centre_crop(x, 64).shape == (2, 3, 3, 64, 64) and centre_crop(x, 64).is_floating_point()
    flat = torch.full((1, 1, 3, 10, 10), 77, dtype=torch.uint8)
    torch.testing.assert_close(centre_crop(flat, 16), torch.full((1, 1, 3, 16, 16), 77.0))


def test_random_crop_of_everything_is_a_resize():
    x = pictures(3, 2, 3, 24, 24)
    out = random_crop(x, 24, PLAIN, "image", rng())
    torch.testing.assert_close(out, x.float(), rtol=0, atol=1e-2)     # of 255
    for size in (12, 20):
        wanted = F.interpolate(x.flatten(0, 1).float(), size=(size, size), mode="bilinear")
        out = random_crop(x, size, PLAIN, "image", rng())
        torch.testing.assert_close(out, wanted.unflatten(0, (3, 2)), rtol=0, atol=1e-2)


def same(one, other):
    """Which samples are alike, (N,) bool."""
    return torch.tensor([torch.allclose(a, b, atol=1e-2) for a, b in zip(one, other)])


def test_flips_mirror_half_of_the_samples():
    x = pictures(400, 2, 3, 6, 6)
    out = random_crop(x, 6, dict(PLAIN, flip=True), "image", rng())
    flipped = same(out, x.float().flip(-1))     # all views of a sample alike
    assert (flipped ^ same(out, x.float())).all() and 0.4 < flipped.float().mean() < 0.6


def test_a_mirror_turns_flow_around():
    x = pictures(40, 1, 6, 6, 6)     # channels x y x y x y
    out = random_crop(x, 6, dict(PLAIN, flip=True), "flow", rng())
    mirrored = x.float().flip(-1)
    mirrored[:, :, 0::2] = 255 - mirrored[:, :, 0::2]     # what went left goes right; up stays up
    flipped, straight = same(out, mirrored), same(out, x.float())
    assert (flipped ^ straight).all() and flipped.any() and straight.any()


def test_random_crop_takes_what_it_says_once_for_all_views():
    """Pictures of their own coordinates tell where each crop came from."""
    S, n = 64, 500
    ramp = torch.arange(S, dtype=torch.float).expand(S, S)
    x = torch.stack([ramp, ramp.T, ramp]).to(torch.uint8).expand(n, 2, 3, S, S)
    out = random_crop(x, 32, dict(PLAIN, crop=(0.5, 1.0)), "image", rng())
    assert torch.equal(out[:, 0], out[:, 1])
    # (n, 32) columns and rows of the source
    across, down = out[:, 0, 0, 16], out[:, 0, 1, :, 16]
    # Shares of the source; away from the border.
    w, h = ((v[:, -4] - v[:, 3]) / 25 * 32 / S for v in (across, down))
    area, ratio = w * h, w / h
    assert 0.5 - 1e-3 <= area.min() < 0.52 and 0.95 < area.max() <= 1 + 1e-3
    assert 3 / 4 - 1e-3 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 4 / 3 + 1e-3
    for first, share in ((across, w), (down, h)):     # places all over the free range
        left = (first[:, 3] + 0.5) / S - 3.5 * share / 32
        assert left.min() > -1e-2 and (left + share).max() < 1.01
        place = (left / (1 - share))[share < 0.8]
        assert place.min() < 0.1 and place.max() > 0.9 and abs(place.mean() - 0.5) < 0.1
    assert len({round(float(a), 3) for a in area}) > 100     # each sample its own


# ---- model_input ----
def test_pictures_are_normalised_as_their_encoder_was(tmp_path):
    value = torch.tensor([10, 100, 200], dtype=torch.uint8)
    split = prepared(tmp_path, {"visual": "frames", "flow": "flow"},
                     visual=value.view(1, 1, 3, 1, 1).expand(2, 4, 3, 64, 64).numpy(),
                     flow=np.full((2, 5, 4, 64, 64), 200, np.uint8))
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    # A ResNet takes 7/8 of what is stored.
    for encoder, (mean, std), size in [(VIT, clip, 32), (RESNET, imagenet, 56)]:
        for generator in (None, rng()):
            x = model_input(split, "visual", torch.tensor([0, 1]), encoder, "cpu", EVAL, generator)
            assert x.shape == (2, 3, 3, size, size) and x.dtype == torch.float32
            wanted = (value / 255 - torch.tensor(mean)) / torch.tensor(std)
            torch.testing.assert_close(x, wanted.view(3, 1, 1).expand_as(x), rtol=1e-4, atol=1e-4)
    flow = build("resnet18", in_channels=4)
    x = model_input(split, "flow", torch.tensor([0]), flow, "cpu", EVAL)
    assert x.shape == (1, 5, 4, 56, 56)     # all stored stacks at test
    torch.testing.assert_close(x, torch.full_like(x, (200 / 255 - 0.5) / 0.226))
    x = model_input(split, "flow", torch.tensor([0, 1]), flow, "cpu", PLAIN, rng())
    assert x.shape == (2, 1, 4, 56, 56)     # one in training


def test_frames_seen_are_the_frames_meant(tmp_path):
    frames = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1).expand(6, 8, 3, 32, 32).clone()
    # Sample 4, frame 3: 43.
    frames += torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1, 1) * 10
    split = prepared(tmp_path, {"visual": "frames"}, visual=frames.numpy())
    mean, std = (torch.tensor(v) for v in VIT.pixels)

    def which(x):
        return ((x.mean((-1, -2)) * std + mean) * 255).round().long()[:, :, 0]

    x = model_input(split, "visual", torch.tensor([4, 1]), VIT, "cpu", EVAL)
    assert which(x).tolist() == [[41, 44, 46], [11, 14, 16]]
    seen = which(model_input(split, "visual", torch.arange(6), VIT, "cpu", EVAL, rng()))
    assert (seen // 10 == torch.arange(6)[:, None]).all() and (seen.diff(dim=1) > 0).all()
    assert len(set(map(tuple, (seen % 10).tolist()))) > 1     # each sample its own
    for generator in (None, rng()):     # fewer stored than wanted: all of them
        x = model_input(split, "visual", torch.tensor([2]), VIT, "cpu", dict(EVAL, frames=20),
                        generator)
        assert which(x).tolist() == [list(range(20, 28))]


def test_sound_is_shifted_in_training_only(tmp_path):
    sound = torch.randn(30, 2, 32, 64, generator=rng()).half()
    split = prepared(tmp_path, {"audio": "audio"}, audio=sound.numpy())
    everything = torch.arange(30)
    stored = sound.float().unsqueeze(2)
    assert torch.equal(model_input(split, "audio", everything, AUDIO, "cpu", EVAL), stored)
    shifted, shifts = model_input(split, "audio", everything, AUDIO, "cpu", EVAL, rng()), set()
    for x, original in zip(shifted, stored):
        k, = [k for k in range(-10, 11) if torch.equal(x, original.roll(k, -1))]
        shifts.add(k)
    assert shifts <= set(range(-4, 5)) and len(shifts) > 5
    assert torch.equal(model_input(split, "audio", everything, AUDIO, "cpu", PLAIN, rng()), stored)


def test_text_is_as_long_as_the_longest_of_the_batch(tmp_path):
    ids = np.zeros((4, 12), np.int32)
    for i, length in enumerate([3, 7, 5, 0]):
        ids[i, :length] = np.arange(1, length + 1)
    split = prepared(tmp_path, {"text": "text"}, text=ids)
    # An empty text keeps one token.
    for index, longest in [([0, 2], 5), ([0, 1], 7), ([0], 3), ([3], 1), ([3, 0], 3)]:
        x = model_input(split, "text", torch.tensor(index), BERT, "cpu", EVAL)
        assert x.dtype == torch.int64
        assert torch.equal(x, torch.from_numpy(ids[index, :longest]).long())


def test_an_encoder_reads_the_ids_of_its_own_vocabulary(tmp_path):
    """text.npy holds the data set's own; beside it may lie the same texts in another one."""
    own, other = np.array([[1, 2, 3]], np.int32), np.array([[7, 8, 0]], np.int32)
    split = prepared(tmp_path, {"text": "text"}, **{"text": own, "text.wordpiece": other})
    deberta = build("deberta_small", vocab_size=50)
    for encoder in (BERT, deberta):
        x = model_input(split, "text", torch.tensor([0]), encoder, "cpu", EVAL)
        assert x.tolist() == [[1, 2, 3]]     # dataset.json tells of no other
    (tmp_path / "dataset.json").write_text(json.dumps(
        dict(modalities={"text": "text"}, other_tokenizers=[dict(kind="wordpiece")])))
    split = Split(tmp_path, "test")
    for encoder, ids in ((BERT, [[7, 8]]), (deberta, [[1, 2, 3]])):
        assert model_input(split, "text", torch.tensor([0]), encoder, "cpu", EVAL).tolist() == ids


def test_inputs_of_a_batch(tmp_path):
    """Of the modalities that have a model; with the labels of the samples."""
    split = prepared(tmp_path, {"visual": "image", "audio": "audio"}, np.arange(5),
                     visual=pictures(5, 1, 3, 36, 36).numpy(),
                     audio=torch.randn(5, 1, 32, 64, generator=rng()).half().numpy())
    models = torch.nn.ModuleDict({"audio": UnimodalModel(AUDIO, 3),
                                  "visual": UnimodalModel(VIT, 3)})
    index = torch.tensor([1, 3])
    x, y = inputs(split, index, models, "cpu", EVAL)
    assert list(x) == ["visual", "audio"] and y.tolist() == [1, 3]
    for m in x:
        assert torch.equal(x[m], model_input(split, m, index, models[m].encoder, "cpu", EVAL))
    one, _ = inputs(split, index, torch.nn.ModuleDict({"audio": models["audio"]}), "cpu", EVAL)
    assert list(one) == ["audio"]
    again = {m: model_input(split, m, index, models[m].encoder, "cpu", EVAL, draw)
             for draw in [rng(4)] for m in ("visual", "audio")}
    # One generator, one after the other.
    x, _ = inputs(split, index, models, "cpu", EVAL, rng(4))
    assert all(torch.equal(x[m], again[m]) for m in x)


def test_evaluation_is_deterministic_and_blind_to_the_rest_of_the_batch(tmp_path):
    split = prepared(tmp_path, {"visual": "frames", "audio": "audio", "flow": "flow"},
                     visual=pictures(9, 5, 3, 40, 40).numpy(),
                     audio=torch.randn(9, 3, 32, 64, generator=rng()).half().numpy(),
                     flow=pictures(9, 3, 4, 40, 40).numpy())
    encoders = {"visual": VIT, "audio": AUDIO, "flow": build("resnet18", in_channels=4)}

    def look(modality, index, generator=None):
        index = torch.tensor(index)
        return model_input(split, modality, index, encoders[modality], "cpu", EVAL, generator)

    for m in encoders:
        whole = look(m, list(range(9)))
        torch.rand(3)
        for index in (list(range(9)), [5], [7, 2, 5]):
            assert torch.equal(look(m, index), whole[index])
        assert torch.equal(look(m, [1, 2], rng(3)), look(m, [1, 2], rng(3)))
        assert not torch.equal(look(m, [1, 2], rng(3)), look(m, [1, 2], rng(4)))


# ---- sound -> log-mel ----
@pytest.mark.parametrize("bins, frames, n", [
    (128, 204, 32000), (128, 204, 40000), (32, 64, 10240), (32, 64, 400), (80, 10, 559)])
def test_log_mel_is_kaldis(bins, frames, n):
    fbank = pytest.importorskip("torchaudio").compliance.kaldi.fbank
    wave = 0.3 * torch.randn(2, 3, n, generator=rng(n)) + 0.1
    wave[0] *= torch.sin(torch.arange(n) * 0.05)
    wave[1, 2] = 0     # silence is a number, too
    out = log_mel(wave, bins, frames)
    assert out.shape == (2, 3, bins, frames)
    for i, j in np.ndindex(2, 3):
        mel = fbank(wave[i, j, None], htk_compat=True, sample_frequency=16000, use_energy=False,
                    window_type="hanning", num_mel_bins=bins, dither=0.0, frame_length=25,
                    frame_shift=10).T     # ImageBind's call
        mel = F.pad(mel, (0, max(0, frames - mel.shape[1])))[:, :frames]
        # ImageBind's mean -4.268 and 2 x 4.569.
        torch.testing.assert_close(out[i, j], (mel + 4.268) / 9.138, rtol=0, atol=1e-4)


def test_log_mel_needs_one_frame():
    assert log_mel(torch.zeros(400)).shape == (128, 204)
    with pytest.raises(ValueError, match="399 samples of sound.*400"):
        log_mel(torch.zeros(399))


# ---- the toys ----
def small_toys(folder, names=("toy",), seeds=(0,), sizes=(60, 30, 90)):
    before, toy.SIZES = toy.SIZES, dict.fromkeys(toy.WORLDS,
                                                 dict(zip(("train", "val", "test"), sizes)))
    try:
        return [find(folder, name, seed) for name in names for seed in seeds]
    finally:
        toy.SIZES = before


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_toys_are_made_once_and_the_same_from_the_same_seed(tmp_path, capsys):
    sizes = (40, 40, 40)     # alike, or their draws would differ even from one seed
    one, other = small_toys(tmp_path / "a", seeds=(0, 1), sizes=sizes)
    assert capsys.readouterr().out.count("making ") == 2
    assert small_toys(tmp_path / "a") == [one] and not capsys.readouterr().out
    assert contents(one) == contents(small_toys(tmp_path / "b", sizes=sizes)[0])
    for file in ("train/audio.npy", "train/visual.npy", "train/labels.npy", "test/audio.npy"):
        assert contents(one)[file] != contents(other)[file]
    # No split repeats another.
    assert len({(one / split / "audio.npy").read_bytes()
                for split in ("train", "val", "test")}) == 3
    # Nothing else.
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["toy-s0", "toy-s1"]


@pytest.mark.parametrize("leftover", [False, True])
def test_a_toy_of_other_code_is_made_anew(leftover, tmp_path, capsys):
    """And if a program was killed meanwhile, the next one still can."""
    folder, = small_toys(tmp_path)
    before = contents(folder)
    for made_by in (None, {}, {"prepare/toy.py": "other"}):
        info = json.loads(before["dataset.json"])
        del info["made_by"]
        if made_by is not None:
            info["made_by"] = made_by
        (folder / "dataset.json").write_text(json.dumps(info))
        np.save(folder / "test" / "labels.npy", np.zeros(1))
        if leftover:
            shutil.copytree(folder, folder.with_name(".toy-s0.0"))
        capsys.readouterr()
        assert small_toys(tmp_path) == [folder] and contents(folder) == before
        assert f"making {folder} anew" in capsys.readouterr().out
        assert [f.name for f in tmp_path.iterdir()] == ["toy-s0"]     # nothing left over


def test_a_toy_that_another_process_made_meanwhile_is_kept(tmp_path, monkeypatch):
    """Two scripts started at once make the same files:
    the second must not take them away from under the first."""
    folder = small_toys(tmp_path)[0]
    before = {f: f.stat().st_ino for f in folder.rglob("*")}
    made_by = json.loads((folder / "dataset.json").read_text())["made_by"]
    monkeypatch.setattr(toy, "SIZES", {"toy": {"train": 60, "val": 30, "test": 90}})
    toy.make(folder, "toy", 0, made_by)     # as if it had not been there a moment ago
    assert {f: f.stat().st_ino for f in folder.rglob("*")} == before
    assert [f.name for f in tmp_path.iterdir()] == ["toy-s0"]


@pytest.mark.parametrize("name", toy.WORLDS)
def test_toys_follow_the_prepared_format_with_exact_class_counts(name, tmp_path):
    folder = small_toys(tmp_path, [name])[0]
    info = json.loads((folder / "dataset.json").read_text())
    weight = np.array(toy.WORLDS[name]["weight"])
    assert len(info["classes"]) == len(set(info["classes"])) == len(weight)
    assert len(weight) == 8 + len(toy.WORLDS[name]["mimics"])
    for split_name, n in (("train", 60), ("val", 30), ("test", 90)):
        split = Split(folder, split_name)
        ids = (folder / split_name / "ids.txt").read_text().split()
        assert len(split) == len(set(ids)) == n
        count = np.bincount(split.labels.numpy(), minlength=len(weight))
        # Rounded shares, not draws.
        assert (abs(count - n * weight / weight.sum()) < 1).all() and count.sum() == n
        audio, visual = split.arrays["audio"], split.arrays["visual"]
        assert audio.shape == (n, 1, 32, 64) and audio.dtype == np.float16
        assert visual.shape == (n, 1, 3, 36, 36) and visual.dtype == np.uint8
        assert np.isfinite(split.arrays["audio"]).all()
        stored = folder / split_name / "groups.npy"
        for group, members in split.groups.items():
            if name == "toy_mimics":
                mine = np.isin(split.labels, info["groups"][group])
            else:
                number = np.load(stored)
                assert number.shape == (n,) and number.dtype == np.int64
                mine = number == info["sample_groups"].index(group)
            assert members.dtype == torch.bool and np.array_equal(members, mine)
        # Each in one.
        assert (sum(members.int() for members in split.groups.values()) == 1).all()
        assert stored.exists() == (name != "toy_mimics")
    if name == "toy_mimics":
        assert list(split.groups) == list(info["groups"]) and "sample_groups" not in info
        assert info["groups"]["mimics"] == list(range(8, len(weight)))
    else:
        assert (list(split.groups) == info["sample_groups"]
                == ["both fine", "sound off", "sight off"])
        assert "groups" not in info and not toy.WORLDS[name]["mimics"]
    assert info["counts"] == {"train": 60, "val": 30, "test": 90}
    assert set(settings.settings_for(name)["encoders"]) == set(info["modalities"])


def test_sizes_and_worlds_go_together():
    assert list(toy.WORLDS) == list(toy.SIZES) == ["toy", "toy_mismatched", "toy_mimics"]
    for sizes in toy.SIZES.values():
        assert list(sizes) == ["train", "val", "test"]


@pytest.mark.parametrize("name", ["toy", "toy_mismatched"])
def test_what_is_off_is_off_in_a_fifth_each_and_never_both(name, monkeypatch):
    """And it is what the world says: of no creature, or of another one."""
    heard, seen, n = [], [], 3000

    def tones(contour, trilled, rng, table=creatures.CONTOURS, **how):
        heard.append((list(table), contour, trilled))
        return torch.zeros(len(contour), 8) + len(heard), {}

    def masks(shape, rng, size=36, table=creatures.SILHOUETTES, turn=0.25):
        seen.append((list(table), shape))
        return torch.zeros(len(shape), 1, 2, 2) + len(seen), {}

    monkeypatch.setattr(creatures, "tones", tones)
    monkeypatch.setattr(creatures, "masks", masks)
    monkeypatch.setattr(creatures, "noises", lambda n, rng: torch.zeros(n, 8))
    monkeypatch.setattr(creatures, "mix", lambda wave, noise, decibel: wave)
    monkeypatch.setattr(creatures, "paint", lambda mask, contrast, rng: mask)
    y = torch.arange(8).repeat_interleave(n // 8)
    sound, picture, group = toy.samples(toy.WORLDS[name], y, rng())
    assert group.unique().tolist() == [0, 1, 2]     # one number a sample: never both
    for k, share in enumerate((0.6, 0.2, 0.2)):
        assert abs((group == k).float().mean() - share) < 0.03      # 4 sigma of a fifth: 0.029

    # Which of the generated sounds and pictures a sample got: the first are of creatures.
    assert heard[0][0] == list(creatures.CONTOURS) and seen[0][0] == list(creatures.SILHOUETTES)
    call, shape = heard[0][1] + 4 * heard[0][2], seen[0][1]
    sound_of, picture_of = sound[:, 0], picture[:, 0, 0, 0]
    for off, source, kind in ((group == 1, sound_of, call), (group == 2, picture_of, shape)):
        assert torch.equal(kind[~off], y[~off]) and (source[~off] == 1).all()
        if name == "toy":
            assert (source[off] == 2).all()
        else:
            assert (source == 1).all() and (kind[off] != y[off]).all()
            shift = (kind[off] - y[off]) % 8
            assert shift.unique().tolist() == list(range(1, 8))     # any other one
    if name == "toy":
        assert (heard[1][0] == list(creatures.OTHER_CONTOURS)
                and seen[1][0] == list(creatures.OTHER_SHAPES))
        assert not set(heard[1][0]) & set(creatures.CONTOURS)
        assert not set(seen[1][0]) & set(creatures.SILHOUETTES)
    else:
        assert len(heard) == len(seen) == 1


@pytest.mark.parametrize("name", ["toy", "toy_mismatched"])
def test_stored_groups_have_their_shares_in_every_class(name, tmp_path):
    split = Split(small_toys(tmp_path, [name], sizes=(800, 10, 10))[0], "train")
    for group, share in (("both fine", 0.6), ("sound off", 0.2), ("sight off", 0.2)):
        members = split.groups[group].float()
        assert abs(members.mean() - share) < 0.07       # 4 sigma of 800: 0.069 of 0.6
        for c in range(8):
            assert abs(members[split.labels == c].mean() - share) < 0.2


def distance(a, b):
    """How far the means and the mean squares of two groups are apart: squared z, averaged over all
    features; 1 if both follow one law."""
    z = []
    for x, y in ((a, b), (a ** 2, b ** 2)):
        variance = x.var(0) / len(x) + y.var(0) / len(y)
        z.append((x.mean(0) - y.mean(0)) ** 2 / variance.clamp_min(1e-12))
    return float(torch.stack(z).mean())


@pytest.mark.parametrize("name", ["toy_mimics"])
def test_a_mimic_cannot_be_told_from_its_models_by_one_sense(name, tmp_path):
    """By ear class 8 is its caller, by eye its look-alike:
    a leak (of noise, contrast, loudness) would set their spectra apart."""
    world = toy.WORLDS[name]
    split = Split(small_toys(tmp_path, [name], sizes=(1200, 10, 10))[0], "train")
    x = {m: torch.from_numpy(split.arrays[m][:, 0].astype(np.float64)) for m in ("audio", "visual")}
    spectrum = {m: torch.fft.rfft2(v).abs().flatten(1) for m, v in x.items()}
    level = {m: torch.stack([v.flatten(1).mean(1), v.flatten(1).std(1)], 1) for m, v in x.items()}

    def mean_distance(features, modality, to):
        """Of all mimics to one of the two creatures that each is made of."""
        z, found = features[modality], []
        for mimic, models in enumerate(world["mimics"], start=8):
            found.append(distance(z[split.labels == mimic], z[split.labels == models[to]]))
        return np.mean(found)

    caller, lookalike = 0, 1
    assert mean_distance(spectrum, "audio", caller) < 1.3
    assert mean_distance(spectrum, "visual", lookalike) < 1.3
    assert mean_distance(level, "audio", caller) < 4
    assert mean_distance(level, "visual", lookalike) < 4
    assert mean_distance(spectrum, "audio", lookalike) > 1.6
    assert mean_distance(spectrum, "visual", caller) > 1.6
    for i, models in enumerate(world["mimics"], start=8):
        assert len({world["spoilt"][c] for c in (i, *models)}) == 1


def test_a_spoilt_recording_is_noise_and_a_spoilt_picture_is_faint():
    call, no = torch.arange(8).repeat(8), torch.zeros(64, dtype=torch.bool)
    clean, noisy = (log_mel(toy.sounds(call, None, s, rng()), 32, 64) for s in (no, ~no))
    assert clean.std((1, 2)).mean() > 1.1 * noisy.std((1, 2)).mean()
    sharp, faint = (toy.pictures(call, None, s, rng()).float() for s in (no, ~no))
    assert sharp.std((2, 3)).mean() > 1.3 * faint.std((2, 3)).mean()
    loud, low = toy.VARYING["decibel"][1], toy.VARYING["decibel"][0]      # of the other worlds
    loud, low = (torch.full((64,), decibel) for decibel in (loud, low))
    assert (log_mel(toy.sounds(call, loud, None, rng()), 32, 64).std((1, 2)).mean()
            > 1.1 * log_mel(toy.sounds(call, low, None, rng()), 32, 64).std((1, 2)).mean())
    strong, weak = (torch.full((64,), contrast) for contrast in reversed(toy.VARYING["contrast"]))
    assert (toy.pictures(call, strong, None, rng()).float().std((2, 3)).mean()
            > 1.3 * toy.pictures(call, weak, None, rng()).float().std((2, 3)).mean())
    for wave in (toy.sounds(call, None, no, rng()), toy.sounds(call, None, ~no, rng()),
                 toy.sounds(call, loud, None, rng()), toy.sounds(call, low, None, rng()),
                 toy.other_sounds(loud, rng()), toy.other_sounds(low, rng())):
        assert wave.shape == (64, 10240)     # loudness tells nothing
        loudness = wave.square().mean(1).sqrt()
        torch.testing.assert_close(loudness, torch.full((64,), 0.1), rtol=1e-3, atol=0)


def test_example_in_the_source_is_true():
    """`prepare/toy.py` explains the toy by class 9;
    the example has to go with the world when that is changed."""
    world = toy.WORLDS["toy_mimics"]
    call, shape = world["mimics"][1]
    text = Path(toy.__file__).read_text()
    contour, figure = list(creatures.CONTOURS)[call], list(creatures.SILHOUETTES)[shape]
    assert (f"class 9 = (call {call}: a {contour} tone,"
            f" silhouette {shape}: a square {figure})") in text

    def posterior(sense, value):
        weight = {}
        for c in range(12):
            models = (c, c) if c < 8 else world["mimics"][c - 8]
            if models[sense] == value:
                weight[c] = world["weight"][c]
        return {c: w / sum(weight.values()) for c, w in weight.items()}

    heard, seen = posterior(0, call), posterior(1, shape)
    assert heard == {0: 1 / 2, 8: 1 / 4, 9: 1 / 4} and seen == {3: 1 / 2, 9: 1 / 4, 11: 1 / 4}
    mean = {c: (heard.get(c, 0) + seen.get(c, 0)) / 2 for c in range(12)}
    assert max(mean.values()) == 1 / 4
    assert sorted(c for c in mean if mean[c] == 1 / 4) == [0, 3, 9]
