"""How long inference takes: medians over runs that alternate between what is compared.

Other work on a machine slows everything down for a while; calls that take turns in one process share those whiles, so
that the ratio of their medians says more than either of them. Each turn begins with a call that is not timed: it brings
back into the caches what the others have driven out, for in service a model runs alone.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

#: Timed calls in a turn.
TURN = 5


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


def alternating(calls: Mapping[str, Callable[[], Any]], batch: int, runs: int, warmup: int = 3) -> dict[str, Latency]:
    """The latency of each call, on ``batch`` images, over ``runs`` of it in turns of :data:`TURN`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(0, runs, TURN):
        for name, call in calls.items():
            for _ in range(1 if done else warmup):
                call()
            for _ in range(min(TURN, runs - done)):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Latency(
            1000 * min(times), 1000 * statistics.median(times), 1000 * float(np.quantile(times, 0.95)), batch, runs
        )
        for name, times in seconds.items()
    }


def of_runners(
    runners: Mapping[str, Callable[[np.ndarray], Any]], shape: tuple[int, ...], batch: int, runs: int
) -> dict[str, Latency]:
    """:func:`alternating` for runners of models on random images of ``shape`` ``(channels, height, width)``."""
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    return alternating({name: partial(run, images) for name, run in runners.items()}, batch, runs)


def of_networks(networks: Mapping[str, nn.Module], shape: tuple[int, ...], batch: int, runs: int) -> dict[str, Latency]:
    """:func:`alternating` for torch networks in eval mode, where their parameters are: on the CPU with torch's own
    number of threads, or on a GPU, where a call ends when the device has done its work."""
    device = next(next(iter(networks.values())).parameters()).device
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)

    def forward(network: nn.Module) -> None:
        network(images)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    with torch.inference_mode():
        return alternating({name: partial(forward, network) for name, network in networks.items()}, batch, runs)
