"""Temperatures, weights, calibration errors, paired comparisons: against references written out by
hand, and tables of statistics. Then `evaluate.py` with them, and the tables of `results/`.
"""
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import calibration, compare
from paper import settings as paper
from results import study, tables
from running import MMLORA, QUICK, ROOT, UMFT_EPOCHS, call, error, result, table


# ---------------------------------------------------------------------------- statistics
def test_mcnemar_is_the_exact_binomial_test():
    """All 2^n outcomes of n fair coins are counted, one by one."""
    for only_a in range(7):
        for only_b in range(7 - only_a):
            n, as_far = only_a + only_b, 0
            for outcome in range(2 ** n):
                heads = bin(outcome).count("1")
                as_far += abs(heads - n / 2) >= abs(only_a - n / 2)
            assert compare.mcnemar(only_a, only_b) == pytest.approx(as_far / 2 ** n), (
                only_a, only_b)
    assert compare.mcnemar(3, 10) == pytest.approx(0.092285, abs=1e-6)
    assert compare.mcnemar(0, 0) == 1 and compare.mcnemar(400, 400) == 1


@pytest.mark.parametrize("freedom, t05, t01", [
    (1, 12.7062, 63.6567), (2, 4.3027, 9.9248), (3, 3.1824, 5.8409), (4, 2.7764, 4.6041),
    (5, 2.5706, 4.0321), (9, 2.2622, 3.2498), (10, 2.2281, 3.1693), (29, 2.0452, 2.7564)])
def test_t_distribution_is_the_tabulated_one(freedom, t05, t01):
    for t, p in ((t05, 0.05), (t01, 0.01), (-t05, 0.05)):
        assert compare.two_sided_p(t, freedom) == pytest.approx(p, rel=1e-4)
    assert compare.two_sided_p(0, freedom) == pytest.approx(1)


def test_t_distribution_is_its_integral():
    for freedom, t in ((3, 1.3), (8, 0.4), (11, 2.9)):
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale /= math.sqrt(freedom * math.pi)
        h, inside = t / 2000, 0.0
        for i in range(2000):                     # midpoints, 0 to t
            x = (i + 0.5) * h
            inside += h * scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        assert compare.two_sided_p(t, freedom) == pytest.approx(1 - 2 * inside, abs=1e-6)


def test_paired_differences():
    found = compare.paired([1.0, 2.0, 4.0])       # mean 7/3, variance 7/3, se sqrt(7)/3, t sqrt(7)
    assert found["n"] == 3 and found["mean"] == pytest.approx(7 / 3)
    assert found["se"] == pytest.approx(math.sqrt(7) / 3)
    assert found["t"] == pytest.approx(math.sqrt(7))
    # Two degrees: 1 - t / sqrt(2 + t^2).
    assert found["p"] == pytest.approx(1 - math.sqrt(7) / 3)
    assert compare.paired([0.5])["p"] is None
    assert compare.paired([0.0, 0.0])["p"] == 1 and compare.paired([0.5, 0.5])["p"] == 0


def test_gain_by_experts_adds_up():
    a, b = torch.tensor([1, 1, 0, 1, 0]).bool(), torch.tensor([1, 0, 1, 0, 0]).bool()
    first, second = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([1, 0, 0, 0, 0]).bool()
    found = compare.gain_by_experts(a, b, [first, second])
    assert found == {"all": (20, 0), "some": (40, 0), "none": (40, 20)}
    assert compare.table(a, b) == dict(both=1, only_a=2, only_b=1, neither=1, p=1)


# ---------------------------------------------------------------------------- calibration
@pytest.fixture
def scored():
    """Logits of two modalities, (200, 5), and labels: audio is worse and too sure."""
    torch.manual_seed(0)
    y = torch.randint(5, (200,))
    one_hot = torch.nn.functional.one_hot(y, 5)
    return {"audio": 3 * (one_hot + 1.2 * torch.randn(200, 5)),
            "visual": one_hot + 0.6 * torch.randn(200, 5)}, y


