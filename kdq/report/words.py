"""The answer in sentences. Each belongs to a data set, a quantizer and, where it is about one student, its method."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdq.report import answer
from kdq.report.cells import records, size_name, width_name
from kdq.report.difference import LEVEL
from kdq.report.latency import shown_latency

#: How the numbers are to be read; said once, below the answer.
NOTES = (
    "Differences are between means over seeds, in points of top-1 on the test set, with 95 % confidence intervals and "
    f"Welch's t-test (unequal variances, two-sided, p < {LEVEL:g}, not corrected for the number of comparisons). "
    "The intervals are about seeds only: the finite test set adds uncertainty, and where several students compete "
    "the best of them is shown, which favours it a little.",
    "Between measured sizes a model's accuracy is interpolated linearly in the logarithm of its bytes, the float model "
    "being its largest file; nothing is extrapolated.",
)


#: What a difference says of the question, in the order it is told; the student's place where it is one of a list.
_VERDICTS = {
    "yes": "leads at",
    "no": "trails at",
    "undecided within seed noise": "within seed noise at",
    "the student leads, untested,": "leads, untested, at",
    "the teacher leads, untested,": "trails, untested, at",
    "equal": "equal at",
}


@dataclass(frozen=True)
class Statement:
    """A sentence or a few. ``topic`` is ``answer``, ``bits``, ``bytes``, ``drop`` or ``control``; ``method`` is empty
    where several are meant. The ``answer`` has a line for each of its parts."""

    data: str
    quantizer: str
    method: str
    topic: str
    text: str


def statements(frame: pd.DataFrame) -> list[Statement]:
    """Everything that the lines of :func:`kdq.report.cells.by_seed` allow to be said, and what they do not allow."""
    pairs = answer.curve_pairs(frame)
    tables = {
        "bits": answer.at_equal_bits(frame),
        "bytes": _distinct(answer.at_equal_bytes(pairs)),
        "extents": answer.extents(pairs),
        "crossovers": answer.crossovers(pairs),
        "degradation": answer.degradation(frame),
        "control": answer.control(frame),
    }
    parts = {name: dict(list(found.groupby(["data", "quantizer"]))) for name, found in tables.items()}
    spoken = []
    for (data, quantizer), group in frame.groupby(["data", "quantizer"], sort=True):
        here = {name: parts[name].get((data, quantizer), tables[name].iloc[:0]) for name in tables}
        for method, topic, text in _about(group, here):
            spoken.append(Statement(str(data), str(quantizer), method, topic, text))
    return spoken


def _distinct(found: pd.DataFrame) -> pd.DataFrame:
    """Without sizes within a hundredth of the one before, such as a float file beside one of 32 bits."""
    kept = []
    for _, group in found.groupby(answer.PAIR, sort=False):
        last = 0.0
        for index, size in sorted(
            zip(group.index, group["bytes"].astype(float), strict=True), key=lambda pair: pair[1]
        ):
            if size > 1.01 * last:
                kept.append(index)
                last = size
    return found[found.index.isin(kept)]


def without_repeats(said: Iterable[Statement]) -> list[Statement]:
    """Without the answers that say again of a data set what was said: that there are no rows for one."""
    first: dict[tuple[str, str, str], Statement] = {}
    for found in said:
        first.setdefault((found.data, "" if found.topic == "answer" else found.quantizer, found.text), found)
    return list(first.values())


def _about(group: pd.DataFrame, here: dict[str, pd.DataFrame]) -> Iterable[tuple[str, str, str]]:
    """``(method, topic, text)`` for one data set and quantizer."""
    yield "", "answer", _headline(group, here)
    pair = ["method", "arch", "teacher"]
    for key, found in here["bits"].groupby(pair, sort=True):
        yield str(key[0]), "bits", _bits(key, found)
    for key, extent in here["extents"].groupby(pair, sort=True):
        mine = {name: _of(here[name], dict(zip(pair, map(str, key), strict=True))) for name in ("bytes", "crossovers")}
        yield str(key[0]), "bytes", _bytes(key, records(extent)[0], mine["bytes"], mine["crossovers"])
    for key, found in here["control"].groupby(["method", "arch"], sort=True):
        yield str(key[0]), "control", _control(key, found)
    yield "", "drop", _drop(here["degradation"])


def _headline(group: pd.DataFrame, here: dict[str, pd.DataFrame]) -> str:
    """The question, answered for the best distilled student at each width, and at each size that all have."""
    roles, methods = set(group["role"]), set(group["method"])
    question = "Does quantizing a distilled student beat quantizing the teacher?"
    if "teacher" not in roles:
        return f"{question} Nothing can be said: there is no row of a quantized teacher."
    if not methods - {"teacher", "baseline"}:
        return f"{question} Nothing can be said: there is no row of a distilled student."
    bits, sizes = (found[found["method"] != "baseline"] for found in (here["bits"], here["bytes"]))
    bits = bits[~bits["width"].map(math.isinf)]
    said = [question, f"At equal bits: {_best(bits, 'width') if len(bits) else 'no width is there for both'}."]
    if len(sizes):
        said.append(f"At equal bytes: {_best(_at_shared_sizes(sizes, here), 'bytes')}.")
    else:
        said.append("At equal bytes: no size is there for both.")
    crossovers = here["crossovers"][here["crossovers"]["method"] != "baseline"]
    places = [f"{size_name(line.bytes)} ({line.method}; below, the {line.below} leads)" for line in records(crossovers)]
    said += [f"A student's curve crosses the teacher's at {', '.join(places)}."] if places else []
    extents = here["extents"][here["extents"]["method"] != "baseline"]
    if len(extents) and (extents["student_from"] < extents["teacher_from"]).any():
        smallest = min(records(extents), key=lambda line: line.student_from)
        said.append(
            f"Below {size_name(extents['teacher_from'].min())} only students have files, from "
            f"{size_name(smallest.student_from)} ({smallest.method}, {smallest.student_top1_from:.2f} %)."
        )
    said.append(f"Least lost to quantization {_least(here['degradation'])}.")
    control = records(here["control"][here["control"]["width"] == here["control"]["width"].min()])
    if control:
        adds = [f"{line.method} ({_signed(line.difference)}{_interval(line)}{_noise(line)})" for line in control]
        place = width_name(control[0].width, control[0].searched)
        said.append(f"What distillation adds at {place}, over the same network without it: {', '.join(adds)}.")
    said += _speed(group)
    if "baseline" not in methods:
        said.append("Without baseline rows, how much of a student's result is distillation cannot be said.")
    if len(bits) or len(sizes):
        compared = bits if len(bits) else sizes
        intervals = ", with 95 % intervals" if compared["p"].notna().any() else ""
        said.append(f"In brackets: student minus teacher in points of top-1{intervals}. {_seeds(compared)}")
    return "\n".join(said)


def _speed(group: pd.DataFrame) -> list[str]:
    """The latency of each model, where all were timed alike."""
    shown = shown_latency(group)
    timed = group[group[shown.column].notna()] if shown.column in group else group.iloc[:0]
    means = timed.groupby(["role", "method", "arch"])[[shown.column]].mean().reset_index()
    if len(means) < 2:
        return []
    means = means.sort_values(["role", "method", "arch"], ascending=[False, True, True])
    told = [f"{line.method} ({line.arch}) {_milliseconds(getattr(line, shown.column))}" for line in records(means)]
    return [f"{shown.label[0].upper()}{shown.label[1:]}: {', '.join(told)}."]


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _at_shared_sizes(sizes: pd.DataFrame, here: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The lines at sizes where every student is compared, and where there is none, all lines."""
    counts = sizes.groupby("bytes")["method"].transform("size")
    shared = sizes[counts == len(here["extents"][here["extents"]["method"] != "baseline"])]
    return shared if len(shared) else sizes


