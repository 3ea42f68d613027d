"""SPFQ: GPFQ with stochastic rounding (Zhang & Saab 2023, arXiv 2309.10975).

Q rounds up or down at random with the probabilities that make it unbiased, ``E Q(v) = v`` within the alphabet's range.
The error of a layer then is bounded with high probability without assumptions on its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdq.quant.alphabet import Alphabet
from kdq.quant.columns import solve_columns


def spfq(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet, seed: int = 0) -> Tensor:
    """:func:`kdq.quant.gpfq.gpfq` with unbiased rounding; the same ``seed`` gives the same codes on one device."""
    generator = torch.Generator(weight.device).manual_seed(seed)

    def unbiased(value: Tensor) -> Tensor:
        return torch.floor(value + torch.rand(value.shape, dtype=value.dtype, device=value.device, generator=generator))

    numerator = weight @ cross.tril().mT
    return solve_columns(numerator, gram.diagonal(dim1=-2, dim2=-1), gram, alphabet, rounding=unbiased)
