"""The figures for paper: accuracy and drop against bits, total bits, bytes and latency, and what bit searches did.

One panel per data set (columns) and quantizer (rows); a method has one colour everywhere. PNG for looking, SVG for
printing; equal rows make equal files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kdq.report import published
from kdq.report.cells import pareto, records
from kdq.report.latency import shown_latency
from kdq.report.layers import Frontier
from kdq.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that colour-blind people can tell apart (Okabe & Ito 2008); the teacher is black, the control grey.
COLORS = {
    "teacher": "#000000",
    "baseline": "#8c8c8c",
    "vkd": "#0072b2",
    "mixup": "#e69f00",
    "mixup_fm": "#56b4e9",
    "dml": "#009e73",
    "dkd": "#d55e00",
}
_MORE_COLORS = ["#cc79a7", "#6a3d9a", "#b15928", "#1b7f79", "#a6761d", "#e7298a"]
_MARKERS = "osD^vPX*<>"
#: Panels, and names in the legend, that a figure has at most; more would be too small to read.
MOST_SETS, MOST_QUANTIZERS, MOST_NAMES = 4, 3, 24
_FLOAT, _FRONT = "float", "no other is better at its size or speed"
_PUBLISHED = "published: $2^b+1$ levels"
#: What a legend says beside the models, where it is drawn.
_EXPLAINED: dict[str, dict[str, Any]] = {
    _FLOAT: {"color": "0.4", "ls": ":"},
    _FRONT: {"ls": "", "marker": "o", "ms": 9, "mfc": "none", "mec": "0.25", "mew": 0.8},
    _PUBLISHED: {"color": "0.4", "ls": "--", "lw": 0.9, "marker": "x"},
}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "svg.hashsalt": "kdq",
}


def method_colors(methods: list[str]) -> dict[str, str]:
    """A colour for every method, the same in every report for the known ones."""
    others = [method for method in methods if method not in COLORS]
    return {method: COLORS.get(method) or _MORE_COLORS[others.index(method) % len(_MORE_COLORS)] for method in methods}


def write_figures(
    found: pd.DataFrame, folder: Path, searched: pd.DataFrame, searches: Mapping[str, Frontier]
) -> list[Path]:
    """Draw everything that the cells allow below ``folder`` and return the files.

    Args:
        found: lines of :func:`kdq.report.cells.cells`.
        searched: the named rows of searched models; ``searches``: what is known of them, by their ``config_hash``.
    """
    from matplotlib import rc_context

    written, looks = [], _looks(found)
    with rc_context(_STYLE):
        for stem, draw in (
            ("accuracy_vs_bits", _against_bits),
            ("accuracy_vs_total_bits", _against_total_bits),
            ("accuracy_vs_bytes", _against_bytes),
            ("accuracy_vs_latency", _against_latency),
            ("drop_vs_bits", _drops),
        ):
            shown = _timed(found) if draw is _against_latency else found
            written += _save(_panels(shown, draw, looks), folder / stem)
        way = searched[searched["config_hash"].isin(set(searches))]
        if len(way):
            written += _save(_searches(way, searches), folder / "bit_search")
    return written


def _looks(found: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    """Colour and marker of every model ``(method, arch)``, the same in all figures."""
    colors, archs = method_colors(sorted(found["method"].unique())), sorted(found["arch"].unique())
    return {
        (method, arch): {"color": colors[method], "marker": _MARKERS[archs.index(arch) % len(_MARKERS)]}
        for method, arch in sorted(records(found[["method", "arch"]].drop_duplicates()))
    }


def _panels(found: pd.DataFrame, draw: Any, looks: Mapping[Any, dict[str, Any]]) -> Figure:
    """A grid of panels, each drawn by ``draw(panel, cells, style)``, and one legend below."""
    from matplotlib.lines import Line2D

    sets, quantizers = sorted(found["data"].unique()), sorted(found["quantizer"].unique())
    cut = [f"{MOST_SETS} of {len(sets)} data sets"] if len(sets) > MOST_SETS else []
    cut += [f"{MOST_QUANTIZERS} of {len(quantizers)} quantizers"] if len(quantizers) > MOST_QUANTIZERS else []
    sets, quantizers = sets[:MOST_SETS], quantizers[:MOST_QUANTIZERS]
    figure = _figure(max(4.8, 0.6 + 3.3 * len(sets)), 0.9 + 2.5 * len(quantizers))
    panels = figure.subplots(len(quantizers), len(sets), squeeze=False)
    models = set(records(found[["method", "arch"]].drop_duplicates()))
    style = {model: look for model, look in looks.items() if model in models}
    for row, quantizer in zip(panels, quantizers, strict=True):
        for panel, data in zip(row, sets, strict=True):
            part = found[(found["data"] == data) & (found["quantizer"] == quantizer)]
            panel.set_title(_text(f"{data}, {quantizer}"))
            panel.grid(alpha=0.25, lw=0.6)
            if len(part):
                draw(panel, part.sort_values("width"), style)
            else:
                panel.text(0.5, 0.5, "no rows", ha="center", va="center", transform=panel.transAxes, color="0.5")
                panel.set(xticks=[], yticks=[])
    handles = [Line2D([], [], label=_text(f"{method} ({arch})"), **look) for (method, arch), look in style.items()]
    if len(handles) > MOST_NAMES:
        handles, cut = handles[:MOST_NAMES], [*cut, f"{MOST_NAMES} of {len(models)} models are named"]
    for label, look in _EXPLAINED.items():
        if any(line.get_label() == label for panel in panels.flat for line in panel.lines):
            handles.append(Line2D([], [], label=label, **look))
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(figure), frameon=False)
    if cut:
        figure.suptitle(f"{' and '.join(cut)}; all are in report.html", fontsize=8)
    return figure


def _lines(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any], x: str, y: str = "top1") -> None:
    """One line per model with bars of one standard deviation over seeds, and its float accuracy dotted."""
    for model, group in part.groupby(["method", "arch"], sort=True):
        spread = group[f"{y}_std"].fillna(0)
        panel.errorbar(group[x], group[y], spread, capsize=2, elinewidth=0.8, **style[model])
        if y == "top1":
            panel.axhline(group["top1_float"].mean(), color=style[model]["color"], lw=0.7, ls=":", label=_FLOAT)
    panel.set_ylabel("top-1 (%)" if y == "top1" else "drop from float (points)")


def _bits_axis(panel: Axes, part: pd.DataFrame) -> None:
    from matplotlib.ticker import NullLocator

    ticks: list[float] = []
    for width in sorted({math.ceil(width) for width in part["avg_bits"]}):
        if not ticks or width >= ticks[-1] * 1.12:  # closer ones would run into each other
            ticks.append(width)
    panel.set(xscale="log", xlabel="bits per weight")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())


def _against_bits(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    _lines(panel, part, style, "avg_bits")
    _published(panel, _comparable(part), style, 1)
    _bits_axis(panel, part)


def _comparable(part: pd.DataFrame) -> pd.DataFrame:
    """The study's numbers on the very images of ``part``: others would say nothing and press the lines together."""
    known = published.beside(part)
    return known[known["data"] == known["study_data"]]


