"""The check of exercise 3."""
import torch
import torch.nn.functional as F

from lora import mean_prob_loss

Y = torch.tensor([0, 1, 2, 3, 4, 5])


def some_logits(names=("audio", "visual"), scale=3.0):
    rng = torch.Generator().manual_seed(0)
    logits = {m: scale * torch.randn(6, 8, generator=rng) for m in names}
    logits["audio"][0] = 12 * F.one_hot(torch.tensor(5), 8)       # sure, and wrong: y is 0
    logits["visual"][0] = 4 * F.one_hot(torch.tensor(0), 8)       # right
    return logits


def by_autograd(logits):
    logits = {m: z.clone().requires_grad_() for m, z in logits.items()}
    mean_prob_loss(logits, Y).backward()
    return {m: z.grad for m, z in logits.items()}


def test_responsibilities(answer):
    logits = some_logits(("audio", "visual", "text"))
    r = answer.responsibilities(logits, Y)
    assert r.keys() == logits.keys() and all(v.shape == (6,) for v in r.values()), (
        "responsibilities are a dict: modality -> (B,), a number for each sample.")
    total = sum(r.values())
    assert torch.allclose(total, torch.ones(6)), (
        f"the r_m of one sample add up to 1 over the modalities; yours to {total.tolist()}.")
    p = {m: z.softmax(-1)[range(6), Y] for m, z in logits.items()}
    assert torch.allclose(r["text"], p["text"] / sum(p.values()), atol=1e-5), (
        "r_m = P_m(y) / sum_k P_k(y): take the probability of the LABEL, not the largest one.")


def test_the_gradient_is_that_of_autograd(answer):
    for names in (("audio", "visual"), ("audio", "visual", "text")):
        logits = some_logits(names)
        wanted, found = by_autograd(logits), answer.gradient(logits, Y)
        for m in logits:
            ratio = float(found[m].norm() / wanted[m].norm())
            assert torch.allclose(found[m], wanted[m], atol=1e-6), (
                f"autograd says something else for {m}; yours is {ratio:.3g} times as long. Six"
                " times: the loss is the MEAN over six samples. r_m missing: Eq. 1's gradient. The"
                " wrong sign: it is P - onehot.")


def test_large_logits_are_no_nan(answer):
    logits = {"audio": torch.zeros(6, 8), "visual": torch.zeros(6, 8)}
    logits["audio"][:, 7], logits["visual"][:, 6] = 300, 200      # both sure, both wrong
    r = answer.responsibilities(logits, Y)
    found = answer.gradient(logits, Y)
    finite = all(v.isfinite().all() for v in [*r.values(), *found.values()])
    assert finite, ("P_m(y) is 0 in float32 for both, so P / sum P is 0/0 = nan. Take the softmax"
                    " over modalities of log P_m(y) instead.")
    assert torch.allclose(r["visual"] - r["audio"], torch.ones(6)), (
        "log P(y) is -300 and -200: the second is e^100 times as likely, so its r_m is 1,"
        " and that of audio 0.")


def test_a_sure_and_wrong_expert_learns_nothing(answer):
    logits = some_logits()
    found = answer.gradient(logits, Y)["audio"][0] * 6            # of sample 0 alone
    alone = logits["audio"][0].softmax(-1) - F.one_hot(Y[0], 8)   # under Eq. 1
    assert 0 < float(found.norm()) < 1e-4, (
        f"audio is sure and wrong about sample 0, and visual is right. Under Eq. 1 its gradient has"
        f" the length {float(alone.norm()):.2f}, under Eq. 3 it is multiplied by r_m = P_m(y) / sum"
        f" P, about 1e-5. Yours has {float(found.norm()):.2g}.")
