"""The tables people read: in the terminal at the end of a run, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdq.records.rows import Row
from kdq.report.cells import SERIES, cells, grid_widths, named, records, series, width_name

#: The terminal shows so many models; the page shows all.
TERMINAL_LINES = 60


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Top-1 by model and bits, mean and standard deviation over seeds, with the packed size below."""
    found = cells(named(rows))
    return _accuracies(found, _widths(found))


def fitting_tables(rows: Sequence[Row], console: Console) -> list[Table]:
    """The :func:`accuracy_table`, its widths spread over as few tables as the console's own width needs."""
    found = cells(named(rows))
    widths = _widths(found)
    tables: list[Table] = []
    unbound = console.options.update(width=9999)
    for size in range(len(widths), 0, -1):
        tables = [_accuracies(found, widths[i : i + size]) for i in range(0, len(widths), size)]
        if all(console.measure(table, options=unbound).maximum <= console.width for table in tables):
            break
    return tables


def _accuracies(found: pd.DataFrame, widths: Sequence[tuple[float, bool]]) -> Table:
    shown = [name for name in SERIES if name == "method" or found[name].nunique() > 1]
    constant = escape(", ".join(str(found[name].iloc[0]) for name in SERIES if name not in shown))
    lines, grid = list(series(found)), grid_widths(found)
    cut = f"; {len(lines) - TERMINAL_LINES} more models in the report" if len(lines) > TERMINAL_LINES else ""
    about = f" ({constant})" if constant else ""
    text = Table(title=f"top-1 on the test set in %, size in bytes below{about}{cut}", show_lines=True)
    for name in shown:
        text.add_column(name, no_wrap=True)
    for name in ["float", *(width_name(*width) for width in widths)]:
        text.add_column(name, justify="right", no_wrap=True)
    for names, group in lines[:TERMINAL_LINES]:
        by_width = {(cell.width, cell.searched): cell for cell in records(group)}
        entries = [_entry(group["top1_float"].mean(), group["top1_float_std"].mean(), group["float_bytes"].mean())]
        for width in widths:
            cell = by_width.get(width)
            if cell is not None:
                entries.append(_entry(cell.top1, cell.top1_std, cell.size_bytes))
            else:
                entries.append("[red]missing[/]" if _is_missing(width, names[3], grid) else "")
        text.add_row(*(escape(value) for name, value in zip(SERIES, names, strict=True) if name in shown), *entries)
    return text


def markdown_accuracies(found: pd.DataFrame) -> list[str]:
    """One table per data set of :func:`kdq.report.cells.cells`: models by widths, missing cells marked."""
    lines = []
    for data, part in found.groupby("data", sort=True):
        widths, grid = _widths(part), grid_widths(part)
        head = ["method", "arch", "quantizer", "seeds", "float", *(width_name(*width) for width in widths)]
        entries: list[list[str]] = []
        for names, group in series(part):
            by_width = {(cell.width, cell.searched): cell for cell in records(group)}
            whole = mean_std(group["top1_float"].mean(), group["top1_float_std"].mean())
            seeds = f"{group['n'].min()}" if group["n"].nunique() == 1 else f"{group['n'].min()}–{group['n'].max()}"
            entries.append([*names[1:], seeds, f"{whole} ({group['float_bytes'].mean():,.0f})"])
            for width in widths:
                cell = by_width.get(width)
                if cell is not None:
                    entries[-1].append(f"{mean_std(cell.top1, cell.top1_std)} ({cell.size_bytes:,.0f})")
                else:
                    entries[-1].append("missing" if _is_missing(width, names[3], grid) else "")
        lines += [f"### {markdown_text(str(data))}", "", *markdown_table(head, entries)]
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
    return "".join(f"\\{c}" if c in r"\`*_[]|#$~" else {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(c, c) for c in text)


def mean_std(mean: float, std: float) -> str:
    return f"{mean:.2f}" + (f" ± {std:.2f}" if std == std else "")  # NaN: one seed


def _is_missing(width: tuple[float, bool], quantizer: str, grid: set[tuple[str, float]]) -> bool:
    """Whether a model without this (width, searched) lacks a cell of the grid."""
    return not width[1] and (quantizer, width[0]) in grid


def _entry(mean: float, std: float, size: float) -> str:
    return f"{mean_std(mean, std)}\n[dim]{size:,.0f}[/]"


def _widths(found: pd.DataFrame) -> list[tuple[float, bool]]:
    pairs = records(found[["width", "searched"]].drop_duplicates())
    return sorted((float(width), bool(searched)) for width, searched in pairs)
