"""The rows as a data frame for people: named series, and one line per cell with mean and spread over seeds."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kdq.records.rows import COLUMNS, Row, table

#: What one line of a table or of a figure stands for: a model and the way it was quantized.
SERIES = ["data", "method", "arch", "quantizer"]
#: What tells cells apart, seeds aside.
CELL = [*SERIES, "width"]
#: Columns whose mean and standard deviation over seeds are shown, and columns that have a mean only.
SPREAD = ["top1", "top1_float", "drop", "top1_onnx_int8", "top1_onnx_fp32"]
MEANS = [
    "val_top1",
    "val_top1_float",
    "nll",
    "ece",
    "avg_bits",
    "weight_bits_total",
    "size_bytes",
    "float_bytes",
    "epochs",
    "latency_threads",
]
#: Median latencies in milliseconds.
LATENCIES = [name for name in COLUMNS if name.startswith("latency_ms_")]
#: Those of exported networks, on ``latency_threads`` threads.
EXPORTED = [name for name in LATENCIES if name != "latency_ms_torch"]
_LONGEST_NAME = 60


def named(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows with printable names and changes for people.

    ``quantizer`` also tells what its name alone does not: rounded activations (``gpfq A8``), the alphabet or the search
    where rows of one name differ in them, the calibration images where rows of one cell do, and that the ``paper``
    alphabet takes one bit more than it is asked for; trials (``limited``) have names of their own. ``method`` tells,
    too, what tuned the quantized network (``vkd + qad``). ``width`` is ``bits``, or for a ``searched`` row its average
    width rounded up to a quarter, since budgets are upper bounds. Exported networks keep their latencies only where
    these are on the data set's ``latency_threads``, the number of threads that most of its rows have, and PyTorch's are
    kept on the device of most, whatever its threads.
    """
    frame = table(rows)
    for column in (*SERIES, "device"):
        frame[column] = frame[column].map(printable)
    for column in ("tune", "recipe"):
        frame[column] = frame[column].map(lambda text: text and printable(text))
    tuned = frame["tune"] != ""
    frame.loc[tuned, "method"] += " + " + frame.loc[tuned, "tune"]
    # Before format 4, "val_top1" was the float model's.
    frame["val_top1_float"] = frame["val_top1_float"].where(tuned | (frame["row_format"] >= 4), frame["val_top1"])
    # 2^b + 1 levels: what these rows have at 2 bits, others have at 3.
    frame.loc[frame["alphabet"] == "paper", "quantizer"] += " (b+1 bits)"
    for column in ("alphabet", "search"):
        several = frame.groupby("quantizer")[column].transform("nunique") > 1
        differing = several & (frame[column] != "")
        frame.loc[differing, "quantizer"] += " " + frame.loc[differing, column].map(printable)
    rounded = frame["act_bits"] < 32
    frame.loc[rounded, "quantizer"] += " A" + frame.loc[rounded, "act_bits"].astype(str)
    trial = frame["limited"] != ""
    frame.loc[trial, "quantizer"] += " TRIAL " + frame.loc[trial, "limited"].map(printable)
    frame["searched"] = frame["search"] != ""
    frame["width"] = widths(frame)
    several = frame.groupby([*CELL, "seed"])["calibration_images"].transform("nunique") > 1
    counted = frame["quantizer"].isin(frame.loc[several, "quantizer"])
    frame.loc[counted, "quantizer"] += " " + frame.loc[counted, "calibration_images"].astype(str) + " images"
    threads = frame["latency_threads"].astype("float64").where(frame[EXPORTED].notna().any(axis=1))
    most = threads.groupby(frame["data"]).transform(lambda numbers: numbers.mode().min())  # NaN where none is known
    frame.loc[threads.fillna(0) != most.fillna(0), EXPORTED] = np.nan
    devices = frame["device"].map(lambda name: re.sub(r" x\d+$", "", name))
    usual = devices.groupby(frame["data"]).transform(lambda names: names.mode().min())
    frame.loc[devices != usual, "latency_ms_torch"] = np.nan
    return frame.assign(latency_threads=most)


def widths(frame: pd.DataFrame) -> Any:
    """The widths of rows: ``bits``, or of a searched row the average rounded up to a quarter."""
    quarters = np.ceil(frame["avg_bits"].to_numpy(float) * 4 - 1e-6) / 4
    return np.where(frame["search"] != "", quarters, frame["bits"].to_numpy(float))


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per cell and seed. Rows that differ in nothing but settings without a column become their mean; how
    many they were is in ``rows``."""
    keys = [*CELL, "role", "tune", "searched", "seed"]
    groups = frame.groupby(keys, sort=True)
    return groups[[*SPREAD, *MEANS, *LATENCIES]].mean().assign(rows=groups.size()).reset_index()


def cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per cell: means over its ``n`` seeds, ``<column>_std`` for :data:`SPREAD` (NaN for one seed), and the
    number of ``rows``, larger than ``n`` where rows of one seed differ in settings that have no column."""
    groups = by_seed(frame).groupby([*CELL, "role", "tune", "searched"], sort=True)
    spread = groups[SPREAD].std().add_suffix("_std")
    means = groups[[*SPREAD, *MEANS, *LATENCIES]].mean()
    return means.join(spread).assign(n=groups.size(), rows=groups["rows"].sum()).reset_index()


