"""Learning-rate schedules at the points that define them, and recipes that cannot be."""

from typing import Any

import pytest
import torch

from kdq.distill.config import SCHEDULES
from kdq.train.recipe import Recipe
from kdq.utils.errors import KdqError


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"epochs": 10, "batch_size": 32, "lr": 0.1} | changes))


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
        ("one_cycle", {0.0: 0.05, 0.1: 0.525, 0.2: 1.0, 0.6: 0.5, 1.0: 0.0}),
        ("cosine", {0.0: 0.05, 0.2: 1.0, 0.6: 0.5, 1.0: 0.0}),
        ("multistep", {0.0: 1.0, 0.62: 1.0, 0.63: 0.1, 0.75: 0.01, 0.875: 0.001}),
    ],
)
def test_schedules(schedule: str, points: dict[float, float]) -> None:
    found = recipe(schedule=schedule)
    assert {progress: found.factor(progress) for progress in points} == pytest.approx(points)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_factors_lie_between_zero_and_one(schedule: str, warmup: float) -> None:
    factors = [recipe(schedule=schedule, warmup=warmup).factor(step / 50) for step in range(51)]
    assert all(0 <= factor <= 1 for factor in factors)


def test_the_scheduler_follows_the_optimizer_steps() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = recipe().optimizer([parameter])
    scheduler = recipe().scheduler(optimizer, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * recipe().factor(step / 10) for step in range(10)])
    assert optimizer.defaults["nesterov"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "one_cycle, cosine, multistep, constant"),
        ({"epochs": 0}, "at least 1"),
        ({"accumulate": 3}, "must divide recipe.batch_size=32"),
        ({"lr": -0.1}, "recipe.lr=-0.1 must be a number of at least 0"),
        ({"warmup": 1.5}, "recipe.warmup=1.5 must be a number from 0 to 1"),
        ({"label_smoothing": -0.1}, "less than 1"),
        ({"ema": 1.0}, "less than 1"),
        ({"epochs": "ten"}, "recipe.epochs='ten' must be a whole number"),
        ({"epochs": 2.5}, "a whole number"),
        ({"lr": True}, "recipe.lr=True must be a number"),
        ({"clip_grad": "1"}, "must be a number or null"),
        ({"schedule": None}, "must be a name"),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KdqError, match=message):
        recipe(**changes)
