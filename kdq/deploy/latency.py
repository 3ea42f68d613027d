"""How long inference takes: medians over runs that alternate between what is compared.

Other work on a machine slows everything down for a while; calls that take turns in one process share those whiles, so
that the ratio of their medians says more than either of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call: ``median_ms``, ``p95_ms`` and the fastest, ``min_ms``, over ``runs`` calls on ``batch``
    images each. On a machine that is busy otherwise, the fastest says most."""

    min_ms: float
    median_ms: float
    p95_ms: float
    batch: int
    runs: int

    @property
    def throughput(self) -> float:
        """Images a second at the median."""
        return 1000 * self.batch / self.median_ms


def alternating(calls: Mapping[str, Callable[[], Any]], batch: int, runs: int, warmup: int = 5) -> dict[str, Latency]:
    """The latency of each call; they take turns, ``warmup`` times untimed and then ``runs`` times.

    Args:
        batch: how many images a call is for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(warmup + runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Latency(
            1000 * min(times), 1000 * statistics.median(times), 1000 * float(np.quantile(times, 0.95)), batch, runs
        )
        for name, times in seconds.items()
    }


def of_sessions(
    sessions: Mapping[str, Any], shape: tuple[int, ...], batch: int, runs: int, warmup: int = 5
) -> dict[str, Latency]:
    """:func:`alternating` for ONNX Runtime sessions on random images of ``shape`` ``(channels, height, width)``."""
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    calls = {name: lambda runner=runner: runner.run(None, {"image": images}) for name, runner in sessions.items()}
    return alternating(calls, batch, runs, warmup)
