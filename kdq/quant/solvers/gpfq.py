"""GPFQ, greedy path-following quantization, from second moments.

Papers: Lybrand & Saab 2021 (arXiv 2010.15979), Zhang, Zhou & Saab 2023 (arXiv 2201.11113).

A neuron has weights ``w`` (d). ``X`` (m x d) holds its inputs in the float network, ``X~`` the inputs in the network
whose earlier layers are already quantized; ``x_t`` and ``x~_t`` are columns. The recursion quantizes one weight after
the other and carries the error ``u`` (m) made so far:

    u <- u + w_t x_t;    q_t = Q(<x~_t, u> / ||x~_t||^2);    u <- u - q_t x~_t.

Unrolled, ``u`` before step t's rounding is ``sum_{j<=t} w_j x_j - sum_{j<t} q_j x~_j``, and only its inner product
with ``x~_t`` is used. With ``G = X~'X~`` and ``C = X~'X`` (both d x d)

    q_t = Q((sum_{j<=t} w_j C[t,j] - sum_{j<t} q_j G[t,j]) / G[t,t]),

so the images enter through G and C alone: sums over batches, of a size that does not depend on their number.

Complexity for N neurons: O(N d^2) and one rounding per column, against O(N m d) memory traffic for the recursion with
m >> d rows. The first sum is one matrix product before the loop; the second is subtracted for the rest of a block of
columns after each rounding, and for all later columns by one product after each block.

The float32 sums here are rounded in another order than the recursion's, by about 1e-6 of a value. A code differs from
the recursion's only where a value lies that close to the middle between two levels, which is a tie.

A worked example: one neuron, two inputs, levels -2 .. 1 (2 bits, scale 1), and X~ = X, so C = G.

>>> import torch
>>> X = torch.tensor([[1., 1.], [0., 1.]])
>>> G = X.T @ X                                     # [[1, 1], [1, 2]]
>>> w = torch.tensor([[0.4, 0.4]])
>>> alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.), levels=4)
>>> alphabet.nearest(w)                             # rounding alone loses everything
tensor([[0., 0.]])
>>> gpfq(w, G, G, alphabet)                         # q_1 = Q(0.4) = 0; q_2 = Q((0.4 * 1 + 0.4 * 2 - 0) / 2) = Q(0.6)
tensor([[0., 1.]])
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.columns import solve_columns


def gpfq(
    weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet, rounding: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """Quantize the rows of ``weight`` along the path of its columns.

    Leading dimensions are independent problems (the groups of a convolution).

    Args:
        weight: ``W`` ``(..., N, d)``.
        gram: ``G = X~'X~`` ``(..., d, d)``, the inputs of the quantized network.
        cross: ``C = X~'X`` ``(..., d, d)``, row t belonging to ``x~_t``; equal to ``gram`` for the first layer.
        alphabet: the values allowed, per row.
        rounding: codes for values between codes, the Q of the recursion.

    Returns:
        Values of the alphabet ``(..., N, d)``. A column whose input is always zero becomes ``Q(0)``, which is 0 for
        an alphabet that holds 0.
    """
    numerator = weight @ cross.tril().mT
    return solve_columns(numerator, gram.diagonal(dim1=-2, dim2=-1), gram, alphabet, rounding=rounding)
