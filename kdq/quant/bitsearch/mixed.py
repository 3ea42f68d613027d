"""Mixed precision for a network: the greedy bit search of :mod:`kdq.quant.bitsearch.search` over its layers.

Every layer is quantized once at every candidate width, in one pass that shares the float network's part; an
assignment is measured on the network stitched together from those; and the chosen assignment is quantized anew, each
layer then correcting the errors of the layers that really precede it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdq.quant.bitsearch.bank import Bank, fill_bank, packed_size
from kdq.quant.bitsearch.search import CONTEXTS, Budget, Found, Point, Trace, check_candidates, check_reachable, greedy
from kdq.quant.bitsearch.sensitivity import METHODS, from_table
from kdq.quant.bitsearch.stitch import Stitched
from kdq.quant.network import Report, quantize
from kdq.utils.errors import KdqError
from kdq.utils.files import write_text

#: What a step of the search may count as saved.
COSTS = ("weight_bits", "bytes", "bops")


@dataclass(frozen=True)
class MixedPrecision:
    """A searched network.

    Attributes:
        network, report: quantized with the chosen widths.
        found: the choice, the points on the way to it, and the number of evaluations.
        bank: every layer at every width, whose making took ``bank.seconds`` of the ``seconds`` of the search.
    """

    network: nn.Module
    report: Report
    found: Found
    bank: Bank
    seconds: float

    @property
    def avg_bits(self) -> list[float]:
        """Of each point, in the order of ``found.points``."""
        return [self.bank.avg_bits(point.assignment) for point in self.found.points]

    @property
    def size_bytes(self) -> list[int]:
        """Of each point, in the order of ``found.points``, but for some bytes of the file's header."""
        return [self.bank.size_bytes(point.assignment) for point in self.found.points]

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
    context: str = "widest",
    bank: Bank | None = None,
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
        avg_bits: most bits per weight on average, those of layers left float included.
        size_bytes: largest packed file.
        max_drop: most points of validation accuracy that the stitched network may lose, before the chosen assignment is
            quantized anew. At least one of these three; all given ones hold.
        cost: what a step is priced by: ``weight_bits``, packed ``bytes``, or ``bops`` (bits times multiply-adds).
        method: ``greedy``, or ``exact`` or ``sensitivity_once`` on the table of single changes.
        context: where ``greedy`` measures prices, one of :data:`kdq.quant.bitsearch.search.CONTEXTS`.
        bank: what :func:`kdq.quant.bitsearch.bank.fill_bank` made of the same arguments, if it was called before.
        trace: a file that remembers evaluations, so that a killed search goes on; every process names one, or none
            does. ``key`` says what they depend on, and a file of another key is refused. Without a key it is a digest
            of the quantized layers and of the validation images, and a file of others is begun anew.
        on_step: called with a line of text for every step.
        options: for :func:`kdq.quant.network.quantize_widths`.

    Raises:
        KdqError: the budget cannot be met, or the trace is damaged or belongs to another key.
    """
    start = time.perf_counter()
    check_search(
        candidates,
        cost=cost,
        method=method,
        context=context,
        avg_bits=avg_bits,
        size_bytes=size_bytes,
        max_drop=max_drop,
    )
    batches = list(calibration)
    widths = check_candidates(candidates)
    bank = bank or fill_bank(model, batches, widths, **options)
    if widths != sorted(next(iter(bank.weights.values()))):
        raise KdqError(f"the bank has other candidates than {widths}: fill it with the same")
    stitched = Stitched(model, bank.weights, validation)
    prices = bank.prices(cost, model, stitched.batches[0][0][:1])
    measure, spare = Trace(stitched, trace, key or (stitched.digest() if trace else ""), anew=not key), 0
    while True:
        room = None if size_bytes is None else size_bytes - spare
        try:
            budget = bank.budget(avg_bits, room, max_drop, stitched.accuracy())
        except KdqError as error:
            raise error if not spare else KdqError(_too_tight(size_bytes, max_drop)) from error
        if method == "greedy":
            found = greedy(prices, measure, budget, lambda point: _tell(point, bank, on_step), context)
        else:
            found = from_table(method, measure, budget)
        if budget.limits and not budget.met(found.chosen.assignment):
            raise KdqError(_too_tight(size_bytes, max_drop))
        network, report = quantize(model, batches, found.chosen.assignment, **options)
        excess = 0 if size_bytes is None else packed_size(network) - size_bytes
        if excess <= 0:
            stitched.forget()
            return MixedPrecision(network, report, found, bank, time.perf_counter() - start)
        spare += excess  # the header's length was an estimate; what was measured is remembered


def _too_tight(size_bytes: int | None, max_drop: float | None) -> str:
    size = "" if size_bytes is None else f"size_bytes={size_bytes}"
    drop = "" if max_drop is None else f"max_drop={max_drop:g} is reached before the other limits are met"
    return f"the bit search cannot meet its budget: {' '.join(filter(None, (size, drop)))}; allow more"


def check_search(
    candidates: Sequence[int],
    *,
    cost: str,
    method: str,
    context: str,
    avg_bits: float | None,
    size_bytes: int | None,
    max_drop: float | None,
) -> None:
    """Refuse what no network can make good, of the arguments of :func:`search_bits`, whose defaults are the only ones.

    Raises:
        KdqError: a choice is unknown, there is no budget, or none that the candidates can meet.
    """
    if cost not in COSTS:
        raise KdqError(f"cost={cost!r} is unknown: use one of {', '.join(COSTS)}")
    if method not in ("greedy", *METHODS):
        raise KdqError(f"method={method!r} is unknown: use one of greedy, {', '.join(METHODS)}")
    if context not in CONTEXTS:
        raise KdqError(f"context={context!r} is unknown: use one of {', '.join(CONTEXTS)}")
    narrowest = check_candidates(candidates)[0]
    if avg_bits is not None:
        check_reachable({"of a weight": {narrowest: narrowest}}, avg_bits)
    if avg_bits is None and size_bytes is None:
        Budget((), max_drop)  # refuses that none is given


def _tell(point: Point, bank: Bank, on_step: Callable[[str], None]) -> None:
    if point.step is not None:
        layer, wide, narrow = point.step
        loss = f"loss {point.measure.loss:.5f}, top-1 {point.measure.top1:.2f}" if point.measure else "not measured"
        average, size = bank.avg_bits(point.assignment), bank.size_bytes(point.assignment)
        on_step(f"{layer} {wide} -> {narrow} bits: {loss}; {average:.3f} bits on average, {size} bytes")


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
