"""Exercise 2: two senses, their average and their product. C classes."""
import torch


def posterior(sign: torch.Tensor, weight: torch.Tensor, perceived: int) -> torch.Tensor:
    """P(class | a sense perceives the sign), (C,).

    sign: (C,), which call each class has (or which silhouette); weight: (C,), how frequent it is.
    """
    return torch.full((len(sign),), 1 / len(sign))      # your turn


def average(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The prediction of UME and MMLoRA, (C,)."""
    return torch.full((len(p),), 1 / len(p))            # your turn


def product(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The product of the probabilities, normalised so that its sum is 1, (C,)."""
    return torch.full((len(p),), 1 / len(p))            # your turn


def sure_and_wrong() -> tuple[torch.Tensor, torch.Tensor]:
    """Two distributions (3,). Class 0 is true: the average finds it, the product does not."""
    return torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 0, 0])       # your turn
