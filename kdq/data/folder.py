"""Your own images: ``root/train/<class>/*`` and ``root/test/<class>/*``, decoded once into uint8 arrays."""

import hashlib
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kdq.data.decoded import KEPT_EVERY, OneShape, Photographs, Shapes
from kdq.data.image_set import ImageSet
from kdq.data.split import split as divided
from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError, one_line
from kdq.utils.files import write_text
from kdq.utils.progress import progress

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}

#: Pillow's names of the formats behind them. Left to itself it goes by a file's first bytes, and runs Ghostscript for
#: PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: How an image is scaled.
RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic")}

#: What Pillow raises for files that are damaged; the last three for their EXIF.
BROKEN = (
    *(UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError),
    *(struct.error, KeyError, TypeError),
)
#: An image whose longer side is more than this many times the shorter one loses its ends before it is scaled.
EXTREME = 16
#: Pixels that a side may have, which is what JPEG can say: a line of one pixel takes twelve bytes of memory.
LONGEST = 2**16
#: The images of train and of test, each with its label.
Parts = dict[str, list[tuple[Path, int]]]


def class_names(root: str | Path) -> list[str]:
    """The class folders of ``root/train``, sorted: label ``i`` is the i-th name."""
    train = Path(root).expanduser() / "train"
    names = _class_folders(train)
    if len(names) < 2:
        raise KdqError(f"{train} holds {len(names)} class folders, but a classifier needs two: train/<class>/*.jpg")
    return names


def _class_folders(part: Path) -> list[str]:
    if not part.is_dir():
        raise KdqError(f"no folder {part}: data.root must hold train/<class>/ and test/<class>/ folders of images")
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def class_count(root: str) -> int:
    """How many classes the image folder ``root`` has: the resolver ``${class_folders:...}`` of conf/data."""
    return len(class_names(root))


def image_folder(
    root: str,
    image_size: int,
    in_channels: int,
    cache: str,
    split: Mapping[str, Any] | None = None,
    interpolation: str = "bilinear",
    whole: bool = False,
) -> ImageSet:
    """Read an image folder, at ``image_size`` x ``image_size`` pixels with ``in_channels`` (1 grey, 3 RGB).

    Images are turned as their EXIF orientation says. Those of another size are scaled so that the shorter side fits and
    cropped in the centre, unless they are kept whole. The decoded arrays are kept below ``cache`` and memory-mapped
    from then on. The cache is found by the list of file names, sizes and modification times, so any change to the
    folder makes a new one; what a model's key remembers is the digests of the decoded pixels
    (:attr:`ImageSet.train_digest`), which are the same wherever the folder lies.

    Args:
        split: ``val_fraction``, ``seed`` and ``train_limit`` of :func:`kdq.data.split.split`: with a limit, training
            images that are in no part are not decoded, and are black.
        interpolation: how images are scaled: ``nearest``, ``bilinear`` or ``bicubic``.
        whole: training images keep what is beyond the centre of their longer side, for
            :class:`kdq.data.photographs.ResizedCrop` to train on: see :class:`kdq.data.decoded.Photographs`.

    Raises:
        KdqError: a folder is missing or empty, train and test differ in their classes, or an image is corrupt.
    """
    fit, source, classes = fitting(image_size, in_channels, interpolation), Path(root).expanduser(), class_names(root)
    parts = {part: _list_images(source / part, classes) for part in ("train", "test")}
    rows = {part: range(len(files)) for part, files in parts.items()} | _limited(len(parts["train"]), split)
    folder = Path(cache) / _listing_key(source, parts, fit, rows, whole)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _decode_into(folder, parts, rows, fit, whole)
    train = _mapped(folder, "train", len(parts["train"]), image_size, in_channels, whole)
    test = _mapped(folder, "test", len(parts["test"]), image_size, in_channels)
    labels = [torch.tensor([label for _, label in files]) for files in parts.values()]
    return ImageSet(train, labels[0], test, labels[1], tuple(classes))


