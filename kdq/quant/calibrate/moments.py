"""Second moments of a layer's inputs, ``G = X~'X~`` and ``C = X~'X``, without unfolding a single patch.

The rows of ``X`` are the patches a convolution multiplies with its weights, one per image and output position o, and
its columns are the patch's pixels: channel c at tap a. With stride s, dilation e and padding p they hold

    x_(c,a)[o] = x[c, r],   r = o s + a e - p,

so that the inner product of two columns is a sum over pixels r of the input,

    G[(c,a), (c',b)] = sum_r x[c, r] x[c', r + (b - a) e],

of which the taps decide two things only: the lag b - a, and which pixels r are visited, a question to a alone. Pixels
visited by the same taps form a class (for a 3x3 convolution with padding: the inside, four edges, four corners), and
each class needs one correlation of the image with itself, at every lag. That is 25 products of C x C where the unfolded
patches take 81, and 15 for G, which is symmetric. A correlation of two images is what a convolution's weight gradient
computes, so it runs at the speed of the best kernel a device has.

Complexity for m patches and a K x K kernel: O(m C^2 (2K - 1)^2) instead of O(m C^2 K^4); memory O(d^2), d = C K^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.quant.calibrate.layer import patches
from kdq.quant.distributed import summed

#: At most this many output positions per image: one matrix product per lag is faster than a weight gradient.
_FEW_POSITIONS = 16


@dataclass(frozen=True)
class _Pixels:
    """Pixels of one axis that the same taps visit: ``start, start + step, ...``, ``count`` of them, and the lags (in
    taps) at which those taps meet another tap inside the image."""

    taps: tuple[int, ...]
    start: int
    step: int
    count: int
    first_lag: int
    lags: int


@dataclass(frozen=True)
class _Geometry:
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


class Moments:
    """``X~'X`` summed over batches of images; ``X~'X~`` where the two are the same.

    Args:
        layer: a convolution or linear layer.
        symmetric: both sides will always be the same tensor; half of the work is saved.
    """

    def __init__(self, layer: nn.Module, symmetric: bool) -> None:
        self.geometry, self.mode, self.pad = _geometry(layer)
        self.symmetric = symmetric
        self._sums: dict[Any, Tensor] = {}
        #: As many zeros as a group has channels: a layer may see nothing but padding.
        self._channels = torch.empty(0)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add the patches of a batch of layer inputs: ``left`` gives the rows of the sum, ``right`` the columns."""
        if self.geometry is None:
            same = left is right
            left = left.reshape(-1, left.shape[-1])
            self._add("linear", left.mT @ (left if same else right.reshape(-1, right.shape[-1])))
            return
        left, right = (F.pad(x, self.pad, mode=self.mode) if self.pad else x for x in (left, right))
        self._channels = left.new_zeros(left.shape[1] // self.geometry.groups)
        for classes in self._classes(left.shape[2:]):
            seen = [slice(c.start, c.start + (c.count - 1) * c.step + 1, c.step) for c in classes]
            here = left[(slice(None), slice(None), *seen)]
            self._add(classes, _correlate(here, right, classes, self.geometry))

    def total(self) -> Tensor:
        """The sum so far, ``(groups, d, d)``, over all processes where torch.distributed runs."""
        return summed(self._sums["linear"][None] if self.geometry is None else self._assemble(self.geometry))

    def _classes(self, size: Sequence[int]) -> list[tuple[_Pixels, ...]]:
        g = self.geometry
        assert g is not None
        axes = [
            _pixels(*axis, self.symmetric and index == 0)
            for index, axis in enumerate(zip(size, g.kernel, g.stride, g.dilation, g.padding, strict=True))
        ]
        return list(product(*axes))

    def _add(self, key: Any, value: Tensor) -> None:
        if key in self._sums:
            self._sums[key].add_(value)
        else:
            self._sums[key] = value

    def _assemble(self, g: _Geometry) -> Tensor:
        """From correlations by class and lag to inner products by pair of taps."""
        channels, axes = len(self._channels), len(g.kernel)
        blocks = self._channels.new_zeros(*g.kernel, *g.kernel, g.groups, channels, channels)
        for classes, sums in self._sums.items():
            for a in product(*(c.taps for c in classes)):
                # Tap b is at lag b - a: along each axis, the taps that have a lag of this class.
                first = [tap + c.first_lag for tap, c in zip(a, classes, strict=True)]
                ends = [min(x + c.lags, k) for x, c, k in zip(first, classes, g.kernel, strict=True)]
                taps = tuple(slice(max(x, 0), end) for x, end in zip(first, ends, strict=True))
                lags = tuple(slice(max(-x, 0), end - x) for x, end in zip(first, ends, strict=True))
                blocks[a + taps] += sums[lags]
        if self.symmetric:
            for row in range(g.kernel[0]):
                for column in range(row):  # the pair (b, a) is that of (a, b), transposed
                    pairs = blocks[column].select(axes - 1, row)
                    order = (*range(axes - 1, 2 * axes - 2), *range(axes - 1))
                    blocks[row].select(axes - 1, column).copy_(pairs.permute(*order, -3, -2, -1).mT)
        # (*taps, *taps, groups, channels, channels) -> (groups, channels x taps, channels x taps)
        blocks = blocks.flatten(axes, 2 * axes - 1).flatten(0, axes - 1)
        return blocks.permute(2, 3, 0, 4, 1).reshape(g.groups, channels * len(blocks), -1)


class Sums(NamedTuple):
    """Moments ``(groups, d, d)`` of all images, those of the held-out ones, and how many patches these have."""

    all: Tensor
    held_out: Tensor | None
    patches: int

    def plus(self, other: Sums) -> Sums:
        """Of the images of both."""
        both = None if self.held_out is None or other.held_out is None else self.held_out + other.held_out
        return Sums(self.all + other.all, both, self.patches + other.patches)


class PartedMoments:
    """Moments of all images, and apart those of the images that are held out.

    Args:
        moments: makes :class:`Moments`, or what sums in their place.
        layer, symmetric: what it is called with.
        parted: whether any image is held out, in any process.
    """

    def __init__(
        self, moments: Callable[[nn.Module, bool], Any], layer: nn.Module, symmetric: bool, parted: bool
    ) -> None:
        self.layer, self._patches = layer, 0
        self._parts = [moments(layer, symmetric) for _ in range(1 + parted)]

    def add(self, left: Tensor, right: Tensor, held_out: bool) -> None:
        """As :meth:`Moments.add`, of images that are held out or not."""
        self._parts[held_out].add(left, right)
        if held_out:
            self._patches += patches(self.layer, left.to("meta")).shape[1]  # their number alone

    def total(self) -> Sums:
        first, *others = (part.total() for part in self._parts)
        if not others:
            return Sums(first, None, 0)
        patches = torch.tensor(float(self._patches), device=first.device)
        return Sums(first + others[0], others[0], int(summed(patches)))


def _geometry(layer: nn.Module) -> tuple[_Geometry | None, str, list[int]]:
    """How the layer's patches lie, the padding mode, and the padding to do beforehand (by modes other than zeros)."""
    if isinstance(layer, nn.Linear):
        return None, "constant", []
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    both = list(layer._reversed_padding_repeated_twice)
    padding = tuple(zip(both[::2], both[1::2], strict=True))[::-1]
    explicit = layer.padding_mode != "zeros"
    none = tuple((0, 0) for _ in padding)
    geometry = _Geometry(layer.groups, layer.kernel_size, layer.stride, layer.dilation, none if explicit else padding)
    return geometry, layer.padding_mode if explicit else "constant", both if explicit else []


@cache
def _pixels(
    size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int], forward: bool
) -> tuple[_Pixels, ...]:
    """The classes of one axis; ``forward``: without lags below zero."""
    positions = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    visits: dict[tuple[int, ...], list[int]] = {}
    for pixel in range(size):
        reached = ((tap, *divmod(pixel + padding[0] - tap * dilation, stride)) for tap in range(kernel))
        if taps := tuple(tap for tap, o, rest in reached if rest == 0 and 0 <= o < positions):
            visits.setdefault(taps, []).append(pixel)
    result = []
    for taps, pixels in visits.items():
        step = pixels[1] - pixels[0] if len(pixels) > 1 else 1
        assert pixels == list(range(pixels[0], pixels[0] + len(pixels) * step, step))
        lags = [
            lag
            for lag in range(0 if forward else -max(taps), kernel - min(taps))
            if any(0 <= pixel + lag * dilation < size for pixel in pixels)
        ]
        if lags:
            result.append(_Pixels(taps, pixels[0], step, len(pixels), lags[0], lags[-1] - lags[0] + 1))
    return tuple(result)


