"""report.md: the answer, the tables and the figures, for reading where there is no browser."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from kdq.report import published
from kdq.report.material import Material
from kdq.report.tables import (
    markdown_accuracies,
    markdown_distilled,
    markdown_published,
    markdown_table,
    markdown_text,
)
from kdq.report.words import COLUMNS, NOTES, PLACES, Answer


def markdown(material: Material, figures: Sequence[Path]) -> str:
    """The report's text; ``figures`` lie beside it."""
    lines, found = ["# kdq report", ""], material.cells
    if found.empty:
        lines += ["No rows yet: run `kdq experiment=quickstart`.", ""]
        return "\n".join([*lines, *_list(material.warnings)])
    lines += _list(material.warnings)
    for answer in material.answers:
        lines += answer_text(answer)
    lines += _folded("How to read this", [*_list(NOTES), markdown_text(material.summary), ""])
    lines += ["## Top-1 in percent (packed bytes)", ""]
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


def answer_text(answer: Answer, places: bool = True) -> Iterator[str]:
    """The lines of an answer; its every place is folded away, or with ``places=False`` left out."""
    yield from (f"## {markdown_text(answer.data)}", "", f"**{markdown_text(answer.headline)}**", "")
    for text in answer.made:
        yield from (markdown_text(text), "")
    for kind, group in groupby(answer.lines, key=lambda line: line.kind):
        lines = list(group)
        yield from markdown_table([kind, *COLUMNS[1:]], [line.cells for line in lines])
        if places:
            every = [(line.cells[0], *place) for line in lines for place in line.places]
            yield from _folded("every place", markdown_table([kind, *PLACES], every))


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def _list(texts: Sequence[str]) -> list[str]:
    return [*(f"- {markdown_text(text)}" for text in texts), ""] if texts else []
