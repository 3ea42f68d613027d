"""The question, answered with numbers: does the quantized student beat the quantized teacher, where, and by how much?

Every function takes the lines of :func:`kdq.report.cells.by_seed`, or the pairs of curves made from them, and returns a
data frame. Models are compared under the same data and quantizer only. Differences are between means over seeds, with
Welch's test (:mod:`kdq.report.difference`); the finite test set adds an uncertainty that seeds do not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from kdq.report.curve import Curve, crossings, curve, shared_sizes
from kdq.report.difference import difference

#: Who is compared: a student's method and architecture, and the teacher's architecture.
PAIR = ["data", "quantizer", "method", "arch", "teacher"]
CurvePair = tuple[tuple[str, ...], Curve, Curve]
_DIFFERENCE = ["difference", "low", "high", "p", "n_a", "n_b"]


def at_equal_bits(frame: pd.DataFrame) -> pd.DataFrame:
    """Student (a) minus teacher (b) at each width that both have, in points of top-1; the float models at ``inf``."""
    lines = []
    for pair, student, teacher in _pairs(frame):
        for width, searched, a, b in _by_width(student, teacher):
            lines.append((*pair, width, searched, a.mean(), b.mean(), *_compared(a, b)))
    return pd.DataFrame(lines, columns=[*PAIR, "width", "searched", "student_top1", "teacher_top1", *_DIFFERENCE])


def curve_pairs(frame: pd.DataFrame) -> list[CurvePair]:
    """Every student's curve with that of every teacher of the same data and quantizer."""
    found: dict[tuple[str, ...], Curve | None] = {}
    pairs = []
    for pair, *models in _pairs(frame):
        data, quantizer, *student, teacher = pair
        keys = [(data, quantizer, *student), (data, quantizer, teacher)]
        for key, model in zip(keys, models, strict=True):
            if key not in found:
                found[key] = curve(model)
        a, b = (found[key] for key in keys)
        if a is not None and b is not None:
            pairs.append((pair, a, b))
    return pairs


def at_equal_bytes(pairs: Iterable[CurvePair]) -> pd.DataFrame:
    """Student (a) minus teacher (b) at each size that one of them has and the curve of the other covers
    (:class:`kdq.report.curve.Curve`); no line where their sizes do not overlap."""
    lines = []
    for pair, student, teacher in pairs:
        for size in shared_sizes(student, teacher):
            a, b = student.at(size)[:, 0], teacher.at(size)[:, 0]
            lines.append((*pair, float(size), a.mean(), b.mean(), *_compared(a, b)))
    return pd.DataFrame(lines, columns=[*PAIR, "bytes", "student_top1", "teacher_top1", *_DIFFERENCE])


def extents(pairs: Iterable[CurvePair]) -> pd.DataFrame:
    """Each pair's smallest and largest sizes, and the mean accuracy of each model at its smallest."""
    lines = []
    for pair, student, teacher in pairs:
        ends = [(found.sizes[0], found.sizes[-1], found.top1[:, 0].mean()) for found in (student, teacher)]
        lines.append((*pair, *ends[0], *ends[1]))
    of = [f"{role}_{what}" for role in ("student", "teacher") for what in ("from", "to", "top1_from")]
    return pd.DataFrame(lines, columns=[*PAIR, *of])


def crossovers(pairs: Iterable[CurvePair]) -> pd.DataFrame:
    """The sizes at which the mean curves of student and teacher cross: ``bytes``, and who leads ``below`` it.

    ``low`` and ``high`` are the smallest and largest crossing of the ``n`` seeds that both have; NaN unless there are
    at least two and each crosses once.
    """
    lines = []
    for pair, student, teacher in pairs:
        sizes = shared_sizes(student, teacher)
        if len(sizes) < 2:
            continue
        ahead = student.at(sizes).mean(axis=0) - teacher.at(sizes).mean(axis=0)
        common = [seed for seed in student.seeds if seed in teacher.seeds]
        a, b = student.at(sizes), teacher.at(sizes)
        single = [crossings(sizes, a[student.seeds.index(seed)] - b[teacher.seeds.index(seed)]) for seed in common]
        once = len(single) > 1 and all(len(found) == 1 for found in single)
        low, high = (min(single)[0], max(single)[0]) if once else (math.nan, math.nan)
        leader = ("student", "teacher") if next(x for x in [*ahead, 1.0] if x) > 0 else ("teacher", "student")
        for number, size in enumerate(crossings(sizes, ahead)):
            lines.append((*pair, size, low, high, len(common), leader[number % 2]))
    return pd.DataFrame(lines, columns=[*PAIR, "bytes", "low", "high", "n", "below"])