def _published(panel: Axes, known: pd.DataFrame, style: Mapping[Any, Any], weights: int) -> None:
    """The study's lines for models of so many weights; 2^b + 1 levels are log2(2^b + 1) bits."""
    for model, group in known[known["width"] < math.inf].groupby(["method", "arch"], sort=True):
        bits = [weights * math.log2(levels) for levels in group["levels"]]
        look = _EXPLAINED[_PUBLISHED] | {"color": style[model]["color"]}
        panel.plot(bits, group["published"], label=_PUBLISHED, **look)


def _drops(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    _lines(panel, part, style, "avg_bits", "drop")
    panel.axhline(0, color="0.4", lw=0.7, ls=":", label=_FLOAT)
    _bits_axis(panel, part)


def _against_total_bits(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    _lines(panel, part, style, "weight_bits_total")
    known = _comparable(part)
    for role in ("teacher", "student"):
        arch, weights = published.study()[role]["arch"], published.study()[role]["params"]
        mine = known[(known["study_arch"] == arch) & (known["arch"] == arch)]
        _published(panel, mine, style, weights)
    _size_axis(panel, "bits of all weights", "b")


def _against_bytes(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    _lines(panel, part, style, "size_bytes")
    _front(panel, part, "size_bytes")
    _size_axis(panel, "packed size", "B")


def _against_latency(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    shown = shown_latency(part)
    x, y = shown.column, shown.top1
    if y == "top1_float":  # of the network, whatever its widths
        part = part.groupby(["method", "arch"], sort=True)[[x, y, f"{y}_std"]].mean().reset_index()
    for model, group in part.groupby(["method", "arch"], sort=True):
        panel.errorbar(
            group[x], group[y], group[f"{y}_std"].fillna(0), ls="", capsize=2, elinewidth=0.8, **style[model]
        )
        for cell in records(group) if "width" in group else []:
            place = (getattr(cell, x), getattr(cell, y))
            panel.annotate(f"{cell.width:g}", place, (5, 3), textcoords="offset points", fontsize=6, color="0.3")
    _front(panel, part, x, y)
    panel.set(xlabel=shown.label, ylabel="top-1 (%)", xlim=(0, 1.15 * part[x].max() if len(part) else 1))


def _timed(found: pd.DataFrame) -> pd.DataFrame:
    """The cells whose latency is shown: of each data set, those with what :func:`shown_latency` says."""
    parts = []
    for _, part in found.groupby("data", sort=True):
        shown = shown_latency(part)
        parts.append(part[part[[shown.column, shown.top1]].notna().all(axis=1)])
    return pd.concat(parts)


def _front(panel: Axes, part: pd.DataFrame, x: str, y: str = "top1") -> None:
    """Rings around the points that no other beats in both."""
    points = part[[x, y]].to_numpy()
    front = points[pareto(list(points[:, 0]), list(points[:, 1]))] if len(points) else points
    panel.plot(front[:, 0], front[:, 1], label=_FRONT, **_EXPLAINED[_FRONT])


def _size_axis(panel: Axes, label: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    panel.set(xscale="log", xlabel=label)
    smallest, largest = panel.get_xlim()
    # Labels at 1, 2 and 5 of each decade, for all nine would run into each other; within a decade, at round steps.
    locator = LogLocator(subs=(1.0, 2.0, 5.0)) if largest > 10 * smallest else MaxNLocator(4, steps=[1, 2, 5, 10])
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(EngFormatter(unit))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _searches(searched: pd.DataFrame, searches: Mapping[str, Frontier]) -> Figure:
    """Validation loss against size on the way of each search, with its choice; one panel per data set."""
    sets = sorted(searched["data"].unique())[:MOST_SETS]
    colors = method_colors(sorted(searched["method"].unique()))
    figure = _figure(max(4.8, 0.6 + 3.3 * len(sets)), 3.4)
    for panel, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for row in records(searched[searched["data"] == data]):
            found = searches[str(row.config_hash)]
            points = [(size, loss) for size, loss in zip(found.size_bytes, found.loss, strict=True) if loss > 0]
            look: dict[str, Any] = {"color": colors[str(row.method)], "label": _text(f"{row.method} ({row.arch})")}
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", ms=3, lw=0.9, **look)
            panel.axvline(found.size_bytes[found.chosen], color=look["color"], lw=0.8, ls="--")
        panel.set(yscale="log", ylabel="loss on validation images", title=_text(data))
        _size_axis(panel, "packed size (dashed: chosen)", "B")
        panel.grid(alpha=0.25, lw=0.6)
    by_label = {str(line.get_label()): line for panel in figure.axes for line in panel.lines}
    handles = [line for label, line in sorted(by_label.items()) if not label.startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(figure), frameon=False)
    return figure


def _columns(figure: Figure) -> int:
    """How many entries of a legend go beside each other below a figure."""
    return max(1, int(figure.get_figwidth() / 2.1))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> list[Path]:
    written = []
    for suffix in (".png", ".svg"):
        target = path.with_suffix(suffix)
        with replacing(target) as temporary:
            # No dates inside: equal rows make equal files.
            metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(temporary, dpi=160, metadata=metadata)
        figure.set_layout_engine("none")  # the second file keeps the first's layout
        written.append(target)
    return written


def _text(name: str) -> str:
    """A name that Matplotlib takes as it is: dollars would start a formula, an underscore hide a legend's entry."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
