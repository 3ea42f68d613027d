"""What of a batch a network is called on, and what of it the labels are."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kdq.utils.errors import KdqError

#: Entries of a batch that is a dictionary, the first that is there.
IMAGES = ("image", "images", "x", "input", "inputs", "pixel_values")
LABELS = ("label", "labels", "y", "target", "targets")


def images_of(batch: Any) -> Tensor:
    """The inputs of a batch: itself if it is a tensor, the first item of a tuple or list, the entry of a dictionary
    that is named as in :data:`IMAGES`.

        >>> import torch
        >>> images_of({"pixel_values": torch.zeros(2, 3), "labels": torch.zeros(2)}).shape
        torch.Size([2, 3])

    Raises:
        KdqError: it is none of these.
    """
    return _part(batch, 0, IMAGES, "images")


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: the second item of a tuple or list, or the entry of a dictionary that is named as in
    :data:`LABELS`.
    """
    return _part(batch, 1, LABELS, "labels")


def logits_of(output: Any) -> Tensor:
    """The logits of what a network returns: itself, the first item of a tuple or list, a dictionary's ``logits``."""
    return _part(output, 0, ("logits",), "logits", "an output of the network")


def first_pairs(batches: Iterable[Any], count: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the first ``count`` images."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        if count <= 0:
            break
        images, labels = images_of(batch), labels_of(batch)
        pairs.append((images[:count], labels[:count]))
        count -= len(images)
    if not pairs:
        raise KdqError("there is no image to quantize with: the data loader is empty")
    return pairs


def _part(batch: Any, index: int, names: tuple[str, ...], what: str, whole: str = "a batch") -> Tensor:
    found: Any = batch if index == 0 and isinstance(batch, Tensor) else None
    there = type(batch).__name__
    if isinstance(batch, (tuple, list)) and len(batch) > index:
        found = batch[index]
        there = f"{there} of {', '.join(type(item).__name__ for item in batch)}"
    elif isinstance(batch, Mapping):
        found = next((batch[name] for name in names if name in batch), None)
        there = f"{there} of {', '.join(map(str, batch))}"
    if isinstance(found, Tensor):
        return found
    raise KdqError(
        f"{whole} is a {there}: its {what} must be {'a tensor, ' * (index == 0)}item {index} of a tuple or list, or a "
        f"dictionary's {', '.join(names)}"
    )
