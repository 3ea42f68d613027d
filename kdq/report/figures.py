"""The figures for paper: accuracy and drop against bits, total bits, bytes and latency, and what bit searches did.

One panel per data set (columns) and quantizer (rows); a method has one colour everywhere. PNG for looking, PDF and SVG
for printing, their letters as outlines or embedded fonts; equal rows make equal files. Width and fonts are a style's.
"""

import logging
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from kdq.report import published
from kdq.report.cells import float_model, pareto, records, settings, telling
from kdq.report.layers import Frontier
from kdq.report.material import Material
from kdq.report.style import method_colors, styled
from kdq.utils.files import replacing

# What embeds fonts logs every letter that it finds.
logging.getLogger("fontTools").setLevel(logging.WARNING)

_MARKERS, _TUNED = "osD^v*<>PX", "PX"
#: Panels, and names in the legend, that a figure has at most; more would be too small to read.
MOST_SETS, MOST_QUANTIZERS, MOST_NAMES = 4, 3, 24
#: Characters of one point in an inch, roughly.
_CHARACTERS = 130
_FLOAT, _FRONT = "float", "best at its size or speed"
_PUBLISHED = "published: $2^b+1$ levels"
#: What a legend says beside the models, where it is drawn.
_EXPLAINED: dict[str, dict[str, Any]] = {
    _FLOAT: {"color": "0.4", "ls": ":", "lw": 0.8, "marker": "o", "mfc": "white"},
    _FRONT: {"ls": "", "marker": "o", "ms": 9, "mfc": "none", "mec": "0.25", "mew": 0.8},
    _PUBLISHED: {"color": "0.4", "ls": "--", "lw": 0.9, "marker": "x"},
}


def write_figures(material: Material, folder: Path, style: str = "screen") -> list[Path]:
    """Draw everything that the cells allow below ``folder`` and return the files; see :func:`styled`."""
    found, searches = material.cells, material.searches
    if found.empty:
        return []
    written, looks, shown = [], _looks(found), telling(found)
    with styled(style):
        for stem, cells, draw in (
            ("accuracy_vs_bits", shown, _against_bits),
            ("accuracy_vs_total_bits", shown, _against_total_bits),
            ("accuracy_vs_bytes", shown, _against_bytes),
            ("accuracy_vs_latency", material.timed, _against_latency),
            ("drop_vs_bits", shown, _drops),
            ("settings", settings(material.named), draw_settings),
        ):
            if len(cells):
                written += _save(_panels(cells, draw, looks), folder / stem)
        way = material.searched[material.searched["config_hash"].isin(set(searches))]
        if len(way):
            written += _save(_searches(way, searches), folder / "bit_search")
    return written


