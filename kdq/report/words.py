"""The answer in words: for each data set a headline, what made the numbers, and a table with a line per comparison.

The terminal, report.md, report.html and the W&B run of a sweep show what :func:`answers` gives and add nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from kdq.report import answer
from kdq.report.answer import KINDS, ROADS, Comparison, Contest, Measured, Model, Place, between
from kdq.report.cells import by_seed, size_name, width_name
from kdq.report.difference import LEVEL, Difference
from kdq.report.latency import shown_latency

#: How the numbers are to be read; said once, below the answer.
NOTES = (
    "Differences are between means over seeds, in points of top-1 on the test set, with 95 % intervals and Welch's "
    f"t-test (two-sided, p < {LEVEL:g}, not corrected for the number of comparisons); a tuned network and what it "
    "was tuned from are compared seed by seed, with the paired test. The intervals are about seeds only: the "
    "finite test set adds uncertainty.",
    "The headline compares the best model of each road on validation images: the test set chooses none of them. Where "
    "the teacher's weights come from a file, it may have learnt them: who imitates it more gains there.",
    "Between measured sizes a model's accuracy is interpolated linearly in the logarithm of its bytes, the float model "
    "being its largest file; nothing is extrapolated. In the headline a model whose largest file is smaller, and "
    "better than all of a size, leads there, too.",
)
#: The columns of the table: where the first of two models has more, where seeds do not decide, where it has less.
COLUMNS = ("comparison", "higher at", "undecided at", "lower at", "at the smallest", "seeds")
#: The columns of a comparison's own table, folded away.
PLACES = ("at", "first", "second", "difference", "95 % interval", "p")
#: So many regions of sizes are told in a headline.
_TOLD = 4


@dataclass(frozen=True)
class Line:
    """One comparison: ``cells`` under :data:`COLUMNS`, and each of its ``places`` under :data:`PLACES`."""

    quantizer: str
    kind: str
    methods: tuple[str, str]
    cells: tuple[str, ...]
    places: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answer:
    """What the rows of one data set say, the ``headline`` first and alone if need be. ``lines`` of the headline's
    quantizer come first, by kind."""

    data: str
    headline: str
    made: tuple[str, ...]
    lines: tuple[Line, ...]


def answers(named: pd.DataFrame) -> list[Answer]:
    """The answer for each data set of the rows of :func:`kdq.report.cells.named`."""
    frame = by_seed(named)
    compared, contests = answer.comparisons(frame), answer.contests(frame)
    found = []
    for data, parts in groupby(contests, key=lambda contest: contest.data):
        here = list(parts)
        rows = named[named["data"] == data]
        name = _namer(rows)
        order = [contest.quantizer for contest in here]
        mine = [comparison for comparison in compared if comparison.data == data]
        mine.sort(key=lambda comparison: order.index(comparison.quantizer))
        lines = tuple(_line(comparison, name, len(order) > 1) for comparison in mine)
        seen = bool((rows.loc[rows["role"] == "teacher", "epochs"] == 0).any())
        headline = _headline(here[0], mine, _named(name), seen)
        found.append(Answer(data, headline, (_made(rows), *_speed(rows, name)), lines))
    return found


def _namer(rows: pd.DataFrame) -> Callable[[Model], str]:
    """A model's method, with its architecture where a method has several."""
    several = rows.groupby("method")["arch"].nunique() > 1
    return lambda model: f"{model.method} ({model.arch})" if several[model.method] else model.method


def _named(name: Callable[[Model], str]) -> Callable[[Model], str]:
    """The names in a sentence."""
    return lambda model: f"the {name(model)}" if model.method == "teacher" else name(model)


# The headline: who wins where, by how much, how sure.

#: What can be said of sizes, in the order it is told.
_SAID = ("wins", "ahead", "undecided", "alone")
_Lead = tuple[float, list[Measured]]


