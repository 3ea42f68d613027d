"""What this process takes of the machine: CPU cores, and memory that is kept for the next step."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

log = logging.getLogger(__name__)

#: Where Linux says how much time a control group (a container, a Slurm job) may have: microseconds a period.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
#: Of malloc.h: how much free memory at the heap's end is given back, and how many blocks may be maps of their own.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def usable_cores() -> int:
    """Cores that the process is bound to, or fewer where its container is granted less time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        granted = bound if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError):
        granted = bound
    return max(1, min(bound, granted))


def use_cores() -> None:
    """One thread for each usable core, unless OMP_NUM_THREADS says how many.

    torch counts the machine's cores; in a container with a share of them its threads would wait for each other.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = usable_cores()
        torch.set_num_threads(cores)
        if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 1.5 * cores > 1.5:
            log.warning(
                "this machine is busy (load %.1f on %d cores), and threads wait for each other: OMP_NUM_THREADS=1 may "
                "be several times faster", load, cores,
            )  # fmt: skip


def keep_freed_memory() -> None:
    """Let this process reuse what it has freed, on the CPU; its peak grows a little.

    By default glibc gives large blocks back to the system when they are freed, so that every step's activations are new
    pages, zeroed one fault at a time: 28 000 faults and a sixth of the time of a step that trains two ResNet-20s. Does
    nothing where C's library is not glibc, or where ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_MAX_`` say what is
    wanted.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
