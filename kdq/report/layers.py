"""What a bit search left on disk: each layer's width, and the way to it."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kdq.quant.solvers.alphabet import code_bits
from kdq.records.rows import Row
from kdq.utils.files import parse_json, regular

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Widths:
    """The layers of one packed model in the order they run: names, bits and numbers of weights."""

    layers: list[str]
    bits: list[int]
    weights: list[int]


@dataclass(frozen=True)
class Frontier:
    """The points of one search, from wide to narrow. ``loss`` and ``top1`` are of validation images, NaN where a step
    was not measured; ``chosen`` is the position of the choice."""

    avg_bits: list[float]
    size_bytes: list[float]
    loss: list[float]
    top1: list[float]
    chosen: int


def mixed_widths(output: Path, rows: Iterable[Row]) -> dict[str, Widths]:
    """Widths by ``config_hash``, of every row whose layers differ in them, from the headers of the packed files
    below ``output``. Rows without a file (copied from elsewhere, say) are not in it; a damaged file is named in a
    warning."""
    found = {}
    for row in rows:
        if not row.artifact or (row.avg_bits == row.bits and not row.search):
            continue
        path = output / row.artifact
        try:
            if not path.is_file():
                continue
            widths = _widths(path)
        except Exception as error:  # safetensors has errors of its own kind, and names and headers may hold anything
            log.warning("no per-layer bits from %r: %s", row.artifact, error)
            continue
        if len(set(widths.bits)) > 1:
            found[row.config_hash] = widths
    return found


def frontiers(output: Path, rows: Iterable[Row]) -> dict[str, Frontier]:
    """Frontiers by ``config_hash``, of every searched row that left one; a damaged file is named in a warning."""
    there = {path.name: path for path in (output / "store" / "search").glob("frontier-*.json")}
    found = {}
    for row in rows:
        path = there.get(f"frontier-{row.config_hash}.json")
        if path is None:
            continue
        try:
            found[row.config_hash] = _frontier(parse_json(regular(path).read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("no frontier from %s: %r", path, error)
    return found


def _widths(path: Path) -> Widths:
    with safe_open(path, framework="numpy") as file:
        layers = parse_json(file.metadata()["kdq"])["layers"]
    bits = [code_bits(layer["levels"]) for layer in layers.values()]
    return Widths([str(name) for name in layers], bits, [math.prod(layer["shape"]) for layer in layers.values()])


def _frontier(found: dict[str, Any]) -> Frontier:
    points, measures = found["points"], [point["measure"] or {} for point in found["points"]]
    chosen = [point["assignment"] for point in points].index(found["chosen"]["assignment"])
    return Frontier(
        [float(point["avg_bits"]) for point in points],
        [float(point["size_bytes"]) for point in points],
        [float(measure.get("loss", math.nan)) for measure in measures],
        [float(measure.get("top1", math.nan)) for measure in measures],
        chosen,
    )