def float_model(model: pd.DataFrame) -> Any:
    """The one of a model's :func:`cells` that tells its float network's accuracy from most seeds: the mean over all of
    them would count a seed as often as it was quantized."""
    return model.iloc[int(model["n"].argmax())]


def settings(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`named` of every model that has a cell with several rows of one seed: what a search tried."""
    several = frame.groupby([*CELL, "seed"])["config_hash"].transform("size") > 1
    return frame[several.groupby([frame[column] for column in SERIES]).transform("any")]


def series(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """The frame's lines, in the order of :data:`SERIES`."""
    for name, group in frame.groupby(SERIES, sort=True):
        yield tuple(map(str, name)), group


def records(frame: pd.DataFrame) -> list[Any]:
    """The frame's lines as named tuples."""
    return list(frame.itertuples(index=False))


def missing(found: pd.DataFrame) -> pd.DataFrame:
    """The cells of each data set's grid that have fewer seeds than others: one line per cell with ``n`` and
    ``wanted``. A model whose weights were read from a file is wanted once.

    The grid is every model and quantizer of the data set at every width of that quantizer; searched widths are
    points of their own and no part of it.
    """
    lines = []
    grid = found[~found["searched"]]
    for (data, quantizer), group in grid.groupby(["data", "quantizer"], sort=True):
        wanted = int(group["n"].max())
        counts = {(m, a, w): int(n) for m, a, w, n in records(group[["method", "arch", "width", "n"]])}
        for (method, arch, tune), model in group.groupby(["method", "arch", "tune"], sort=False):
            each = 1 if model["epochs"].fillna(-1).max() == 0 else wanted
            for width in sorted(group["width"].unique()):
                n = counts.get((method, arch, width), 0)
                if n < each and (n or not tune):  # a width is tuned by itself
                    lines.append((data, method, arch, quantizer, width, n, each))
    return pd.DataFrame(lines, columns=[*CELL, "n", "wanted"])


def near_chance(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of :func:`named` rows with less than a tenth of what lies between chance and 100 %."""
    keys = [*CELL, "classes"]
    means = frame[frame["classes"] > 1].groupby(keys, sort=True)[["top1", "top1_float"]].mean().reset_index()
    chance = 100 / means["classes"].astype(float)
    return means[means["top1"] < chance + 0.1 * (100 - chance)]


def telling(found: pd.DataFrame) -> pd.DataFrame:
    """The cells without the widths above 8 at which no model of the data set and quantizer is 0.2 points from its
    float model: they would fill half an axis with one line."""
    wide = found["width"].gt(8) & ~found["searched"]
    far = found["drop"].abs().gt(0.2) & wide
    moved = far.groupby([found["data"], found["quantizer"]]).transform("any")
    narrow = (~wide).groupby([found["data"], found["quantizer"]]).transform("any")
    return found[~wide | moved | ~narrow]


def pareto(x: Sequence[float], y: Sequence[float], same: float = 0.01) -> list[int]:
    """Positions of the points that no other beats, in order of ``x``: a point is beaten by a larger ``y`` at a smaller
    or the same ``x``, and by the same ``y`` at a smaller ``x``. Values of ``x`` within the share ``same`` of each
    other are the same: a few bytes of header make no smaller model."""
    order = sorted(range(len(x)), key=lambda i: (x[i], -y[i]))
    front: list[int] = []
    best, ahead = -math.inf, 0
    for i in order:
        while ahead < len(order) and x[order[ahead]] <= x[i] * (1 + same):
            best, ahead = max(best, y[order[ahead]]), ahead + 1
        if y[i] >= best and (not front or y[i] > y[front[-1]]):
            front.append(i)
    return front


def width_name(width: float, searched: bool = False) -> str:
    """``4 bits``; ``≤ 3.5 bits`` where a search chose each layer's; ``float`` for infinity."""
    if math.isinf(width):
        return "float"
    return f"{'≤ ' if searched else ''}{width:g} bits"


def size_name(size: float) -> str:
    """Bytes in kB or MB of a thousand, three digits: ``163 kB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size:.0f} B"


def printable(text: str) -> str:
    """A name on one line, without control characters, not endlessly long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(no name)"
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