def softmax(row, T):
    weights = [math.exp(float(z) / T) for z in row]
    return [w / sum(weights) for w in weights]


def naive(logits, y, T, w):
    """accuracy, NLL, ECE with loops; T, w: modality -> number."""
    right, nll, bins = 0, 0.0, [[] for _ in range(15)]
    for i, label in enumerate(y.tolist()):
        p = [0.0] * 5
        for m, z in logits.items():
            for c, q in enumerate(softmax(z[i], T[m])):
                p[c] += w[m] * q
        guess = max(range(5), key=p.__getitem__)
        right += guess == label
        nll -= math.log(p[label])
        bins[min(14, math.ceil(p[guess] * 15) - 1)].append((p[guess], guess == label))
    ece = 0.0
    for members in bins:
        if members:
            confidence = sum(c for c, _ in members) / len(members)
            hits = sum(hit for _, hit in members) / len(members)
            ece += len(members) / len(y) * abs(hits - confidence)
    return dict(accuracy=right / len(y), nll=nll / len(y), ece=ece)


@pytest.mark.parametrize("T, w", [
    ({"audio": 1, "visual": 1}, {"audio": 0.5, "visual": 0.5}),
    ({"audio": 4, "visual": 0.5}, {"audio": 0.25, "visual": 0.75})])
def test_scores_are_the_naive_loops(scored, T, w):
    logits, y = scored
    found = calibration.scores(calibration.fuse(logits, T, w), y)
    for key, value in naive(logits, y, T, w).items():
        assert found[key] == pytest.approx(value, abs=1e-9), key
    assert 0.01 < found["ece"] < 0.5


def test_ece_by_hand():
    """Two samples in one bin, one in another: (2/3) |1/2 - 0.9| + (1/3) |1 - 0.6|."""
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0])
    assert calibration.ece(p, y) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)


@pytest.mark.parametrize("kind", ["one", "each", "weighted"])
def test_choices_are_the_best_of_all(scored, kind):
    logits, y = scored
    logits, y = {m: z[:60] for m, z in logits.items()}, y[:60]
    found = calibration.choose(kind, "nll", logits, y)
    best = naive(logits, y, *found)["nll"]
    grid = [0.25, 0.5, 1, 2, 4, 8]                # a part of what was tried
    for a in grid:
        for b in grid:
            if kind == "one" and a == b or kind == "each":
                T, w = {"audio": a, "visual": b}, {"audio": 0.5, "visual": 0.5}
                assert naive(logits, y, T, w)["nll"] >= best - 1e-9
    if kind == "weighted":
        assert sum(found[1].values()) == pytest.approx(1) and found[1]["visual"] > 0.5
    if kind == "each":
        assert found[0]["audio"] > 1              # it was too sure
    by_accuracy = calibration.choose(kind, "accuracy", logits, y)
    after, before = naive(logits, y, *by_accuracy), naive(logits, y, *calibration.unchanged(logits))
    assert after["accuracy"] >= before["accuracy"]
    assert naive(logits, y, *found)["accuracy"] <= after["accuracy"]


def test_a_large_temperature_is_the_average_of_logits(scored):
    logits, _ = scored
    p = calibration.fuse(logits, {"audio": 1e4, "visual": 1e4}, {"audio": 0.5, "visual": 0.5})
    assert torch.equal(p.argmax(1), sum(logits.values()).argmax(1))


