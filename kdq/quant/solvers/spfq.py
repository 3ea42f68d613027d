"""SPFQ: GPFQ with stochastic rounding (Zhang & Saab 2023, arXiv 2309.10975).

Q rounds up or down at random with the probabilities that make it unbiased, ``E Q(v) = v`` within the alphabet's range.
The error of a layer then is bounded with high probability without assumptions on its weights. (The paper's bound is for
its two-phase form, which first aligns the data; the rounding here is on GPFQ's own path.) Every layer draws its own
noise: from the seed, and from the weights themselves.
"""

import zlib

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.gpfq import gpfq


def spfq(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet, seed: int = 0) -> Tensor:
    """GPFQ with unbiased rounding; the same ``seed`` gives the same codes on one device.

    >>> alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.0), levels=4)  # -2, -1, 0, 1
    >>> weight = torch.full((1, 1000), 0.25)
    >>> chosen = spfq(weight, torch.eye(1000), torch.eye(1000), alphabet)
    >>> chosen.unique()  # 0 or 1, and 1 a quarter of the time
    tensor([0., 1.])
    >>> abs(chosen.mean().item() - 0.25) < 0.05
    True
    """
    own = zlib.crc32(weight.detach().cpu().contiguous().numpy().tobytes(), seed)
    generator = torch.Generator(weight.device).manual_seed(own)

    def unbiased(value: Tensor) -> Tensor:
        return torch.floor(value + torch.rand(value.shape, dtype=value.dtype, device=value.device, generator=generator))

    return gpfq(weight, gram, cross, alphabet, unbiased)
