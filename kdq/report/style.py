"""How figures look: the style of a journal's column, and a colour for every method."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kdq.utils.checks import nearest
from kdq.utils.errors import KdqError

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
_MORE_COLORS += ["#66a61e", "#b2182b", "#8a8ad0", "#f4877d", "#4d4600", "#2b2f8f"]
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "kdq",
}


def _fonts(width: float, size: float, *fonts: str) -> dict[str, Any]:
    """A column of so many inches with text of so many points in the first of the fonts that is installed."""
    sizes = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), size)
    sizes |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), size - 1)
    return {"figure.figsize": (width, 0.72 * width), "font.family": list(fonts), "mathtext.fontset": "stix", **sizes}


_TIMES = ("Times New Roman", "Nimbus Roman", "TeX Gyre Termes", "STIXGeneral")
#: Choices of ``kdq-report --style``, beside Matplotlib's own and files of its settings: one column of these journals.
STYLES = {
    "screen": _fonts(4.8, 9, "DejaVu Sans"),
    "ieee": _fonts(3.5, 8, *_TIMES),
    "neurips": _fonts(5.5, 9, *_TIMES),
    "nature": _fonts(3.5, 7, "Helvetica", "Arial", "Nimbus Sans", "Liberation Sans", "DejaVu Sans"),
}


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Matplotlib draws in one of :data:`STYLES`, or in a style of its own by name or file."""
    from matplotlib import font_manager, rc_context, style

    chosen: Any = STYLES.get(name, name)
    if name in STYLES:  # it warns at each text of fonts that are not there
        there = {font.name for font in font_manager.fontManager.ttflist}
        chosen = chosen | {"font.family": next(font for font in chosen["font.family"] if font in there)}
    with rc_context():
        try:
            style.use([chosen, _STYLE])
        except OSError as error:
            hint = nearest(name, [*STYLES, *style.available])
            known = f"use one of {', '.join(STYLES)}, or Matplotlib's or a file"
            raise KdqError(f"no style {name}{hint}: {known}") from error
        yield


def method_colors(methods: list[str]) -> dict[str, str]:
    """A colour for every method, the same in every report for the known ones; what tuned a quantized network
    (``vkd + qad``) does not change it."""
    before = {method: method.split(" + ")[0] for method in methods}
    others = [method for method in dict.fromkeys(before.values()) if method not in COLORS]
    colors = COLORS | {method: _MORE_COLORS[i % len(_MORE_COLORS)] for i, method in enumerate(others)}
    return {method: colors[name] for method, name in before.items()}
