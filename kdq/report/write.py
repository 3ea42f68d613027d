"""Everything kdq writes about its rows: results.csv, results.parquet, and the folder report/."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdq.records.rows import Row, table, write_csv
from kdq.report.markdown import markdown
from kdq.report.material import Material
from kdq.report.words import Answer
from kdq.utils.files import replacing, write_text

log = logging.getLogger(__name__)


@dataclass
class Written:
    """What was reported: the rows, the files, what could not be written, the answers, what to know before them, and the
    packed files that rows lack."""

    rows: list[Row]
    files: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)


def write_report(output: Path, style: str = "screen") -> Written:
    """Rebuild results.csv, results.parquet and report/ below ``output`` from its rows.

    A part that cannot be written is told in a warning and in the result, and the others are: the cells' own rows are
    safe whatever becomes of the report. ``style``: of the figures, see :func:`kdq.report.style.styled`."""
    material, folder = Material(output), output / "report"
    written = Written(material.rows, lacking=material.lacking)

    def csv(path: Path) -> list[Path]:
        write_csv(path, material.rows)
        return [path]

    def parquet(path: Path) -> list[Path]:
        with replacing(path) as temporary:
            table(material.rows).to_parquet(temporary, index=False)
        return [path]

    def figures(path: Path) -> list[Path]:
        from kdq.report.figures import write_figures

        return write_figures(material, path, style)

    def text(path: Path) -> list[Path]:
        write_text(path, markdown(material, [file for file in written.files if file.suffix == ".png"]))
        return [path]

    parts: dict[str, tuple[Path, Callable[[Path], Sequence[Path]]]] = {
        "the table": (output / "results.csv", csv),
        "the Parquet table": (output / "results.parquet", parquet),
        "the figures": (folder, figures),
        "the page": (folder / "report.html", lambda path: write_page(path, material)),
        "the Markdown report": (folder / "report.md", text),
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


def write_page(path: Path, material: Material) -> list[Path]:
    """Write report.html alone."""
    from kdq.report.html import page

    write_text(path, page(material))
    return [path]
