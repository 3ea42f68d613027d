"""The question, answered with numbers: which model is better, at equal bytes and at equal bits, and by how much?

Models are compared under the same data and quantizer only. Differences are between means over seeds, with Welch's test
(:mod:`kdq.report.difference`); a tuned network and what it was tuned from are compared seed by seed. The finite test
set adds an uncertainty that seeds do not show.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from kdq.report.curve import Curve, curve, shared_sizes
from kdq.report.difference import Difference, difference

#: How a quantized model can be made, in the order they are told.
ROADS = {
    "teacher": "quantize the teacher",
    "student": "train or distil a student, then quantize it",
    "tuned": "distil into the quantized student",
    "tuned teacher": "distil into the quantized teacher",
}
#: What is compared, in the order it is told.
KINDS = {
    "bytes": "top-1 at equal bytes, student − teacher",
    "bits": "top-1 at equal bits, student − teacher",
    "control": "top-1 at equal bits, distilled − plain student",
    "drop": "points lost to quantization, distilled − plain student",
    "tune": "top-1 at equal bits, tuned − not tuned",
}
#: Sizes within this share of each other are the same, such as a float file and one of 32 bits.
SAME_SIZE = 0.01


class Model(NamedTuple):
    """A way to a quantized network, whatever its quantizer and width. ``tune`` names a training after quantization."""

    method: str
    arch: str
    role: str
    tune: str

    @property
    def road(self) -> str:
        return self.role if not self.tune else "tuned" if self.role == "student" else "tuned teacher"

    @property
    def untuned(self) -> str:
        """The method before it was tuned."""
        return self.method.removesuffix(f" + {self.tune}")

    @property
    def origin(self) -> "Model":
        """What was tuned."""
        return self._replace(method=self.untuned, tune="")


#: A model and its values by seed.
Measured = tuple[Model, pd.Series]


@dataclass(frozen=True)
class Place:
    """Two models at one size or width: their means over the seeds compared and what they differ by."""

    at: float
    searched: bool
    a: float
    b: float
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """Model ``a`` against ``b``, wherever both can be: at ``bytes``, or at widths with the float models at ``inf``."""

    data: str
    quantizer: str
    kind: str
    a: Model
    b: Model
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Contest:
    """The best model of each road on validation images, so that no test image chooses who is compared; a plain student
    only where none is distilled, for it is the control.

    ``leads`` are the sizes in bytes that are measured, each with its models and their accuracies by seed, the best
    mean first: those that have such a size, and those whose largest file is smaller and better than all of these.
    """

    data: str
    quantizer: str
    roads: dict[str, Model]
    leads: list[tuple[float, list[Measured]]]


def models(group: pd.DataFrame) -> dict[Model, pd.DataFrame]:
    """The lines (:func:`kdq.report.cells.by_seed`) of each model of one data set and quantizer."""
    return {Model(*map(str, key)): lines for key, lines in group.groupby(list(Model._fields), sort=True)}


def comparisons(frame: pd.DataFrame) -> list[Comparison]:
    """Every comparison that the lines of :func:`kdq.report.cells.by_seed` allow, by data set, quantizer and kind."""
    compared = []
    for (data, quantizer), group in frame.groupby(["data", "quantizer"], sort=True):
        found = models(group)
        curves = {model: curve(lines) for model, lines in found.items()}
        for kind, a, b in sorted(_pairs(list(found)), key=lambda pair: list(KINDS).index(pair[0])):
            if kind == "bytes":
                places = _at_sizes(a, b, curves)
            else:
                places = _at_widths(a, b, found, "drop" if kind == "drop" else "top1")
            compared.append(Comparison(str(data), str(quantizer), kind, a, b, tuple(places)))
    return compared


def contests(frame: pd.DataFrame) -> list[Contest]:
    """One for each data set and quantizer, the one that compares most at first, of equal ones the least lossy."""
    found = []
    for (data, quantizer), group in frame.groupby(["data", "quantizer"], sort=True):
        of = models(group)
        by_road = {road: [model for model in of if model.road == road] for road in ROADS}
        roads = {
            road: max(among, key=lambda model: (model.untuned != "baseline", _validated(of, model, among)))
            for road, among in by_road.items()
            if among
        }
        leads = _leads({model: curve(of[model]) for model in roads.values()})
        shared = sum(len(there) > 1 for _, there in leads)
        found.append(
            ((data, -len(roads), -shared, group["drop"].mean()), Contest(str(data), str(quantizer), roads, leads))
        )
    return [contest for _, contest in sorted(found, key=lambda pair: pair[0])]


def _validated(of: Mapping[Model, pd.DataFrame], model: Model, among: Iterable[Model]) -> float:
    """The mean accuracy on validation images: of the float models, each seed's once, or of a tuned network at the
    widths that all have."""
    lines = of[model]
    if not model.tune:
        return float(lines.groupby("seed")["val_top1_float"].mean().mean())
    shared = set.intersection(*(set(of[other]["width"]) for other in among))
    return float(lines.loc[lines["width"].isin(shared or lines["width"]), "val_top1"].mean())


def rivals(contest: Contest, compared: Iterable[Comparison]) -> dict[Model, set[Model]]:
    """The distilled and the tuned models among which each of ``contest`` was chosen, where there were several."""
    distilled = {
        each.a
        for each in compared
        if (each.data, each.quantizer) == (contest.data, contest.quantizer)
        and each.kind in ("bytes", "tune")
        and each.a.untuned != "baseline"
    }
    among = {chosen: {model for model in distilled if model.road == road} for road, chosen in contest.roads.items()}
    return {chosen: models for chosen, models in among.items() if len(models) > 1}


def table(compared: Iterable[Comparison]) -> pd.DataFrame:
    """The comparisons as a data frame with a line for each place, for going on from here."""
    lines: list[tuple[object, ...]] = []
    for comparison in compared:
        a, b = comparison.a, comparison.b
        names = (comparison.data, comparison.quantizer, comparison.kind, a.method, a.arch, b.method, b.arch)
        lines += [(*names, x.at, x.a, x.b, *vars(x.difference).values()) for x in comparison.places]
    models = ["method_a", "arch_a", "method_b", "arch_b"]
    numbers = ["a", "b", "difference", "low", "high", "p", "n_a", "n_b", "paired"]
    return pd.DataFrame(lines, columns=["data", "quantizer", "kind", *models, "at", *numbers])


def _pairs(found: list[Model]) -> Iterator[tuple[str, Model, Model]]:
    for a in found:
        for b in found:
            if a.role == "student" and b.role == "teacher":
                yield "bytes", a, b
                yield "bits", a, b
            same = a.arch == b.arch and a.role == b.role
            if same and a.tune == b.tune and a.role == "student" and a.untuned != b.untuned == "baseline":
                yield "control", a, b
                yield "drop", a, b
            if a.tune and a.origin == b:
                yield "tune", a, b


def _at_widths(a: Model, b: Model, found: Mapping[Model, pd.DataFrame], column: str) -> Iterator[Place]:
    """Each width that both have, and last their float models, which lose nothing; a tuned network has none."""
    for width in sorted(set(found[a]["width"]) & set(found[b]["width"])):
        mine, other = (found[model][found[model]["width"] == width].set_index("seed") for model in (a, b))
        yield _place(width, bool(mine["searched"].any()), (a, mine[column]), (b, other[column]))
    if column == "top1" and not (a.tune or b.tune):
        whole = [(model, found[model].groupby("seed")["top1_float"].mean()) for model in (a, b)]
        yield _place(math.inf, False, *whole)


def _at_sizes(a: Model, b: Model, curves: Mapping[Model, Curve | None]) -> Iterator[Place]:
    """Each size that one of them has and the curve of the other covers."""
    mine, other = curves[a], curves[b]
    if mine is not None and other is not None:
        for size in distinct(shared_sizes(mine, other)):
            yield _place(size, False, (a, mine.at(size)), (b, other.at(size)))


def _leads(curves: Mapping[Model, Curve | None]) -> list[tuple[float, list[Measured]]]:
    known = {model: found for model, found in curves.items() if found is not None}
    leads = []
    for size in distinct(size for found in known.values() for size in found.sizes):
        at = {model: _at(found, size) for model, found in known.items()}
        there = [(model, top1) for model, top1 in at.items() if np.isfinite(top1).all()]
        ends = {model: found.at(found.sizes[-1]) for model, found in known.items() if found.sizes[-1] < size}
        smaller = [(model, top1) for model, top1 in ends.items() if np.isnan(at[model]).all()]
        there += [each for each in smaller if all(between(each, other).value > 0 for other in there)]
        there.sort(key=lambda pair: float(pair[1].mean()), reverse=True)
        if len(there) > 1 and between(*there[:2]).value < 0:  # of a pair, seeds that only one has may say otherwise
            there[:2] = reversed(there[:2])
        leads.append((size, there))
    return leads


def _at(found: Curve, size: float) -> pd.Series:
    """The accuracies at ``size``, or at the curve's end, where that is the same size."""
    end = min(max(size, found.sizes[0]), found.sizes[-1])
    return found.at(end if abs(end - size) <= SAME_SIZE * size else size)


def distinct(sizes: Iterable[float]) -> list[float]:
    """The sizes in order, without those that are the same as the one before.

    >>> distinct([400, 100, 403])
    [100.0, 400.0]
    """
    kept: list[float] = []
    for size in sorted(map(float, sizes)):
        if not kept or size > (1 + SAME_SIZE) * kept[-1]:
            kept.append(size)
    return kept


def between(first: Measured, second: Measured) -> Difference:
    """What the first of two models has more than the second; see :func:`_compared`."""
    return difference(*_compared(first, second))


def _compared(first: Measured, second: Measured) -> tuple[np.ndarray, np.ndarray, bool]:
    """The values to compare, and whether by seed: a tuned network's and its origin's of the seeds that both have."""
    (a, x), (b, y) = first, second
    shared = x.index.intersection(y.index)
    paired = len(shared) > 0 and (a.origin == b or b.origin == a)
    x, y = (x[shared], y[shared]) if paired else (x, y)
    return x.to_numpy(), y.to_numpy(), paired


def _place(at: float, searched: bool, first: Measured, second: Measured) -> Place:
    a, b, paired = _compared(first, second)
    return Place(float(at), searched, float(a.mean()), float(b.mean()), difference(a, b, paired))
