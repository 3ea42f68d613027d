"""Images with a rectangle of another's pixels (CutMix: Yun et al. 2019, arXiv 1905.04899)."""

import torch
from torch import Tensor

from kdq.distill.mixup import neighbours, sent
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError


def draw(count: int, seed: int, progress: TrainingProgress) -> Tensor:
    """Boxes of this process's ``count`` images for :func:`cutmix`, whose areas are drawn evenly from 0 to 1."""
    drawn = progress.random(seed).random((count * progress.world_size, 3))
    drawn[:, 2] **= 0.5
    return torch.from_numpy(drawn[progress.rank * count :][:count]).float()


def cutmix(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Each image with its neighbour's pixels inside its box, and the share of its own pixels that it keeps, ``(n,)``.

    >>> images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    >>> mixed, share = cutmix(images, torch.full((2, 3), 0.5))
    >>> mixed[0, 0].tolist()  # a quarter of the first image is the second's
    [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

    Args:
        images: ``(n, c, h, w)``; neighbours are those of :func:`kdq.distill.mixup.neighbours`.
        boxes: ``(n, 3)``, the centre, down and across, and the side, as shares of the image's. A pixel is inside where
            its centre is.

    Raises:
        KdqError: the images have another shape.
    """
    if images.ndim != 4:
        raise KdqError(f"cutmix is of images (n, channels, height, width), not of {tuple(images.shape)}: leave it out")
    down, across, side = sent(boxes, images.device).unsqueeze(-1).unbind(1)
    rows, columns = (torch.arange(0.5, size, device=images.device) / size for size in images.shape[-2:])
    inside = ((rows - down).abs() < side / 2)[:, :, None] & ((columns - across).abs() < side / 2)[:, None]
    mixed = torch.where(inside[:, None], images[neighbours(len(images), images.device)], images)
    return mixed, 1 - inside.float().mean((1, 2))
