"""Augmentation of photographs: random resized crops, mirrored, colours jittered, RandAugment; on the images' device."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from kdq.utils.errors import KdqError

#: What the eye makes of red, green and blue (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ResizedCrop:
    """A rectangle of random area and shape of each image, scaled to ``size`` x ``size`` pixels and mirrored with
    probability one half (Szegedy et al. 2015, arXiv 1409.4842), its colours jittered.

    Args:
        size: pixels of what the network sees; for evaluation, these of the centre.
        scale: the smallest share of the image's area.
        ratio: the largest width over height, and height over width.
        jitter: how far brightness, contrast and saturation, in this order, are drawn from their own: each is times a
            number between ``1 - jitter`` and ``1 + jitter``.

    >>> crop, images = ResizedCrop(size=24), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> crop(images, crop.draw(2, 32, 32, torch.Generator())).shape
    torch.Size([2, 24, 24, 3])

    Raises:
        KdqError: an argument is out of its range.
    """

    size: int = 224
    scale: float = 0.08
    ratio: float = 4 / 3
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not (self.size > 0 and 0 < self.scale <= 1 <= self.ratio and 0 <= self.jitter < 1):
            raise KdqError(f"data.augment={self}: size > 0, 0 < scale <= 1 <= ratio, 0 <= jitter < 1")

    def draw(self, count: int, height: Any, width: Any, generator: torch.Generator) -> Tensor:
        """``(count, 8)`` float32: top, left, height and width of the rectangle, 1 where it is mirrored, and the factors
        of brightness, contrast and saturation. A rectangle that is longer than the image ends with it."""
        uniform = torch.rand(count, 8, generator=generator)
        area = height * width * (self.scale + (1 - self.scale) * uniform[:, 0])
        ratio = torch.exp(math.log(self.ratio) * (2 * uniform[:, 1] - 1))
        whole = [torch.as_tensor(side, dtype=torch.float32) for side in (height, width)]
        sides = [(area / ratio).sqrt().round(), (area * ratio).sqrt().round()]
        sides = [part.clamp(min=1).minimum(side) for part, side in zip(sides, whole, strict=True)]
        rest = [(side + 1 - part) for side, part in zip(whole, sides, strict=True)]
        starts = [(drawn * left).floor() for drawn, left in zip(uniform[:, 2:4].T, rest, strict=True)]
        factors = 1 + self.jitter * (2 * uniform[:, 5:] - 1)
        return torch.stack([*starts, *sides, uniform[:, 4].round(), *factors.T], dim=1)

    def __call__(self, images: Tensor | list[Tensor], draws: Tensor) -> Tensor:
        """uint8 ``(batch, height, width, channels)``, or a list of images of their own sizes, by ``draws``
        ``(batch, 8)``, to ``size`` x ``size`` pixels."""
        device, channels = images[0].device, images[0].shape[-1]
        cut = torch.empty(len(images), self.size, self.size, channels, dtype=torch.uint8, device=device)
        for image, drawn, target in zip(images, draws.tolist(), cut, strict=True):
            top, left, height, width, mirrored = map(int, drawn[:5])
            part = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
            # Of whole numbers there is a kernel for CPUs alone, and it is ten times as fast there.
            part = part if device.type == "cpu" else part.float()
            scaled = F.interpolate(part, size=(self.size, self.size), mode="bilinear", antialias=True)[0].round()
            scaled = scaled.flip(2) if mirrored else scaled
            target.copy_((_jittered(scaled, *drawn[5:]) if self.jitter else scaled).permute(1, 2, 0))
        return cut


@dataclass(frozen=True)
class RandAugment(ResizedCrop):
    """:class:`ResizedCrop`, then for each image ``ops`` of RandAugment's 14 operations (Cubuk et al. 2019, arXiv
    1909.13719), torchvision's, each of which is drawn for it alone.

    Args:
        ops: operations, one after the other.
        magnitude: how strong they are, from 0 to 30.

    >>> augment, images = RandAugment(size=24), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    >>> augment(images, augment.draw(2, 32, 32, torch.Generator())).shape
    torch.Size([2, 24, 24, 3])
    """

    ops: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ops < 0 or not 0 <= self.magnitude <= 30:
            raise KdqError(f"data.augment={self}: ops >= 0, magnitude from 0 to 30")

    def draw(self, count: int, height: Any, width: Any, generator: torch.Generator) -> Tensor:
        """``(count, 9)``: those of :class:`ResizedCrop`, and a seed for what torchvision draws itself."""
        crops = super().draw(count, height, width, generator)
        return torch.cat([crops, torch.randint(2**24, (count, 1), generator=generator).float()], dim=1)

    def __call__(self, images: Tensor | list[Tensor], draws: Tensor) -> Tensor:
        cut = super().__call__(images, draws[:, :8])
        operations = v2.RandAugment(self.ops, self.magnitude)
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(cut, draws[:, 8].long().tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                image.copy_(operations(image.permute(2, 0, 1)).permute(1, 2, 0))
        return cut


def _jittered(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """``image`` ``(channels, height, width)``, values 0 to 255, brightened, contrasted and saturated by these factors.
    Values are rounded, and cut to 0..255, once, at the end. One image at a time: it fits a processor's cache."""
    planes = image.contiguous().float()
    weights = GREY if len(planes) == 3 else (1 / len(planes),) * len(planes)
    grey = torch.zeros_like(planes[0])
    for plane, weight in zip(planes, weights, strict=True):
        grey.add_(plane, alpha=weight)
    # Contrast moves colours from the image's mean grey, saturation from each pixel's own.
    shift = (1 - contrast) * brightness * grey.mean()
    grey.mul_(brightness * contrast * (1 - saturation)).add_(shift)
    return planes.mul_(brightness * contrast * saturation).add_(grey).round_().clamp_(0, 255)
