"""The one W&B run of a whole sweep: its table, its curves, and which models no other beats at their size."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from omegaconf import DictConfig

from kdq.cell import plain
from kdq.dashboard.names import BYTES, pareto_curve, series
from kdq.results import AXES, COLUMNS, Row
from kdq.tracking import About, Track, tracked

Point = tuple[float, float]


def tell_sweep(cfg: DictConfig, rows: Sequence[Row]) -> None:
    """Log ``rows``, those of the sweep ``cfg.sweep``, as its run of job type ``report``."""
    if not rows:
        return
    values = {axis: sorted({getattr(row, axis) for row in rows}) for axis in AXES}
    config = {axis: found[0] if len(found) == 1 else found for axis, found in values.items()}
    config |= {"rows": len(rows), "series": "Pareto front"}
    sweep = str(cfg.sweep)
    tags = [*map(str, values["data"]), *map(str, values["method"])]
    about = About("report", f"report-{sweep}", group=sweep, key=sweep, config=config, tags=tags)
    with tracked(plain(cfg.logger), Path(cfg.paths.output_dir) / "runs", about) as track:
        track.table("report/rows", COLUMNS, (dataclasses.astuple(row) for row in rows))
        for data in values["data"]:
            _tell_data(track, data, [row for row in rows if row.data == data])


def _tell_data(track: Track, data: str, rows: Sequence[Row]) -> None:
    bits, sizes = curves(rows, "avg_bits"), curves(rows, "size_bytes")
    front = pareto(point for points in sizes.values() for point in points)
    track.lines(f"report/accuracy_vs_bits_{data}", f"{data}: top-1 over bits per weight", "avg_bits", "top1", bits)
    lines = {"Pareto front": front, **sizes}
    track.lines(f"report/frontiers_{data}", f"{data}: top-1 over packed bytes", "size_bytes", "top1", lines)
    points = [(float(row.size_bytes), row.top1) for row in rows]
    track.points(f"report/accuracy_vs_bytes_{data}", f"{data}: every cell", "size_bytes", "top1", points)
    timed = [(row.latency_ms_onnx_int8, row.top1_onnx_int8) for row in rows]
    if latencies := [(ms, top1) for ms, top1 in timed if ms is not None and top1 is not None]:
        name, title = f"report/accuracy_vs_latency_{data}", f"{data}: every exported INT8 model"
        track.points(name, title, "latency_ms", "top1", latencies)
    track.axis(BYTES, [pareto_curve(data)])
    for size, top1 in front:
        track.metrics({BYTES: size, pareto_curve(data): top1})


def curves(rows: Iterable[Row], x: str) -> dict[str, list[Point]]:
    """Top-1 over the column ``x``: one curve for each model and quantizer, one point for each width, means over
    seeds."""
    groups: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[series(row.method, row.arch, row.quantizer, row.act_bits)][row.bits].append(row)
    return {
        name: sorted((mean(getattr(r, x) for r in cells), mean(r.top1 for r in cells)) for cells in widths.values())
        for name, widths in sorted(groups.items())
    }


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points ``(size, accuracy)`` that no smaller or equal one reaches, by size."""
    front: list[Point] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front
