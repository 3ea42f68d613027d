"""The bit search on losses that are known in closed form."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from kdq.quant.bitsearch.search import (
    Budget,
    cost_of,
    greedy,
    widest,
)
from kdq.quant.bitsearch.sensitivity import exact, from_table, sensitivities, sensitivity_once
from kdq.quant.bitsearch.trace import Assignment, Measure, Trace
from kdq.utils.errors import KdqError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def _problem(layers: int, seed: int) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Layer sizes and sensitivities over three orders of magnitude."""
    random = np.random.default_rng(seed)
    sizes = {f"layer{i}": float(s) for i, s in enumerate(10 ** random.uniform(2, 5, layers).round(2))}
    costs = {layer: {bits: bits * size for bits in WIDTHS} for layer, size in sizes.items()}
    return costs, {layer: float(10 ** random.uniform(-2, 1)) for layer in sizes}


def _additive(sensitivity: dict[str, float]) -> object:
    def evaluate(assignment: Assignment) -> Measure:
        loss = sum(sensitivity[layer] * 4.0**-bits for layer, bits in assignment.items())
        return Measure(loss, 100 - 10 * loss)

    return evaluate


@pytest.mark.parametrize("seed", range(5))
def test_exact_is_the_best_of_all_assignments(seed: int) -> None:
    costs, sensitivity = _problem(4, seed)
    evaluate = _additive(sensitivity)
    budget = 0.5 * cost_of(costs, widest(costs))
    chosen = exact(costs, sensitivities(costs, evaluate), budget)
    every = [dict(zip(costs, bits, strict=True)) for bits in itertools.product(WIDTHS, repeat=4)]
    best = min(evaluate(a).loss for a in every if cost_of(costs, a) <= budget)
    assert cost_of(costs, chosen) <= budget
    assert evaluate(chosen).loss == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_exact_meets_a_limit_to_the_last_bit(seed: int) -> None:
    """Of millions: what the solver tolerates is more than one."""
    costs, sensitivity = _problem(4, seed)
    costs = {layer: {bits: 1000.0 * round(cost) for bits, cost in widths.items()} for layer, widths in costs.items()}
    table = sensitivities(costs, _additive(sensitivity))
    best = exact(costs, table, 0.5 * cost_of(costs, widest(costs)))
    limit = cost_of(costs, best) - 1
    assert cost_of(costs, exact(costs, table, limit)) <= limit


