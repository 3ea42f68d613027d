"""Ctrl-C and SIGTERM end a command within seconds, with one line and nothing left running.

signal  ->  KeyboardInterrupt where the program is, which leaves its blocks: logs are closed, locks released
        ->  a thread that ends the process when this takes longer than PATIENCE (a server that does not answer,
            an operation that looks for no signals); what is left behind, the next command takes over
"""

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

#: Seconds in which an interrupted command leaves its blocks.
PATIENCE = 2.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ending = threading.Lock()
_interrupted = threading.Event()


def interrupted() -> bool:
    """Whether a signal has come: errors from then on are of work that it broke off.

    >>> interrupted()
    False
    """
    return _interrupted.is_set()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End this process with 130 (SIGINT) or 143 (SIGTERM) when a signal comes while the block runs.

    A ``KeyboardInterrupt`` that says in its first argument where the same command goes on is quoted.
    """
    received = queue.SimpleQueue[int]()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if not interrupted():  # further ones change nothing
            _interrupted.set()
            # From a destructor it gets no further, and Python complains: then the thread ends the process.
            sys.unraisablehook = lambda raised: None
            raise KeyboardInterrupt

    # Python heeds signals between two of its own operations, those with small numbers first; wake-ups come at once,
    # whatever runs, and in order.
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours, received), daemon=True).start()
    for signum in SIGNALS:
        signal.signal(signum, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        _end(received.get() if interrupted() else signal.SIGINT, str(error))
    except SystemExit:
        if not interrupted():
            raise
        _end(received.get())  # a library answered the KeyboardInterrupt by leaving Python
    finally:
        for signum in SIGNALS:  # what comes while Python ends changes nothing: everything is done
            signal.signal(signum, signal.SIG_IGN)


def _watch(wakeups: int, received: queue.SimpleQueue[int]) -> None:
    while True:
        for signum in os.read(wakeups, 1):
            if signum in SIGNALS:
                received.put(signum)
                time.sleep(PATIENCE)
                _end(signum)


def _end(signum: int, where: str = "") -> None:
    with _ending:  # by whoever comes first
        with suppress(OSError, ValueError):  # nobody may read any more
            word = "interrupted" if signum == signal.SIGINT else "terminated"
            print(f"kdq: {word}; the same command goes on from {where or 'what is there'}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        kill_children()
        os._exit(128 + signum)


def kill_children() -> None:
    """Kill every process that this one has started, and those that they have. Most end with their parent by themselves,
    but one that is still importing does not look."""
    while found := _descendants():
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _descendants() -> set[int]:
    """The living processes below this one; none where the system has no ``/proc``."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = status.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(status.parent.name))
    found, left = set[int](), [os.getpid()]
    while left:
        left = [child for parent in left for child in children.get(parent, ()) if child not in found]
        found.update(left)
    return found
