"""The check of exercise 2."""
import torch

from prepare import toy

WORLD = toy.WORLDS["toy_mimics"]
WEIGHT = torch.tensor(WORLD["weight"])
CALL = torch.tensor([*range(8), *(caller for caller, _ in WORLD["mimics"])])
SHAPE = torch.tensor([*range(8), *(lookalike for _, lookalike in WORLD["mimics"])])


def heard_and_seen(answer):
    return answer.posterior(CALL, WEIGHT, 0), answer.posterior(SHAPE, WEIGHT, 3)


def told(p):
    values = {k: round(float(v), 3) for k, v in enumerate(p) if v > 0}
    assert abs(float(p.sum()) - 1) < 1e-5, f"the probabilities {values} do not add up to 1."
    return f"yours says {values}"


def test_the_posterior(answer):
    for sign, perceived in ((CALL, 0), (SHAPE, 3), (CALL, 5)):
        p = answer.posterior(sign, WEIGHT, perceived)
        yours = told(p)
        silent = sign != perceived
        assert not p[silent].any(), (
            f"{yours}. Only classes with this call are possible; all others have probability 0.")
        assert torch.allclose(p[~silent], WEIGHT[~silent] / WEIGHT[~silent].sum()), (
            f"{yours}. Among the classes with this call P is proportional to how frequent each"
            " class is: creature 0 with 2/4, its mimics with 1/4 each.")


def test_the_average_ties(answer):
    p = answer.average(*heard_and_seen(answer))
    yours = told(p)
    tied = sorted(float(v) for v in p)[-3:]
    assert torch.allclose(torch.tensor(tied), torch.tensor(0.25)), (
        f"{yours}, but in the average 0, 3 and 9 are tied at 1/4: the ear gives the mimic 1/4 and"
        " creature 0 1/2, the eye gives the mimic 1/4 and creature 3 1/2.")


def test_the_product_finds_the_mimic(answer):
    p = answer.product(*heard_and_seen(answer))
    yours = told(p)
    assert torch.allclose(p, torch.eye(12)[9]), (
        f"{yours}. A product is zero where one factor is zero: only class 9 has this call AND this"
        " silhouette, so it has probability 1.")


def test_a_sure_and_wrong_sense_ruins_the_product(answer):
    p, q = answer.sure_and_wrong()
    for one in (p, q):
        assert one.shape == (3,) and (one >= 0).all() and abs(float(one.sum()) - 1) < 1e-5, (
            f"{one.tolist()} is no distribution over three classes.")
    average, product = (p + q) / 2, p * q
    assert average.argmax() == 0, (
        f"the average {average.tolist()} does not choose class 0: the right sense must be surer of"
        " class 0 than both together are of any other class.")
    assert product.argmax() != 0, (
        f"the product {product.tolist()} still chooses class 0. Make one sense sure that it is NOT"
        " class 0: near 0 there, and spread over the others.")