def _headline(contest: Contest, compared: Sequence[Comparison], name: Callable[[Model], str], seen: bool) -> str:
    """``seen``: the teacher's weights are from a file and may have been trained on the validation images."""
    data, roads = contest.data, contest.roads
    if len(roads) < 2:
        missing = [f"“{what}”" for road, what in ROADS.items() if road not in roads and "tuned" not in road]
        none = f"no row quantized with {contest.quantizer} is of {' or '.join(missing)}"
        return f"{data}: which road wins cannot be said, for {none}."
    parts = groupby(contest.leads, key=lambda lead: _leader(lead[1]))
    regions = [_Region(what, list(leads), name) for (what, _), leads in parts]
    counts = sorted({len(top1) for _, there in contest.leads for _, top1 in there})
    start = f"{data} at equal bytes ({contest.quantizer}, {_range(counts)} seed{'s' if counts[-1] > 1 else ''}): "
    order = sorted(range(len(regions)), key=lambda i: _SAID.index(regions[i].what))
    told = [text for i in order if (text := regions[i].text(i, regions[i + 1 :]))]
    if all(region.what == "alone" for region in regions):
        told = ["no size is there for two roads", *told]
    elif all(region.what != "wins" for region in regions) and any(region.tested for region in regions):
        told = ["no road wins beyond seed noise", *told]
    told = told[:_TOLD] + ["more in the table"] * (len(told) > _TOLD)
    doubts = [
        f"{name(chosen)} was chosen among {', '.join(sorted(map(name, among)))} on images that the teacher, whose "
        "weights are from a file, may have been trained on"
        for chosen, among in answer.rivals(contest, compared).items()
        if seen
    ]
    return f"{start}{'; '.join([*told, *_adds(contest, compared, name), *doubts])}."


def _adds(contest: Contest, compared: Sequence[Comparison], name: Callable[[Model], str]) -> list[str]:
    """What the distillation of the headline's student adds at the narrowest width."""
    student = contest.roads.get("student")
    said = []
    for comparison in compared:
        if (comparison.kind, comparison.quantizer, comparison.a) != ("control", contest.quantizer, student):
            continue
        first = comparison.places[0]
        sure = _sure(first.difference)
        sure += ": undecided" if first.difference.tested and not first.difference.beyond_noise else ""
        over = f"over {name(comparison.b)} at {_at(comparison.kind, first)}"
        said.append(f"distillation itself is worth {_signed(first.difference.value, 1)} points {over} ({sure})")
    return said


def _leader(there: Sequence[Measured]) -> tuple[str, list[Model]]:
    """What can be said of a size, and of which models; ``there`` are those that it has, the best mean first."""
    first = [model for model, _ in there[:2]]
    if len(there) < 2:
        return "alone", first
    by = between(*there[:2])
    if _verdict(by) == "undecided":
        return "undecided", []
    return "wins" if by.tested else "ahead", first


@dataclass(frozen=True)
class _Region:
    """Sizes in a row of which the same can be said."""

    what: str  # one of _SAID
    leads: list[_Lead]
    name: Callable[[Model], str]

    @property
    def tested(self) -> bool:
        return any(len(there) > 1 and between(*there[:2]).tested for _, there in self.leads)

    def text(self, before: int, later: Sequence[_Region]) -> str:
        """What is said, after so many regions ``before``. Empty where it is nothing: of sizes that only the largest
        model has, or none."""
        (low, there), high = self.leads[0], self.leads[-1][0]
        if not there or (self.what == "alone" and not later):
            return ""
        first, here = self.name(there[0][0]), f" at {size_name(low)}" if high > low else ""
        span = f"from {_to(size_name(low), size_name(high))}" if here else f"at {size_name(low)}"
        if self.what == "alone":
            top1 = f"{there[0][1].mean():.1f} % at {size_name(low)}"
            span = span if before else f"below {size_name(later[0].leads[0][0])}"
            return f"{span} only {first} has files ({top1})"
        by = between(*there[:2])
        if self.what == "undecided":
            leaders = {self.name(models[0][0]) for _, models in self.leads}
            gains = [between(*models[:2]).value for _, models in self.leads]
            ahead = len(leaders) == 1 and max(gains) >= 0.05  # printed as 0.1
            who = f"{leaders.pop()} ahead by" if ahead else "means differ by"
            return f"{span} undecided ({who} {_range(gains, '.1f')} points)"
        gain = f"by {_number(by.value, 1)} points{here}, {_sure(by)}"
        verb = "beats" if self.what == "wins" else "is ahead of"
        return f"{first} {verb} {self.name(there[1][0])} {span} ({gain})"


def _sure(by: Difference) -> str:
    said = f"95 % interval {_number(by.low, 1)} to {_number(by.high, 1)}" if by.tested else "untested"
    return f"{said}, {by.n_a} seed{'s' if by.n_a > 1 else ''} of both" if by.paired else said


# What made the numbers.


