"""What is timed, in which order, and what is made of the times."""

from __future__ import annotations

from typing import Any

import pytest

from kdq.deploy import latency


def test_calls_take_turns_and_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that calls advance themselves: no timing."""
    now, order = [0.0], []
    costs = {"slow": [9.0, *(0.01 * run for run in range(1, 21))], "fast": [9.0, *[0.002] * 20]}

    def call(name: str) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += costs[name].pop(0)

        return run

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = latency.alternating({name: call(name) for name in ("slow", "fast")}, batch=8, runs=20, warmup=1)
    assert order == ["slow", "fast"] * 21
    assert found["slow"].min_ms == pytest.approx(10)
    assert found["slow"].median_ms == pytest.approx(105)
    assert found["slow"].p95_ms == pytest.approx(190.5)
    assert found["fast"].median_ms == pytest.approx(2)
    assert found["fast"].throughput == pytest.approx(4000)
