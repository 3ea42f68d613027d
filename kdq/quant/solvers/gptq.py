"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round a column, and let the later ones make up for it.

With ``G^-1 = U'U``, U upper triangular, the best answer of all later weights to an error e in column t is
``w_j <- w_j - e U[t, j] / U[t, t]``. It looks at the quantized network's inputs alone, C plays no part;
:mod:`kdq.quant.solvers.qronos` puts that right. O(N d^2 + d^3).

The example of :mod:`kdq.quant.solvers.gpfq`, where U[1, 2] / U[1, 1] = -G[1, 2] / G[2, 2] = -1/2 (but for the damping):

>>> alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.), levels=4)
>>> G = torch.tensor([[1., 1.], [1., 2.]])
>>> gptq(torch.tensor([[0.4, 0.4]]), G, G, alphabet)    # q_1 = Q(0.4) = 0; q_2 = Q(0.4 + 0.4 / 2) = Q(0.6)
tensor([[0., 1.]])
"""

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.columns import solve_columns
from kdq.utils.errors import KdqError

#: Added to G's diagonal, as a share of its mean, so that it can be inverted.
DAMPING = 0.01


def gptq(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Tensor:
    """Quantize with error diffusion; the arguments are those of :func:`kdq.quant.solvers.gpfq.gpfq`."""
    return diffuse(weight, gram, alphabet)


def diffuse(weight: Tensor, gram: Tensor, alphabet: Alphabet) -> Tensor:
    """Values of the alphabet near ``weight @ X~'`` for ``weight`` ``(..., N, d)`` and ``gram = X~'X~`` ``(..., d,
    d)``."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    damping = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(gram.dtype).tiny)
    damped = gram + torch.diag_embed(damping.expand_as(diagonal))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        raise KdqError("the layer's inputs are not finite, or too far apart in size for float32")
    inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed.any()):
        raise KdqError("the layer's inputs are too far apart in size for float32")
    feedback = inverse / inverse.diagonal(dim1=-2, dim2=-1)[..., None]
    return solve_columns(weight, torch.ones_like(diagonal), feedback, alphabet, carry_error=True)
