"""WebDataset's shards, tar files of ``key.jpg`` and ``key.cls``: images stay there, and are decoded each time.

An index says where in its shard each image is. Any one can be read at any time: splits, seeds and resumed epochs are
those of images in memory.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import glob
from io import BytesIO
from pathlib import Path
from tarfile import AREGTYPE, BLOCKSIZE, DIRTYPE, GNUTYPE_LONGNAME, REGTYPE, XGLTYPE, XHDTYPE, HeaderError, TarInfo
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kdq.data.decoded import Photographs
from kdq.data.folder import fitted, fitting, opened, scaled, shown
from kdq.data.image_set import ImageSet
from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError, one_line
from kdq.utils.files import replacing
from kdq.utils.progress import progress

KINDS, FORMATS = ("jpg", "jpeg", "png", "webp"), ("JPEG", "PNG", "WEBP")
#: Bytes of an image's file, of a header that holds a name, and characters of a name: more is refused unread.
LARGEST, HEADER, NAME = 2**28, 2**16, 1024
#: An index is int64 ``(images, 9)``: an image's first byte, length, label, height, width, and its file's SHA-256.
LABEL, SIDES, SHA = 2, slice(3, 5), slice(5, 9)


def webdataset(
    root: str, train: str | Sequence[str], test: str | Sequence[str], image_size: int, in_channels: int,
    num_classes: int, cache: str, interpolation: str = "bilinear",
) -> ImageSet:  # fmt: skip
    """Read shards whose samples are ``key.jpg`` (or ``jpeg``, ``png``, ``webp``) and ``key.cls``, the label's number.

    They are read as :func:`kdq.data.folder.image_folder` does, those for training whole. What a model's key remembers
    is the digests of their files and how they are scaled.

    Args:
        train, test: the shards of each part, below ``root``, a pattern or several: the library expands braces, then
            ``*`` is looked up.
        cache: where indices are kept, each under its shard's path, size and modification time.

    Raises:
        KdqError: the library or a shard is missing, or a shard is no tar of such samples.
    """
    fit, base = fitting(image_size, in_channels, interpolation), Path(root).expanduser()
    shards = [_shards(base, train), _shards(base, test)]
    if both := {*shards[0]} & {*shards[1]}:
        raise KdqError(f"{shown(min(both))} is a shard of both data.train and data.test: give others")
    parts = [Shards(names, num_classes, Path(cache), fit) for names in shards]
    labels = [torch.from_numpy(images.rows[:, LABEL].copy()) for images in parts]
    return ImageSet(parts[0], labels[0], parts[1], labels[1], tuple(map(str, range(num_classes))))


def _shards(root: Path, pattern: str | Sequence[str]) -> list[Path]:
    """The files that ``pattern`` means, each once, those of a ``*`` in the order of their names."""
    try:
        from webdataset.shardlists import expand_urls

        names = expand_urls("::".join([pattern] if isinstance(pattern, str) else pattern))
    except ModuleNotFoundError as error:
        raise KdqError("data=webdataset needs WebDataset: pip install 'kdq[webdataset]'") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise KdqError(f"data.train or data.test={pattern} is no pattern: {one_line(error)}") from error
    found = [f for n in names for f in (sorted(glob(n, root_dir=root)) if re.search(r"[*?[]", n) else [n])]
    if missing := [name for name in found or names if not (root / name).is_file()]:
        raise KdqError(f"no file {shown(root / missing[0])}: data.train and data.test name files below data.root")
    return list(dict.fromkeys(root / name for name in found))


class Shards(Photographs):
    """Photographs that are decoded when they are asked for, by a thread for each core."""

    def __init__(self, shards: Sequence[Path], classes: int, cache: Path, fit: Mapping[str, Any]) -> None:
        # Not the base's, which is of pixels that are there.
        indices, index = [], partial(_index, classes=classes, cache=cache)
        with ThreadPoolExecutor(usable_cores()) as pool, progress("indexing shards", len(shards), "shard") as bar:
            for found in pool.map(index, shards):
                indices.append(found)
                bar.update()
        self.shards, self.rows, self.fit = shards, np.concatenate(indices), fit
        self.shard = np.repeat(np.arange(len(shards)), [len(rows) for rows in indices])
        self.sizes = torch.from_numpy(scaled(self.rows[:, SIDES], fit["size"]))
        self.side, self.channels = fit["size"], fit["in_channels"]
        self.shape = (len(self.sizes), self.side, self.side, self.channels)

    def content(self) -> tuple[Tensor, ...]:
        how = torch.tensor([self.side, self.channels, self.fit["resampling"]])
        return how, torch.from_numpy(self.rows[:, SHA])

    def whole(self, rows: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(pool.map(self._image, rows.tolist()))

    def _image(self, row: int) -> Tensor:
        shard, (start, length) = self.shards[self.shard[row]], self.rows[row, :2].tolist()
        with shard.open("rb") as stream:
            stream.seek(start - BLOCKSIZE)
            header, data = stream.read(BLOCKSIZE), stream.read(length)
        name = f"{header[:100].rstrip(bytes(1)).decode(errors='replace')!r} of {shown(shard)}"
        if hashlib.sha256(data).digest() != self.rows[row, SHA].tobytes():
            raise KdqError(f"the image {name} was changed while kdq ran: give the command again")
        with opened(BytesIO(data), name, FORMATS) as image:
            found = fitted(image, whole=True, **self.fit)
            if found.shape[:2] != tuple(self.sizes[row].tolist()):
                raise ValueError("it has another size than its header says")
        return torch.tensor(found)


def _index(shard: Path, classes: int, cache: Path) -> np.ndarray:
    """The index of a shard, from below ``cache``, or made and kept there."""
    stat = shard.stat()
    said = f"2\0{classes}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode() + os.fsencode(shard.resolve())
    file = cache / f"{hashlib.sha256(said).hexdigest()[:20]}.npy"
    try:
        return np.load(file, allow_pickle=False).reshape(-1, 9)
    except Exception:  # not there; or damaged, where numpy may raise anything
        pass
    from webdataset.tariterators import group_by_keys

    try:
        with shard.open("rb") as stream:
            samples = (sample for sample in group_by_keys(_members(stream)) if _kinds(sample))
            rows = [_row(stream, f"{sample['__key__']!r} of {shown(shard)}", sample, classes) for sample in samples]
        if not rows:
            raise ValueError("it holds no key.jpg beside a key.cls")
    except (ValueError, HeaderError) as error:
        what = one_line(ValueError(error.args[0]))  # group_by_keys adds arguments
        raise KdqError(f"cannot read the shard {shown(shard)} ({what}): it must be a whole, plain tar") from error
    with replacing(file) as temporary:
        np.save(temporary, np.array(rows, np.int64))
    return np.array(rows, np.int64)


def _kinds(sample: Mapping[str, Any]) -> list[str]:
    """What of a sample is an image or a label: what else it holds is nobody's business here."""
    kinds = [kind for kind in (*KINDS, "cls") if kind in sample]
    return kinds or [name for name in sample if name.rpartition(".")[2] in (*KINDS, "cls")]


