"""Batches on the training device: shuffled and augmented for training, in order for evaluation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdq.data.augment import Augmentation, Preprocess
from kdq.data.source import Source
from kdq.utils.errors import KdqError


class TrainLoader:
    """Shuffled, augmented, normalised batches ``(inputs, labels)``, or ``(inputs, labels, places in indices)``.

    The order and the augmentation of an epoch depend on ``(seed, epoch)`` alone. ``batch_size`` is the *global*
    batch: with several processes each takes its slice of every global batch, so that n processes see what one
    would. Each batch comes in ``portions`` parts, for the accumulation of gradients. A last incomplete batch is left
    out, as its gradient would be noisier than the others'.

    Args:
        source: gives the raw images.
        indices: which of them to use, int64 on the CPU.
        epoch: tells the current epoch, so that a resumed training goes on with the epoch's own order.
        indexed: whether batches say which images they hold.
    """

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        batch_size: int,
        *,
        preprocess: Preprocess,
        augment: Augmentation,
        seed: int,
        epoch: Callable[[], int],
        portions: int = 1,
        rank: int = 0,
        world_size: int = 1,
        indexed: bool = False,
    ) -> None:
        self.source, self.indices, self.indexed = source, indices, indexed
        self.local = max(1, min(batch_size, len(indices)) // (world_size * portions))
        self.portion, self.portions = self.local * world_size, portions
        self.preprocess, self.augment = preprocess, augment
        self.seed, self.epoch, self.rank = seed, epoch, rank
        if len(indices) and not len(self):
            raise KdqError(
                f"{len(indices)} training images are too few for {world_size} devices x {portions} portions: lower "
                "recipe.accumulate or trainer.devices"
            )

    def __len__(self) -> int:
        return len(self.indices) // (self.portion * self.portions) * self.portions

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(len(self.indices), generator=generator)
        draws = self.augment.draw(len(order), *self.source.size(self.indices[order]), generator)
        places = self._own(order)
        own = (values.to(self.source.device).split(self.local) for values in (self._own(draws), places))
        batches = self.source.batches(self.indices[places], self.local, whole=True)
        for (images, labels), drawn, place in zip(batches, *own, strict=True):
            inputs = self.preprocess(self.augment(images, drawn))
            yield (inputs, labels, place) if self.indexed else (inputs, labels)

    def _own(self, values: Tensor) -> Tensor:
        """What of an epoch's ``values`` (one for each image) is this process's: a slice of every batch."""
        parts = values[: len(self) * self.portion].unflatten(0, (len(self), self.portion // self.local, self.local))
        return parts[:, self.rank].flatten(0, 1)


class EvalLoader:
    """Batches ``(inputs, labels)`` of ``indices`` in order, without augmentation.

    With several processes each takes every ``world_size``-th image: nothing is padded, so that each image counts
    exactly once.
    """

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        batch_size: int,
        *,
        preprocess: Preprocess,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source, self.indices = source, indices[rank::world_size]
        self.batch_size, self.preprocess = batch_size, preprocess

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.source.batches(self.indices, self.batch_size):
            yield self.preprocess(images), labels
