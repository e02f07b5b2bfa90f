"""The toy's own public checkpoints, and its pictures and sounds. Its worlds: test_data.py."""
import json
import wave

import pytest
import torch
from safetensors.torch import load_file

from encoders import build
from prepare import creatures, toy, toy_encoders
from pretrained import checkpoints
from running import call


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pre-training of 15 steps: modality -> file."""
    samples = dict.fromkeys(toy_encoders.ENCODERS, 250)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_encoders, "HELD_OUT", 250)
        return toy_encoders.pretrain(tmp_path_factory.mktemp("one"), steps=15, samples=samples)


@pytest.mark.parametrize("modality, names", [("audio", "modality_"), ("visual", "visual.")])
def test_pretraining_makes_the_files_again_in_their_public_layout(made, modality, names):
    one = made[modality]
    encoder = toy_encoders.ENCODERS[modality]
    shipped = checkpoints.download(encoder)
    tensors = load_file(one)
    assert all(name.startswith(names) for name in tensors)
    assert ({k: v.shape for k, v in tensors.items()}
            == {k: v.shape for k, v in load_file(shipped).items()})
    # Trained, and loaded by what loads OpenCLIP and ImageBind.
    torch.manual_seed(0)
    fresh = build(encoder)
    loaded = checkpoints.load_public(build(encoder), one)
    weight = "blocks.0.attention.query.weight"
    assert not torch.equal(loaded.state_dict()[weight], fresh.state_dict()[weight])
    # Nothing is left aside: the file is the encoder.
    assert sum(v.numel() for v in tensors.values()) == sum(p.numel() for p in fresh.parameters())


def test_pretraining_gives_the_same_bits_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_encoders, "ENCODERS", {"visual": "vit_toy"})
    monkeypatch.setattr(toy_encoders, "HELD_OUT", 250)
    again = toy_encoders.pretrain(tmp_path, steps=15, samples={"visual": 250})
    assert again["visual"].read_bytes() == made["visual"].read_bytes()


def test_pretraining_learns(tmp_path, capsys, monkeypatch):
    """After 120 steps the questions about pictures are answered better than by chance."""
    monkeypatch.setattr(toy_encoders, "ENCODERS", {"visual": "vit_toy"})
    monkeypatch.setattr(toy_encoders, "HELD_OUT", 250)
    toy_encoders.pretrain(tmp_path, steps=120, samples={"visual": 1_000})
    told = capsys.readouterr().out
    hue = int(told.split("hue ")[1].split(" %")[0])
    assert hue > 60                                       # of three


@pytest.mark.parametrize("modality, least", [("audio", 0.55), ("visual", 0.55)])
def test_shipped_files_are_better_than_random_weights(modality, least, root, tmp_path):
    """Linear evaluation, Table 4, on 200 samples."""
    accuracy = {}
    for start in ("shipped", "none"):
        words = ["--pretrained", "none"] if start == "none" else []
        call("evaluate.py", "--probe", "--dataset", "toy", "--modality", modality, *words,
             out=tmp_path / start, root=root)
        file, = tmp_path.glob(f"{start}/toy/probe-{modality}-*-s0/probe.json")
        accuracy[start] = json.loads(file.read_text())[modality]["test"]["accuracy"]
    assert accuracy["shipped"] > least > accuracy["none"] + 0.1


def test_every_method_starts_from_the_shipped_weights(base, root, tmp_path):
    for m, encoder in toy_encoders.ENCODERS.items():
        folder = next((base.out / "toy").glob(f"unimodal-{m}-s0"))
        assert json.loads((folder / "config.json").read_text())["settings"]["pretrained"] == encoder
    words = "--epochs 1 --batch-size 100".split()
    call("baselines.no_umft", *words, out=tmp_path, root=root)
    call("baselines.concat", *words, out=tmp_path, root=root)
    shipped = load_file(checkpoints.download("vit_toy"))["visual.conv1.weight"]
    frozen = load_file(tmp_path / "toy/no-umft-all-r1-s0/model.safetensors")
    assert torch.equal(frozen["visual.encoder.patch.weight"], shipped)
    config = json.loads((tmp_path / "toy/concat-s0/config.json").read_text())
    assert config["settings"]["pretrained"] == toy_encoders.ENCODERS


def test_look_and_listen(tmp_path, capsys):
    from torchvision.io import read_image
    toy.main(["--draw", str(tmp_path / "toy.png")])
    image = read_image(str(tmp_path / "toy.png"))
    assert image.shape == (3, 4 * 40 * 3, 8 * 40 * 3) and image.float().std() > 20
    toy.main(["--listen", str(tmp_path / "toy.wav")])
    with wave.open(str(tmp_path / "toy.wav")) as f:
        assert (f.getframerate(), f.getnchannels()) == (creatures.RATE, 1)
        assert f.getnframes() == 20 * creatures.SAMPLES
    assert capsys.readouterr().out.count("wrote ") == 2
