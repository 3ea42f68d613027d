"""Waiting that ends."""

import threading

import pytest

from kdq.tracking import patience as module
from kdq.tracking.patience import Patience


def test_a_call_that_never_ends_is_left_and_nobody_waits_again() -> None:
    never, patience, asked = threading.Event(), Patience(0.2), []
    with pytest.raises(TimeoutError):
        patience.wait(never.wait)
    assert patience.left == 0
    with pytest.raises(TimeoutError):
        patience.wait(lambda: asked.append(1))
    assert not asked
    assert patience.wait(lambda: 7, at_least=5.0) == 7
    never.set()


def test_failures_are_raised_and_cost_their_time_and_quick_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(5.0)
    assert patience.wait(lambda: 7) == 7
    assert patience.left == 5.0
    with pytest.raises(ZeroDivisionError):
        patience.wait(lambda: 1 // 0)
    assert patience.left < 5.0
    monkeypatch.setattr(module, "FREE", 0.0)
    left = patience.left
    patience.wait(lambda: 7)
    assert patience.left < left
