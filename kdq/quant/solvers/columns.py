"""The loop all sequential solvers share: round one column after the other, and let the later ones make up for it.

Every solver keeps, for each neuron, a vector ``r`` (d) of what its weights still have to explain, and visits the
columns t in turn:

    v = start_t + r_t / divisor_t;    q_t = Q(v);    r <- r - signal F[t, :],

where ``signal`` is what the choice of ``q_t`` changes. Written for one column this touches all of ``r``, so columns go
in blocks: within a block only the block's part of ``r`` is kept up to date, and the rest gets one matrix product per
block. The cost is that of the product, O(N d^2), plus one rounding of N values per column.

Values are held in units of the scale and transposed, ``(..., d, N)``: a column of weights is contiguous memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet

#: Columns finished before the others are updated by one product.
BLOCK = 64


def solve_columns(
    residual: Tensor,
    divisor: Tensor,
    feedback: Tensor,
    alphabet: Alphabet,
    *,
    start: Tensor | None = None,
    carry_error: bool = False,
    rounding: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """Choose the columns of a quantized weight in turn.

    Args:
        residual: ``r`` before the first column ``(..., N, d)``.
        divisor: ``(..., d)``; where it is not positive the column's input is dead and ``v = start_t``.
        feedback: ``F`` ``(..., d, d)``.
        alphabet: the values allowed, per row.
        start: the weight to improve ``(..., N, d)``, whose part in ``r`` is accounted for; ``signal`` is then
            ``q_t - start_t``, and earlier columns are kept up to date as well. Zero if not given.
        carry_error: ``signal`` is the rounding error ``v - q_t``.
        rounding: codes for values between codes.

    Returns:
        Values of the alphabet ``(..., N, d)``.
    """
    dtype = alphabet.exact_dtype(residual)
    scale, zero = alphabet.scale.to(dtype).mT, alphabet.zero.to(dtype).mT
    low, high = -zero, alphabet.levels - 1 - zero
    r = (residual.to(dtype).mT / scale).contiguous()
    inverse = torch.where(divisor > 0, 1 / divisor, 0.0).to(dtype)[..., None]
    before = None if start is None else (start.to(dtype).mT / scale).contiguous()
    feedback = feedback.to(dtype)
    chosen = torch.empty_like(r)
    columns = r.shape[-2]
    for first in range(0, columns, BLOCK):
        stop = min(first + BLOCK, columns)
        rest = r[..., first:stop, :].clone()
        signals = torch.empty_like(rest)
        within = feedback[..., first:stop, first:stop, None].contiguous()
        for i in range(stop - first):
            t = first + i
            value = rest[..., i, :] * inverse[..., t, :]
            if before is not None:
                value += before[..., t, :]
            q = rounding(value + zero[..., 0, :]).sub_(zero[..., 0, :])
            q = torch.clamp(q, low[..., 0, :], high[..., 0, :], out=chosen[..., t, :])
            signal = signals[..., i, :]
            if carry_error:
                torch.sub(value, q, out=signal)
            elif before is not None:
                torch.sub(q, before[..., t, :], out=signal)
            else:
                signal.copy_(q)
            rest[..., i + 1 :, :].addcmul_(within[..., i, i + 1 :, :], signal[..., None, :], value=-1)
        if before is None:
            r[..., stop:, :] -= feedback[..., first:stop, stop:].mT @ signals
        else:
            r -= feedback[..., first:stop, :].mT @ signals
    return (chosen * scale).mT.contiguous().to(residual.dtype)
