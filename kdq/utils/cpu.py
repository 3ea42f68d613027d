"""What this process takes of the machine: CPU cores, and memory that is kept for the next step."""

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from kdq.utils.errors import KdqError

#: What ``trainer.threads`` says when the number of threads is to be found out.
AUTO = "auto"
#: A number of threads is tried for two steps, of which the second counts, in each of so many rounds.
ROUNDS = 5
#: How much slower than the best a number is whose try ends early; and already after a step that would not count.
CLEARLY, HOPELESS = 2.0, 20.0
#: Share of the time on fewer threads that more threads must need less than.
WORTH = 0.95
#: Steps are late when they take longer than so many usual ones; a new try begins when all delays together are so long,
#: in usual steps. (A disk that is slow once does not start one; a thread that waits for a core does within seconds.)
LATE, PATIENCE = 3.0, 20.0
#: A try for more threads begins after so many times as long as the last one took.
SELDOM = 100.0

#: Where Linux says how much time a control group (a container, a Slurm job) may have: microseconds a period.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
#: Parameters of malloc.h: free memory kept at the end of the heap, and how many blocks may be maps of their own.
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


def thread_numbers(threads: int | str = AUTO) -> list[int]:
    """The numbers of threads that may be tried, the smallest first; a single one where the user has said which.

    Args:
        threads: the option ``trainer.threads``: a number, which is kept, or ``auto``: one, half and all of the usable
            cores, unless OMP_NUM_THREADS says how many.

    >>> thread_numbers(3)
    [3]
    """
    import torch

    if threads != AUTO:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise KdqError(f"trainer.threads={threads} must be auto or a number from 1 up")
        return [threads]
    if "OMP_NUM_THREADS" in os.environ:
        return [torch.get_num_threads()]
    cores = usable_cores()
    return sorted({1, max(1, cores // 2), cores})


def use_cores(threads: int | str = AUTO) -> None:
    """Use as many threads as the user says, or else one for each usable core.

    torch counts the machine's cores; in a container with a share of them its threads would wait for each other.
    """
    import torch

    torch.set_num_threads(thread_numbers(threads)[-1])


class ThreadChooser:
    """Chooses among numbers of threads by how long steps take, and again when the machine has become busy or quiet.

    Threads wait for each other many times in a step. Where another program has one of their cores, they wait for a
    time slice each time, and two threads may be a hundred times slower than one; alone, they are nearly twice as fast.
    Only a try can tell. Steps that are needed anyway are taken at each number in turn, the smallest first. A number
    that is clearly slower than the best ends its try, and with it those that are larger still. More threads are chosen
    only if they are faster by more than 5 %. Means are compared, not medians: the rare step that waits for seconds
    counts.

    A new try begins when steps have taken far longer than the chosen number promised, and, while fewer threads than
    allowed are chosen, whenever the last try was shorter than a hundredth of the time since then.

    Args:
        numbers: of threads; a single one is kept.

    >>> chooser = ThreadChooser([1, 2])
    >>> while chooser.trying:
    ...     chooser.step(0.3 if chooser.threads == 1 else 0.2)
    >>> chooser.threads
    2
    """

    #: Seconds of the last try and of the steps since then, and how late those were, in usual steps.
    _spent: float
    _since: float
    _late: float

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = sorted(numbers)
        #: Whether numbers are being tried, and what the next step shall use.
        self.trying, self.threads = False, self.numbers[-1]
        self._begin()

    def step(self, seconds: float) -> None:
        """A step on :attr:`threads` threads took so long."""
        if self.trying:
            self._spent += seconds
            self._time(seconds)
        elif len(self.numbers) > 1:
            self._since += seconds
            self._late = max(0.0, self._late + seconds / self._mean(self.threads) - LATE)
            busier = self.threads > self.numbers[0] and self._late > PATIENCE
            if busier or (self.threads < self.numbers[-1] and self._since > SELDOM * self._spent):
                self._begin()

    @property
    def best(self) -> int:
        """The number to choose after what has been timed so far; the largest before anything has."""
        timed = [number for number in self._kept if self._times[number]]
        chosen = timed[0] if timed else self.numbers[-1]
        for number in timed[1:]:
            if self._mean(number) < WORTH * self._mean(chosen):
                chosen = number
        return chosen

    def _mean(self, number: int) -> float:
        return fmean(self._times[number])

    def _begin(self) -> None:
        self._times: dict[int, list[float]] = {number: [] for number in self.numbers}
        self._kept, self._turns, self._round = list(self.numbers), list(self.numbers), 1
        self._spent = self._since = self._late = 0.0
        self.trying = len(self.numbers) > 1
        self._next()

    def _next(self) -> None:
        """Go to the next number of this round or of another one, or end the try."""
        if not self._turns and self._round < ROUNDS:
            self._round += 1  # to and fro, so that no number gets every second step
            self._turns = self._kept[:: 1 if self._round % 2 else -1]
        self.trying = len(self._kept) > 1 and bool(self._turns)
        self.threads, self._fresh = (self._turns.pop(0), True) if self.trying else (self.best, False)

    def _time(self, seconds: float) -> None:
        means = {number: self._mean(number) for number in self._kept if self._times[number]}
        # The first step after a change starts threads and fills caches. It counts only where it says enough.
        if self._fresh and not (means and seconds > HOPELESS * min(means.values())):
            self._fresh = False
            return
        self._times[self.threads].append(seconds)
        means[self.threads] = self._mean(self.threads)
        best = min(means, key=means.__getitem__)
        slow = {number for number, mean in means.items() if mean > CLEARLY * means[best]}
        most = min((number for number in slow if number > best), default=self.numbers[-1])
        self._kept = [number for number in self._kept if number not in slow and number <= most]
        self._turns = [number for number in self._turns if number in self._kept]
        self._next()


def settle_threads(call: Callable[[], object], threads: int | str = AUTO, seconds: float = 1.0) -> int:
    """Let torch use the number of threads on which ``call`` is fastest, and return it.

    Args:
        call: what is tried a few times, such as a forward pass on some images.
        threads: the option ``trainer.threads``; a number, or one that OMP_NUM_THREADS gives, is not tried but used.
        seconds: after which a try that has an answer ends; a call is never interrupted.
    """
    import torch

    chooser, end = ThreadChooser(thread_numbers(threads)), time.perf_counter() + seconds
    while chooser.trying and time.perf_counter() < end:
        torch.set_num_threads(chooser.threads)
        start = time.perf_counter()
        call()
        chooser.step(time.perf_counter() - start)
    torch.set_num_threads(chooser.best)
    return chooser.best


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


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()