def _best(found: pd.DataFrame, at: str) -> str:
    """Yes where any student leads beyond noise, no where all trail beyond it, else undecided; each with its widths or
    sizes and the best such student there."""
    several = found["method"].nunique() > 1
    verdicts: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for _, group in found.groupby(at, sort=True):
        line = max(records(group), key=_rank)
        place = size_name(line.bytes) if at == "bytes" else width_name(line.width, line.searched)
        who = f"{line.method} " if several else ""
        verdicts[_verdict(line)].append(f"{place} ({who}{_signed(line.difference)}{_interval(line)})")
    return "; ".join(f"{verdict} at {', '.join(places)}" for verdict, places in verdicts.items() if places)


def _rank(line: Any) -> tuple[bool, bool, float]:
    verdict = _verdict(line)
    return verdict == "yes", verdict != "no", line.difference


def _verdict(line: Any) -> str:
    if line.p >= LEVEL:
        return "undecided within seed noise"
    if abs(line.difference) < 0.005:  # printed as 0.00
        return "equal"
    if math.isnan(line.p):
        return "the student leads, untested," if line.difference > 0 else "the teacher leads, untested,"
    return "yes" if line.difference > 0 else "no"


def _bits(key: tuple[Any, ...], found: pd.DataFrame) -> str:
    method, arch, teacher = key
    places = {width_name(line.width, line.searched): line for line in records(found)}
    return f"{method} ({arch}) against the teacher ({teacher}) at equal bits: {_listed(places)}. {_seeds(found)}"


