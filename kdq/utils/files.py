"""Files: written so that a reader, or a rerun after a crash, sees the old one or the new one and nothing between; read
as if anyone had written them."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes ``path``'s place, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for files that anyone may have written: ValueError whatever is wrong with the text."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def regular(path: Path) -> Path:
    """``path`` itself, or OSError where no regular file is there: opening a pipe would wait for ever."""
    if not S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: a file is needed")
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal."""
    with regular(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
