"""A classification data set as arrays."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from kdq.data.decoded import Photographs


@dataclass(frozen=True)
class ImageSet:
    """A classification data set in memory (or memory-mapped).

    Attributes:
        train_images, test_images: uint8 ``(images, height, width, channels)``, or photographs of several shapes.
        train_labels, test_labels: int64 ``(images,)``, values in ``0 .. len(classes) - 1``.
        classes: names, in label order.
    """

    train_images: Tensor | Photographs
    train_labels: Tensor
    test_images: Tensor | Photographs
    test_labels: Tensor
    classes: tuple[str, ...]

    @cached_property
    def train_digest(self) -> str:
        """SHA-256 over the training pixels and labels: what a stored model's key says about its data."""
        return _digest(self.train_images, self.train_labels)

    @cached_property
    def test_digest(self) -> str:
        """SHA-256 over the test pixels and labels, which rows depend on, too."""
        return _digest(self.test_images, self.test_labels)


def _digest(images: Tensor | Photographs, labels: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in (*(images.content() if isinstance(images, Photographs) else (images,)), labels):
        sha.update(repr(tuple(tensor.shape)).encode())
        sha.update(np.ascontiguousarray(tensor.numpy()).data)
    return sha.hexdigest()