def _looks(found: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    """Colour and marker of every model ``(method, arch)``, the same in all figures: colours are of methods, markers of
    architectures and of tunings, but those of one colour have one each as long as there are some."""
    colors, archs = method_colors(sorted(found["method"].unique())), sorted(found["arch"].unique())
    looks: dict[Any, dict[str, Any]] = {}
    for method, arch in sorted(records(found[["method", "arch"]].drop_duplicates())):
        first = archs.index(arch) % len(_MARKERS)
        wanted = _TUNED * (" + " in method) + _MARKERS[first:] + _MARKERS
        taken = {look["marker"] for look in looks.values() if look["color"] == colors[method]}
        marker = next((marker for marker in wanted if marker not in taken), wanted[0])
        looks[method, arch] = {"color": colors[method], "marker": marker}
    return looks


def _panels(found: pd.DataFrame, draw: Any, looks: Mapping[Any, dict[str, Any]]) -> Figure:
    """A grid of panels, each drawn by ``draw(panel, cells, style)``, and one legend below."""
    # The quantizers with most cells, for there may be too many.
    sets, counts = sorted(found["data"].unique()), found["quantizer"].sort_values().value_counts(sort=False)
    quantizers = sorted(counts.index, key=lambda name: -counts[name])
    cut = [f"{MOST_SETS} of {len(sets)} data sets"] if len(sets) > MOST_SETS else []
    cut += [f"{MOST_QUANTIZERS} of {len(quantizers)} quantizers"] if len(quantizers) > MOST_QUANTIZERS else []
    sets, quantizers = sets[:MOST_SETS], quantizers[:MOST_QUANTIZERS]
    figure = _figure(len(sets), len(quantizers))
    panels = figure.subplots(len(quantizers), len(sets), squeeze=False)
    models = set(records(found[["method", "arch"]].drop_duplicates()))
    style = {model: look for model, look in looks.items() if model in models}
    for row, quantizer in zip(panels, quantizers, strict=True):
        for panel, data in zip(row, sets, strict=True):
            part = found[(found["data"] == data) & (found["quantizer"] == quantizer)]
            panel.set_title(_text(f"{data}, {quantizer}", _inches(panel)))
            panel.grid(alpha=0.25, lw=0.6)
            if len(part):
                draw(panel, part, style)
            else:
                panel.text(0.5, 0.5, "no rows", ha="center", va="center", transform=panel.transAxes, color="0.5")
                panel.set(xticks=[], yticks=[])
    handles = [
        Line2D([], [], label=_text(f"{method} ({arch})", figure.get_figwidth() - 0.6), **look)
        for (method, arch), look in style.items()
    ]
    if len(handles) > MOST_NAMES:
        handles, cut = handles[:MOST_NAMES], [*cut, f"{MOST_NAMES} of {len(models)} models are named"]
    for label, look in _EXPLAINED.items():
        if any(line.get_label() == label for panel in panels.flat for line in panel.lines):
            handles.append(Line2D([], [], label=label, **look))
    _legend(figure, handles)
    if cut:
        figure.suptitle(f"{' and '.join(cut)}; all are in report.html", fontsize="small")
    return figure


def _lines(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any], x: str, whole: Any, y: str = "top1") -> None:
    """One line per model with bars of one standard deviation over seeds, and its float model, hollow, behind its end;
    that of a tuned network is another's. ``whole``: its place on the axis: a column, or a number; None leaves it
    out."""
    for model, group in part.sort_values(x).groupby(["method", "arch"], sort=True):
        spread = group[f"{y}_std"].fillna(0)
        panel.errorbar(group[x], group[y], spread, capsize=1.5, elinewidth=0.7, **style[model])
        if whole is not None and not (group["tune"] != "").any():
            end = group[whole].mean() if isinstance(whole, str) else whole
            look = _EXPLAINED[_FLOAT] | {key: style[model][key] for key in ("color", "marker")}
            points = [group[x].iloc[-1], end], [group[y].iloc[-1], float_model(group)["top1_float"]]
            panel.plot(*points, label=_FLOAT, markevery=[1], **look)
    panel.set_ylabel("top-1 (%)" if y == "top1" else "points lost")


def _bits_axis(panel: Axes, part: pd.DataFrame, whole: float | None = None) -> None:
    """A tick for each width, and one named ``float`` at ``whole``."""
    ticks: list[float] = []
    apart = 1.12 ** (4.3 / _inches(panel))  # closer ones would run into each other
    for width in sorted({math.ceil(width) for width in part["avg_bits"]}):
        if not ticks or width >= ticks[-1] * apart:
            ticks.append(width)
    panel.set(xscale="log", xlabel="bits per weight")
    named = [(tick, f"{tick:g}") for tick in ticks] + ([(whole, "float")] if whole else [])
    panel.set_xticks(*map(list, zip(*named, strict=True)))
    panel.xaxis.set_minor_locator(NullLocator())