def _row(stream: BinaryIO, name: str, sample: Mapping[str, Any], classes: int) -> list[int]:
    """What an index says of a sample."""
    kinds = _kinds(sample)
    if len(kinds) != 2 or kinds[1] != "cls":
        wanted = "it must have one image and one cls, side by side (a key ends at its first dot)"
        raise KdqError(f"the sample {name} has {', '.join(kinds)}: {wanted}")
    (start, length), (place, digits) = (sample[kind] for kind in kinds)
    stream.seek(place)
    label = stream.read(min(digits, 20))
    if not re.fullmatch(rb"\s*\d{1,9}\s*", label) or int(label) >= classes:
        raise KdqError(f"the label of {name} is {label.decode(errors='replace')!r}: it must be from 0 to {classes - 1}")
    if length > LARGEST:
        raise KdqError(f"the image {name} has {length} bytes: leave it out")
    stream.seek(start)
    data = stream.read(length)
    with opened(BytesIO(data), name, FORMATS) as image:
        width, height = image.size[:: -1 if image.getexif().get(0x0112) in (5, 6, 7, 8) else 1]  # those lie on a side
    return [start, length, int(label), height, width, *np.frombuffer(hashlib.sha256(data).digest(), np.int64).tolist()]


def _members(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The files of a tar as the library groups them, with their place in it as what they hold.

    Headers are walked here: Python's reader, which the library uses, takes a damaged one for the end, fills the memory
    with names, and goes in circles where a size is negative.
    """
    end, at, long = os.fstat(stream.fileno()).st_size, 0, b""
    while at + BLOCKSIZE <= end:
        stream.seek(at)
        header = stream.read(BLOCKSIZE)
        if not header.strip(b"\0"):
            if stream.read(2**20).strip(b"\0"):
                raise ValueError("it goes on after its end, like two that were joined")
            return
        found = TarInfo.frombuf(header, "utf-8", "surrogateescape")
        start, size = at + BLOCKSIZE, 0 if found.type == DIRTYPE else found.size
        name, at = long.decode("utf-8", "surrogateescape") or found.name, start - size // -BLOCKSIZE * BLOCKSIZE
        if len(name) > NAME or not name.isprintable() or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name[:99]!r} is no name in a shard")
        named = found.type in (XHDTYPE, XGLTYPE, GNUTYPE_LONGNAME)  # what holds the next one's name
        if not 0 <= size <= (min(HEADER, end - start) if named else end - start):
            raise ValueError(f"{name[:99]!r} of {size} bytes is cut off, or too long")
        if named:
            said = stream.read(size)
            if found.type == GNUTYPE_LONGNAME:
                long = said.rstrip(b"\0")
            elif path := re.search(rb"^(\d+) path=", said, re.M):
                long = said[path.end() : path.start() + int(path[1]) - 1]
            continue
        if found.type in (REGTYPE, AREGTYPE):
            yield {"fname": name, "data": (start, size), "__url__": ""}
        elif found.type != DIRTYPE:
            raise ValueError(f"{name!r} is a link or a device, no file")
        long = b""
    raise ValueError("it has no end: it was cut off")
