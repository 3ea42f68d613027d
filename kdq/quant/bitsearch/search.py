"""Which layer gets how many bits: the search, knowing nothing of networks.

An *assignment* maps layer names to widths. Two things are given: ``evaluate``, which measures the loss of an
assignment (in whatever context the caller builds), and a *cost table*, ``costs[layer][bits]``, in any additive unit:
weight bits, packed bytes, or bits times multiply-adds.

:func:`greedy` starts with every layer at its widest candidate and lowers, again and again, the layer whose next step
costs the least loss for the cost it saves. Measuring every possible step before each move would take
(layers x steps)^2 evaluations, so

- a step's price is measured when it is about to be taken: with the other layers at their widest, once, or with them as
  chosen so far (``context``), and then again whenever another layer's step was taken in between;
- until then a step is priced by the noise law of a uniform grid, whose squared error is proportional to ``4^-bits``,
  scaled by one measurement per layer. Down to :data:`TRUSTED_BITS` the law holds well enough to take the step on it:
  the losses there are too small to tell apart.

The last step usually saves more than was missing: steps that fit into what it left are taken back, the dearest first.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kdq.quant.bitsearch.trace import Assignment, Measure, Trace
from kdq.utils.errors import KdqError

#: ``costs[layer][bits]``; its keys are the layers and their candidate widths.
Costs = Mapping[str, Mapping[int, float]]
#: A layer, its width, and its next one.
Step = tuple[str, int, int]
#: Where the price of a layer's step is measured: with the other layers as chosen so far, or at their widest. If losses
#: are those of the finished network, the first is right. Where a last pass lets every layer make up for the errors of
#: those before it, the errors of a stitched network add up to more than remains of them, and the second is closer.
CONTEXTS = ("chosen", "widest")
#: Width at which each layer's sensitivity is measured once.
PROBE_BITS = 4
#: Steps that end at this width or above are taken on the noise law, without being measured.
TRUSTED_BITS = 5


@dataclass(frozen=True)
class Point:
    """One assignment on the frontier. ``measure`` is None where a step was taken on the noise law."""

    assignment: Assignment
    cost: float
    measure: Measure | None
    step: Step | None = None


@dataclass(frozen=True)
class Found:
    """The outcome of a search: its choice, every point on the way to it, and how many assignments it asked about."""

    chosen: Point
    points: list[Point]
    evaluations: int


@dataclass(frozen=True)
class Budget:
    """When to stop: at the first assignment that meets every limit, or at the last that loses at most ``max_drop``
    points of accuracy against ``top1`` (percent), whichever comes first."""

    limits: Sequence[tuple[Costs, float]] = ()  # cost tables, and the most that an assignment may cost by each
    max_drop: float | None = None
    top1: float = 100.0

    def __post_init__(self) -> None:
        if not self.limits and self.max_drop is None:
            raise KdqError("the bit search has no budget: give avg_bits, size_bytes or max_drop")
        for costs, limit in self.limits:
            check_reachable(costs, limit)

    def met(self, assignment: Assignment) -> bool:
        """Whether every limit is met; without limits the search goes on until ``max_drop`` stops it."""
        return bool(self.limits) and all(cost_of(costs, assignment) <= limit for costs, limit in self.limits)

    def drops_too_far(self, measure: Measure) -> bool:
        return self.max_drop is not None and self.top1 - measure.top1 > self.max_drop


def cost_of(costs: Costs, assignment: Mapping[str, int]) -> float:
    return sum(costs[layer][bits] for layer, bits in assignment.items())


def widest(costs: Costs) -> Assignment:
    return {layer: max(widths) for layer, widths in costs.items()}


def distinct(costs: Costs) -> dict[str, Mapping[int, float]]:
    """``costs`` without the widths that cost no less than a wider one: files are padded, and a small layer may take as
    many bytes at 7 bits as at 8."""
    return {
        layer: {
            bits: cost
            for bits, cost in widths.items()
            if all(cost < other for wider, other in widths.items() if wider > bits)
        }
        for layer, widths in costs.items()
    }


def greedy(
    costs: Costs,
    evaluate: Callable[[Assignment], Measure],
    budget: Budget,
    on_step: Callable[[Point], None] = lambda point: None,
    context: str = "chosen",
) -> Found:
    """Lower the cheapest layer until the budget is met; see the module's text.

    >>> costs = {"conv": {2: 20.0, 8: 80.0}, "fc": {2: 20.0, 8: 80.0}}
    >>> losses = {"conv": {2: 1.0, 8: 0.0}, "fc": {2: 0.1, 8: 0.0}}
    >>> def measure(assignment):
    ...     return Measure(sum(losses[layer][bits] for layer, bits in assignment.items()), top1=50.0)
    >>> greedy(costs, measure, Budget([(costs, 100.0)])).chosen.assignment  # fc loses less
    {'conv': 8, 'fc': 2}

    What a step saves is counted in ``costs``; prices are measured in a ``context`` of :data:`CONTEXTS`.
    """
    trace = evaluate if isinstance(evaluate, Trace) else Trace(evaluate)
    search = _Greedy(distinct(costs), trace, budget, on_step, context)
    return Found(search.run(), search.points, len(trace.asked))


@dataclass
class _Greedy:
    costs: dict[str, Mapping[int, float]]
    evaluate: Trace
    budget: Budget
    on_step: Callable[[Point], None]
    context: str
    points: list[Point] = field(default_factory=list)
    paid: dict[tuple[str, int], float] = field(default_factory=dict)  # the price of each step taken, by where it led

    def run(self) -> Point:
        now = widest(self.costs)
        here = self._reach(now, self.evaluate(now))
        sensitivity = self._probe(here)
        # Entries: price, layer (breaks ties), width after the step, and the number of steps taken when it was measured.
        heap = [self._predicted(layer, now[layer], value) for layer, value in sensitivity.items()]
        heapq.heapify(heap)
        while heap and not self.budget.met(here.assignment):
            price, layer, to, measured_at = heapq.heappop(heap)
            taken = {**here.assignment, layer: to}
            measure = None
            if to < TRUSTED_BITS:
                valid = len(self.points) if self.context == "chosen" else 0
                if measured_at != valid:
                    heapq.heappush(heap, (self._price(here, layer, to), layer, to, valid))
                    continue
                measure = self.evaluate(taken)
                if self.budget.drops_too_far(measure):
                    continue  # this layer stays as it is; a cheaper one may still have a step to give
            self.paid[layer, to] = price
            here = self._reach(taken, measure, (layer, here.assignment[layer], to))
            if to > min(self.costs[layer]):
                heapq.heappush(heap, self._predicted(layer, to, sensitivity[layer]))
        return self._measured(self._refilled(here))

    def _refilled(self, here: Point) -> Point:
        """Take steps back, the dearest first, as far as the limits allow: a large layer's step overshoots them."""
        now = dict(here.assignment)
        if self.budget.met(now):
            steps = sorted(self.paid, key=lambda step: -self.paid[step])
            while steps:  # again after each, for the step before one taken back may have been a cheaper one
                for layer, narrow in steps:
                    wider = {**now, layer: min((w for w in self.costs[layer] if w > narrow), default=narrow)}
                    if now[layer] == narrow and self.budget.met(wider):
                        now = wider
                        break
                else:
                    break
        return here if now == here.assignment else self._reach(now, self.evaluate(now))

    def _probe(self, start: Point) -> dict[str, float]:
        """Each layer's loss over the noise law's value, from one measurement at about PROBE_BITS."""
        assert start.measure is not None
        sensitivity = {}
        for layer, widths in reversed(self.costs.items()):  # from the last to the first: prefixes stay cached
            wide = start.assignment[layer]
            if narrower := [width for width in widths if width < wide]:
                probe = min(narrower, key=lambda width: (abs(width - PROBE_BITS), width))
                loss = self.evaluate({**start.assignment, layer: probe}).loss - start.measure.loss
                sensitivity[layer] = max(loss, 0.0) / (_noise(probe) - _noise(wide))
        return sensitivity

    def _predicted(self, layer: str, now: int, sensitivity: float) -> tuple[float, str, int, int]:
        to = max(width for width in self.costs[layer] if width < now)
        loss = sensitivity * (_noise(to) - _noise(now))
        return loss / (self.costs[layer][now] - self.costs[layer][to]), layer, to, -1

    def _price(self, here: Point, layer: str, to: int) -> float:
        now = here.assignment[layer]
        others = here.assignment if self.context == "chosen" else widest(self.costs)
        loss = self.evaluate({**others, layer: to}).loss - self.evaluate({**others, layer: now}).loss
        return loss / (self.costs[layer][now] - self.costs[layer][to])

    def _reach(self, assignment: Assignment, measure: Measure | None, step: Step | None = None) -> Point:
        point = Point(assignment, cost_of(self.costs, assignment), measure, step)
        self.points.append(point)
        self.on_step(point)
        return point

    def _measured(self, point: Point) -> Point:
        """The chosen point with its measurement, and, should steps taken on trust have dropped too far, the last point
        that did not."""
        for candidate in reversed(self.points):
            measure = candidate.measure or self.evaluate(candidate.assignment)
            if not self.budget.drops_too_far(measure):
                return Point(candidate.assignment, candidate.cost, measure, candidate.step)
        raise KdqError(f"even the widest candidates lose more than max_drop={self.budget.max_drop} points")


def _noise(bits: int) -> float:
    return 4.0**-bits


def check_reachable(costs: Costs, limit: float) -> None:
    """Raise a :class:`KdqError` when even the narrowest candidates cost more than ``limit``."""
    least = sum(min(widths.values()) for widths in costs.values())
    if least > limit:
        raise KdqError(
            f"the bit search cannot meet its budget: the narrowest candidates cost {least:.6g}, the budget is "
            f"{limit:.6g}; allow narrower widths or more"
        )
