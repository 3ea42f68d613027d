"""A lock that processes of several hosts share through a folder: a file that names its holder, who keeps it fresh."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

log = logging.getLogger(__name__)

#: Seconds without a sign of life after which a holder on another host counts as dead. On this host its process is
#: looked for.
LEASE_SECONDS = 60.0
#: Seconds that a holder has to write its name into the file that it created.
NAMELESS_SECONDS = 2.0


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock ``path`` while the block runs. Whoever holds it is waited for, and taken over from when dead.
    Waiting says ``what`` is made under the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(path, lease_duration=LEASE_SECONDS)
    try:
        lease.acquire(timeout=0)
    except Timeout:
        owner = lease.owner
        who = f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "a process that left no name"
        log.info("waiting for %s, which is making %s (lock: %s)", who, what, path)
        _wait(lease, path)
    try:
        yield
    finally:
        lease.release()


def _wait(lease: SoftFileLease, path: Path) -> None:
    nameless: os.stat_result | None = None
    while True:
        with suppress(Timeout):
            lease.acquire(timeout=NAMELESS_SECONDS, poll_interval=0.5)
            return
        file = None
        with suppress(OSError):  # released just now
            file = path.stat()
        if file is None or file.st_size:
            nameless = None
        elif nameless is not None and os.path.samestat(file, nameless):
            _mark(path)
        else:
            nameless = file


def _mark(path: Path) -> None:
    """Write a line into a lock that stayed empty: power was lost between its creation and its content. The library
    respects an empty lock for ever, and takes over one whose content is damaged. In a record that its holder writes
    at this very moment the line is an unknown field, which readers skip."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, b"empty=1\n")
        finally:
            os.close(descriptor)
