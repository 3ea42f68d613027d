"""``kdq-report``: rebuild the report from the rows, or compare two output folders."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kdq.records.rows import rows_below
from kdq.report.style import STYLES, styled
from kdq.utils.errors import KdqError


def main(arguments: Sequence[str] | None = None) -> None:
    """``kdq-report [DIR] [--publish FOLDER]`` and ``kdq-report --compare A B``; exit codes are in ``--help``."""
    parser = argparse.ArgumentParser(
        prog="kdq-report",
        description="Rebuild results.csv, results.parquet and report/ (report.html, report.md, figures) from the rows "
        "under DIR, or compare the rows of two folders.",
        epilog="Exit codes: 0: written; with --compare, no difference. 1: something could not be written; with "
        "--compare, there are differences. 2: a mistake in the command.",
    )
    parser.add_argument("dir", nargs="?", type=Path, help="paths.output_dir of the run (outputs)")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="also put rows, figures and report.md there")
    parser.add_argument(
        "--style",
        help=f"of the figures: {', '.join(STYLES)} (width of a column, fonts), or a Matplotlib style or file (screen)",
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two paths.output_dir")
    asked = parser.parse_args(arguments)
    logging.basicConfig(format="kdq-report: %(message)s")
    output, style = asked.dir or Path("outputs"), asked.style or "screen"
    try:
        if asked.compare and (asked.dir or asked.publish or asked.style):
            raise KdqError("--compare A B writes nothing: it takes neither a third folder nor --publish or --style")
        for folder in asked.compare or [output]:
            if not folder.is_dir():
                raise KdqError(f"no folder {folder}: give the paths.output_dir of a run")
        if asked.publish is not None and asked.publish.resolve() == output.resolve():
            raise KdqError("--publish FOLDER takes a folder of its own")
        with styled(style):
            pass
        code = _compare(*asked.compare) if asked.compare else _write(output, asked.publish, style)
    except KdqError as error:
        print(f"kdq-report: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _write(output: Path, public: Path | None, style: str) -> int:
    from kdq.report.publish import publish
    from kdq.report.terminal import print_results
    from kdq.report.write import write_report

    written = write_report(output, style)
    print_results(Console(), output, written.rows, written)
    if public is not None:
        try:
            publish(output, written, public)
        except OSError as error:
            print(f"kdq-report: nothing could be published to {public}: {error.strerror or error}", file=sys.stderr)
            return 1
        print(f"published:         {public}")
    return 1 if written.failures else 0


def _compare(a: Path, b: Path) -> int:
    from kdq.report.compare import compare, comparison_table, summary
    from kdq.report.tables import unbound

    comparison = compare(rows_below(a), rows_below(b))
    console = Console()
    if not comparison.same:
        text = comparison_table(comparison, str(a), str(b))
        console = unbound(console, text)
        console.print(text)
    console.print(summary(comparison, str(a), str(b)), markup=False, highlight=False, soft_wrap=True)
    return 0 if comparison.same else 1