def _bytes(key: tuple[Any, ...], extent: Any, found: pd.DataFrame, crossovers: pd.DataFrame) -> str:
    method, arch, teacher = key
    head = f"{method} ({arch}) against the teacher ({teacher}) at equal bytes: "
    if found.empty:
        return head + (
            f"no size is there for both: the student has {size_name(extent.student_from)} to "
            f"{size_name(extent.student_to)}, the teacher {size_name(extent.teacher_from)} to "
            f"{size_name(extent.teacher_to)}."
        )
    said = [head + _listed({size_name(line.bytes): line for line in records(found)}) + "."]
    for line in records(crossovers):
        other = "teacher" if line.below == "student" else "student"
        seeds = (
            "" if math.isnan(line.low) else f" (seeds: {size_name(line.low)} to {size_name(line.high)}, n = {line.n})"
        )
        said.append(
            f"The mean curves cross at {size_name(line.bytes)}{seeds}: the {line.below} leads below, the {other} above."
        )
    if crossovers.empty and len(found) > 1:
        said.append("The mean curves do not cross where both exist.")
    for role, other in (("student", "teacher"), ("teacher", "student")):
        mine, others = getattr(extent, f"{role}_from"), getattr(extent, f"{other}_from")
        if mine < others:
            top1 = getattr(extent, f"{role}_top1_from")
            said.append(
                f"Below {size_name(others)} only the {role} has files, from {size_name(mine)} with {top1:.2f} %."
            )
    return " ".join([*said, _seeds(found)])


def _control(key: tuple[Any, ...], found: pd.DataFrame) -> str:
    method, arch = key
    places = {width_name(line.width, line.searched): line for line in records(found)}
    return (
        f"What distillation adds to {method} ({arch}), against the same network trained on cross-entropy alone: "
        f"{_listed(places)}. {_seeds(found)}"
    )


def _drop(found: pd.DataFrame) -> str:
    said = [_least(group) for _, group in found.groupby("width", sort=True)]
    return "Points of top-1 lost to quantization, the least first: " + "; ".join(said) + "."


def _least(found: pd.DataFrame) -> str:
    """The two models that lose least at the narrowest width, and whether that is a difference."""
    group = records(found[found["width"] == found["width"].min()].sort_values("rank"))
    first, methods = group[0], [line.method for line in group]
    who = {line: line.method if methods.count(line.method) == 1 else f"{line.method} ({line.arch})" for line in group}
    text = f"at {width_name(first.width, bool(first.searched))}: {who[first]} with {_points(first)}"
    if len(group) == 1:
        return text + " (the only model)"
    second = group[1]
    text += f", then {who[second]} with {_points(second)}"
    if not math.isnan(second.p):
        noise = "more than" if second.p < LEVEL else "not more than"
        return text + f" (p = {second.p:.2g}: {noise} seed noise)"
    if min(second.n_a, second.n_b) < 2:
        return text + " (one seed: nothing can be said about noise)"
    return text + " (no spread over seeds)"


def _points(line: Any) -> str:
    spread = "" if math.isnan(line.std) else f" ± {line.std:.2f}"
    return f"{_number(line.drop)}{spread}"


def _listed(places: dict[str, Any]) -> str:
    """``leads at 2 bits by 1.30 (95 % CI 0.73 to 1.87); within seed noise at 3 bits (+0.10, ...)``."""
    said: dict[str, list[str]] = {place: [] for place in _VERDICTS.values()}
    for place, line in places.items():
        said[_VERDICTS[_verdict(line)]].append(f"{place} ({_signed(line.difference)}{_interval(line)})")
    return "; ".join(f"{verdict} {', '.join(found)}" for verdict, found in said.items() if found)


def _interval(line: Any) -> str:
    return "" if math.isnan(line.p) else f", {_number(line.low)} to {_number(line.high)}"


def _noise(line: Any) -> str:
    return ": within seed noise" if line.p >= LEVEL else ""


def _seeds(found: pd.DataFrame) -> str:
    """How many seeds stand behind the differences."""
    a, b = (sorted(set(found[name].astype(int))) for name in ("n_a", "n_b"))
    if a[-1] == b[-1] == 1:
        return "One seed each: nothing can be said about seed noise."
    text = [str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (a, b)]
    alone = " Without an interval: one seed on a side, or no spread." if found["p"].isna().any() else ""
    return f"n = {text[0]} and {text[1]} seeds.{alone}"


def _signed(value: float) -> str:
    return ("+" if value > 0 and f"{value:.2f}" != "0.00" else "") + _number(value)


def _number(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def _of(found: pd.DataFrame, values: dict[str, str]) -> pd.DataFrame:
    for column, value in values.items():
        found = found[found[column] == value]
    return found
