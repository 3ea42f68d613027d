"""Mixed precision for a network: the greedy bit search of :mod:`kdq.quant.search` over its layers.

Every layer is quantized once at every candidate width, in one pass that shares the float network's part; an
assignment is measured on the network stitched together from those; and the chosen assignment is quantized anew, each
layer then correcting the errors of the layers that really precede it.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdq.errors import KdqError
from kdq.files import write_text
from kdq.quant.network import QuantizedWeight, Report, quantizable_layers, quantize, quantize_widths
from kdq.quant.packing import save_packed, stored_bytes
from kdq.quant.search import Assignment, Budget, Found, Point, Trace, check_candidates, cost_of, greedy, widest
from kdq.quant.sensitivity import METHODS, from_table
from kdq.quant.stitch import Stitched, bit_operations, weight_costs

#: What a step of the search may count as saved.
COSTS = ("weight_bits", "bytes", "bops")


@dataclass(frozen=True)
class MixedPrecision:
    """A searched network.

    Attributes:
        network, report: quantized with the chosen widths.
        found: the choice, the points on the way to it, and the number of evaluations.
        avg_bits, size_bytes: of each point, in the order of ``found.points``.
        seconds: of the search; ``bank_seconds`` of them quantized every layer at every width.
    """

    network: nn.Module
    report: Report
    found: Found
    avg_bits: list[float]
    size_bytes: list[int]
    seconds: float
    bank_seconds: float

    def metrics(self) -> list[dict[str, float]]:
        """What loggers show of each point."""
        found = []
        points = zip(self.found.points, self.avg_bits, self.size_bytes, strict=True)
        for number, (point, average, size) in enumerate(points):
            row = {"bits/step": float(number), "bits/avg_bits": average, "bits/size_bytes": float(size)}
            if point.measure is not None:
                row |= {"bits/loss": point.measure.loss, "bits/top1": point.measure.top1}
            found.append(row)
        return found

    def write_frontier(self, path: Path) -> None:
        """The points as JSON: each with its assignment, loss, accuracy, average bits and bytes. ``quantize(model,
        batches, bits=assignment)`` makes any of them into a network."""
        points = [
            asdict(point) | {"avg_bits": bits, "size_bytes": size}
            for point, bits, size in zip(self.found.points, self.avg_bits, self.size_bytes, strict=True)
        ]
        found = {"evaluations": self.found.evaluations, "chosen": asdict(self.found.chosen), "points": points}
        write_text(path, json.dumps(found, indent=1))


def search_bits(
    model: nn.Module,
    calibration: Iterable[Any],
    validation: Iterable[tuple[Tensor, Tensor]],
    *,
    candidates: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    avg_bits: float | None = None,
    size_bytes: int | None = None,
    max_drop: float | None = None,
    cost: str = "weight_bits",
    method: str = "greedy",
    trace: Path | None = None,
    key: str = "",
    on_step: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> MixedPrecision:
    """Choose each layer's width within a budget and quantize ``model`` with them.

    Args:
        calibration: batches for the quantizer.
        validation: ``(images, labels)`` that choose; neither calibration nor test images.
        candidates: the widths a layer may have.
        avg_bits: most bits per weight on average.
        size_bytes: largest packed file.
        max_drop: most points of validation accuracy to lose. At least one of these three; all given ones hold.
        cost: what a step is priced by: ``weight_bits``, packed ``bytes``, or ``bops`` (bits times multiply-adds).
        method: ``greedy``, or ``exact`` or ``sensitivity_once`` on the table of single changes.
        trace: a file that remembers evaluations, so that a killed search goes on; ``key`` says what they depend on.
        on_step: called with a line of text for every step.
        options: for :func:`kdq.quant.network.quantize_widths`.

    Raises:
        KdqError: the budget cannot be met, or the trace belongs to another search.
    """
    start = time.perf_counter()
    if cost not in COSTS:
        raise KdqError(f"cost={cost!r} is unknown: use one of {', '.join(COSTS)}")
    if method not in ("greedy", *METHODS):
        raise KdqError(f"method={method!r} is unknown: use one of greedy, {', '.join(METHODS)}")
    widths, batches = check_candidates(candidates), list(calibration)
    layers = quantizable_layers(model, options.get("exclude", ()))
    versions = quantize_widths(model, batches, widths, **options)
    bank_seconds = time.perf_counter() - start
    by_width = {bits: _weights(version) for bits, (version, _) in zip(widths, versions, strict=True)}
    bank = {name: {bits: weights[name] for bits, weights in by_width.items()} for name in layers}
    stitched = Stitched(model, bank, validation)
    by_bits = weight_costs(model, layers, widths)
    by_bytes = {name: {bits: float(stored_bytes(weight)) for bits, weight in bank[name].items()} for name in layers}
    rest = _file_size(versions[-1][0]) - round(cost_of(by_bytes, dict.fromkeys(layers, widths[-1])))
    image = stitched.batches[0][0][:1]
    prices = {"weight_bits": by_bits, "bytes": by_bytes, "bops": bit_operations(model, layers, widths, image)}[cost]
    weights = cost_of(by_bits, widest(by_bits)) / widths[-1]

    def averages(assignment: Assignment) -> tuple[float, int]:
        return cost_of(by_bits, assignment) / weights, rest + round(cost_of(by_bytes, assignment))

    def tell(point: Point) -> None:
        if point.step is not None:
            layer, wide, narrow = point.step
            average, size = averages(point.assignment)
            loss = f"loss {point.measure.loss:.5f}, top-1 {point.measure.top1:.2f}" if point.measure else "not measured"
            on_step(f"{layer} {wide} -> {narrow} bits: {loss}; {average:.3f} bits on average, {size} bytes")

    measure, room = Trace(stitched, trace, key), math.inf if size_bytes is None else size_bytes - rest
    while True:
        limits = [] if avg_bits is None else [(by_bits, avg_bits * weights)]
        limits += [(by_bytes, room)] if size_bytes is not None else []
        budget = Budget(limits, max_drop, stitched.accuracy())
        found = greedy(prices, measure, budget, tell) if method == "greedy" else from_table(method, measure, budget)
        network, report = quantize(model, batches, found.chosen.assignment, **options)
        excess = 0 if size_bytes is None else _file_size(network) - size_bytes
        if excess <= 0:
            break
        room -= excess  # the header's length is an estimate; what was measured is remembered
    points = [averages(point.assignment) for point in found.points]
    seconds = time.perf_counter() - start
    return MixedPrecision(
        network, report, found, [bits for bits, _ in points], [size for _, size in points], seconds, bank_seconds
    )


def _weights(network: nn.Module) -> dict[str, QuantizedWeight]:
    weights: Any = network.quantized_weights
    return dict(weights)


def _file_size(network: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_packed(network, Path(folder) / "network.kdq")


def first_batches(batches: Iterable[Any], images: int) -> list[tuple[Tensor, Tensor]]:
    """The first ``images`` of ``(inputs, targets)`` batches.

    Raises:
        KdqError: there are none.
    """
    found: list[tuple[Tensor, Tensor]] = []
    left = images
    for inputs, targets in batches:
        if left <= 0:
            break
        found.append((torch.as_tensor(inputs)[:left], torch.as_tensor(targets)[:left]))
        left -= len(inputs)
    if not found:
        raise KdqError("there is no image to quantize with: the data loader is empty")
    return found
