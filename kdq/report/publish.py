"""What others need to check a study and to compare theirs with it: its rows and its report, without models and logs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from kdq.files import write_text
from kdq.results import read_rows


def publish(output: Path, written: Sequence[Path], folder: Path) -> None:
    """Copy the report of ``output`` to ``folder``, its rows as one file, ``rows/rows.jsonl``; ``kdq-report`` reads the
    folder as it reads ``output``.

    Args:
        written: the report's files; the page is left out, for ``kdq-report FOLDER`` makes it again.
    """
    rows = [json.dumps(dataclasses.asdict(row)) + "\n" for row in read_rows(output / "rows")]
    write_text(folder / "rows" / "rows.jsonl", "".join(rows))
    for path in written:
        if path.suffix in (".csv", ".md", ".png", ".svg"):
            target = folder / path.relative_to(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
