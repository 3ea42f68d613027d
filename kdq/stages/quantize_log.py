"""What the stage that quantizes tells its log: accuracy over bits, every layer's error and width, the bit search."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kdq.quant.bitsearch.mixed import MixedPrecision
from kdq.quant.report import Report
from kdq.records.rows import COLUMNS, Row
from kdq.records.store import key_of
from kdq.stages.asked import row_axes
from kdq.stages.cell import Cell
from kdq.stages.train import Model, artifact
from kdq.tracking.names import series
from kdq.tracking.run import Artifact, Chart, RunLogger
from kdq.utils.config import plain

#: Columns of a row that are curves over ``quantize/bits``.
CURVES = ("top1", "top5", "drop", "nll", "ece", "size_bytes", "avg_bits", "bops", "latency_ms_torch")
#: The same of rows with exported models.
DEPLOYED = [name for name in COLUMNS if "_onnx_" in name or name.startswith("onnx_") or name.endswith("_deployed")]
SEARCH = ("avg_bits", "size_bytes", "loss", "top1")
LAYERS = ("asked", "layer", "kind", "shape", "weights", "bits", "levels", "error")
STEPS = ("step", "layer", "from_bits", "to_bits", "avg_bits", "size_bytes", "loss", "top1")


@contextmanager
def tracked_rows(
    cell: Cell, model: Model, trained_on: Mapping[str, Model], arch: str, asked: Mapping[str, str]
) -> Iterator[RunLogger]:
    """The log of the rows of ``model``, or of what each was ``trained_on`` to, which has its name from all that were
    ``asked`` for, also those that are there already. Bits are the x-axis of everything that is measured at each."""
    cfg, role, quant, axes = cell.cfg, plain(cell.cfg[cell.role]), plain(cell.cfg.quant), row_axes(cell, arch)
    named = [axes[axis] for axis in ("method", "arch", "quantizer", "act_bits", "tune")]
    axes |= {
        "teacher": cfg.teacher.name,
        "bits": quant["search"]["candidates"] if axes["search"] else quant["bits"],
        "model_key": model.key,
        "series": series(*named),
    }
    settings = {"net": role["net"], "recipe": role["recipe"], "method": plain(cfg.method), "quant": quant}
    settings |= {"tune": plain(cfg.tune)} if axes["tune"] else {}
    name, key = f"{cell.name}-b{','.join(asked)}", key_of({"rows": sorted(asked.values())})
    inputs = [artifact(cell.store, each) for each in trained_on.values() or [model]]
    tags = [f"{name}bit" for name in asked]
    with cell.tracked("quantize", name, key, axes, settings, inputs, tags) as track:
        track.axis("quantize/bits", [f"quantize/{curve}" for curve in (*CURVES, *DEPLOYED)])
        track.axis("bits/step", [f"bits/{curve}" for curve in SEARCH])
        yield track


def log_layers(track: RunLogger, reports: Mapping[str, Report]) -> None:
    """Every layer at every asked width (``4``, or ``2-8`` for the candidates of a bit search)."""
    rows = [
        (asked, x.name, x.kind, "x".join(map(str, x.shape)), math.prod(x.shape), x.bits, x.levels, x.error)
        for asked, report in reports.items()
        for x in report.layers
    ]
    if not rows:
        return
    track.show(Chart("quantize/layers", LAYERS, rows))
    errors = [(f"{asked} bits", i, x.error) for asked, report in reports.items() for i, x in enumerate(report.layers)]
    title = "Relative error of each layer's outputs"
    track.show(Chart("quantize/layer_errors", ("curve", "layer", "error"), errors, "lines", title))


def log_search(track: RunLogger, search: MixedPrecision) -> None:
    """The frontier on which a bit search went from the widest layers to its choice, and the widths that it chose."""
    rows, frontier = [], []
    for values, point in zip(search.metrics(), search.found.points, strict=True):
        track.metrics(values)
        layer, wide, narrow = point.step or ("", None, None)
        numbers = [values.get(f"bits/{name}") for name in SEARCH]
        rows.append((int(values["bits/step"]), layer, wide, narrow, *numbers))
        if point.measure is not None:
            frontier.append((values["bits/avg_bits"], point.measure.loss))
    track.show(Chart("bits/points", STEPS, rows))
    title = "Greedy frontier: loss over bits per weight"
    track.show(Chart("bits/frontier", ("avg_bits", "loss"), frontier, "points", title))
    chosen = [(layer.name, layer.bits) for layer in search.report.layers]
    track.show(Chart("bits/chosen", ("layer", "bits"), chosen, "bars", "Chosen bits"))


def log_row(track: RunLogger, row: Row, file: Path) -> None:
    """One width's results and its packed file."""
    track.metrics({"quantize/bits": row.bits} | {f"quantize/{curve}": getattr(row, curve) for curve in CURVES})
    width = f"{row.bits}bit" if not row.search else row.search
    track.summary({f"top1_{width}": row.top1, f"size_bytes_{width}": row.size_bytes, "top1_float": row.top1_float})
    facts = {"bits": row.bits, "avg_bits": row.avg_bits, "top1": row.top1, "drop": row.drop, "bytes": row.size_bytes}
    track.made(Artifact(row.name, row.config_hash, "quantized", file, facts))


def log_deployed(track: RunLogger, row: Row) -> None:
    """One width's exported models: their accuracy, bytes, latency and throughput."""
    measured = {f"quantize/{name}": getattr(row, name) for name in DEPLOYED if getattr(row, name) is not None}
    track.metrics({"quantize/bits": row.bits} | measured)
