"""How many cores kdq computes with."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdq.utils import cpu as cores
from kdq.utils.errors import KdqError


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_container_s_share_of_the_machine_counts(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cores.usable_cores() == expected


def test_without_control_groups_the_binding_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "absent")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(("said", "expected"), [(None, "1"), ("2", "2")])
def test_torch_uses_them_unless_the_user_says_otherwise(said: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if said is None else {"OMP_NUM_THREADS": said}
    code = (
        "import sys, pathlib, torch; from kdq.utils import cpu as cores; cores.QUOTA = pathlib.Path(sys.argv[1]); "
        "cores.use_cores(); print(torch.get_num_threads())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cpu.max")]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == expected


def drive(chooser: cores.ThreadChooser, seconds: Callable[[int], float], steps: int) -> list[int]:
    """The numbers of threads of so many steps, which take ``seconds(number)``."""
    used = []
    for _ in range(steps):
        used.append(chooser.threads)
        chooser.step(seconds(chooser.threads))
    return used


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 4: 0.4, 8: 0.25}, 8),  # a quiet machine
        ({1: 1.0, 4: 0.6, 8: 0.59}, 4),  # more threads must be worth it
        ({1: 1.0, 4: 0.96, 8: 0.96}, 1),
        ({1: 1.0, 4: 0.5, 8: 1.5}, 4),  # some cores are taken
        ({1: 1.0, 4: 250.0, 8: 500.0}, 1),
    ],
)
def test_the_fastest_number_of_threads_is_chosen(seconds: dict[int, float], expected: int) -> None:
    chooser = cores.ThreadChooser([8, 1, 4])
    drive(chooser, seconds.__getitem__, 2 * 3 * cores.ROUNDS)
    assert not chooser.trying
    assert chooser.threads == chooser.best == expected
    assert set(drive(chooser, seconds.__getitem__, 10)) == {expected}


def test_a_hopeless_number_costs_one_step_and_larger_ones_none() -> None:
    used = drive(cores.ThreadChooser([1, 4, 8]), {1: 1.0, 4: 250.0, 8: 500.0}.__getitem__, 50)
    assert (used[0], used.count(4), used.count(8)) == (1, 1, 0)


def test_a_number_that_is_clearly_slower_is_tried_once() -> None:
    used = drive(cores.ThreadChooser([1, 4, 8]), {1: 10.0, 4: 2.0, 8: 1.5}.__getitem__, 50)
    assert used.count(1) == 2
    assert used.count(4) == 2 * cores.ROUNDS  # not clearly


def test_first_steps_on_a_number_do_not_count_unless_they_are_hopeless() -> None:
    """They are slow here, three times, and twice for the number that is the better one."""
    chooser, before = cores.ThreadChooser([1, 2]), 0

    def seconds(threads: int) -> float:
        return {1: 1.0, 2: 0.8}[threads] * (1 if threads == before else 3)

    for _ in range(40):
        now = chooser.threads
        chooser.step(seconds(now))
        before = now
    assert chooser.threads == 2


def test_rare_steps_of_seconds_count() -> None:
    """The median on two threads is the better one, and every second step that counts waits for a core."""
    chooser, timed = cores.ThreadChooser([1, 2]), 0
    while chooser.trying:
        timed += chooser.threads == 2
        chooser.step(1.0 if chooser.threads == 1 else 0.8 if timed != 6 else 19.0)
    assert chooser.threads == 1


def test_a_machine_that_becomes_busy_is_noticed_and_one_that_becomes_quiet_too() -> None:
    chooser = cores.ThreadChooser([1, 2])
    quiet, busy = {1: 1.0, 2: 0.6}, {1: 1.5, 2: 60.0}
    drive(chooser, quiet.__getitem__, 1000)
    assert chooser.threads == 2
    assert not chooser.trying
    used = drive(chooser, busy.__getitem__, 500)
    assert used.count(2) == 2  # the step that was late, and one of the try
    assert chooser.threads == 1
    assert not chooser.trying
    spent = 60.0 + 4 * 1.5
    used = drive(chooser, quiet.__getitem__, int(2 * cores.SELDOM * spent))
    assert used[-1] == 2


def test_steps_that_take_a_little_longer_start_no_try() -> None:
    chooser = cores.ThreadChooser([1, 2])
    drive(chooser, {1: 1.0, 2: 0.6}.__getitem__, 100)
    assert set(drive(chooser, {1: 9.0, 2: 1.7}.__getitem__, 10_000)) == {2}
    assert chooser.threads == 2
    drive(chooser, {1: 9.0, 2: 6.0}.__getitem__, 1)  # a disk that is slow once
    assert not chooser.trying


def test_tries_on_a_busy_machine_cost_a_hundredth() -> None:
    chooser, spent, steps = cores.ThreadChooser([1, 2]), 0.0, 20_000
    for _ in range(steps):
        seconds = {1: 0.01, 2: 2.5}[chooser.threads]
        spent += seconds
        chooser.step(seconds)
    assert spent < 1.02 * 0.01 * steps + 2.5  # the first one comes when nothing has been gained yet


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "many"])
def test_an_impossible_number_of_threads_is_refused(threads: object) -> None:
    with pytest.raises(KdqError, match=r"trainer\.threads"):
        cores.thread_numbers(threads)  # type: ignore[arg-type]


def test_what_the_user_says_is_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # read by torch when it is loaded
    assert cores.thread_numbers() == [torch.get_num_threads()]
    assert cores.thread_numbers(5) == [5]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cores.thread_numbers() == [1, 4, 8]
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    assert cores.thread_numbers() == [1]
    assert not cores.ThreadChooser([1]).trying
    assert set(drive(cores.ThreadChooser([5]), lambda _: 1e6, 1000)) == {5}


def test_torch_settles_on_the_fastest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the pool grows again, and when time is over in the middle of a try."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    before, now = torch.get_num_threads(), 0.0
    monkeypatch.setattr(cores.time, "perf_counter", lambda: now)

    def settle(seconds: dict[int, float], limit: float) -> int:
        def call() -> None:
            nonlocal now
            now += seconds[torch.get_num_threads()]

        chosen = cores.settle_threads(call, seconds=limit)
        assert torch.get_num_threads() == chosen
        return chosen

    try:
        assert settle({1: 1.0, 2: 99.0}, 1e9) == 1
        assert settle({1: 1.0, 2: 0.6}, 1e9) == 2
        assert settle({1: 1.0, 2: 0.6}, 2.5) == 1  # two threads had no time to show anything
    finally:
        torch.set_num_threads(before)