# ---------------------------------------------------------------------------- evaluate.py
def test_temperature_from_stored_logits(copied, root):
    """No model is read: model.safetensors may be away."""
    run = copied / MMLORA
    (run / "model.safetensors").unlink()
    printed = call("evaluate.py", "--run", run, "--temperature", "each", "--fusion", "weighted",
                   "--data-root", root)
    rows = {}
    for line in printed.splitlines():
        found = re.match(r"(.{36}) +(\d+\.\d) +(\d+\.\d+) +(\d+\.\d)$", line)
        if found:
            rows[found[1].strip()] = [float(x) for x in found.groups()[1:]]
        assert len(line) <= 80 or str(copied) in line
    kinds = ("", ", T by accuracy", ", T by NLL", ", weights by accuracy")
    assert list(rows) == [f"{name}{kind}" for name in ("UME", "MMLoRA") for kind in kinds]
    done = result(copied, MMLORA)
    assert rows["UME"][0] == round(100 * done["ume"]["test"]["prob"]["accuracy"], 1)
    assert rows["MMLoRA"][:2] == [round(100 * done["test"]["prob"]["accuracy"], 1),
                                  round(done["test"]["prob"]["loss"], 3)]
    assert rows["UME, T by NLL"] != rows["UME"] and "15 bins" in printed


def test_one_temperature_stands_in_the_closing_table(base, root):
    rows = table(base.printed)
    assert list(rows)[2:5] == ["UME, probabilities averaged", "UME, logits averaged",
                               "UME, one temperature"]
    splits = {name: study.data.Split(root / "toy-s0", name).labels for name in ("val", "test")}
    val, test = (calibration.stored(base.run, name)["UME"] for name in splits)
    tried = []
    for i in range(-8, 13):
        T = 2 ** (i / 4)
        right = {}
        for name, z in (("val", val), ("test", test)):
            p = sum((v.double() / T).softmax(-1) for v in z.values())
            right[name] = float((p.argmax(-1) == splits[name]).double().mean())
            loss = float(-(p / 2).gather(1, splits[name][:, None]).log().mean())
            right[name] = (right[name], -loss)
        tried.append((right["val"], right["test"][0]))
    assert rows["UME, one temperature"][0].startswith(f"{100 * max(tried)[1]:.1f} ")


def test_compare_two_runs_and_a_run_with_ume(copied, root):
    call("baselines.separate_full", *QUICK, "--epochs", 1, out=copied, root=root)
    words = ("--data-root", root)
    a, b = copied / MMLORA, copied / "toy/separate_full-s0"
    printed = call("evaluate.py", "--compare", a, b, *words)
    y = study.data.Split(root / "toy-s0", "test").labels
    guesses = []
    for run in (a, b):
        z = calibration.stored(run, "test")["run"]
        guesses.append(sum(v.softmax(1) for v in z.values()).argmax(1).tolist())
    both = only_a = only_b = 0
    for of_a, of_b, label in zip(*guesses, y.tolist()):
        both += of_a == label == of_b
        only_a += of_a == label != of_b
        only_b += of_a != label == of_b
    cells = next(line.split() for line in printed.splitlines() if line.startswith("     0"))
    assert list(map(int, cells[4:8])) == [both, only_a, only_b, 120 - both - only_a - only_b]
    assert float(cells[3]) == pytest.approx(100 * (only_a - only_b) / 120, abs=0.006)
    assert float(cells[8]) == pytest.approx(compare.mcnemar(only_a, only_b), rel=0.06)
    gains = next(line for line in printed.splitlines() if line.startswith("A - B there"))
    assert sum(map(float, gains.split()[-3:])) == pytest.approx(float(cells[3]), abs=0.02)
    assert "give --seeds" in printed

    printed = call("evaluate.py", "--compare", b, "ume", *words)      # of this very run
    ume = 100 * result(copied, "toy/separate_full-s0")["ume"]["test"]["prob"]["accuracy"]
    cells = next(line.split() for line in printed.splitlines() if line.startswith("     0"))
    assert float(cells[2]) == round(ume, 1)


