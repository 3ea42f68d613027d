"""Round to nearest: the floor that every other solver must beat."""

from __future__ import annotations

from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet


def rtn(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Tensor:
    """Every weight becomes the nearest value of the alphabet; the data (``gram``, ``cross``) plays no part."""
    return alphabet.nearest(weight)
