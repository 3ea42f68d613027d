"""What the rows of an output folder come to: everything that figures, page and texts show, worked out once."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from kdq.records.failures import read_failures
from kdq.records.rows import Row, read_rows, without_artifacts
from kdq.report.cells import cells, missing, named, near_chance, printable, records, width_name
from kdq.report.latency import timed_models
from kdq.report.layers import Frontier, Widths, frontiers, mixed_widths
from kdq.report.words import Answer, answers

#: So many of a kind are named at the report's top.
_NAMED = 10


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

    @property
    def summary(self) -> str:
        frame = self.named
        counts = [(len(frame), "row"), (len(self.cells), "cell")]
        counts += [(frame[name].nunique(), what) for name, what in (("data", "data set"), ("method", "method"))]
        counts += [(frame["quantizer"].nunique(), "quantizer"), (frame["seed"].nunique(), "seed")]
        said = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in counts)
        return f"{said}. Measured on: {', '.join(sorted(set(frame['device'].map(printable)))) or 'nothing yet'}."

    @property
    def averaged(self) -> list[str]:
        """That settings were averaged, if they were."""
        mixed = self.cells[self.cells["rows"] > self.cells["n"]]
        if not len(mixed):
            return []
        return [
            f"{len(mixed)} of {len(self.cells)} cells hold several rows of one seed, whose settings differ in "
            "something that has no column (epochs, say); their mean is shown, and each in the figure settings. To tell "
            "them apart give each a name "
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
        near = [
            f"NEAR CHANCE: {_cell(cell)} has {cell.top1:.1f} %, its float model {cell.top1_float:.1f} % "
            f"({cell.classes:.0f} classes): a failed training or quantizer, no result."
            for cell in records(near_chance(self.named))
        ]
        said = _first(near, "NEAR CHANCE: {} more.")
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

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before the numbers."""
        said = [*self.suspect, *(f"A damaged row was left out: {line}" for line in self.skipped)]
        lacking = [f"A packed file is lacking: {line}." for line in self.lacking]
        said += _first(lacking, "{} more packed files are lacking.")
        failed = [f"Failed: {failure.name}: {failure.cause}" for failure in read_failures(self.output).values()]
        said += _first(failed, "{} more failed: see failed/.")
        return said + (["What is no longer wanted of these: delete its file in failed/."] if failed else [])


def _first(lines: list[str], more: str) -> list[str]:
    """The first lines of many, and how many there are beside."""
    return lines[:_NAMED] + ([more.format(len(lines) - _NAMED)] if len(lines) > _NAMED else [])


def _cell(line: Any) -> str:
    return f"{line.data}, {line.method} ({line.arch}), {line.quantizer}, {width_name(line.width)}"
