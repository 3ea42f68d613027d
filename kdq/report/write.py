"""Everything kdq writes about its rows: results.csv, results.parquet, and the folder report/."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from kdq.records.failures import read_failures
from kdq.records.rows import Row, read_rows, table, without_artifacts, write_csv
from kdq.report.cells import cells, missing, named, near_chance, printable, records, width_name
from kdq.report.latency import timed_models
from kdq.report.layers import Frontier, Widths, frontiers, mixed_widths
from kdq.report.words import Answer, answers
from kdq.utils.files import replacing, write_text

log = logging.getLogger(__name__)

#: So many of a kind are named at the report's top.
_NAMED = 10


@dataclass
class Written:
    """The files written, what could not be, the answers, and the packed files that rows lack; lines of text."""

    files: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)


class Material:
    """What the rows below ``output`` come to; each part is worked out when something first asks for it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.skipped: list[str] = []
        self.rows: list[Row] = read_rows(output / "rows", skipped=self.skipped)

    @cached_property
    def named(self) -> pd.DataFrame:
        return named(self.rows)

    @cached_property
    def cells(self) -> pd.DataFrame:
        return cells(self.named)

    @cached_property
    def timed(self) -> pd.DataFrame:
        return timed_models(self.named)

    @cached_property
    def answers(self) -> list[Answer]:
        return answers(self.named)

    @cached_property
    def widths(self) -> dict[str, Widths]:
        return mixed_widths(self.output, self.rows)

    @cached_property
    def searches(self) -> dict[str, Frontier]:
        return frontiers(self.output, self.rows)

    @cached_property
    def searched(self) -> pd.DataFrame:
        """The rows that a bit search left something for."""
        return self.named[self.named["config_hash"].isin({*self.widths, *self.searches})]

    @cached_property
    def summary(self) -> str:
        frame = self.named
        counts = [(len(frame), "row"), (len(self.cells), "cell")]
        counts += [(frame[name].nunique(), what) for name, what in (("data", "data set"), ("method", "method"))]
        counts += [(frame["quantizer"].nunique(), "quantizer"), (frame["seed"].nunique(), "seed")]
        said = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in counts)
        return f"{said}. Measured on: {', '.join(sorted(set(frame['device'].map(printable)))) or 'nothing yet'}."

    @cached_property
    def averaged(self) -> list[str]:
        """That settings were averaged, if they were."""
        mixed = self.cells[self.cells["rows"] > self.cells["n"]]
        if not len(mixed):
            return []
        return [
            f"{len(mixed)} of {len(self.cells)} cells hold several rows of one seed, whose settings differ in "
            "something that has no column (epochs, say); their mean is shown. To tell them apart give each a name "
            "(method.name, student.name, quant.name) or an output folder of its own. The first: "
            f"{_cell(mixed.iloc[0])}."
        ]

    @cached_property
    def lacking(self) -> list[str]:
        """The packed files that rows promise and that are not there, or not whole."""
        return without_artifacts(self.output, self.rows)

    @cached_property
    def suspect(self) -> list[str]:
        """What makes the answer itself doubtful: it is said before it."""
        said = []
        for cell in records(near := near_chance(self.named))[:_NAMED]:
            said.append(
                f"NEAR CHANCE: {_cell(cell)} has {cell.top1:.1f} %, its float model {cell.top1_float:.1f} % "
                f"({cell.classes:.0f} classes): a failed training or quantizer, no result."
            )
        said += [f"NEAR CHANCE: {more} more."] if (more := len(near) - _NAMED) > 0 else []
        gaps = missing(self.cells)
        for (data, quantizer, method, arch), part in gaps.groupby(["data", "quantizer", "method", "arch"], sort=True):
            there, wanted = sorted(set(part["n"])), part["wanted"].max()
            widths = ", ".join(width_name(width) for width in part["width"])
            said.append(
                f"MISSING: {data}, {method} ({arch}), {quantizer} has {' or '.join(map(str, there))} of {wanted} seeds "
                f"at {widths}."
            )
        if trials := sum(row.limited != "" for row in self.rows):
            said.append(
                f"{trials} rows are trials, under flags of the Trainer such as fast_dev_run: they are no results."
            )
        return said + self.averaged

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader must know before the numbers."""
        said = [*self.suspect, *(f"A damaged row was left out: {line}" for line in self.skipped)]
        said += [f"A packed file is lacking: {line}." for line in self.lacking[:_NAMED]]
        said += [f"{more} more packed files are lacking."] if (more := len(self.lacking) - _NAMED) > 0 else []
        failed = list(read_failures(self.output).values())
        said += [f"Failed: {failure.name}: {failure.cause}" for failure in failed[:_NAMED]]
        said += ["What is no longer wanted of these: delete its file in failed/."] if failed else []
        said += [f"{len(failed) - _NAMED} more failed: see failed/."] if len(failed) > _NAMED else []
        return said


def write_report(output: Path, style: str = "screen") -> Written:
    """Rebuild results.csv, results.parquet and report/ below ``output`` from its rows.

    A part that cannot be written is told in a warning and in the result, and the others are: the cells' own rows are
    safe whatever becomes of the report.

    Args:
        style: of the figures, see :func:`kdq.report.figures.styled`.
    """
    material = Material(output)
    written = Written(lacking=material.lacking)
    folder = output / "report"
    parts: dict[str, tuple[Path, Callable[[Path], Sequence[Path]]]] = {
        "the table": (output / "results.csv", lambda path: _csv(path, material)),
        "the Parquet table": (output / "results.parquet", lambda path: _parquet(path, material)),
        "the figures": (folder, lambda path: _figures(path, material, style)),
        "the page": (folder / "report.html", lambda path: write_page(path, material)),
        "the Markdown report": (folder / "report.md", lambda path: _markdown(path, material, written.files)),
    }
    for name, (path, write) in parts.items():
        try:
            written.files += write(path)
        except Exception as error:  # whatever it is, it must not take the other parts or a sweep's end with it
            written.failures.append(f"{name} could not be written to {path}: {type(error).__name__}: {error}")
            log.warning(written.failures[-1])
            log.debug("", exc_info=True)
    if "answers" in vars(material):
        written.answers, written.warnings = material.answers, material.suspect
        for line in material.averaged:
            log.warning(line)
    return written


def _csv(path: Path, material: Material) -> list[Path]:
    write_csv(path, material.rows)
    return [path]


def _parquet(path: Path, material: Material) -> list[Path]:
    with replacing(path) as temporary:
        table(material.rows).to_parquet(temporary, index=False)
    return [path]


def _figures(folder: Path, material: Material, style: str) -> list[Path]:
    from kdq.report.figures import write_figures

    m = material
    return write_figures(m.cells, m.timed, folder, m.searched, m.searches, style) if len(m.cells) else []


def write_page(path: Path, material: Material) -> list[Path]:
    """Write report.html alone."""
    from kdq.report.html import page

    m = material
    write_text(path, page(m.cells, m.timed, m.answers, m.summary, m.warnings, m.searched, m.widths, m.searches))
    return [path]


def _markdown(path: Path, material: Material, written: Sequence[Path]) -> list[Path]:
    from kdq.report.markdown import markdown

    figures = [file for file in written if file.suffix == ".png"]
    write_text(path, markdown(material.cells, material.answers, material.summary, material.warnings, figures))
    return [path]


def _cell(line: Any) -> str:
    return f"{line.data}, {line.method} ({line.arch}), {line.quantizer}, {width_name(line.width)}"
