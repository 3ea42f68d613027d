"""How many CPU cores this process may use, and making torch use them: neither more nor fewer."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

#: Where Linux says how much time a control group (a container, a Slurm job) may have: microseconds a period.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
