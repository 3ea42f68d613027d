"""What a run ends with."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdq.records.rows import Row
from kdq.report.tables import accuracy_table, fitting_tables, unbound
from kdq.report.words import COLUMNS, Answer
from kdq.report.write import Written

#: The terminal shows the answer for so many data sets, and so many comparisons of each; report.md has all.
ANSWERS, LINES = 4, 12


def print_results(console: Console, output: Path, rows: Sequence[Row], written: Written) -> None:
    """The table of ``rows``, the answer that all rows below ``output`` give, and where everything is."""
    if rows:
        tables = fitting_tables(rows, console) if console.is_terminal else [accuracy_table(rows)]
        console = unbound(console, tables[0], 100)
        console.print(*tables)
    for line in written.warnings:
        console.print(line, style="yellow", markup=False, highlight=False)
    for answer in written.answers[:ANSWERS]:
        _print_answer(console, answer)
    if len(written.answers) > ANSWERS:
        console.print(f"{len(written.answers) - ANSWERS} more answers are in report.md", highlight=False)
    if written.lacking:
        more = f" ({len(written.lacking)} rows lack theirs)" if len(written.lacking) > 1 else ""
        console.print(f"not complete: {written.lacking[0]}{more}", markup=False, highlight=False, soft_wrap=True)
    by_name = {path.name: path for path in written.files}
    for name, file in (
        ("results", "results.csv"),
        ("report", "report.html"),
        ("report as text", "report.md"),
        ("accuracy vs bits", "accuracy_vs_bits.png"),
        ("accuracy vs bytes", "accuracy_vs_bytes.png"),
    ):
        if file in by_name:
            _place(console, name, str(by_name[file]))
    if (runs := output / "runs" / "wandb").is_dir():
        _place(console, "W&B runs", str(runs))
        _place(console, "browse them with", f"wandb leet {runs}")


def _print_answer(console: Console, answer: Answer) -> None:
    console.print(f"\n[bold]{escape(answer.headline)}[/]", highlight=False)
    for text in answer.made:
        console.print(text, style="dim", markup=False, highlight=False)
    for kind, lines in groupby(answer.lines[:LINES], key=lambda line: line.kind):
        table = Table(*COLUMNS, box=box.SIMPLE_HEAD, show_edge=False, title=escape(kind), title_justify="left")
        for line in lines:
            table.add_row(*map(escape, line.cells))
        console.print("", table)
    if len(answer.lines) > LINES:
        console.print(f"{len(answer.lines) - LINES} more comparisons are in report.md", highlight=False)


def _place(console: Console, name: str, where: str) -> None:
    console.print(f"{name + ':':<19}{where}", soft_wrap=True, highlight=False, markup=False)
