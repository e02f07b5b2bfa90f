"""Is one method better than another? Paired comparisons of predictions on the same samples.

One seed: McNemar's exact test, on the samples that exactly one of two models gets right. Several
seeds: Student's t of the differences. A seed of a toy is a new world, so only the second says that
a method is better on such worlds.
"""
import math

import torch


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test.

    only_a, only_b: how many samples only the first, only the second model gets right. If both are
    equally good, each such sample is a fair coin.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2 ** n)


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| > |t|) for Student's t with so many degrees of freedom, an integer of 1 or more.

    The finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    cos2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cos2
        total += term
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + inside)
    return max(0.0, 1 - inside)


def paired(differences: list[float]) -> dict:
    """Of one difference a seed: n, mean, standard error of the mean, t, p.

    With one seed there is no error: se, t and p are None. If all differences are equal, t is None,
    and p is 0, or 1 where they are all zero.
    """
    n = len(differences)
    mean = sum(differences) / n
    found = dict(n=n, mean=mean, se=None, t=None, p=None)
    if n == 1:
        return found
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    se = math.sqrt(variance / n)
    if se == 0:
        return dict(found, se=se, p=0.0 if mean else 1.0)
    return dict(found, se=se, t=mean / se, p=two_sided_p(mean / se, n - 1))


def table(right_a: torch.Tensor, right_b: torch.Tensor) -> dict:
    """Counts of bool (N,): both right, only a, only b, neither; and McNemar's p."""
    counts = dict(both=int((right_a & right_b).sum()), only_a=int((right_a & ~right_b).sum()),
                  only_b=int((right_b & ~right_a).sum()), neither=int((~right_a & ~right_b).sum()))
    return dict(counts, p=mcnemar(counts["only_a"], counts["only_b"]))


def gain_by_experts(right_a: torch.Tensor, right_b: torch.Tensor, experts: list) -> dict:
    """Where a - b comes from: samples on which all, some, or none of the experts are right.

    experts: bool (N,) of each modality alone. -> group -> (share of the samples, points of a - b),
    both in %; the points of all groups add up to the difference of the accuracies.
    """
    count = torch.stack(experts).sum(0)
    groups = dict(all=count == len(experts), some=(count > 0) & (count < len(experts)),
                  none=count == 0)
    gain, found = right_a.double() - right_b.double(), {}
    for name, members in groups.items():
        share = 100 * float(members.double().mean())
        found[name] = (share, 100 * float((gain * members).mean()))
    return found