def test_compare_over_seeds(copied, root):
    """Seed 1 is the same run once more, with one right sample more than UME."""
    for name in ("mmlora-all-r1", "unimodal-audio", "unimodal-visual"):
        first, second = copied / f"toy/{name}-s0", copied / f"toy/{name}-s1"
        second.mkdir()
        for file in first.iterdir():
            (second / file.name).write_bytes(file.read_bytes())
    printed = call("evaluate.py", "--compare", copied / MMLORA, "ume", "--seeds", 0, 1,
                   "--data-root", root)
    rows = [line.split() for line in printed.splitlines() if re.match(r" +0 +\d+\.\d", line)]
    assert len(rows) == 2 and rows[0] == rows[1]
    assert f"A - B over 2 seeds, in points: {float(rows[0][3]):+.2f} +- 0.00" in printed


@pytest.mark.parametrize("words, told", [
    ("--compare {run} {other}", "no finished run"),
    ("--compare {run} ume --seeds 7", "no finished run"),
    ("--compare {run} ume --drop audio", "stands alone"),
    ("--compare {run} ume --seeds 0 0", "each seed once"),
    ("--run {run} --temperature --drop audio", "stored logits"),
    ("--compare {alone} ume", "has no step 1")])
def test_wrong_input(base, root, words, told):
    where = dict(run=base.run, other=base.run.with_name("none-s0"),
                 alone=base.run.with_name("unimodal-audio-s0"))
    assert told in error("evaluate.py", *words.format(**where).split(), "--data-root", root)


@pytest.mark.parametrize("words", ["--run {} --temperature", "--compare {} ume", "--run {} --page"])
def test_stored_logits_do_not_stand_beside_other_samples_or_models(copied, root, words):
    run, step_1 = copied / MMLORA, copied / "toy/unimodal-audio-s0/model.safetensors"
    words = (*words.format(run).split(), "--data-root", root)
    before = step_1.read_bytes()
    tensors = load_file(step_1)
    tensors["audio.head.bias"] += 1
    save_file(tensors, step_1)                            # step 1 was trained anew
    assert f"the uni-modal models of {run} have been trained anew" in error("evaluate.py", *words)
    step_1.write_bytes(before)
    call("evaluate.py", *words)
    config = json.loads((run / "config.json").read_text())
    config["fingerprint"]["data"] = "other"
    (run / "config.json").write_text(json.dumps(config))
    assert f"is not what {run} has learnt from" in error("evaluate.py", *words)
    if "--page" in words:
        printed = call("evaluate.py", "--run", run, "--data-root", root)
        assert "UME is left out" in printed and "audio alone (UMFT)" not in printed


# ---------------------------------------------------------------------------- results/
def test_tables_in_the_documents_are_those_of_the_json_files():
    for name in tables.FILES:
        text = (ROOT / name).read_text()
        assert tables.filled(text) == text, f"{name}: python -m results.tables"


@pytest.mark.parametrize("name", tables.FILES)
def test_the_text_quotes_the_tables(name):
    """A mean with its error, in the text, stands in a table of this page or of docs/toy.md."""
    text = (ROOT / name).read_text()
    made = [block[0] for page in (text, (ROOT / "docs/toy.md").read_text())
            for block in tables.BLOCK.finditer(page)]
    shown = "".join(made)
    prose = re.sub(r"```.*?```|`.*?`", "", tables.BLOCK.sub("", text), flags=re.DOTALL)
    for quoted in re.findall(r"[+-]?\d+\.\d+\s\+-\s\d+\.\d+", prose):
        number = re.escape(" ".join(quoted.split()))
        assert re.search(rf"(?<![\d.]){number}(?!\d)", shown), f"{name}: {quoted}"


def test_a_claim_is_open_where_its_difference_is_not_bold():
    """docs/toy.md. Table 8 claims that there is no difference: it is judged by an interval."""
    text = (ROOT / "docs/toy.md").read_text()
    bold, judged = "".join(block[0] for block in tables.BLOCK.finditer(text)), 0
    for line in tables.BLOCK.sub("", text).splitlines():
        for label, number in re.findall(r"(shown|refuted|open), ([+-][\d.]+ \+- [\d.]+)", line):
            if not line.startswith("| Table 8"):
                assert (f"**{number}**" in bold) == (label != "open"), line
                judged += 1
    assert judged > 50