def _correlate(here: Tensor, image: Tensor, classes: tuple[_Pixels, ...], g: _Geometry) -> Tensor:
    """``sum_r here[c, r] image[c', r + lag]`` for every lag of the class: ``(*lags, groups, channels, channels)``.

    Args:
        here: the pixels of the class ``(batch, groups x channels, *counts)``.
        image: what they are correlated with ``(batch, groups x channels, *size)``.
    """
    # The part of the image that the lags reach, padded with zeros where they reach beyond it.
    margins: list[int] = []
    for c, size, dilation in zip(classes, image.shape[2:], g.dilation, strict=True):
        first = c.start + c.first_lag * dilation
        end = first + (c.count - 1) * c.step + (c.lags - 1) * dilation + 1
        margins = [-first, end - size, *margins]
    reach = F.pad(image, margins) if any(margins) else image
    lags = [c.lags for c in classes]
    if math.prod(c.count for c in classes) <= _FEW_POSITIONS:
        return _by_products(here, reach, classes, g)
    shape = (here.shape[1], here.shape[1] // g.groups, *lags)
    # A weight gradient's stride is the step between pixels here, its dilation the step between lags.
    gradient = torch.ops.aten.convolution_backward(
        here,
        reach,
        here.new_empty(1).expand(shape),
        None,
        [c.step for c in classes],
        [0] * len(lags),
        g.dilation,
        False,
        [0] * len(lags),
        g.groups,
        [False, True, False],
    )[1]
    return gradient.unflatten(0, (g.groups, -1)).movedim((0, 1, 2), (-3, -2, -1)).contiguous()


def _by_products(here: Tensor, reach: Tensor, classes: tuple[_Pixels, ...], g: _Geometry) -> Tensor:
    """The same as one matrix product per lag, for images of a few pixels."""
    # (groups, *positions, batch, channels): the batch is contiguous, so that a lag is a slice of pixels.
    here, reach = (x.unflatten(1, (g.groups, -1)).movedim((1, 0, 2), (0, -2, -1)).contiguous() for x in (here, reach))
    channels = here.shape[-1]
    left = here.reshape(g.groups, -1, channels).mT
    sums = left.new_empty(*(c.lags for c in classes), g.groups, channels, channels)
    for lag in product(*(range(c.lags) for c in classes)):
        window = (
            slice(i * dilation, i * dilation + (c.count - 1) * c.step + 1, c.step)
            for i, c, dilation in zip(lag, classes, g.dilation, strict=True)
        )
        torch.bmm(left, reach[(slice(None), *window)].reshape(g.groups, -1, channels), out=sums[lag])
    return sums
