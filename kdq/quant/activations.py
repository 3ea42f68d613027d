"""Static quantization of a layer's inputs: one scale per tensor, from calibration images."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdq.quant.distributed import summed
from kdq.utils.checks import one_of

#: A histogram bin spans a factor of 2^(1/64), 1 %; bins reach from 2^-64 to 2^64, whose squares float32 holds. A range
#: is chosen from a window of them: 2^-20 to 2^20, or moved so that it holds the largest value and 12 octaves below it.
_PER_OCTAVE, _OCTAVES, _WINDOW = 64, 64, 20
#: How a range is chosen: by squared error, or as what the largest 0.01 % or 0.1 % of the values lie outside of.
RANGES = ("mse", "percentile", "percentile_99.9")
_CLIPPED = {"percentile": 1e-4, "percentile_99.9": 1e-3}


@dataclass(frozen=True)
class ActivationQuantizer:
    """Rounds a tensor to ``scale * (code - zero)``, ``code = 0 .. 2^bits - 1``; a forward pre-hook of a layer."""

    scale: float
    zero: int
    bits: int

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.nearest(inputs[0]), *inputs[1:])

    def nearest(self, values: Tensor) -> Tensor:
        """``values`` rounded, in their own dtype."""
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero, 0, 2**self.bits - 1)


def remove_hooks(layer: nn.Module, kind: type) -> None:
    """Take the forward pre-hooks of a ``kind`` off a layer."""
    hooks = layer._forward_pre_hooks
    for handle in [handle for handle, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[handle]


class Histogram:
    """Where the values of a tensor lie, summed over batches: counts by sign and logarithm of the size."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, values: Tensor) -> None:
        bins, shift = 2 * _OCTAVES * _PER_OCTAVE, (_OCTAVES - _WINDOW) * _PER_OCTAVE
        index = values.float().abs().log2_().add_(_WINDOW).mul_(_PER_OCTAVE).floor_()
        index = index.add_(shift).clamp_(-1, bins - 1).long()
        index = torch.where(values < 0, index + bins, index)[index >= 0]
        counts = torch.bincount(index, minlength=2 * bins).double()
        self.counts = counts if self.counts is None else self.counts + counts

    def quantizer(self, bits: int, choice: str = "mse") -> ActivationQuantizer:
        """The quantizer for these values: ``choice="mse"`` has the least squared error of 60 clipping points,
        ``"percentile"`` clips the largest 0.01 % of those that are not zero, ``"percentile_99.9"`` the largest 0.1 %.
        Values that are never negative, such as a ReLU's, get all codes for themselves."""
        one_of("act_range", choice, RANGES)
        assert self.counts is not None
        both = summed(self.counts).cpu().view(2, -1)
        if not both.any():
            return ActivationQuantizer(1.0, 0, bits)
        top, width = int(both.nonzero()[:, 1].max()), 2 * _WINDOW * _PER_OCTAVE
        low = min(max((_OCTAVES - _WINDOW) * _PER_OCTAVE, top + 1 - width), max(0, top - 12 * _PER_OCTAVE))
        sizes = torch.exp2((torch.arange(low, low + width).double() + 0.5) / _PER_OCTAVE - _OCTAVES)
        positive, negative = both[:, low : low + width]
        counts, zero = positive + negative, 2 ** (bits - 1) if negative.any() else 0
        largest = float(sizes[top - low])
        steps = 2**bits - 1 - zero
        if choice in _CLIPPED:
            below = counts.cumsum(0) / counts.sum()
            return ActivationQuantizer(float(sizes[int((below < 1 - _CLIPPED[choice]).sum())]) / steps, zero, bits)

        values, weights = torch.cat([sizes, -sizes]), torch.cat([positive, negative])
        tried = [ActivationQuantizer(largest / steps * 2 ** (-i / 8), zero, bits) for i in range(60)]
        return min(tried, key=lambda q: float(((q.nearest(values) - values).square() * weights).sum()))
