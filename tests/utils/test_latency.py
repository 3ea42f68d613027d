"""What is timed, in which order, and what is made of the times."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdq.utils import latency


def test_calls_take_turns_of_which_the_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that calls advance themselves: no timing."""
    now, order = [0.0], []
    timed = {"slow": [0.01 * run for run in range(1, 8)], "fast": [0.002] * 7}
    costs = {name: [9.0, *times[:5], 9.0, *times[5:]] for name, times in timed.items()}

    def call(name: str) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += costs[name].pop(0)

        return run

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = latency.alternating({name: call(name) for name in ("slow", "fast")}, batch=8, runs=7, warmup=1)
    assert order == ["slow"] * 6 + ["fast"] * 6 + ["slow"] * 3 + ["fast"] * 3
    assert found["slow"].min_ms == pytest.approx(10)
    assert found["slow"].median_ms == pytest.approx(40)
    assert found["slow"].p95_ms == pytest.approx(67)
    assert found["slow"].runs == 7
    assert found["fast"].median_ms == pytest.approx(2)
    assert found["fast"].throughput == pytest.approx(4000)


class _Seen(nn.Module):
    """Says when it runs, and on what."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.weight, self.events = nn.Parameter(torch.zeros(1)), events

    def forward(self, x: Tensor) -> Tensor:
        self.events.append(("forward", tuple(x.shape), x.device.type, torch.is_inference_mode_enabled()))
        return x


def test_networks_are_timed_until_their_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ``meta``, a device that computes nothing, in place of a GPU."""
    for device in ("cpu", "meta"):
        events: list[Any] = []
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda which, to=events: to.append(which.type))
        monkeypatch.setattr(latency.time, "perf_counter", lambda to=events: to.append("clock") or 0.0)
        network = _Seen(events).to(device)
        latency.of_networks({"one": network}, (3, 8, 8), batch=4, runs=2)
        call = [("forward", (4, 3, 8, 8), device, True), *([device] if device != "cpu" else [])]
        assert events == [*call * 3, "clock", *call, "clock", "clock", *call, "clock"]
