"""What others need to check a study and to compare theirs with it: its rows and its report, without models and logs."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from kdq.records.rows import Row
from kdq.report.write import Written, write_csv
from kdq.utils.files import write_text

_FIGURES = (".png", ".svg", ".pdf")


def publish(output: Path, written: Written, folder: Path) -> None:
    """Copy the report of ``output`` to ``folder``, its rows as one file, ``rows/rows.jsonl``; ``kdq-report`` reads the
    folder as it reads ``output``. The page is left out, for ``kdq-report FOLDER`` makes it again.
    """
    rows = [public(row) for row in written.rows]
    lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in rows]
    write_text(folder / "rows" / "rows.jsonl", "".join(lines))
    write_csv(folder / "results.csv", rows)
    for old in (folder / "report").glob("*.*"):  # of an earlier publication
        if old.suffix in _FIGURES:
            old.unlink()
    for path in written.files:
        if path.suffix in (".md", *_FIGURES):
            target = folder / path.relative_to(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def public(row: Row) -> Row:
    """``row`` for others: where logs and images lay on this machine is nobody's business; their names find them."""
    return dataclasses.replace(row, wandb_run=Path(row.wandb_run).name, config=_without_places(row.config))


def _without_places(value: Any) -> Any:
    """A config whose absolute paths are their last part."""
    if isinstance(value, dict):
        return {name: _without_places(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