def fitting(image_size: int, in_channels: int, interpolation: str) -> dict[str, Any]:
    """How images become arrays, as :func:`fitted` wants to know it."""
    if in_channels not in (1, 3):
        raise KdqError(f"data.in_channels={in_channels}: images are read as grey (1) or RGB (3)")
    if interpolation not in RESAMPLING:
        raise KdqError(f"data.interpolation={interpolation} is none of {', '.join(RESAMPLING)}")
    return {"size": image_size, "in_channels": in_channels, "resampling": RESAMPLING[interpolation]}


def _limited(images: int, asked: Mapping[str, Any] | None) -> dict[str, Sequence[int]]:
    """The training images that a limit leaves, as ``{"train": rows}``; nothing without a limit."""
    if asked is None or asked["train_limit"] is None:
        return {}
    found = divided(images, asked["val_fraction"], asked["seed"], asked["train_limit"])
    return {"train": sorted([*found.train.tolist(), *found.val.tolist()])}


def _list_images(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    if extra := [name for name in _class_folders(folder) if name not in classes]:
        raise KdqError(f"{folder} has class folders that train/ lacks: {', '.join(extra[:5])}")
    found = []
    for label, name in enumerate(classes):
        found_here = ((f, f.relative_to(folder).parts) for f in _files(folder / name))
        files = sorted(
            f for f, parts in found_here if f.suffix.lower() in EXTENSIONS and not any(p.startswith(".") for p in parts)
        )
        if not files:
            raise KdqError(f"{folder / name} holds no image ({', '.join(sorted(EXTENSIONS))})")
        found += [(file, label) for file in files]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Every file inside, also behind links to folders, each of which may be there once."""
    seen: dict[str, str] = {}
    for here, _, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(here)) in seen:
            raise KdqError(f"{here} is a link to what {seen[place]} holds, whose images would count twice: remove it")
        seen[place] = here
        yield from (Path(here, file) for file in files)


def _listing_key(
    source: Path, parts: Parts, fit: Mapping[str, Any], rows: Mapping[str, Sequence[int]], whole: bool
) -> str:
    resampling = fit["resampling"]
    how = ("" if resampling == RESAMPLING["bilinear"] else f" {resampling.name}") + (" whole" if whole else "")
    sha = hashlib.sha256(f"2 {fit['size']} {fit['in_channels']}{how}".encode())
    if not isinstance(rows["train"], range):
        sha.update(repr(rows["train"]).encode())
    for files in parts.values():
        for file, _ in files:
            try:
                stat = file.stat()
            except OSError as error:  # a link to nowhere, or to itself
                raise KdqError(f"cannot read the image {shown(file)} ({error.strerror}): mend or remove it") from error
            if not S_ISREG(stat.st_mode):  # opening a pipe would wait for ever
                raise KdqError(f"{shown(file)} is not a regular file: remove it")
            listed = f"{file.relative_to(source)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            sha.update(os.fsencode(listed))  # a name may be any bytes
    return sha.hexdigest()[:20]


def _decode_into(
    folder: Path, parts: Parts, rows: Mapping[str, Sequence[int]], fit: Mapping[str, Any], whole: bool
) -> None:
    """Decode the images of ``rows`` into files in a temporary folder, then rename it to ``folder``. A process
    that is killed leaves the temporary folder, and the next one goes on there."""
    temporary = folder.parent / f".decode-{folder.name}"  # this process alone: it holds the lock
    temporary.mkdir(exist_ok=True)
    size, in_channels = fit["size"], fit["in_channels"]
    try:
        for part, files in parts.items():
            several = whole and part == "train"
            kept: OneShape | Shapes = (
                Shapes(temporary, part, len(files), rows[part], in_channels)
                if several
                else OneShape(temporary, part, (len(files), size, size, in_channels))
            )
            with (
                ThreadPoolExecutor(max_workers=usable_cores()) as pool,
                progress(f"decoding {part} images", len(rows[part]), "image") as bar,
            ):
                bar.update(kept.done)
                asked = rows[part][kept.done :]
                decoded = pool.map(partial(decode_image, **fit, whole=several), [files[row][0] for row in asked])
                for done, (row, image) in enumerate(zip(asked, decoded, strict=True), kept.done + 1):
                    kept.put(row, image)
                    bar.update()
                    if done % KEPT_EVERY == 0 or done == len(rows[part]):
                        kept.keep()
                        write_text(temporary / f"{part}_decoded", str(done))
        temporary.chmod(0o755)  # others may share the cache
        os.rename(temporary, folder)
    except KdqError:  # of a file that is to be mended: then the folder is another one
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def shown(path: Path) -> str:
    """``path`` as text that can be written anywhere: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def opened(file: Path | BinaryIO, name: str, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """An image, not decoded yet. What is wrong with it, then or later, is a KdqError that calls it ``name``."""
    try:
        with Image.open(file, formats=formats) as image:
            if image.mode.startswith("I") or image.mode == "F":
                raise KdqError(f"{name} has more than 8 bits a channel (mode {image.mode}): save it with 8")
            if max(image.size) > LONGEST:
                raise KdqError(f"{name} has a side of more than {LONGEST} pixels: cut or scale it")
            yield image
    except BROKEN as error:
        why = f"none of {', '.join(formats)}" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise KdqError(f"cannot read the image {name} ({why}): mend or remove it") from error


def decode_image(
    file: Path,
    size: int,
    in_channels: int,
    resampling: Image.Resampling = RESAMPLING["bilinear"],
    whole: bool = False,
) -> np.ndarray:
    """The image of a file, as :func:`fitted` makes it."""
    with opened(file, shown(file)) as image:
        return fitted(image, size, in_channels, resampling, whole)


def fitted(found: Image.Image, size: int, in_channels: int, resampling: Image.Resampling, whole: bool) -> np.ndarray:
    """One image, upright (by its EXIF orientation), scaled and, unless ``whole``, cropped."""
    ImageOps.exif_transpose(found, in_place=True)  # no copy of what may fill the memory
    width, height = scaled(np.array(found.size), size).tolist()
    image, mode = _square_enough(found), "RGB" if in_channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (size, size):
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), resampling, reducing_gap=2.0)
        image = image if whole else image.crop((left, top, left + size, top + size))
    return np.asarray(image, np.uint8).reshape(image.height, image.width, in_channels)


