"""The tables people read: in the terminal at the end of a run, and in Markdown."""

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdq.records.rows import Row
from kdq.report.cells import SERIES, cells, float_model, named, records, series, width_name

#: The terminal shows so many models; the page shows all.
TERMINAL_LINES = 60
#: What stands in place of a cell of the grid that is not there.
MISSING = "missing"


class Entry(NamedTuple):
    """Top-1 in percent, its standard deviation over seeds (NaN for one seed), and bytes."""

    mean: float
    std: float
    size: float

    @property
    def accuracy(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std == self.std else "")


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Top-1 by model and bits, mean and standard deviation over seeds, with the packed size below."""
    found = cells(named(rows))
    return _accuracies(found, _widths(found))


def fitting_tables(rows: Sequence[Row], console: Console) -> list[Table]:
    """The :func:`accuracy_table`, its widths spread over as few tables as the console's own width needs."""
    found = cells(named(rows))
    widths = _widths(found)
    tables: list[Table] = []
    for size in range(len(widths), 0, -1):
        tables = [_accuracies(found, widths[i : i + size]) for i in range(0, len(widths), size)]
        if all(_wanted(console, table) <= console.width for table in tables):
            break
    return tables


def unbound(console: Console, table: Table, least: int = 0) -> Console:
    """A console that shows ``table`` uncut: itself in a terminal; a log has no width that a table could be cut to."""
    return console if console.is_terminal else Console(file=console.file, width=max(_wanted(console, table), least))


def _wanted(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(width=9999)).maximum


def _entries(
    found: pd.DataFrame, widths: Sequence[tuple[float, bool]]
) -> Iterator[tuple[tuple[str, ...], pd.DataFrame, list[Entry | str]]]:
    """Each model's names and cells, and its entries: the float model's, then one for each width."""
    grid = {(cell.data, cell.quantizer, cell.width) for cell in records(found) if not cell.searched}
    for names, group in series(found):
        cell = float_model(group)
        whole = Entry(cell["top1_float"], cell["top1_float_std"], cell["float_bytes"])
        by_width = {(c.width, c.searched): Entry(c.top1, c.top1_std, c.size_bytes) for c in records(group)}
        tuned = (group["tune"] != "").any()  # each width by itself
        empty = [
            MISSING if not (searched or tuned) and (names[0], names[3], width) in grid else ""
            for width, searched in widths
        ]
        yield names, group, [whole, *(by_width.get(width, text) for width, text in zip(widths, empty, strict=True))]


def _accuracies(found: pd.DataFrame, widths: Sequence[tuple[float, bool]]) -> Table:
    shown = [name for name in SERIES if name == "method" or found[name].nunique() > 1]
    constant = escape(", ".join(str(found[name].iloc[0]) for name in SERIES if name not in shown))
    lines = list(_entries(found, widths))
    cut = f"; {len(lines) - TERMINAL_LINES} more models in the report" if len(lines) > TERMINAL_LINES else ""
    about = f" ({constant})" if constant else ""
    text = Table(title=f"top-1 on the test set in %, size in bytes below{about}{cut}", show_lines=True)
    for name in shown:
        text.add_column(name, no_wrap=True)
    for name in ["float", *(width_name(*width) for width in widths)]:
        text.add_column(name, justify="right", no_wrap=True)
    forms = {MISSING: f"[red]{MISSING}[/]", "": ""}
    for names, _, entries in lines[:TERMINAL_LINES]:
        values = [forms[e] if isinstance(e, str) else f"{e.accuracy}\n[dim]{e.size:,.0f}[/]" for e in entries]
        text.add_row(*(escape(value) for name, value in zip(SERIES, names, strict=True) if name in shown), *values)
    return text


def markdown_accuracies(found: pd.DataFrame) -> list[str]:
    """One table per data set of :func:`kdq.report.cells.cells`: models by widths, missing cells marked."""
    lines = []
    for data, part in found.groupby("data", sort=True):
        widths = _widths(part)
        head = ["method", "arch", "quantizer", "seeds", "float", *(width_name(*width) for width in widths)]
        table = []
        for names, group, entries in _entries(part, widths):
            seeds = "–".join(dict.fromkeys(str(n) for n in (group["n"].min(), group["n"].max())))
            values = [e if isinstance(e, str) else f"{e.accuracy} ({e.size:,.0f})" for e in entries]
            table.append([*names[1:], seeds, *values])
        lines += [f"### {markdown_text(str(data))}", "", *markdown_table(head, table)]
    return lines


def markdown_published(beside: pd.DataFrame) -> list[str]:
    """The lines of :func:`kdq.report.published.beside`."""
    lines = []
    for cell in records(beside):
        levels = "float" if cell.levels == float("inf") else f"{cell.levels:,.0f}"
        numbers = [width_name(cell.width), f"{cell.top1:.2f}", f"{cell.published:.2f}", levels]
        lines.append([cell.data, cell.method, cell.arch, cell.quantizer, *numbers])
    return markdown_table(["data", "method", "arch", "quantizer", "bits", "here", "published", "levels there"], lines)


def markdown_distilled(beside: pd.DataFrame) -> list[str]:
    """The lines of :func:`kdq.report.published.distilled_beside`."""
    lines = [
        [cell.data, cell.method, cell.teacher, cell.arch, f"{cell.top1_float:.2f}", f"{cell.published:.2f}"]
        for cell in records(beside)
    ]
    return markdown_table(["data", "method", "teacher", "student", "here", "published"], lines)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table of texts as they are, and an empty line."""
    rule = "|" + " --- |" * len(head)
    return [_line(head), rule, *(_line(map(markdown_text, line)) for line in lines), ""]


def _line(entries: Iterable[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def markdown_text(text: str) -> str:
    """``text`` with everything escaped that Markdown or HTML would read as more than text."""
    return re.sub(r"[\\`*_\[\]|#$~]", r"\\\g<0>", html.escape(text, quote=False))


def _widths(found: pd.DataFrame) -> list[tuple[float, bool]]:
    pairs = records(found[["width", "searched"]].drop_duplicates())
    return sorted((float(width), bool(searched)) for width, searched in pairs)
