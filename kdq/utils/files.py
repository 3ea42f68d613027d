"""Files: written so that a reader, or a rerun after a crash, sees the old one or the new one and nothing between; read
as if anyone had written them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes ``path``'s place, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for files that anyone may have written.

    Raises:
        ValueError: whatever is wrong with the text, nested too deeply included.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def regular(path: Path) -> Path:
    """``path`` itself, if a regular file is there: opening a pipe would wait for ever.

    Raises:
        OSError: there is none, or something else.
    """
    if not S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a regular file")
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal."""
    with regular(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _umask() -> int:
    # mkstemp makes files private; results are for everyone the user's umask lets in.
    umask = os.umask(0)
    os.umask(umask)
    return umask
