"""Weights with BatchNorm folded into them as INT8 codes.

In eval mode BatchNorm multiplies each channel by a factor and adds a shift; so does the scale of a quantized weight.
Hence the few levels of a low-bit weight survive folding exactly: the codes stay, and the channel's scale takes the
factor. A negative factor turns the codes' sign; a zero that lies half-way between two codes doubles the codes and
halves the scale. A whole number may multiply all codes of a channel, and divide its scale, as long as they fit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdq.quant.packing.packed import QuantizedWeight

#: Few levels are spread over codes up to this, so that biases, whose step is the product of the input's and the
#: weight's scale, have fine steps too. Pairs of products with UINT8 inputs still fit INT16, in which CPUs without VNNI
#: add them.
FINE = 63
#: Largest code of a bias of a layer with INT8 inputs, whose codes are INT32.
_BIAS_CODES = 2**30


@dataclass(frozen=True)
class Int8Weight:
    """A weight as ``scale * codes`` per output channel. Those that are ``exact`` have the values of the weight that it
    was made from, and not the nearest of 255 levels."""

    codes: Tensor  # int8, in the weight's shape
    scale: Tensor  # float32, positive, (out_channels,)
    exact: Tensor  # bool, (out_channels,)


def int8_weight(
    weight: Tensor, coded: QuantizedWeight | None, factor: Tensor | None, bias: Tensor | None, input_scale: float
) -> Int8Weight:
    """The folded ``weight`` in INT8.

    Channels whose codes fit INT8 keep them: all alphabets of up to seven bits, and those of eight with zero in the
    middle and a factor that is not negative. The others, wider weights and float ones are rounded to the nearest of 255
    evenly spaced values up to the channel's largest, which is what eight bits can do.

    Args:
        weight: ``(out_channels, ...)``, folded.
        coded: the codes the unfolded weight was made from; None for a float weight.
        factor: what it was multiplied with, ``(out_channels,)``; None for nothing.
        bias: the folded layer's; its codes, in steps of ``input_scale`` times the weight's scale, must fit INT32.
    """
    rows = weight.double().flatten(1)
    least = torch.full_like(rows[:, 0], torch.finfo(torch.float32).tiny)
    if bias is not None:
        least = torch.maximum(least, bias.double().abs() / input_scale / _BIAS_CODES)
    scale = torch.maximum(rows.abs().amax(1) / 127, least)
    codes, exact = torch.round(rows / scale[:, None]), torch.zeros(len(rows), dtype=torch.bool)
    if coded is not None:
        factor = torch.ones_like(scale) if factor is None else factor.double()
        zero = coded.zero.double()
        steps = torch.where(zero == zero.round(), 1.0, 2.0)
        own = (coded.codes.flatten(1).double() - zero[:, None]) * (steps * factor.sign())[:, None]
        own_scale = coded.scale.double() * factor.abs() / steps
        finer = (FINE / own.abs().amax(1).clamp_min(1)).floor().clamp_min(1)
        own, own_scale = own * finer[:, None], own_scale / finer
        exact = ((own >= -128) & (own <= 127) & (own == own.round())).all(1) & (own_scale >= least)
        codes, scale = torch.where(exact[:, None], own, codes), torch.where(exact, own_scale, scale)
    return Int8Weight(codes.to(torch.int8).view(weight.shape), scale.float(), exact)
