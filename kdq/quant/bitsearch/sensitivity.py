"""Bit widths from a table of single changes, as mixed-precision tools usually choose them.

The table says what each layer's loss adds to the network when it alone has a width. Sums of such losses are what an
integer programme can minimise (:func:`exact`) and what a sorted list can be cut from (:func:`sensitivity_once`, the
scheme of AIMET's automatic mixed precision); neither sees that two layers can be cheap alone and ruinous together.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from kdq.quant.bitsearch.search import Budget, Costs, Found, Point, cost_of, distinct, widest
from kdq.quant.bitsearch.trace import Assignment, Measure, Trace
from kdq.utils.errors import KdqError

#: ``table[layer][bits]``: a loss.
Table = Mapping[str, Mapping[int, float]]


def sensitivities(costs: Costs, evaluate: Callable[[Assignment], Measure]) -> Table:
    """``table[layer][bits]``: the loss that this one change adds to the network with every layer at its widest."""
    start = widest(costs)
    base = evaluate(start).loss
    table: dict[str, dict[int, float]] = {}
    for layer in reversed(list(costs)):
        table[layer] = {bits: evaluate({**start, layer: bits}).loss - base for bits in sorted(costs[layer])}
    return {layer: table[layer] for layer in costs}


def exact(costs: Costs, table: Table, cost: float) -> Assignment:
    """The assignment with the least sum of ``table`` among those that cost at most ``cost``: an integer programme with
    one binary variable per layer and width, solved by scipy's milp.

    >>> costs = {"conv": {2: 20.0, 8: 80.0}, "fc": {2: 20.0, 8: 80.0}}
    >>> exact(costs, {"conv": {2: 1.0, 8: 0.0}, "fc": {2: 0.1, 8: 0.0}}, cost=100.0)
    {'conv': 8, 'fc': 2}
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    variables = [(layer, bits) for layer in costs for bits in sorted(costs[layer])]
    one_each = np.array([[float(layer == owner) for owner, _ in variables] for layer in costs])
    price = np.array([[costs[layer][bits] for layer, bits in variables]])
    # Scaled to about one: the losses of wide layers are far below the solver's tolerances.
    losses = np.array([table[layer][bits] for layer, bits in variables])
    limit = cost
    while True:
        result = milp(
            losses / (np.abs(losses).max() or 1.0),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(price / cost, -np.inf, limit / cost)],
            integrality=np.ones(len(variables)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise KdqError(f"the integer programme of the bit search found nothing: {result.message}")
        found = {layer: bits for (layer, bits), on in zip(variables, result.x, strict=True) if on > 0.5}
        if cost_of(costs, found) <= cost:
            return found
        limit -= 1e-6 * cost  # what the solver tolerates


def sensitivity_once(costs: Costs, table: Table, cost: float) -> Assignment:
    """All steps sorted once by loss per cost saved, a layer's own steps in order; the shortest list that meets
    ``cost`` is taken."""
    steps: list[tuple[float, str, int]] = []
    for layer, widths in costs.items():
        dearest = -np.inf
        for wide, narrow in itertools.pairwise(sorted(widths, reverse=True)):
            price = (table[layer][narrow] - table[layer][wide]) / (costs[layer][wide] - costs[layer][narrow])
            dearest = max(dearest, price)  # a step cannot come before the wider one of its layer
            steps.append((dearest, layer, narrow))
    assignment = widest(costs)
    for _, layer, bits in sorted(steps, key=lambda step: step[0]):
        if cost_of(costs, assignment) <= cost:
            break
        assignment[layer] = bits
    return assignment


#: ``(costs, table, limit) -> assignment``.
METHODS: dict[str, Callable[[Costs, Table, float], Assignment]] = {"exact": exact, "sensitivity_once": sensitivity_once}


def from_table(method: str, trace: Trace, budget: Budget) -> Found:
    """The assignment that ``method`` of :data:`METHODS` chooses for the budget's one limit, measured."""
    if len(budget.limits) != 1 or budget.max_drop is not None:
        raise KdqError(f"method={method} takes one budget, avg_bits or size_bytes; max_drop and several need greedy")
    ((costs, limit),) = budget.limits
    costs = distinct(costs)
    start = widest(costs)
    chosen = METHODS[method](costs, sensitivities(costs, trace), limit)
    points = [Point(a, cost_of(costs, a), trace(a)) for a in (start, chosen)]
    return Found(points[1], points, len(trace.asked))
