"""Judging a layer's solution on calibration images that it was not fitted to.

The weight that full precision would have on the quantized network's inputs is ``W + D`` with the correction
``D = W (C' - G)(G + lambda I)^-1`` (see :mod:`kdq.quant.solvers.qronos`). Where a layer has many columns for its
patches, D fits their noise. With the moments of held-out images the error of a part of it,
``||X W' - X~ (W + gamma D)'||^2``, is a parabola in gamma with its minimum at

    gamma = <D, W (C' - G)> / <D, D G>,

cut to 0 and 1: as much of the correction as holds elsewhere (a closed-form shrinkage as in CoreQ, arXiv 2602.05902). A
share gamma of D is what moments with ``G + gamma (C - G)`` in place of C lead to, whatever the solver.

Where there are few patches for the columns, the weights themselves say more of what the layer does elsewhere:
several ridges are tried, and plain rounding, and the one of least held-out error is taken. It is not fitted to the
held-out images afterwards, as other layers are: to the layers behind it they would no longer be images that nothing was
fitted to. (timm's tinynet_a with random weights, 4 bits, 32 images of 64 pixels: the error on other images is 0.84 so;
1.60 where few are fewer than the columns, 0.92 of plain rounding.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdq.quant.solvers.qronos import project

#: One chunk of calibration images in so many is held out.
PARTS = 4
#: Patches for a column, of all images, below which a layer has few.
FEW = 16
#: Ridges tried where there are few patches, as multiples of the preset's.
RIDGES = (1, 10, 100)


class HeldOut(NamedTuple):
    """Moments ``X~'X~`` and ``X~'X`` ``(groups, d, d)`` of held-out images, and how many patches they have."""

    gram: Tensor
    cross: Tensor
    patches: int

    @property
    def few(self) -> bool:
        """Whether the layer has less than :data:`FEW` patches for each of its columns."""
        return PARTS * self.patches < FEW * self.gram.shape[-1]


def trusted(weight: Tensor, gram: Tensor, cross: Tensor, held_out: HeldOut) -> Tensor:
    """The share gamma of a layer's correction, a number from 0 to 1.

    >>> W, G, C = torch.tensor([[[1.0, 1.0]]]), torch.eye(2)[None], 2 * torch.eye(2)[None]
    >>> trusted(W, G, C, HeldOut(G, 1.5 * G, patches=2))  # C asks for W more, held-out images for half of it
    tensor(0.5000)

    Args:
        weight: ``(groups, N, d)``.
        gram, cross: of the images that the correction is fitted to ``(groups, d, d)``.
    """
    if torch.equal(held_out.gram, held_out.cross):
        return weight.new_ones(())
    correction = project(weight, gram, cross) - weight
    size = (correction @ held_out.gram * correction).sum()
    share = (correction * (weight @ (held_out.cross.mT - held_out.gram))).sum() / size
    return share.clamp(0, 1) if size > 0 else torch.zeros_like(size)


def output_error(weight: Tensor, quantized: Tensor, held_out: HeldOut) -> Tensor:
    """``||X W' - X~ Q'||^2`` of all rows together, but for what does not depend on Q."""
    return (quantized * (quantized @ held_out.gram - 2 * weight @ held_out.cross.mT)).sum()
