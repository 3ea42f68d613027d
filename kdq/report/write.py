"""Everything kdq writes about its rows: results.csv, results.parquet, and the folder report/."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kdq.records.rows import Row, table
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
    """Rebuild results.csv, results.parquet and report/ below ``output`` from its rows; figures in the ``style`` of
    :func:`kdq.report.style.styled`.

    A part that cannot be written is told in a warning and in the result, and the others are: the cells' own rows are
    safe whatever becomes of the report.
    """
    material, folder = Material(output), output / "report"
    written = Written(material.rows, lacking=material.lacking)

    def parquet(path: Path) -> None:
        with replacing(path) as temporary:
            table(material.rows).to_parquet(temporary, index=False)

    def figures(path: Path) -> list[Path]:
        from kdq.report.figures import write_figures

        return write_figures(material, path, style)

    def html(path: Path) -> None:
        from kdq.report.html import page

        write_text(path, page(material))

    def text(path: Path) -> None:
        write_text(path, markdown(material, [file for file in written.files if file.suffix == ".png"]))

    parts: dict[str, tuple[Path, Callable[[Path], list[Path] | None]]] = {
        "the table": (output / "results.csv", lambda path: write_csv(path, material.rows)),
        "the Parquet table": (output / "results.parquet", parquet),
        "the figures": (folder, figures),
        "the page": (folder / "report.html", html),
        "the Markdown report": (folder / "report.md", text),
    }
    for name, (path, write) in parts.items():
        try:
            made = write(path)
            written.files += [path] if made is None else made
        except Exception as error:  # whatever it is, it must not take the other parts or a sweep's end with it
            written.failures.append(f"{name} could not be written to {path}: {type(error).__name__}: {error}")
            log.warning(written.failures[-1])
            log.debug("", exc_info=True)
    if "answers" in vars(material):
        written.answers, written.warnings = material.answers, material.suspect
        for line in material.averaged:
            log.warning(line)
    return written


#: What makes spreadsheets take a text for a formula, and the mark itself.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠'")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the merged table atomically.

    A text that a spreadsheet would run as a formula (it begins with one of ``= + - @``, a tab or a new line) gets a
    ``'`` before it, and so does one that begins with ``'``: whoever reads the file takes one leading ``'`` off. The
    rows themselves and results.parquet hold every text as it is.
    """
    frame = table(rows)
    for name in frame.select_dtypes(exclude="number").columns:
        frame[name] = [f"'{x}" if isinstance(x, str) and x.startswith(_FORMULA) else x for x in frame[name]]
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)
