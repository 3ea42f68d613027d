"""Second moments from a random share of non-overlapping patches, as the published study took them."""

import copy

import torch
from torch import Tensor, nn

from kdq.quant.calibrate.layer import patches
from kdq.quant.distributed import summed


class SampledMoments:
    """Takes the place of :class:`~kdq.quant.calibrate.moments.Moments`: a ``share`` of the patches a kernel apart.

    It starves the solver: of 256 images of 32 x 32 pixels, the last stage of a ResNet-18 keeps 256 rows for 4 608
    columns.

    Args:
        share: of the patches, at least one.
        apart: false: at the layer's own stride, as the layer meets them.
        seed: draws them, the same for both sides and for G and C.
    """

    def __init__(
        self, layer: nn.Module, symmetric: bool, share: float = 0.25, apart: bool = True, seed: int = 0
    ) -> None:
        self.layer = layer
        if apart and isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            self.layer = copy.copy(layer)
            self.layer.stride = layer.kernel_size
        self.share, self.generator = share, torch.Generator().manual_seed(seed)
        self.sum: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        rows, columns = patches(self.layer, left), patches(self.layer, right)
        count = max(1, round(self.share * rows.shape[1]))
        drawn = torch.randperm(rows.shape[1], generator=self.generator)[:count].to(rows.device)
        value = rows[:, drawn].mT @ columns[:, drawn]
        self.sum = value if self.sum is None else self.sum.add_(value)

    def total(self) -> Tensor:
        """``(groups, d, d)``, over all processes."""
        assert self.sum is not None
        return summed(self.sum)
