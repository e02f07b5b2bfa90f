"""What the scripts are made of: optimisers, schedules, metrics,
the checks before a model is built."""
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from encoders import UnimodalModel, build
from harness import metrics
from harness.models import new_model
from harness.optim import BertAdam, lr_factor, make_optimizer, set_lr
from harness.report import mean_std
from lora import add_lora, mean_prob_loss


def test_bertadam_is_pytorch_pretrained_berts():
    """Twelve steps recorded from BertAdam of pytorch_pretrained_bert 0.6.2: warm-up, decay to zero
    and beyond, gradients to clip or not."""
    folder = Path(__file__).parent / "fixtures" / "encoders" / "optim"
    x = load_file(folder / "bertadam.safetensors")
    how = json.loads((folder / "bertadam.json").read_text())
    w, b = nn.Parameter(x["w0"].clone()), nn.Parameter(x["b0"].clone())
    decay = how["weight_decay"]
    groups = [dict(params=[p], weight_decay=decay[k]) for p, k in ((w, "w"), (b, "b"))]
    optimizer = BertAdam(groups, how["lr"], how["warmup"], how["t_total"])
    for step in range(how["steps"]):
        w.grad, b.grad = x["grad_w"][step].clone(), x["grad_b"][step].clone()
        lr = how["lr"] * BertAdam.factor(step, optimizer.param_groups[0])
        assert lr == pytest.approx(float(x["lr_used"][step]), abs=1e-7)
        optimizer.step()
        assert (w - x["w"][step]).abs().max() < 2e-6 and (b - x["b"][step]).abs().max() < 2e-6
        assert torch.equal(w.grad, x["grad_w"][step])     # clipping is the optimiser's own affair
    assert max(g.norm() for g in x["grad_w"]) > 1
    assert BertAdam.factor(7, dict(t_total=-1, warmup=-1)) == 1


def test_plateau_is_torchs():
    chance = random.Random(0)
    for _ in range(50):
        history = []
        for n in range(30):
            history.append(chance.choice([0.1, 0.2, 0.3, 0.4, 0.5]) + 0.01 * n * chance.random())
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=1, threshold=0, eps=0)
        for n, score in enumerate(history):
            assert lr_factor("plateau", 99, 1000, history[:n]) == optimizer.param_groups[0]["lr"]
            scheduler.step(score)
    # Two epochs in a row without improvement.
    assert lr_factor("plateau", 0, 10, [0.5, 0.4, 0.4]) == 0.5
    assert lr_factor("plateau", 0, 10, [0.5, 0.4, 0.6, 0.4]) == 1


def test_cosine_and_constant():
    factors = [lr_factor("cosine", step, 200, [0.1, 0.1, 0.1]) for step in range(200)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])     # warm-up: 5 %
    assert factors[10] == 1 and 0 < factors[-1] < 1e-3
    assert all(a >= b for a, b in zip(factors[9:], factors[10:]))
    assert factors[105] == pytest.approx(0.5)
    # Runs shorter than a warm-up.
    assert [lr_factor("cosine", step, 1, []) for step in (0, 1)] == [1, 1]
    assert all(math.isfinite(lr_factor("cosine", step, 3, [])) for step in range(3))
    assert {lr_factor("constant", step, 200, [0.3, 0.1, 0.1, 0.1]) for step in range(200)} == {1.0}


def test_set_lr():
    """BertAdam has a schedule of its own, so cosine is not put on top of it; a plateau is."""
    model = nn.Linear(3, 2)
    for name, schedule, factor in [("adamw", "cosine", 0.5), ("sgd", "cosine", 0.5),
                                   ("bertadam", "cosine", 1), ("bertadam", "plateau", 0.5),
                                   ("adamw", "constant", 1)]:
        optimizer = make_optimizer(name, model, 0.1, 0.01, 200)
        set_lr(optimizer, dict(schedule=schedule, lr=0.3), 105, 200, [0.5, 0.4, 0.4])
        assert ([group["lr"] for group in optimizer.param_groups]
                == pytest.approx([0.3 * factor] * 2))


def test_what_decays():
    """The weights of linear layers, convolutions and embeddings; nothing else."""
    layers = (nn.Linear, nn.Conv2d, nn.Embedding)
    for encoder, options in (("vit_toy", {}), ("audio_vit_toy", {}), ("resnet18", {}),
                             ("bert_small", dict(vocab_size=9))):
        model = UnimodalModel(build(encoder, **options), 5)
        wanted = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
        everything = {id(p) for p in model.parameters()}
        for name in ("adamw", "bertadam", "sgd"):
            decayed, spared = make_optimizer(name, model, 0.1, 0.3, 10).param_groups
            assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0
            assert {id(p) for p in decayed["params"]} == wanted
            assert {id(p) for p in spared["params"]} == everything - wanted
    model = UnimodalModel(build("vit_toy"), 5)
    names = add_lora(model)
    decayed, spared = make_optimizer("adamw", model, 0.1, 0.3, 10).param_groups
    # A and B only, and no decay on them.
    assert not decayed["params"] and len(spared["params"]) == 2 * len(names)
    kinds = [type(make_optimizer(name, model, 0.1, 0.3, 10))
             for name in ("adamw", "bertadam", "sgd")]
    assert kinds == [torch.optim.AdamW, BertAdam, torch.optim.SGD]
    groups = make_optimizer("bertadam", model, 0.1, 0.3, 70).param_groups
    assert {(group["warmup"], group["t_total"]) for group in groups} == {(0.1, 70)}


