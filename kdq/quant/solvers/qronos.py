"""Qronos (Zhang et al. 2025, arXiv 2505.11695): first correct the error of the layers before, then diffuse one's own.

The best real weight on the quantized network's inputs is a ridge projection V, with ``X~ V' ~ X W'``; the diffusion of
:mod:`~kdq.quant.solvers.gptq` then rounds V. The order of the steps is what GPFQ and GPTQ do each in their own way, one
column at a time. O(N d^2 + d^3).
"""

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.gptq import diffuse
from kdq.utils.errors import KdqError

#: lambda as a share of what bounds G's largest eigenvalue.
RIDGE = 1e-6


def qronos(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Tensor:
    """Quantize the projection of ``weight``; the arguments are those of :func:`kdq.quant.solvers.gpfq.gpfq`.

    >>> alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.0), levels=4)  # -2, -1, 0, 1
    >>> G = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    >>> qronos(torch.tensor([[0.4, 0.4]]), G, G, alphabet)  # equal inputs: GPTQ's answer
    tensor([[0., 1.]])
    """
    return diffuse(project(weight, gram, cross), gram, alphabet)


def project(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """``V = W + W (C' - G) (G + lambda I)^-1`` ``(..., N, d)``, in float64: what full precision would do in the layer's
    place. It minimises ``||X W' - X~ V'||^2 + lambda ||V - W||^2``: the paper's ``W C' (G + lambda I)^-1`` is zero, and
    this is W, in directions that no calibration image has."""
    G, W = gram.double(), weight.double()
    # The largest row sum bounds the largest eigenvalue (on real inputs it is 1.1 to 1.8 times that) and costs one pass.
    largest = G.abs().sum(-1).amax(-1)[..., None, None]
    ridge = (RIDGE * largest).clamp_min(torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(G + ridge * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device))
    if bool(failed.any()):
        raise KdqError("the layer's inputs are not finite")
    return (W + torch.cholesky_solve((cross.double() - G) @ W.mT, factor).mT).to(weight.dtype)
