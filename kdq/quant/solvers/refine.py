"""Coordinate descent on a layer's true error, from any start, with the scales refit (cf. COMQ, arXiv 2403.07134).

The error ``||X W' - X~ Q'||^2`` has in Q the gradient ``2 (Q G - W C')``, so the best value of one column while the
others stand still is

    q_t <- Q(q_t + (W C' - Q G)_t / G_tt),

and no step increases the error. One sweep visits every column once, O(N d^2). With the codes fixed, ``Q = s Z`` for a
row's scale s, the error is a parabola in s whose minimum is ``s = <Z, W C'> / <Z, Z G>``: the refit costs one product.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.columns import solve_columns


def refine(
    weight: Tensor, gram: Tensor, cross: Tensor, quantized: Tensor, alphabet: Alphabet, sweeps: int = 1
) -> tuple[Tensor, Alphabet]:
    """Improve ``quantized`` by ``sweeps`` rounds of a scale refit and a sweep over the columns, and a last refit.

    >>> alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.0), levels=4)  # -2, -1, 0, 1
    >>> weight, G = torch.tensor([[0.6, -1.2]]), torch.eye(2)
    >>> values, fitted = refine(weight, G, G, alphabet.nearest(weight), alphabet)
    >>> values  # the codes of 1 and -1, at the scale that suits them best
    tensor([[ 0.9000, -0.9000]])

    Args:
        weight, gram, cross, alphabet: as of :func:`kdq.quant.solvers.gpfq.gpfq`.
        quantized: values of the alphabet ``(..., N, d)``.

    Returns:
        The new values, and the alphabet they belong to, of the same levels with new scales.
    """
    target = weight @ cross.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    for _ in range(sweeps):
        quantized, alphabet = refit(target, gram, quantized, alphabet)
        quantized = solve_columns(target - quantized @ gram, diagonal, gram, alphabet, start=quantized)
    return refit(target, gram, quantized, alphabet)


def refit(target: Tensor, gram: Tensor, quantized: Tensor, alphabet: Alphabet) -> tuple[Tensor, Alphabet]:
    """The same codes with the scales of least error, for ``target = W C'``. A row whose best scale is not positive,
    such as one of zeros, keeps its own."""
    units = quantized / alphabet.scale
    best = (units * target).sum(-1, keepdim=True) / (units * (units @ gram)).sum(-1, keepdim=True)
    scale = torch.where(best.isfinite() & (best > 0), best, alphabet.scale)
    alphabet = replace(alphabet, scale=scale)
    return alphabet.nearest(units * scale), alphabet