@pytest.mark.parametrize("world", paper.TOY_LR)
def test_the_default_rates_are_those_that_were_chosen(world):
    chosen = {name: found["rate"] for name, found in study.read("rates")[world].items()}
    assert chosen["umft"] == paper.UMFT_LR["toy"]
    assert paper.TOY_LR[world] == dict(lora=chosen["mmlora"], full=chosen["full_ume"],
                                       joint=chosen["concat"])


def a_row(label, values, command="", **more):
    return dict(label=label, command=command, commits=["c"], versions={}, **more,
                seeds={str(s): dict(accuracy=v) for s, v in values.items()})


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """JSON files of one world: UME and a method that is 1, 2 and 4 points better."""
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(study, "HERE", tmp_path)
    rows = dict(ume=a_row("UME", {30: 80, 31: 81, 32: 82}),
                mmlora=a_row("MMLoRA", {30: 81, 31: 83, 32: 86}, lr=0.01, epochs="40 + 15",
                             trained=1728))
    (tmp_path / "main.json").write_text(json.dumps({"toy": rows}))
    return tmp_path


def test_a_table_is_made_of_the_json_files(measured):
    text = "before\n<!-- results: methods toy -->\nold\n<!-- end -->\nafter\n"
    made = tables.filled(text)
    assert "| MMLoRA | 83.3 +- 2.5 | +2.33 +- 0.88 | 0.12 | 0.01 | 40 + 15 | 1,728 |\n" in made
    assert "| UME | 81.0 +- 1.0 |  |  |  |  |  |\n" in made and "old" not in made
    assert made.startswith("before\n<!-- ") and made.endswith("<!-- end -->\nafter\n")
    assert tables.filled(made) == made
    with pytest.raises(ValueError, match="no table is called 'method toy'"):
        tables.filled(text.replace("methods", "method"))
    with pytest.raises(ValueError, match="nothing of toy_mimics"):
        tables.filled(text.replace("methods toy", "methods toy_mimics"))


@pytest.mark.parametrize("name", ["methods", "gains", "ablations", "sgd", "shares"])
def test_a_table_says_what_is_not_measured(measured, name):
    rows = {"concat": a_row("baseline", {30: 80}), "full_ume_gain": a_row("", {}),
            "pmr_sgd": a_row("PMR", {30: 80}), "mmlora 0.3": a_row("30 %", {30: 80})}
    for file in ("main", "ablations", "sgd", "shares"):
        (measured / f"{file}.json").write_text(json.dumps({"toy": rows}))
    with pytest.raises(ValueError, match="is not measured: python -m results.study"):
        tables.table(f"{name} toy")
    rows = {"mmlora": a_row("MMLoRA", {30: 80}), "ume": a_row("UME", {31: 80})}
    (measured / "main.json").write_text(json.dumps({"toy": rows}))
    assert tables.differences("toy").count("\n") == 2     # no pair has a seed in common


def test_a_row_keeps_its_other_seeds(measured):
    def stored(seeds, command):
        study.store("main", "toy", "mmlora_T", a_row("MMLoRA", seeds, command))
        row = study.read("main")["toy"]["mmlora_T"]
        return list(row["seeds"]), row["command"]
    assert stored({33: 90}, "a --lr 1 --seeds 33") == (["33"], "a --lr 1 --seeds 33")
    assert stored({31: 90}, "a --lr 1 --seeds 31") == (["31", "33"], "a --lr 1 --seeds 31 33")
    assert stored({32: 90}, "a --lr 3 --seeds 32") == (["32"], "a --lr 3 --seeds 32")
    assert "ume" in study.read("main")["toy"]


