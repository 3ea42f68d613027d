"""Where batches of raw images come from: a copy on the device, or, for sets that do not fit there, the host's memory
or a memory-mapped file, read ahead."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from kdq.data.decoded import Photographs

#: Batches that are read before they are asked for, and threads that read them. The images are decoded already: reading
#: is copying, which frees Python's lock, so that threads do what a DataLoader's processes would, also inside the jobs
#: of a launcher, which may not start processes.
AHEAD, READERS = 4, 2


class Source:
    """Raw images and their labels.

    Args:
        images: uint8 ``(images, height, width, channels)``, or whole photographs.
        labels: int64 ``(images,)``.
        device: where batches are wanted.
    """

    def __init__(self, images: Tensor | Photographs, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels, self.device = images, labels, device

    def size(self, indices: Tensor) -> tuple[Any, Any]:
        """Height and width: numbers, or, of photographs, tensors ``(indices,)``."""
        if isinstance(self.images, Photographs):
            height, width = self.images.sizes[indices].T
            return height, width
        return self.images.shape[1], self.images.shape[2]

    def batches(self, indices: Tensor, batch_size: int, whole: bool = False) -> Iterator[tuple[Any, Tensor]]:
        """``(images, labels)`` of ``indices`` in order, ``batch_size`` at a time; the last batch may be smaller.

        Args:
            whole: photographs are lists of images of their own shapes, and not the centres of these.
        """
        raise NotImplementedError


class Resident(Source):
    """All images on the device; a batch is one gather there."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        super().__init__(images.to(device), labels.to(device), device)

    def batches(self, indices: Tensor, batch_size: int, whole: bool = False) -> Iterator[tuple[Any, Tensor]]:
        for chosen in indices.to(self.device).split(batch_size):
            yield self.images[chosen], self.labels[chosen]


class Streamed(Source):
    """The same batches from images that stay where they are: gathered by threads, page-locked, and copied to a GPU
    while it computes."""

    def batches(self, indices: Tensor, batch_size: int, whole: bool = False) -> Iterator[tuple[Any, Tensor]]:
        readers, waiting = ThreadPoolExecutor(READERS), deque[Future[tuple[Any, Tensor]]]()
        try:
            for chosen in indices.cpu().split(batch_size):
                waiting.append(readers.submit(self._read, chosen, whole))
                if len(waiting) > AHEAD:
                    yield self._placed(*waiting.popleft().result())
            while waiting:
                yield self._placed(*waiting.popleft().result())
        finally:  # also when nobody wants the rest
            readers.shutdown(wait=False, cancel_futures=True)

    def _read(self, chosen: Tensor, whole: bool) -> tuple[Any, Tensor]:
        read = self.images.whole if whole and isinstance(self.images, Photographs) else self.images.__getitem__
        images, labels = read(chosen), self.labels[chosen]
        if self.device.type != "cuda":
            return images, labels
        return _each(images, Tensor.pin_memory), labels.pin_memory()

    def _placed(self, images: Any, labels: Tensor) -> tuple[Any, Tensor]:
        place = methodcaller("to", self.device, non_blocking=True)
        return _each(images, place), place(labels)


def _each(images: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of a batch, or of each of its images."""
    return [function(image) for image in images] if isinstance(images, list) else function(images)


def source(images: Tensor | Photographs, labels: Tensor, device: torch.device) -> Source:
    """:class:`Resident` where the images are of one shape and take at most half of the device's memory, else
    :class:`Streamed`."""
    if isinstance(images, Tensor) and 2 * images.nbytes <= memory(device):
        return Resident(images, labels, device)
    return Streamed(images, labels, device)


def memory(device: torch.device) -> int:
    """Bytes: those still free on a GPU, all of the machine's for its CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
