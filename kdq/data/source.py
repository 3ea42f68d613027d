"""Where batches of raw images come from: a copy on the device, or, for sets that do not fit there, the host's memory
or a memory-mapped file, read ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

#: Batches that are read before they are asked for, and threads that read them. The images are decoded already: reading
#: is copying, which frees Python's lock, so that threads do what a DataLoader's processes would, also inside the jobs
#: of a launcher, which may not start processes.
AHEAD, READERS = 4, 2


class Source:
    """Raw images and their labels.

    Args:
        images: uint8 ``(images, height, width, channels)``.
        labels: int64 ``(images,)``.
        device: where batches are wanted.
    """

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels, self.device = images, labels, device
        self.size: tuple[int, int] = (images.shape[1], images.shape[2])

    def batches(self, indices: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images, labels)`` of ``indices`` in order, ``batch_size`` at a time; the last batch may be smaller."""
        raise NotImplementedError


class Resident(Source):
    """All images on the device; a batch is one gather there."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        super().__init__(images.to(device), labels.to(device), device)

    def batches(self, indices: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in indices.to(self.device).split(batch_size):
            yield self.images[chosen], self.labels[chosen]


class Streamed(Source):
    """The same batches from images that stay where they are: gathered by threads, page-locked, and copied to a GPU
    while it computes."""

    def batches(self, indices: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        readers, waiting = ThreadPoolExecutor(READERS), deque[Future[tuple[Tensor, Tensor]]]()
        try:
            for chosen in indices.cpu().split(batch_size):
                waiting.append(readers.submit(self._read, chosen))
                if len(waiting) > AHEAD:
                    yield self._placed(*waiting.popleft().result())
            while waiting:
                yield self._placed(*waiting.popleft().result())
        finally:  # also when nobody wants the rest
            readers.shutdown(wait=False, cancel_futures=True)

    def _read(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.images[chosen], self.labels[chosen]
        return (images.pin_memory(), labels.pin_memory()) if self.device.type == "cuda" else (images, labels)

    def _placed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def source(images: Tensor, labels: Tensor, device: torch.device) -> Source:
    """:class:`Resident` where the images take at most half of the device's memory, else :class:`Streamed`."""
    kind = Resident if 2 * images.nbytes <= memory(device) else Streamed
    return kind(images, labels, device)


def memory(device: torch.device) -> int:
    """Bytes: those still free on a GPU, all of the machine's for its CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
