"""Decoded images on disk: of one shape in an array, or of several, one after the other.

Both are written so that a process that is killed loses at most :data:`KEPT_EVERY` images: ``{part}_decoded`` says how
many are there.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

#: Images after which decoding can be killed without losing them.
KEPT_EVERY = 512


class _Rows:
    """The rows of an array in a file. They are written there, and not in mapped memory, where a full disk kills."""

    def __init__(self, array: np.memmap[Any, Any]) -> None:
        file = Path(str(array.filename))
        self.file, self.start = file.open("r+b"), array.offset

    def put(self, row: int, values: np.ndarray) -> None:
        self.file.seek(self.start + row * values.nbytes)
        self.file.write(values.tobytes())

    def keep(self) -> None:
        _keep(self.file)


class OneShape(_Rows):
    """A part's images in ``{part}_images.npy``, uint8 ``shape``: images, height, width, channels. Others are black."""

    def __init__(self, folder: Path, part: str, shape: tuple[int, ...]) -> None:
        array, self.done = _array(folder, part, "images", shape, np.uint8)
        super().__init__(array)


class Shapes:
    """Images of several shapes: their pixels in ``{part}_pixels``, height and width in ``{part}_sizes.npy``.

    Args:
        images: of the part.
        rows: of the images that will be put, ascending; others have no pixel.
    """

    def __init__(self, folder: Path, part: str, images: int, rows: Sequence[int], channels: int) -> None:
        sizes, self.done = _array(folder, part, "sizes", (images, 2), np.int64)
        self.sizes = _Rows(sizes)
        self.pixels = (folder / f"{part}_pixels").open("r+b" if self.done else "wb")
        self.pixels.truncate(channels * int(sizes[list(rows[: self.done])].prod(1).sum()))
        self.pixels.seek(0, 2)

    def put(self, row: int, image: np.ndarray) -> None:
        self.sizes.put(row, np.array(image.shape[:2], np.int64))
        self.pixels.write(image.tobytes())

    def keep(self) -> None:
        _keep(self.pixels)
        self.sizes.keep()


def _keep(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _array(folder: Path, part: str, name: str, shape: tuple[int, ...], kind: Any) -> tuple[np.memmap[Any, Any], int]:
    """The array to write into, and how many images are there from a process that was killed."""
    file = folder / f"{part}_{name}.npy"
    try:
        array, done = np.lib.format.open_memmap(file, "r+"), int((folder / f"{part}_decoded").read_text())
        if array.shape == shape:
            return array, done
    except (OSError, ValueError):  # not begun, or not far
        pass
    return np.lib.format.open_memmap(file, "w+", kind, shape), 0


class Photographs:
    """Images of several shapes. To all but training they are squares, their centres: ``photographs[rows]`` is uint8
    ``(rows, side, side, channels)``.

    Args:
        pixels: uint8, of one image after the other, each ``(height, width, channels)``.
        sizes: int64 ``(images, 2)``: height and width, neither below ``side``; zero where there is no image.
    """

    def __init__(self, pixels: Tensor, sizes: Tensor, side: int, channels: int) -> None:
        ends = (channels * sizes.prod(1)).cumsum(0)
        if len(pixels) != int(ends[-1]):
            raise ValueError(f"{len(pixels)} bytes are not those of the images")
        self.pixels, self.sizes, self.side, self.channels = pixels, sizes, side, channels
        self.ends, self.shape = ends, (len(sizes), side, side, channels)

    def __len__(self) -> int:
        return len(self.sizes)

    def content(self) -> tuple[Tensor, ...]:
        """What says which images these are."""
        return self.sizes, self.pixels

    def whole(self, rows: Tensor) -> list[Tensor]:
        """Each image, uint8 ``(height, width, channels)``."""
        found = []
        for row in rows.tolist():
            height, width = self.sizes[row].tolist()
            end = int(self.ends[row])
            found.append(self.pixels[end - height * width * self.channels : end].view(height, width, self.channels))
        return found

    def __getitem__(self, rows: Tensor) -> Tensor:
        squares = []
        for image in self.whole(rows):
            top, left = ((length - self.side) // 2 for length in image.shape[:2])
            squares.append(image[top : top + self.side, left : left + self.side])
        return torch.stack(squares)