def test_two_studies_lose_no_row_of_each_other(measured):
    row = dict(command="", seeds={}, commits=[])
    code = ("from pathlib import Path; from results import study;"
            f" study.HERE = Path({str(measured)!r}); print(flush=True);"
            f" [study.store('main', 'toy', f'b{{i}}', {row}) for i in range(60)]")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()                               # it is there
    for i in range(60):
        study.store("main", "toy", f"a{i}", dict(row))
    assert other.wait() == 0
    other.stdout.close()
    rows = study.read("main")["toy"].keys()
    assert rows >= {f"{name}{i}" for name in "ab" for i in range(60)}
    assert not list(measured.glob(".*"))


@pytest.mark.parametrize("words, told", [
    ("--only toy:mlora", "--only toy:mlora: no row"), ("--seeds 30 31 30", "each seed once")])
def test_wrong_words_of_the_study(measured, monkeypatch, words, told):
    (measured / "rates.json").write_text(json.dumps({"toy": {"umft": dict(rate=0.001)}}))
    monkeypatch.setattr(tables, "fill", lambda: None)
    monkeypatch.setattr("sys.argv", ["study", "--worlds", "toy", *words.split()])
    with pytest.raises(ValueError, match=told):
        study.main()


@pytest.mark.parametrize("peak, tried", [
    (0.01, {0.003, 0.01, 0.03}), (0.1, {0.003, 0.01, 0.03, 0.1, 0.3}),
    (0.001, {0.0003, 0.001, 0.003, 0.01, 0.03})])
def test_the_winner_of_the_rates_has_a_worse_one_on_either_side(peak, tried):
    rate, scores = study.search(0.012, lambda rate: [-abs(math.log(rate / peak))])
    assert rate == peak and set(scores) == tried


def test_ties_and_divergence_in_the_search():
    rate, scores = study.search(0.01, lambda rate: [1.0])
    assert rate == 0.01 and len(scores) == 3
    rate, _ = study.search(0.01, lambda rate: None if rate > 0.02 else [rate])
    assert rate == 0.01
    with pytest.raises(ValueError, match="diverged at all rates: 0.003, 0.01, 0.03"):
        study.search(0.01, lambda rate: None)


def test_the_study_trains_with_the_real_scripts(base, copied, root, measured, monkeypatch):
    """One row, whose uni-modal models are there already."""
    monkeypatch.setattr(study, "MAIN", dict(mmlora=study.MAIN["mmlora"]._replace(
        words=("--lora", "all", *map(str, QUICK), "--epochs", "1"))))
    words = ("toy", ["--worlds", "toy", "--seeds", "0", "--studies", "main", "--out", str(copied),
                     "--data-root", str(root)])
    rates = {"umft": dict(rate=0.001), "mmlora": dict(rate=0.03)}
    (measured / "rates.json").write_text(json.dumps({words[0]: rates}))
    (measured / "main.json").unlink()
    monkeypatch.setattr(tables, "fill", lambda: None)
    monkeypatch.setattr("sys.argv", ["study", *words[1]])
    study.main()
    rows = study.read("main")["toy"]
    done = result(copied, "toy/mmlora-all-r1-lr0.03-s0")
    assert rows["mmlora"]["lr"] == 0.03 and rows["mmlora"]["epochs"] == f"{UMFT_EPOCHS} + 1"
    assert rows["mmlora"]["seeds"]["0"]["accuracy"] == round(
        100 * done["test"]["prob"]["accuracy"], 4)
    assert rows["ume"]["seeds"]["0"]["accuracy"] == round(
        100 * done["ume"]["test"]["prob"]["accuracy"], 4)
    assert rows["mmlora"]["command"].startswith("python train_joint.py --dataset toy --lora all")
    assert sum(points for _, points in rows["mmlora_gain"]["seeds"]["0"].values()) == pytest.approx(
        rows["mmlora"]["seeds"]["0"]["accuracy"] - rows["ume"]["seeds"]["0"]["accuracy"], abs=1e-3)
    assert "MMLoRA" in tables.methods("toy") and "one temperature" in tables.calibration("toy")