def degradation(frame: pd.DataFrame) -> pd.DataFrame:
    """What quantization costs: per data, quantizer and width, the models by their mean drop from float, the smallest
    first (``rank`` 1). The difference is to the model of rank 1 (b), whose own line has none."""
    lines = []
    for (data, quantizer, width), group in frame.groupby(["data", "quantizer", "width"], sort=True):
        drops = {
            (str(method), str(arch)): model["drop"].to_numpy()
            for (method, arch), model in group.groupby(["method", "arch"], sort=True)
        }
        ranked = sorted(drops, key=lambda model: round(drops[model].mean(), 6))
        searched = bool(group["searched"].any())
        for rank, model in enumerate(ranked, start=1):
            found = drops[model]
            spread = found.std(ddof=1) if len(found) > 1 else math.nan
            compared = _compared(found, drops[ranked[0]]) if rank > 1 else (math.nan,) * 4 + (len(found),) * 2
            lines.append((data, quantizer, width, searched, rank, *model, found.mean(), spread, *compared))
    columns = ["data", "quantizer", "width", "searched", "rank", "method", "arch", "drop", "std", *_DIFFERENCE]
    return pd.DataFrame(lines, columns=columns)


def control(frame: pd.DataFrame) -> pd.DataFrame:
    """What distillation adds: each distilled student (a) minus the ``baseline`` of its architecture (b), trained on
    cross-entropy alone, at each width and, at ``inf``, before quantization."""
    lines = []
    for (data, quantizer, arch), group in frame[frame["role"] == "student"].groupby(["data", "quantizer", "arch"]):
        baseline = group[group["method"] == "baseline"]
        if baseline.empty:
            continue
        for method, student in group[group["method"] != "baseline"].groupby("method", sort=True):
            for width, searched, a, b in _by_width(student, baseline):
                lines.append((data, quantizer, method, arch, width, searched, *_compared(a, b)))
    return pd.DataFrame(lines, columns=["data", "quantizer", "method", "arch", "width", "searched", *_DIFFERENCE])


def _pairs(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], pd.DataFrame, pd.DataFrame]]:
    """Every student with every teacher of the same data and quantizer."""
    for (data, quantizer), group in frame.groupby(["data", "quantizer"], sort=True):
        teachers = group[group["role"] == "teacher"].groupby("arch", sort=True)
        students = group[group["role"] == "student"].groupby(["method", "arch"], sort=True)
        for ((method, arch), student), (teacher_arch, teacher) in product(students, teachers):
            yield (str(data), str(quantizer), str(method), str(arch), str(teacher_arch)), student, teacher


def _by_width(a: pd.DataFrame, b: pd.DataFrame) -> Iterator[tuple[float, bool, Any, Any]]:
    """The accuracies of two models by seed, at each width they share, and last of their float models."""
    for width in sorted(set(a["width"]) & set(b["width"])):
        mine, other = a[a["width"] == width], b[b["width"] == width]
        yield width, bool(mine["searched"].any()), mine["top1"], other["top1"]
    whole = [model.groupby("seed")["top1_float"].mean() for model in (a, b)]
    yield math.inf, False, whole[0], whole[1]


def _compared(a: pd.Series | np.ndarray, b: pd.Series | np.ndarray) -> tuple[float, float, float, float, int, int]:
    found = difference(np.asarray(a, float), np.asarray(b, float))
    return found.value, found.low, found.high, found.p, found.n_a, found.n_b
