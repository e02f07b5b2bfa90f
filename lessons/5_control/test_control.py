"""The check of exercise 5. Its accuracies are what the commands of its README print."""
import torch
import torch.nn.functional as F

from lora import mean_prob_loss

MMLORA, SEPARATE = [91.3, 91.6, 91.2], [88.9, 88.0, 89.8]
Y = torch.tensor([0, 1])


def two_models():
    """Audio is sure and wrong about sample 0; visual is right about both."""
    audio, visual = 9 * F.one_hot(torch.tensor([3, 1]), 4), 3 * F.one_hot(Y, 4)
    return {"audio": audio.float().requires_grad_(), "visual": visual.float().requires_grad_()}


def test_the_loss_is_that_of_each_alone(answer):
    logits = two_models()
    found = float(answer.loss(logits, Y).detach())
    wanted = sum(float(F.cross_entropy(z.detach(), Y)) for z in logits.values()) / 2
    eq_3 = float(mean_prob_loss(logits, Y).detach())
    assert abs(found - wanted) < 1e-5, (
        f"the mean of the two cross-entropies is {wanted:.4f}; yours is {found:.4f}. Twice as much:"
        f" divide by the number of modalities. {eq_3:.4f}: that is Eq. 3, which is to be replaced.")


def test_each_learns_as_if_alone(answer):
    logits = two_models()
    loss = answer.loss(logits, Y)
    assert loss.requires_grad, (
        "nothing can be trained on this loss: it has no gradient, since it does not use the"
        " logits.")
    loss.backward()
    wrong = float(logits["audio"].grad[0].norm())
    assert abs(wrong - 0.353) < 0.01, (
        f"audio's gradient for the sample where it is sure and wrong has the length {wrong:.4f}."
        " Under separate losses it is 1.41 / 2 modalities / 2 samples = 0.353. Much smaller: the"
        " other model still excuses it, as in Eq. 3.")


def test_paired_error(answer):
    mean, error = answer.paired(MMLORA, SEPARATE)
    assert abs(mean - 2.467) < 0.001, (
        f"the mean of the differences 2.4, 3.6 and 1.4 is 2.467; yours is {mean:.3f}.")
    assert abs(error - 0.636) < 0.001, (
        f"the standard error of this mean is 0.636; yours is {error:.3f}. 1.102: the deviation of"
        " the differences, not yet divided by the root of 3. 0.519: a deviation that divides by n"
        " and not by n - 1. 0.533: the errors of both methods added, without pairs.")
