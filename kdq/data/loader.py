"""Batches from images that already lie on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdq.data.augment import Augment, Preprocess


class TrainLoader:
    """Shuffled, augmented, normalised batches ``(inputs, labels)``.

    The order and the augmentation of an epoch depend on ``(seed, epoch)`` alone. ``batch_size`` is the *global*
    batch: with several processes each takes its slice of every global batch, so that n processes see what one
    would. Each batch comes in ``portions`` parts, for the accumulation of gradients. A last incomplete batch is left
    out, as its gradient would be noisier than the others'.

    Args:
        images: uint8 ``(images, height, width, channels)`` on the device; ``labels`` int64 ``(images,)`` too.
        indices: which of them to use, int64 on the CPU.
        epoch: tells the current epoch, so that a resumed training goes on with the epoch's own order.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        preprocess: Preprocess,
        augment: Augment,
        seed: int,
        epoch: Callable[[], int],
        portions: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels, self.indices = images, labels, indices
        self.local = max(1, min(batch_size, len(indices)) // (world_size * portions))
        self.portion, self.portions = self.local * world_size, portions
        self.preprocess, self.augment = preprocess, augment
        self.seed, self.epoch, self.rank = seed, epoch, rank

    def __len__(self) -> int:
        return len(self.indices) // (self.portion * self.portions) * self.portions

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        device = self.images.device
        order = self.indices[torch.randperm(len(self.indices), generator=generator)].to(device)
        height, width = self.images.shape[1:3]
        draws = self.augment.draw(len(order), height, width, generator).to(device)
        for batch in range(len(self)):
            start = batch * self.portion + self.rank * self.local
            own = slice(start, start + self.local)
            images = self.augment(self.images[order[own]], draws[own])
            yield self.preprocess(images), self.labels[order[own]]


class EvalLoader:
    """Batches ``(inputs, labels)`` of ``indices`` in order, without augmentation.

    With several processes each takes every ``world_size``-th image: nothing is padded, so that each image counts
    exactly once.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        preprocess: Preprocess,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels = images, labels
        self.indices = indices[rank::world_size].to(images.device)
        self.batch_size, self.preprocess = batch_size, preprocess

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self.indices.split(self.batch_size):
            yield self.preprocess(self.images[chosen]), self.labels[chosen]