def naive_f1(predicted, true):
    """(micro, macro), counted one decision at a time."""
    tp, fp, fn = ([0] * len(true[0]) for _ in range(3))
    for p, t in zip(predicted, true):
        for c in range(len(t)):
            tp[c] += bool(p[c] and t[c])
            fp[c] += bool(p[c] and not t[c])
            fn[c] += bool(t[c] and not p[c])

    def of(a, b, c):
        return 2 * a / (2 * a + b + c) if a + b + c else 0.0
    return of(sum(tp), sum(fp), sum(fn)), sum(map(of, tp, fp, fn)) / len(tp)


def test_f1_against_a_naive_count():
    for seed in range(20):
        torch.manual_seed(seed)
        true, predicted = torch.rand(30, 6) < 0.4, torch.rand(30, 6) < 0.5
        true[:, 0] = False                       # never there, sometimes predicted
        predicted[:, 1] = False                  # never predicted
        true[:, 2] = predicted[:, 2] = False     # neither
        naive = naive_f1(predicted.tolist(), true.tolist())
        assert metrics.f1(predicted, true) == pytest.approx(naive)
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    assert metrics.f1(nothing, nothing) == (0, 0) and metrics.f1(~nothing, ~nothing) == (1, 1)


def test_scores_of_groups_and_of_training_batches():
    logits = {"a": torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 4, 0], [4, 0, 0]]),
              "b": torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 9, 0]])}
    labels = torch.tensor([0, 1, 2, 1])
    info, groups = dict(multilabel=False), {"first": labels == 0, "rest": labels > 0}
    scores = metrics.scores(logits, labels, info, groups=groups)
    assert scores["groups"] == {"first": 1, "rest": pytest.approx(2 / 3)}
    assert scores["accuracy"] == 0.75 and metrics.count_right(logits, labels) == 3
    assert "groups" not in metrics.scores(logits, labels, info)
    every = metrics.all_scores(logits, labels, info, groups)
    assert list(every) == ["a", "b", "prob", "logits"]
    assert every["prob"] == scores and every["a"]["groups"]["rest"] == pytest.approx(1 / 3)
    odd = {"odd": torch.tensor([False, True, True, False])}      # of samples, whatever their class
    p = metrics.fuse(logits)
    assert metrics.rates(p, labels, info, odd)["groups"] == {"odd": 0.5}
    assert list(metrics.all_scores({"a": logits["a"]}, labels, info)) == ["a"]
    assert metrics.all_scores(logits, labels, info)["a"]["accuracy"] == 0.5
    multi = torch.tensor([[1, 0, 1]])
    two = {"a": torch.tensor([[3.0, 3, 3]]), "b": torch.tensor([[0.0, -9, 1]])}
    assert metrics.count_right(two, multi) == 1     # the mean of 0.95 and 0.0001 says no
    assert mean_std([1.0, 2.0, 6.0]) == pytest.approx((3, statistics.stdev([1, 2, 6])))
    assert mean_std([5.0]) == (5, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_measures_equals_what_is_trained(dtype):
    """metrics does not use lora.py, or an edit of Eq. 3 would move the yardstick, too. As long as
    nobody has edited it, both are the same bits."""
    torch.manual_seed(0)
    logits = {m: torch.randn(9, 5).to(dtype) for m in ("audio", "visual")}
    for y in (torch.arange(9) % 5, (torch.rand(9, 5) < 0.4).to(torch.uint8)):
        assert torch.equal(metrics.fused_loss(logits, y), mean_prob_loss(logits, y))
        for z in logits.values():
            assert torch.equal(metrics.cross_entropy(z, y), mean_prob_loss({"one": z}, y))


def test_a_text_encoder_is_not_fed_anothers_ids():
    info = dict(name="menus", classes=["a", "b"], modalities={"text": "text"}, shapes={"text": [8]},
                tokenizer=dict(kind="wordpiece", vocab_size=31, fingerprint="x"))
    assert new_model("bert_small", info, "text").encoder.words.num_embeddings == 31
    with pytest.raises(ValueError, match="deberta_small needs byte_bpe token ids, but menus was"
                                         " prepared with a wordpiece tokenizer"):
        new_model("deberta_small", info, "text")
    with pytest.raises(ValueError, match="bert_base knows 30522 tokens, but menus was prepared"
                                         " with a vocabulary of 31"):
        new_model("bert_base", info, "text")
    info["other_tokenizers"] = [dict(kind="byte_bpe", vocab_size=47, fingerprint="y")]
    assert new_model("deberta_small", info, "text").encoder.words.num_embeddings == 47
