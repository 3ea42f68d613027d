"""report.html: one file with everything in it, that a browser shows without a network.

The data is JSON in the page; the scripts in ``page/`` filter it, draw it with Plotly and put it into tables. What comes
from rows is text and nothing else: the JSON cannot end its element, the scripts set text, and the page's policy lets
only the scripts with the right checksum run and nothing be loaded.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from kdq.report import published
from kdq.report.cells import LATENCIES, records, telling
from kdq.report.latency import shown_latency
from kdq.report.material import Material
from kdq.report.style import method_colors
from kdq.report.words import COLUMNS, NOTES, PLACES

#: Columns of a cell that the page shows, and the digits it keeps of them.
_DIGITS = {"width": 2, "nll": 4, "size_bytes": 0, "float_bytes": 0}
_DIGITS |= dict.fromkeys(["avg_bits", "top1", "top1_std", "top1_float", "top1_float_std", "drop", "drop_std", "ece"], 3)
_DIGITS |= dict.fromkeys(LATENCIES, 4)
_NAMES = ["data", "method", "arch", "quantizer", "tune", "searched", "n", "told"]


def page(material: Material) -> str:
    """The page's HTML."""
    found, timed = material.cells, material.timed
    beside, told = published.beside(found), found.assign(told=found.index.isin(telling(found).index))
    digits = _DIGITS | dict.fromkeys([name for name in found.columns if name.startswith("top1_onnx_")], 3)
    payload = {
        "cells": _columns(told[[*_NAMES, *digits]], digits),
        "answers": [asdict(answer) for answer in material.answers],
        "answer_columns": COLUMNS,
        "place_columns": PLACES,
        "notes": NOTES if len(found) else (),
        "summary": material.summary,
        "warnings": material.warnings,
        "colors": method_colors(sorted(found["method"].unique())),
        "timed": _columns(timed, {"ms": 4, "ms_low": 4, "ms_high": 4, "top1": 3, "top1_std": 3, "count": 0}),
        "latency": {str(data): asdict(shown_latency(part)) for data, part in found.groupby("data", sort=True)},
        "published": _columns(beside, {"width": 0, "top1": 2, "published": 2, "levels": 0}),
        "published_warnings": published.warnings(beside),
        "searches": [_search(row, material) for row in records(material.searched)],
    }
    script = _part("charts.js") + _part("page.js")
    plotly = _plotly()
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    return Template(_part("page.html")).substitute(
        policy=policy, style=_part("page.css"), payload=_json(payload), plotly=plotly, script=script
    )


def _columns(frame: pd.DataFrame, digits: Mapping[str, int]) -> dict[str, Any]:
    """The frame's lines without repeating the columns' names in each."""
    lists = [
        [_rounded(value, digits[name]) for value in frame[name]] if name in digits else frame[name].tolist()
        for name in frame.columns
    ]
    return {"columns": list(frame.columns), "data": [list(line) for line in zip(*lists, strict=True)]}


def _search(row: Any, material: Material) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(row, name) for name in ("data", "method", "quantizer")}
    found["name"] = f"{row.data}, {row.method} ({row.arch}), {row.quantizer}, {row.avg_bits:.2f} bits, seed {row.seed}"
    if widths := material.widths.get(row.config_hash):
        found |= asdict(widths)
    if way := material.searches.get(row.config_hash):
        found |= {name: [_rounded(x, 6) for x in getattr(way, name)] for name in ("avg_bits", "loss", "top1")}
        found |= {"size_bytes": [_rounded(x, 0) for x in way.size_bytes], "chosen": way.chosen}
    return found


def _rounded(value: float, digits: int) -> float | int | None:
    """None where there is no number: JSON has no NaN."""
    if not math.isfinite(value):
        return None
    return round(float(value), digits) if digits else round(value)


def _json(payload: Any) -> str:
    """JSON that cannot end the element it is in, nor open a comment."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _part(name: str) -> str:
    return (files("kdq.report") / "page" / name).read_text("utf-8")


@cache
def _plotly() -> str:
    text = get_plotlyjs()
    assert "</script" not in text.lower(), "Plotly's bundle would end its own element"
    return text
