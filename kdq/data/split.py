"""Train, validation and calibration images, all from the training set, chosen by a recorded seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class Split:
    """Index tensors into the training set: ``train`` and ``val`` are disjoint, int64."""

    train: Tensor
    val: Tensor

    def calibration(self, count: int, seed: int) -> Tensor:
        """``count`` of the training images (all, when there are fewer), drawn by ``seed``, in a fixed order.

        They come from the part the network was trained on: validation images stay unseen by the quantizer, so
        that they can choose between quantized networks.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train[order[:count]]


def split(images: int, val_fraction: float, seed: int, train_limit: int | None = None) -> Split:
    """Divide ``images`` training images: ``val_fraction`` of them to validation, the rest to training, of which
    at most ``train_limit`` are kept.

    >>> found = split(1000, val_fraction=0.1, seed=0, train_limit=500)
    >>> len(found.train), len(found.val), len(found.calibration(256, seed=0))
    (500, 100, 256)
    """
    if not 0 < val_fraction < 1:
        raise KdqError(f"data.val_fraction={val_fraction} must lie between 0 and 1: models are selected on validation")
    val = round(images * val_fraction)
    if not 0 < val < images:
        raise KdqError(f"data.val_fraction={val_fraction} of {images} images leaves a part empty")
    if train_limit is not None and train_limit < 1:
        raise KdqError(f"data.train_limit={train_limit} must be at least 1")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return Split(train=order[val:][:train_limit], val=order[:val])
