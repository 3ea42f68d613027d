"""Normalisation and per-sample augmentation as batched tensor operations on whatever device holds the images.

torchvision's v2 transforms draw once per *batch*; here every image has its own draw. The draws of an epoch are
made at once on the CPU from one seed, so they are the same on every device and for every number of processes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class Preprocess:
    """``(pixel / 255 - mean) / std`` per channel, of the ``crop`` x ``crop`` pixels in the centre where that is given.

    >>> Preprocess(mean=(0.5,), std=(0.5,))(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
    1.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``(batch, height, width, channels)`` to float32 ``(batch, channels, height, width)``, stored
        channels-last, the layout convolutions run fastest in."""
        if self.crop is not None:
            top, left = ((side - self.crop) // 2 for side in images.shape[1:3])
            images = images[:, top : top + self.crop, left : left + self.crop]
        scale, shift = _placed(self, images.device)
        return images.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _placed(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """``1 / (255 std)`` and ``mean / std`` on the device: copied there once, for a copy waits for the device."""
    mean, scale = torch.tensor(preprocess.mean), 1 / torch.tensor(preprocess.std)
    return (scale / 255).to(device), (mean * scale).to(device)


@lru_cache(maxsize=16)
def _filling(fill: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(fill, dtype=torch.uint8).to(device)


class Augmentation(Protocol):
    """What changes each training image in its own way; uint8 in and out."""

    def draw(self, count: int, height: Any, width: Any, generator: torch.Generator) -> Tensor:
        """What is drawn for ``count`` images of this size, or of sizes ``(count,)``: a row for each."""

    def __call__(self, images: Any, draws: Tensor) -> Tensor:
        """``images`` ``(batch, height, width, channels)``, or a list of images of their own sizes, changed by their
        rows of ``draws``."""


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding by ``pad`` pixels, horizontal flip with probability one half, and a square of
    ``cutout`` pixels that is ``fill``, the mean of each channel, which normalisation makes zero (DeVries & Taylor 2017,
    arXiv 1708.04552).

    >>> augment = Augment(pad=4, flip=True)
    >>> images, generator = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.Generator()
    >>> augment(images, augment.draw(2, 32, 32, generator)).shape
    torch.Size([2, 32, 32, 3])
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0
    fill: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises KdqError for a negative number of pixels."""
        for name in ("pad", "cutout"):
            if getattr(self, name) < 0:
                raise KdqError(f"data.augment.{name}={getattr(self, name)} must be 0 or more")

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """``(count, 5)`` int64: crop row, crop column, flip, cutout row, cutout column of every image."""
        highs = (2 * self.pad + 1, 2 * self.pad + 1, 2, height, width)
        return torch.stack([torch.randint(high, (count,), generator=generator) for high in highs], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment uint8 ``(batch, height, width, channels)`` by ``draws`` ``(batch, 5)``; returns a new tensor."""
        batch, height, width, _ = images.shape
        top, left, flip, cut_row, cut_column = draws.T[:, :, None]
        which, y, x = (torch.arange(count, device=images.device) for count in (batch, height, width))
        rows, columns = y.expand(batch, -1), x.expand(batch, -1)
        if self.flip:
            columns = torch.where(flip == 1, width - 1 - x, x)
        if self.pad:
            images = F.pad(images, (0, 0, self.pad, self.pad, self.pad, self.pad))
            rows, columns = rows + top, columns + left
        images = images[which[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self.cutout:
            down, across = y - cut_row + self.cutout // 2, x - cut_column + self.cutout // 2
            inside_rows, inside_columns = ((place >= 0) & (place < self.cutout) for place in (down, across))
            hole = (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
            images = torch.where(hole, _filling(self.fill or (0,), images.device), images)
        return images