def _made(rows: pd.DataFrame) -> str:
    """Networks, trainings, calibration and machine."""
    networks = []
    for (role, arch), part in rows.groupby(["role", "arch"], sort=True):
        facts = [f"{_range(part['params'], ',')} parameters", _training(part)]
        networks.append(f"{role} {arch} ({', '.join(facts)})")
    trained = sorted(networks, reverse=True)  # the teacher first
    quantizers = [
        f"{quantizer} ({_range(part['calibration_images'], ',')} images)"
        for quantizer, part in rows.groupby("quantizer", sort=True)
    ]
    tuned = [
        f"tuned with {tune} ({_epochs(part['tune_epochs'])})"
        for tune, part in rows[rows["tune"] != ""].groupby("tune", sort=True)
    ]
    devices, seeds = ", ".join(sorted(set(rows["device"]))), rows["seed"].nunique()
    parts = ["; ".join(trained), f"quantized with {', '.join(quantizers)}", *tuned]
    return f"Made by: {'; '.join(parts)}; {seeds} seed{'s' if seeds > 1 else ''}; measured on {devices}."


def _training(part: pd.DataFrame) -> str:
    epochs = part["epochs"].dropna()
    if epochs.empty:
        return "training not recorded"
    if epochs.max() == 0:
        return "weights from a file"
    recipes = sorted(set(part["recipe"]) - {""})
    return f"{_epochs(epochs)}, {recipes[0] if len(recipes) == 1 else f'{len(recipes)} recipes'}"


def _epochs(values: pd.Series) -> str:
    said = _range(values.dropna())
    return f"{said} epoch{'' if said == '1' else 's'}"


def _speed(rows: pd.DataFrame, name: Callable[[Model], str]) -> list[str]:
    """The latency of each model, where all were timed alike."""
    shown = shown_latency(rows)
    timed = rows[rows[shown.column].notna()]
    models = answer.models(timed)
    if len(models) < 2:
        return []
    told = []
    for model, lines in sorted(models.items(), key=lambda pair: list(ROADS).index(pair[0].road)):
        ms = lines[shown.column].median()
        told.append(f"{name(model)} {ms:{'.3g' if ms < 1000 else ',.0f'}}")
    return [f"{shown.label[0].upper()}{shown.label[1:]}: {', '.join(told)}."]


# The table.


def _line(comparison: Comparison, name: Callable[[Model], str], several: bool) -> Line:
    verdicts: dict[str, list[str]] = {"higher": [], "undecided": [], "lower": []}
    for verdict, group in groupby(comparison.places, key=lambda place: _verdict(place.difference)):
        places = [_at(comparison.kind, place) for place in group]
        verdicts[verdict].append(_to(places[0], places[-1]))
    named = f"{name(comparison.a)} vs {name(comparison.b)}" + (f", {comparison.quantizer}" if several else "")
    cells = [named, *("; ".join(told) or "–" for told in verdicts.values())]
    if comparison.places:
        first = comparison.places[0]
        by = first.difference
        untested = "" if any(place.difference.tested for place in comparison.places) else ", untested"
        interval = f" ({_number(by.low)} to {_number(by.high)})" if by.tested else ""
        seeds = f"{by.n_a} of both" if by.paired else f"{by.n_a} + {by.n_b}"
        cells += [f"{_signed(by.value)}{interval} at {_at(comparison.kind, first)}", f"{seeds}{untested}"]
    else:
        cells += ["nothing in common", "–"]
    every = tuple(_place(comparison.kind, place) for place in comparison.places)
    methods = comparison.a.method, comparison.b.method
    return Line(comparison.quantizer, KINDS[comparison.kind], methods, tuple(cells), every)


def _place(kind: str, place: Place) -> tuple[str, ...]:
    by = place.difference
    interval = f"{_number(by.low)} to {_number(by.high)}" if by.tested else "–"
    means = (_number(place.a), _number(place.b), _signed(by.value))
    return (_at(kind, place), *means, interval, f"{by.p:.2g}" if by.tested else "–")


def _verdict(by: Difference) -> str:
    """What a difference says of the first of two models; without a test, of the numbers as they are."""
    if (by.tested and not by.beyond_noise) or abs(by.value) < 0.005:  # printed as 0.00
        return "undecided"
    return "higher" if by.value > 0 else "lower"


def _to(first: str, last: str) -> str:
    """``295 to 301 kB``, ``2 to 8 bits``."""
    unit = f" {last.rpartition(' ')[2]}"
    return first if first == last else f"{first.removesuffix(unit)} to {last}"


def _at(kind: str, place: Place) -> str:
    return size_name(place.at) if kind == "bytes" else width_name(place.at, place.searched)


def _range(values: Iterable[float], form: str = "g") -> str:
    low, high = f"{min(values, default=0):{form}}", f"{max(values, default=0):{form}}"
    return low if low == high else f"{low} to {high}"


def _signed(value: float, digits: int = 2) -> str:
    return ("+" if value > 0 and float(f"{value:.{digits}f}") else "") + _number(value, digits)


def _number(value: float, digits: int = 2) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text.replace("-", "−")