def _against_bits(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    whole = 1.35 * part["avg_bits"].max()
    _lines(panel, part, style, "avg_bits", whole)
    _published(panel, _comparable(part), style, 1)
    _bits_axis(panel, part, whole)


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
    _lines(panel, part, style, "avg_bits", None, "drop")
    panel.axhline(0, color="0.7", lw=0.7, zorder=0)
    _bits_axis(panel, part)


def _against_total_bits(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    _lines(
        panel, part.assign(whole=32 * part["weight_bits_total"] / part["avg_bits"]), style, "weight_bits_total", "whole"
    )
    known = _comparable(part)
    for role in ("teacher", "student"):
        arch, weights = published.study()[role]["arch"], published.study()[role]["params"]
        mine = known[(known["study_arch"] == arch) & (known["arch"] == arch)]
        _published(panel, mine, style, weights)
    _size_axis(panel, "bits of all weights", "b")


def _against_bytes(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    _lines(panel, part, style, "size_bytes", "float_bytes")
    _front(panel, part, "size_bytes")
    _size_axis(panel, "packed size", "B")


def _against_latency(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    """One point per model: the median of its measurements and their range."""
    for model, group in part.groupby(["method", "arch"], sort=True):
        reach = [group["ms"] - group["ms_low"], group["ms_high"] - group["ms"]]
        spread = group["top1_std"].fillna(0)
        panel.errorbar(group["ms"], group["top1"], spread, reach, ls="", capsize=1.5, elinewidth=0.7, **style[model])
    _front(panel, part, "ms")
    label = _text(part["label"].iloc[0], _inches(panel))
    panel.set(xlabel=label, ylabel="top-1 (%)", xlim=(0, 1.1 * part["ms_high"].max()))


def draw_settings(panel: Axes, part: pd.DataFrame, style: Mapping[Any, Any]) -> None:
    """One point per row, and which are the front of a search for accuracy on validation images and few bytes."""
    for model, group in part.groupby(["method", "arch"], sort=True):
        panel.plot(group["size_bytes"], group["val_top1"], ls="", **style[model])
    _front(panel, part, "size_bytes", "val_top1")
    panel.set_ylabel("top-1 on validation images (%)")
    _size_axis(panel, "packed size", "B")


def _front(panel: Axes, part: pd.DataFrame, x: str, y: str = "top1") -> None:
    """Rings around the points that no other beats in both."""
    points = part[[x, y]].to_numpy()
    front = points[pareto(list(points[:, 0]), list(points[:, 1]))] if len(points) else points
    panel.plot(front[:, 0], front[:, 1], label=_FRONT, **_EXPLAINED[_FRONT])


def _size_axis(panel: Axes, label: str, unit: str) -> None:
    panel.set(xscale="log", xlabel=label)
    smallest, largest = panel.get_xlim()
    # Labels at 1, 2 and 5 of each decade, for all nine would run into each other, or at 1 alone; within a decade, at
    # round steps.
    decades = math.log10(largest / smallest)
    fine = LogLocator(subs=(1.0, 2.0, 5.0) if 3 * decades < 2 * _inches(panel) else (1.0,))
    panel.xaxis.set_major_locator(fine if decades > 1 else MaxNLocator(4, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(unit))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _searches(searched: pd.DataFrame, searches: Mapping[str, Frontier]) -> Figure:
    """Validation loss against size on the way of each search, with its choice; one panel per data set."""
    sets = sorted(searched["data"].unique())[:MOST_SETS]
    colors = method_colors(sorted(searched["method"].unique()))
    figure = _figure(len(sets), 1)
    for panel, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for row in records(searched[searched["data"] == data]):
            found = searches[str(row.config_hash)]
            points = [(size, loss) for size, loss in zip(found.size_bytes, found.loss, strict=True) if loss > 0]
            look: dict[str, Any] = {
                "color": colors[str(row.method)],
                "label": _text(f"{row.method} ({row.arch})", figure.get_figwidth() - 0.6),
            }
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", ms=3, lw=0.9, **look)
            panel.axvline(found.size_bytes[found.chosen], color=look["color"], lw=0.8, ls="--")
        panel.set(yscale="log", ylabel="loss on validation images", title=_text(data, _inches(panel)))
        _size_axis(panel, "packed size (dashed: chosen)", "B")
        panel.grid(alpha=0.25, lw=0.6)
    by_label = {str(line.get_label()): line for panel in figure.axes for line in panel.lines}
    handles = [line for label, line in sorted(by_label.items()) if not label.startswith("_")]
    _legend(figure, handles)
    return figure


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend below the figure, which grows by it; fewer entries lie beside each other where one is long."""
    longest = max((len(line) for handle in handles for line in str(handle.get_label()).splitlines()), default=0)
    wide = float(rcParams["font.size"]) * max(0.21, 0.05 + longest / _CHARACTERS)
    columns = max(1, int(figure.get_figwidth() / wide))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def _figure(columns: int, rows: int) -> Figure:
    """A page's column wide for one panel in a row, else two columns and what is between them."""
    width, height = rcParams["figure.figsize"]
    share = height / width
    wide = width if columns == 1 else 2 * width + 0.25
    figure = Figure(figsize=(wide, 0.3 + rows * max(1.6, share * wide / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> list[Path]:
    written = []
    # No dates inside: equal rows make equal files.
    for suffix, undated in ((".png", "Software"), (".svg", "Date"), (".pdf", "CreationDate")):
        target = path.with_suffix(suffix)
        with replacing(target) as temporary:
            figure.savefig(temporary, dpi=200, metadata={undated: None})
        figure.set_layout_engine("none")  # the second file keeps the first's layout
        written.append(target)
    return written


def _inches(panel: Axes) -> float:
    """The panel's share of the figure's width, without what is beside its axis."""
    return float(panel.figure.get_figwidth()) / panel.get_gridspec().ncols - 0.5  # type: ignore[union-attr]


def _text(name: str, inches: float) -> str:
    """A name, in as many lines as it needs, that Matplotlib takes as it is: dollars would start a formula, an
    underscore hide a legend's entry."""
    name = textwrap.fill(name, int(_CHARACTERS * inches / float(rcParams["font.size"]))).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