def scaled(sides: np.ndarray, size: int) -> np.ndarray:
    """What the sides ``(..., 2)`` of images become: the shorter one ``size``, the longer one without extreme ends."""
    shorter = sides.min(-1, keepdims=True)
    return np.maximum(size, np.rint(size / shorter * np.minimum(sides, EXTREME * shorter))).astype(np.int64)


def _square_enough(image: Image.Image) -> Image.Image:
    """The centre of an image of an extreme shape, so that little is scaled that is not kept; others as they are."""
    width, height = image.size
    most = EXTREME * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, min(width, left + most), min(height, top + most)))


def _mapped(
    folder: Path, part: str, images: int, size: int, in_channels: int, whole: bool = False
) -> Tensor | Photographs:
    """The images of a part, from the cache."""
    name, kind = ("sizes", torch.int64) if whole else ("images", torch.uint8)
    shape: tuple[int, ...] = (images, 2) if whole else (images, size, size, in_channels)
    try:
        # Copy-on-write: pages are shared with the file, and torch gets an array it may call writable.
        found = torch.from_numpy(np.load(folder / f"{part}_{name}.npy", mmap_mode="c", allow_pickle=False))
        if found.dtype != kind or found.shape != shape:
            raise ValueError(f"{part} is not {images} images of {size} x {size}")
        if whole:
            pixels = torch.from_numpy(np.memmap(folder / f"{part}_pixels", np.uint8, "c"))
            return Photographs(pixels, found, size, in_channels)
    except PermissionError as error:
        raise KdqError(f"{error.filename} may not be read: it belongs to another user") from error
    except Exception as error:  # numpy evaluates the header: whatever Python makes of broken source
        raise KdqError(f"the decoded images in {folder} are damaged ({one_line(error)}): delete this folder") from error
    return found
