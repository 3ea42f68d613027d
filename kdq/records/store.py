"""The trained-once store: every model is trained once, whoever asks for it, and found by what made it.

    store/<slug>-<key>/        one finished model
        weights.safetensors    its best weights
        config.yaml            the spec it was made from: everything that affects the weights, and nothing else
        metrics.json           how its training went
        entry.json             format, key, and the SHA-256 of the files above
    store/.work/<key>/         an unfinished training: its last checkpoint, until it is published
    store/.locks/<key>.lock    held by whoever trains it

The key is a hash of the spec, so equal models meet in one entry and different ones never do. What the machine decides
is no part of it: the device, its threads, and the number of processes, each of which has BatchNorm statistics of its
own images; ``metrics.json`` names them. An entry appears by one rename, complete. The lock is a lease that its holder
refreshes: when the holder dies, here or on another host that shares the folder, the next one takes over and resumes
from the last checkpoint.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kdq.records.lock import locked
from kdq.utils.errors import KdqError, one_line
from kdq.utils.files import file_digest, parse_json, regular
from kdq.utils.names import stable

#: Raised when the meaning of a spec changes, or what is made from it: older entries and rows are then not found.
FORMAT = 3
#: From a work folder to the state dict and the metrics of a model, once the block is entered. What may wait for a
#: server, closing a log, comes when the block is left: by then the model is published and its lock is free.
Make = Callable[[Path], AbstractContextManager[tuple[Mapping[str, Tensor], Mapping[str, Any]]]]
_FILES = ("weights.safetensors", "config.yaml", "metrics.json")


def key_of(spec: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that identify ``spec`` (plain JSON values), whatever the order of its entries, and
    wherever kdq's own objects lie (:mod:`kdq.utils.names`)."""
    text = json.dumps({"format": FORMAT, **stable(spec)}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_file(weights: Mapping[str, Tensor]) -> bytes:
    """The content of ``weights.safetensors``; equal weights make equal files. A tensor of several names is there under
    each: copies, for safetensors takes no memory twice."""
    return save({k: x.detach().cpu().clone(memory_format=torch.contiguous_format) for k, x in weights.items()})


@dataclass(frozen=True)
class Entry:
    """A finished model."""

    path: Path
    key: str
    metrics: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """The state dict, on the CPU. Raises KdqError where the file, whatever its checksum, is none."""
        try:
            return load_file(self.path / "weights.safetensors")
        except SafetensorError as error:
            raise KdqError(
                f"the stored model {self.path} is damaged ({one_line(error)}): delete this folder"
            ) from error


class Store:
    """The entries below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, spec: Mapping[str, Any], slug: str) -> Path:
        """Where the entry made from ``spec`` is, once it is there: it may have been made under another slug."""
        key = key_of(spec)
        named = self.root / f"{slug}-{key}"
        return named if named.is_dir() else next(self.root.glob(f"*-{key}"), named)

    def get(self, spec: Mapping[str, Any], slug: str) -> Entry | None:
        """The entry made from ``spec``, or None.

        Raises:
            KdqError: it is there but was damaged.
        """
        path = self.path(spec, slug)
        if not path.is_dir():
            return None
        try:
            digests = parse_json(regular(path / "entry.json").read_text())["sha256"]
            damaged = [name for name in _FILES if file_digest(path / name) != digests[name]]
            metrics = parse_json(regular(path / "metrics.json").read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KdqError(f"the stored model {path} is damaged ({error}): delete this folder and run again") from error
        if damaged:
            raise KdqError(f"{path / damaged[0]} does not match its checksum: delete the folder {path} and run again")
        return Entry(path, key_of(spec), metrics)

    def get_or_make(self, spec: Mapping[str, Any], slug: str, make: Make) -> Entry:
        """The entry made from ``spec``, everything that affects the weights as plain JSON values; where there is none,
        ``make`` gets a work folder that survives crashes: it resumes from what it finds there."""
        entry, key = self.get(spec, slug), key_of(spec)
        if entry is not None:
            # Left by a holder that was killed after it had published.
            shutil.rmtree(self.root / ".work" / key, ignore_errors=True)
            return entry
        with ExitStack() as making, locked(self.root / ".locks" / f"{key}.lock", slug):
            entry = self.get(spec, slug)  # published by the holder this one waited for
            if entry is not None:
                return entry
            work = self.root / ".work" / key
            work.mkdir(parents=True, exist_ok=True)
            weights, metrics = making.enter_context(make(work))
            self._publish(spec, slug, weights, metrics)
            shutil.rmtree(work, ignore_errors=True)
        entry = self.get(spec, slug)
        assert entry is not None
        return entry

    def _publish(
        self, spec: Mapping[str, Any], slug: str, weights: Mapping[str, Tensor], metrics: Mapping[str, Any]
    ) -> None:
        key = key_of(spec)
        for left in self.root.glob(f".publish-{key}-*"):  # by a holder that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=self.root, prefix=f".publish-{key}-"))
        try:
            (temporary / _FILES[0]).write_bytes(weights_file(weights))
            (temporary / _FILES[1]).write_text(OmegaConf.to_yaml(OmegaConf.create(stable(spec))))
            (temporary / _FILES[2]).write_text(json.dumps(metrics, indent=1) + "\n")
            digests = {name: file_digest(temporary / name) for name in _FILES}
            (temporary / "entry.json").write_text(json.dumps({"format": FORMAT, "key": key, "sha256": digests}))
            for file in temporary.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            temporary.chmod(0o755)
            try:
                os.rename(temporary, self.path(spec, slug))
            except OSError:
                # A holder that was taken for dead may have published first; equal specs make equal entries.
                if not self.path(spec, slug).is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
