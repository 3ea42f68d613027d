"""report.md: the answer, the tables and the figures, for reading where there is no browser."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd

from kdq.report import published
from kdq.report.tables import (
    markdown_accuracies,
    markdown_distilled,
    markdown_published,
    markdown_text,
)
from kdq.report.words import NOTES, Statement, without_repeats


def markdown(
    found: pd.DataFrame, statements: Sequence[Statement], summary: str, warnings: Sequence[str], figures: Sequence[Path]
) -> str:
    """The report's text. ``found`` are lines of :func:`kdq.report.cells.cells`, ``figures`` lie beside it."""
    lines = ["# kdq report", ""]
    if found.empty:
        lines += ["No rows yet: run `kdq experiment=quickstart`.", ""]
        return "\n".join([*lines, *_list(warnings)])
    lines += [markdown_text(summary), "", *_list(warnings), "## The answer", ""]
    for (data, quantizer), group in groupby(
        without_repeats(statements), key=lambda found: (found.data, found.quantizer)
    ):
        lines += [
            f"### {markdown_text(f'{data}, {quantizer}')}",
            "",
            *_list([line for found in group for line in found.text.split("\n")]),
        ]
    lines += [*(f"{note}\n" for note in NOTES), "## Top-1 in percent (packed bytes)", ""]
    lines += ["Mean ± standard deviation over seeds.", "", *markdown_accuracies(found)]
    beside, distilled = published.beside(found), published.distilled_beside(found)
    if len(beside):
        lines += ["## Published numbers", "", *_list(published.warnings(beside)), *markdown_published(beside)]
    if len(distilled):
        lines += ["## Published distillation of float students (other repositories, several seeds)", ""]
        lines += markdown_distilled(distilled)
    if figures:
        lines += ["## Figures", ""]
        lines += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in figures]
    return "\n".join([*lines, ""])


def _list(texts: Sequence[str]) -> list[str]:
    return [*(f"- {markdown_text(text)}" for text in texts), ""] if texts else []
