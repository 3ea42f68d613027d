"""Mixed precision for a network: the greedy bit search of :mod:`kdq.quant.bitsearch.search` over its layers.

Every layer is quantized once at every candidate width, in one pass that shares the float network's part; an
assignment is measured on the network stitched together from those; and the chosen assignment is quantized anew, each
layer then correcting the errors of the layers that really precede it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdq.quant.batches import first_pairs
from kdq.quant.bitsearch.bank import Bank, fill_bank, packed_size
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.bitsearch.search import Found, Point, greedy
from kdq.quant.bitsearch.sensitivity import from_table
from kdq.quant.bitsearch.stitch import Stitched
from kdq.quant.bitsearch.trace import Trace
from kdq.quant.config import QuantConfig
from kdq.quant.distributed import share
from kdq.quant.network import quantize
from kdq.quant.report import Report
from kdq.utils.errors import KdqError
from kdq.utils.files import write_text


@dataclass(frozen=True)
class MixedPrecision:
    """A network quantized with the widths that a search chose."""

    network: nn.Module
    report: Report
    found: Found  # the choice, the points on the way to it, and the number of evaluations
    bank: Bank  # every layer at every width
    seconds: float  # of the whole search, bank.seconds among them

    @property
    def avg_bits(self) -> list[float]:
        """Average bits of each point, in the order of ``found.points``."""
        return [self.bank.avg_bits(point.assignment) for point in self.found.points]

    @property
    def size_bytes(self) -> list[int]:
        """Bytes of each point, in the order of ``found.points``, but for some bytes of the file's header."""
        return [self.bank.size_bytes(point.assignment) for point in self.found.points]

    def metrics(self) -> list[dict[str, float]]:
        """What loggers show of each point."""
        points = zip(self.found.points, self.avg_bits, self.size_bytes, strict=True)
        return [
            {"bits/step": float(number), "bits/avg_bits": average, "bits/size_bytes": float(size)}
            | ({} if point.measure is None else {f"bits/{name}": x for name, x in vars(point.measure).items()})
            for number, (point, average, size) in enumerate(points)
        ]

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
    validation: Iterable[Any],
    search: SearchConfig,
    config: QuantConfig = QuantConfig(),  # noqa: B008
    *,
    bank: Bank | None = None,
    trace: Path | None = None,
    key: str = "",
    on_step: Callable[[str], None] = lambda line: None,
) -> MixedPrecision:
    """Choose each layer's width within a budget and quantize ``model`` with them.

    Args:
        calibration: batches for the quantizer.
        validation: batches of images and labels, of which the first ``search.validation_images`` choose; neither
            calibration nor test images.
        search: budget, candidates and method.
        config: how layers are quantized.
        bank: what :func:`kdq.quant.bitsearch.bank.fill_bank` made of the same arguments, if it was called before.
        trace: a file that remembers evaluations, so that a killed search goes on; every process names one, or none
            does. ``key`` says what they depend on, and a file of another key is refused; the bank is kept beside it, in
            a folder of the key's own. Without a key it is a digest of the quantized layers and of the validation
            images, and a file of others is begun anew.
        on_step: called with a line of text for every step.

    Raises:
        KdqError: the budget cannot be met, or the trace is damaged or belongs to another key.
    """
    start = time.perf_counter()
    batches, widths = list(calibration), list(search.candidates)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    kept = trace.with_name(f"{trace.stem}-{digest}.bank") if trace and key else None
    bank = bank or fill_bank(model, batches, widths, config, kept)
    if widths != sorted(next(iter(bank.weights.values()))):
        raise KdqError(f"the bank has other candidates than {widths}: fill it with the same")
    stitched = Stitched(model, bank.weights, first_pairs(validation, share(search.validation_images)))
    prices = bank.prices(search.cost, model, stitched.batches[0][0][:1])
    measure, spare = Trace(stitched, trace, key or (stitched.digest() if trace else ""), anew=not key), 0
    while True:
        try:
            budget = bank.budget(search, spare, stitched.accuracy())
        except KdqError as error:
            raise error if not spare else KdqError(_too_tight(search)) from error
        if search.method == "greedy":
            found = greedy(prices, measure, budget, lambda point: _tell(point, bank, on_step), search.context)
        else:
            found = from_table(search.method, measure, budget)
        if budget.limits and not budget.met(found.chosen.assignment):
            raise KdqError(_too_tight(search))
        network, report = quantize(model, batches, found.chosen.assignment, config)
        excess = 0 if search.size_bytes is None else packed_size(network) - search.size_bytes
        if excess <= 0:
            stitched.forget()
            return MixedPrecision(network, report, found, bank, time.perf_counter() - start)
        spare += excess  # the header's length was an estimate; what was measured is remembered


def _too_tight(search: SearchConfig) -> str:
    size = "" if search.size_bytes is None else f"size_bytes={search.size_bytes}"
    drop = "" if search.max_drop is None else f"max_drop={search.max_drop:g} is reached before the other limits are met"
    return f"the bit search cannot meet its budget: {' '.join(filter(None, (size, drop)))}; allow more"


def _tell(point: Point, bank: Bank, on_step: Callable[[str], None]) -> None:
    if point.step is not None:
        layer, wide, narrow = point.step
        loss = f"loss {point.measure.loss:.5f}, top-1 {point.measure.top1:.2f}" if point.measure else "not measured"
        average, size = bank.avg_bits(point.assignment), bank.size_bytes(point.assignment)
        on_step(f"{layer} {wide} -> {narrow} bits: {loss}; {average:.3f} bits on average, {size} bytes")
