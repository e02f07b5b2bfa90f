"""Exercise 2: two senses, their average and their product. C classes."""
import torch


def posterior(sign: torch.Tensor, weight: torch.Tensor, perceived: int) -> torch.Tensor:
    """P(class | a sense perceives the sign), (C,).

    sign: (C,), which call each class has (or which silhouette); weight: (C,), how frequent it is.
    """
    possible = torch.where(sign == perceived, weight.float(), 0.0)
    return possible / possible.sum()


def average(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The prediction of UME and MMLoRA, (C,)."""
    return (p + q) / 2


def product(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The product of the probabilities, normalised so that its sum is 1, (C,)."""
    return p * q / (p * q).sum()


def sure_and_wrong() -> tuple[torch.Tensor, torch.Tensor]:
    """Two distributions (3,). Class 0 is true: the average finds it, the product does not."""
    # The first is sure that it is not class 0. In the average that costs 1/2 at most.
    return torch.tensor([0.001, 0.6, 0.399]), torch.tensor([0.8, 0.1, 0.1])
