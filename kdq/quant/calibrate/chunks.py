"""Calibration images in chunks: the network's own code runs once, on the first; the others repeat what it did.

While the first chunk runs, every torch function it passes through is noted on a :class:`Tape`. When it stops at a layer
that waits for all chunks, each of them in turn is taken from :class:`Chunks`, repeats the calls noted since the last
stop, and is put back with only the values that the network's code still holds. So a pass costs what a forward pass
costs, and memory holds the activations of one chunk plus a fixed number of bytes, beyond which the waiting chunks lie
in a temporary folder.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdq.quant.batches import images_of
from kdq.quant.calibrate.lanes import Lanes, Values

#: Images pushed through a layer at a time, whatever batches the caller has, so that sums, and hence codes, do not
#: depend on those.
CHUNK = 64
#: Bytes of waiting chunks that stay in memory; on a GPU, where a way to the disk and back is long, its share of what is
#: free.
IN_MEMORY = 128 * 2**20
GPU_SHARE = 0.25


class Chunks:
    """The values of the chunks that wait, in memory up to :data:`IN_MEMORY` bytes (a GPU's up to :data:`GPU_SHARE`),
    else in a temporary folder."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._room = int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else IN_MEMORY
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._stored: dict[int, dict[int, list[Tensor]] | Path] = {}
        self._bytes: dict[int, int] = {}

    def put(self, index: int, values: Values) -> None:
        tensors = {key: value.lanes for key, value in values.items()}
        size = storage_bytes(x for lanes in tensors.values() for x in lanes)
        if size + sum(self._bytes.values()) <= self._room:
            self._stored[index], self._bytes[index] = tensors, size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="kdq-calibration-")
        path = Path(self._folder.name) / f"{index}.pt"
        torch.save(tensors, path)
        self._stored[index] = path

    def take(self, index: int) -> Values:
        stored = self._stored.pop(index)
        if isinstance(stored, Path):
            # One save holds a tensor that lanes share once, and loads it so; weights_only refuses anything but tensors.
            stored = torch.load(stored, map_location=self.device, weights_only=True)
        self._bytes.pop(index, None)
        return {key: Lanes(tensors) for key, tensors in stored.items()}

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def in_chunks(batches: Iterable[Any], device: torch.device, parts: int = 1) -> Iterator[tuple[Tensor, int]]:
    """The inputs in chunks of one size, and how many of each chunk's images are real: the last chunk is filled up with
    copies of its last image.

    Args:
        parts: with fewer images than so many chunks hold, chunks are smaller, so that there are as many.
    """
    waiting: list[Tensor] = []
    size, enough = 0, CHUNK * max(1, parts)
    for batch in batches:
        waiting.append(images_of(batch).to(device))
        if sum(map(len, waiting)) < enough:
            continue
        together, size, enough = torch.cat(waiting), CHUNK, CHUNK
        whole = len(together) // CHUNK * CHUNK
        waiting = [together[whole:].clone()]
        for start in range(0, whole, CHUNK):
            yield together[start : start + CHUNK].clone(), CHUNK
    if rest := sum(map(len, waiting)):
        size = size or max(1, rest // max(1, parts))
        for images in torch.cat(waiting).split(size):
            copies = images[-1:].expand(size - len(images), *images.shape[1:])
            yield torch.cat([images, copies]), len(images)


def images_axis(value: Tensor, size: int, count: int) -> tuple[int, int, int]:
    """Where a chunk's images lie in a ``value`` of the network: the axis, and how many entries of it come before the
    images, and after them in each.

    Most networks have the images first, some have tokens before them. The copies that fill up the chunk show it: only
    along the images' axis are they equal.

    >>> tokens = torch.randn(5, 3, 8)[:, [0, 1, 2, 2]]  # of three images and a copy
    >>> images_axis(tokens, size=4, count=3), images_axis(tokens.flatten(0, 1), size=4, count=3)
    ((1, 1, 1), (0, 5, 1))
    """
    for axis, length in enumerate(value.shape):
        for outer, inner in ((1, length // size), (length // size, 1)):
            if outer * size * inner == length:
                last, copy = (value.unflatten(axis, (outer, size, inner)).select(axis + 1, i) for i in (count - 1, -1))
                if (last - copy).float().norm() <= 1e-4 * last.float().norm():
                    return axis, outer, inner
    return 0, 1, len(value) // size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind ``tensors``, which may share some."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
