"""The data sets kdq knows by name, each a function that returns an :class:`ImageSet`."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets.utils import extract_archive

from kdq.data.folder import image_folder
from kdq.data.image_set import ImageSet
from kdq.utils.errors import KdqError, message


def digits() -> ImageSet:
    """1 797 real handwritten digits, 8x8 grey (Alpaydin & Kaynak 1998), shipped inside scikit-learn.

    The set has no official test part: here every fifth image is one.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8))[..., None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    test = torch.arange(len(labels)) % 5 == 4
    return ImageSet(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def fashion_mnist(root: str) -> ImageSet:
    """Fashion-MNIST (Xiao et al. 2017): 60 000 + 10 000 grey images, 28x28."""
    from torchvision.datasets import FashionMNIST

    files = [f"FashionMNIST/raw/{Path(url).name}" for url, _ in FashionMNIST.resources]
    return _torchvision_set("Fashion-MNIST", FashionMNIST, Path(root), files)


def cifar10(root: str, cache: str | None = None, split: Mapping[str, Any] | None = None) -> ImageSet:
    """CIFAR-10 (Krizhevsky 2009): 50 000 + 10 000 RGB images, 32x32; see :func:`_cifar`."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, Path(root), cache, split)


def cifar100(root: str, cache: str | None = None, split: Mapping[str, Any] | None = None) -> ImageSet:
    """CIFAR-100 (Krizhevsky 2009): 50 000 + 10 000 RGB images, 32x32, a hundred classes; see :func:`_cifar`."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, Path(root), cache, split)


def _cifar(name: str, dataset: Any, root: Path, cache: str | None, split: Mapping[str, Any] | None) -> ImageSet:
    """The original images as whatever is there: class folders of lossless files (``train/<class>/*.png`` and
    ``test/<class>/*.png`` in ``root`` or in a folder of the set's name below it), whose classes are in alphabetical
    order, as the set's labels are; else torchvision's archive, fetched where it is missing.

    Args:
        cache: where decoded class folders are kept; by default below ``root``.
        split: see :func:`kdq.data.folder.image_folder`.
    """
    for folder in (root / name, root):
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return image_folder(str(folder), 32, 3, cache or str(root / "image_folder"), split)
    return _torchvision_set(name.upper().replace("CIFAR", "CIFAR-"), dataset, root, [dataset.filename])


def _torchvision_set(name: str, dataset: Callable[..., Any], root: Path, files: list[str]) -> ImageSet:
    """Read a torchvision data set below ``root``, fetching it first where it is missing.

    Archives the user put there are used before anything is fetched.
    """
    with suppress(Exception):  # torchvision raises many kinds for a missing, half-written or corrupt set
        return _read(dataset, root)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        with suppress(Exception):  # another process may have fetched it while this one waited
            return _read(dataset, root)
        try:
            _fetch(dataset, root, files)
            return _read(dataset, root)
        except Exception as error:
            raise KdqError(
                f"{name} is not in {root.resolve()} and could not be fetched ({message(error)[:160]}): "
                f"put {', '.join(files)} there, or set paths.data_dir to where they are"
            ) from error


def _fetch(dataset: Callable[..., Any], root: Path, files: list[str]) -> None:
    """Download and unpack into a temporary folder, then move each finished file into place."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as temporary:
        for name in files:
            if (root / name).is_file():
                copy = Path(temporary) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, copy)
                if copy.suffixes == [".gz"]:
                    # Distributions compress the same files anew: torchvision knows only one archive's checksum, but
                    # takes a file that is already unpacked. gzip carries a checksum of the content itself.
                    extract_archive(str(copy))
        dataset(temporary, download=True)
        for file in [f for f in Path(temporary).rglob("*") if f.is_file()]:
            target = root / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def _read(dataset: Callable[..., Any], root: Path) -> ImageSet:
    parts = [dataset(root, train=train, download=False) for train in (True, False)]
    pixels = [torch.as_tensor(part.data) for part in parts]
    images = [each[..., None] if each.ndim == 3 else each for each in pixels]
    labels = [torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]
    return ImageSet(images[0], labels[0], images[1], labels[1], tuple(parts[0].classes))
