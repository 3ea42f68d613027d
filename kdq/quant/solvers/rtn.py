"""Round to nearest: the floor that every other solver must beat."""

from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet


def rtn(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Tensor:
    """Every weight becomes the nearest value of the alphabet; the data (``gram``, ``cross``) plays no part.

    >>> import torch
    >>> alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.0), levels=4)  # -2, -1, 0, 1
    >>> rtn(torch.tensor([[0.4, -1.7]]), torch.eye(2), torch.eye(2), alphabet)
    tensor([[ 0., -2.]])
    """
    return alphabet.nearest(weight)