@pytest.mark.parametrize("average", [2.5, 3.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_near_the_optimum_within_its_evaluations(seed: int, average: float) -> None:
    """21 layers and 7 widths, as ResNet-18: at most 150 evaluations."""
    costs, sensitivity = _problem(21, seed)
    evaluate = _additive(sensitivity)
    budget = average / 8 * cost_of(costs, widest(costs))
    found = greedy(costs, evaluate, Budget([(costs, budget)]))
    assert found.evaluations <= 150
    assert found.chosen.cost <= budget
    table = sensitivities(costs, evaluate)
    optimum = evaluate(exact(costs, table, budget)).loss
    once = evaluate(sensitivity_once(costs, table, budget)).loss
    assert optimum <= found.chosen.measure.loss * (1 + 1e-9)
    assert found.chosen.measure.loss <= 1.35 * optimum
    assert optimum <= once * (1 + 1e-9)


def test_every_step_lowers_one_layer_by_one_candidate() -> None:
    costs, sensitivity = _problem(6, 1)
    seen = []
    found = greedy(
        costs, _additive(sensitivity), Budget([(costs, 2.2 / 8 * cost_of(costs, widest(costs)))]), seen.append
    )
    assert seen == found.points
    *steps, last = found.points
    for before, after in itertools.pairwise(steps):
        assert after.step is not None
        layer, wide, narrow = after.step
        assert after.assignment == {**before.assignment, layer: narrow}
        assert (before.assignment[layer], wide - narrow) == (wide, 1)
        assert after.cost == pytest.approx(cost_of(costs, after.assignment))

    # The last step overshot the budget, and the room it left was given back to layers that had paid most.
    assert last.step is None
    assert all(last.assignment[layer] >= bits for layer, bits in steps[-1].assignment.items())
    assert last.measure is not None
    assert steps[-1].cost < last.cost


@pytest.mark.parametrize("seed", range(10))
def test_no_layer_that_was_narrowed_could_be_wider_within_the_budget(seed: int) -> None:
    costs, sensitivity = _problem(8, seed)
    limit = 3.1 / 8 * cost_of(costs, widest(costs))
    found = greedy(costs, _additive(sensitivity), Budget([(costs, limit)])).chosen.assignment
    assert cost_of(costs, found) <= limit
    for layer, bits in found.items():
        assert bits == WIDTHS[-1] or cost_of(costs, {**found, layer: bits + 1}) > limit


def test_room_is_given_back_though_a_later_step_of_a_layer_was_the_cheaper_one() -> None:
    """Losses as they are measured: the small layer's step to 3 bits costs more than the one to 2 that follows it."""
    costs = {"small": {4: 4.0, 3: 3.0, 2: 2.0}, "large": {4: 400.0, 3: 300.0, 2: 200.0}}
    losses = {"small": {4: 0.0, 3: 0.02, 2: 0.03}, "large": {4: 0.0, 3: 40.0, 2: 90.0}}

    def evaluate(assignment: Assignment) -> Measure:
        return Measure(sum(losses[layer][bits] for layer, bits in assignment.items()), 50.0)

    found = greedy(costs, evaluate, Budget([(costs, 310.0)]), context="widest")
    assert found.chosen.assignment == {"small": 4, "large": 3}


@pytest.mark.parametrize("method", ["greedy", "exact", "sensitivity_once"])
def test_a_width_that_saves_nothing_is_not_chosen(method: str) -> None:
    """Files are padded: 7 bits may take as many bytes as 8, and the step to 6 is still worth taking."""
    costs = {layer: {8: 16.0, 7: 16.0, 6: 12.0, 4: 8.0} for layer in "abc"}
    evaluate, budget = _additive({"a": 1.0, "b": 2.0, "c": 8.0}), Budget([(costs, 40.0)])
    find = greedy(costs, evaluate, budget) if method == "greedy" else from_table(method, Trace(evaluate), budget)
    assert cost_of(costs, find.chosen.assignment) == 40.0
    assert 7 not in find.chosen.assignment.values()


@pytest.mark.parametrize("widths", [(2, 4), (2, 4, 8)])
def test_prices_are_measured_in_context(widths: tuple[int, ...]) -> None:
    """Two layers are cheap alone and ruinous together; a table of single changes cannot know. Of three widths, all
    prices at two bits are measured before the first such step, which makes them stale."""
    costs = {layer: {bits: float(bits) for bits in widths} for layer in "abc"}

    def evaluate(assignment: Assignment) -> Measure:
        low = {layer for layer, bits in assignment.items() if bits == 2}
        loss = {"a": 0.01, "b": 0.011, "c": 0.1}
        alone = sum(loss[x] * {2: 1.0, 4: 0.01, 8: 0.0}[bits] for x, bits in assignment.items())
        return Measure(alone + (5.0 if {"a", "b"} <= low else 0.0), 50.0)

    budget = 8.0  # two of the three layers at two bits
    assert evaluate(exact(costs, sensitivities(costs, evaluate), budget)).loss > 5
    assert greedy(costs, evaluate, Budget([(costs, budget)])).chosen.assignment == {"a": 2, "b": 4, "c": 2}


def test_max_drop_is_kept_and_used_up() -> None:
    costs, sensitivity = _problem(8, 2)
    evaluate = _additive(sensitivity)
    top1 = evaluate(widest(costs)).top1
    found = greedy(costs, evaluate, Budget(max_drop=0.5, top1=top1))
    assert top1 - found.chosen.measure.top1 <= 0.5
    for layer, bits in found.chosen.assignment.items():
        if bits > 2:  # no further step fits
            assert top1 - evaluate({**found.chosen.assignment, layer: bits - 1}).top1 > 0.5
    assert greedy(costs, evaluate, Budget(max_drop=0.0, top1=top1)).chosen.assignment == widest(costs)


def test_a_killed_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    costs, sensitivity = _problem(9, 3)
    evaluate, budget = _additive(sensitivity), Budget([(costs, 3 / 8 * cost_of(costs, widest(costs)))])
    undisturbed = greedy(costs, evaluate, budget)
    calls = 0

    def dying(assignment: Assignment) -> Measure:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return evaluate(assignment)

    for _ in range(100):
        try:
            resumed = greedy(costs, Trace(dying, tmp_path / "trace.json", "key"), budget)
            break
        except KeyboardInterrupt:
            continue
    assert resumed == undisturbed
    assert calls == undisturbed.evaluations + (undisturbed.evaluations - 1) // 6  # nothing was measured twice
    stored = json.loads((tmp_path / "trace.json").read_text())
    assert len(stored["evaluations"]) == undisturbed.evaluations


def test_stale_and_damaged_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    Trace(lambda assignment: Measure(0.0, 0.0), path, "one")({"a": 2})
    with pytest.raises(KdqError, match="belongs to another model"):
        Trace(lambda assignment: Measure(0.0, 0.0), path, "two")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(KdqError, match="is damaged"):
        Trace(lambda assignment: Measure(0.0, 0.0), path, "one")


def test_impossible_budgets_are_refused() -> None:
    costs, _ = _problem(3, 0)
    with pytest.raises(KdqError, match="cannot meet its budget"):
        Budget([(costs, 1.0)])
    least = sum(min(widths.values()) for widths in costs.values())
    assert Budget([(costs, least)]).limits
    with pytest.raises(KdqError, match="cannot meet its budget"):
        Budget([(costs, least * 0.999)])
    with pytest.raises(KdqError, match="no budget"):
        Budget()
    with pytest.raises(KdqError, match="nan"):
        Trace(lambda assignment: Measure(float("nan"), 0.0))({"a": 2})
