"""The one W&B run of a whole sweep: its answer, its table, its curves, and which models no other beats at their
size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from kdq.records.rows import AXES, COLUMNS, Row
from kdq.report.cells import cells, named, pareto, series
from kdq.report.words import COLUMNS as WORDS
from kdq.report.words import answers
from kdq.tracking.names import BYTES, pareto_curve
from kdq.tracking.open import tracked
from kdq.tracking.run import Chart, RunInfo, RunLogger
from kdq.utils.config import plain


def log_sweep(cfg: DictConfig, rows: Sequence[Row]) -> None:
    """Log ``rows``, those of the sweep ``cfg.sweep``, as its run of job type ``report``."""
    if not rows:
        return
    values = {axis: sorted({getattr(row, axis) for row in rows}) for axis in AXES}
    config = {axis: found[0] if len(found) == 1 else found for axis, found in values.items()}
    config |= {"rows": len(rows), "series": "Pareto front"}
    sweep = str(cfg.sweep)
    tags = [*map(str, values["data"]), *map(str, values["method"])]
    about = RunInfo("report", f"report-{sweep}", group=sweep, key=sweep, config=config, tags=tags)
    with tracked(plain(cfg.logger), Path(cfg.paths.output_dir) / "runs", about) as track:
        track.show(Chart("report/rows", COLUMNS, [[getattr(row, name) for name in COLUMNS] for row in rows]))
        frame = named(rows)
        means, said = cells(frame), answers(frame)
        track.summary({f"answer/{answer.data}": answer.headline for answer in said})
        lines = [(answer.data, line.kind, *line.cells) for answer in said for line in answer.lines]
        track.show(Chart("report/comparisons", ("data", "kind", *WORDS), lines))
        for data, group in frame.groupby("data", sort=True):
            _log_data(track, str(data), group, means[means["data"] == data])


def _log_data(track: RunLogger, data: str, frame: pd.DataFrame, means: pd.DataFrame) -> None:
    """Log one data set: its rows, and its cells, which are means over seeds."""
    points = _points(means, "size_bytes", "top1")
    front = [points[i] for i in pareto([size for size, _ in points], [top1 for _, top1 in points])]

    def show(name: str, columns: tuple[str, ...], rows: Sequence[Sequence[Any]], kind: str, title: str) -> None:
        track.show(Chart(f"report/{name}_{data}", columns, rows, kind, f"{data}: {title}"))

    bits = _curves(means, "avg_bits")
    show("accuracy_vs_bits", ("curve", "avg_bits", "top1"), bits, "lines", "top-1 over bits per weight")
    sizes = [*(("Pareto front", *point) for point in front), *_curves(means, "size_bytes")]
    show("frontiers", ("curve", "size_bytes", "top1"), sizes, "lines", "top-1 over packed bytes")
    every = _points(frame, "size_bytes", "top1")
    show("accuracy_vs_bytes", ("size_bytes", "top1"), every, "points", "every cell")
    if latencies := _points(frame, "latency_ms_onnx_int8", "top1_onnx_int8"):
        show("accuracy_vs_latency", ("latency_ms", "top1"), latencies, "points", "every exported INT8 model")
    track.axis(BYTES, [pareto_curve(data)])
    for size, top1 in front:
        track.metrics({BYTES: size, pareto_curve(data): top1})


def _curves(means: pd.DataFrame, x: str) -> list[tuple[str, float, float]]:
    """Top-1 over the column ``x``: one curve for each model and quantizer, one point for each width."""
    return [
        (" ".join(name[1:]), *point) for name, group in series(means) for point in sorted(_points(group, x, "top1"))
    ]


def _points(frame: pd.DataFrame, x: str, y: str) -> list[tuple[float, float]]:
    known = frame[[x, y]].dropna().astype(float)
    return list(zip(known[x], known[y], strict=True))
