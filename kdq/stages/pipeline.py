"""A job from its config to its rows: teacher -> student -> quantize -> deploy, making only what is not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from kdq.records.failures import Job, recorded
from kdq.records.rows import Row, has, read_rows
from kdq.stages.asked import row_keys
from kdq.stages.cell import Cell
from kdq.stages.deploy import asked_columns, deploy
from kdq.stages.quantize import arch_of, quantize, tracked_rows
from kdq.stages.quantize_log import log_deployed
from kdq.stages.train import Model, obtain, planned
from kdq.utils.errors import KdqError


def run(cfg: DictConfig, job: Job = Job()) -> list[Row]:  # noqa: B008
    """The rows that the config asks for, one per width: those on disk, and the missing ones, made in one pass; then the
    columns of ``deploy`` that they lack.

    Args:
        job: named in the record that a failure leaves.

    Raises:
        KdqError: with one line that says what is wrong with the config, the data or a stored file.
    """
    cell = Cell(cfg)
    _ = cell.device  # a wrong setting is refused before anything is trained
    model = planned(cell)
    keys = row_keys(cell, model)
    known = {row.config_hash: row for row in read_rows(cell.output / "rows", set(keys.values()))}
    columns = asked_columns(cell)
    names = {
        key: f"{cell.name}-b{name}" for name, key in keys.items() if key not in known or not has(known[key], columns)
    }
    if names:
        with recorded(cell.output, names, job):
            known = _completed(cell, model, keys, known, columns)
    return [known[key] for key in keys.values()]


def _completed(
    cell: Cell, model: Model, keys: Mapping[str, str], known: Mapping[str, Row], columns: Mapping[str, Any]
) -> dict[str, Row]:
    """``known`` with the missing rows and columns, all told in one log."""
    rows, missing = dict(known), {name: key for name, key in keys.items() if key not in known}
    entry = obtain(cell.store, model) if missing else None
    arch = arch_of(cell, entry) if entry else next(iter(rows.values())).arch
    with tracked_rows(cell, model, arch, keys) as track:
        if entry:
            made = quantize(cell, entry, missing, track)
            rows |= {missing[name]: row for name, row in made.items()}
        for key, row in rows.items():
            if not has(row, columns):
                rows[key] = deploy(cell, row)
                log_deployed(track, rows[key])
    return rows


def train(cfg: DictConfig, key: str, job: Job = Job()) -> None:  # noqa: B008
    """Make one of the models that the config's rows need, and no row: a job of a sweep's first waves.

    Raises:
        KdqError: as :func:`run`, or ``key`` is none of them.
    """
    cell = Cell(cfg)
    _ = cell.device
    found = {model.key: model for model in planned(cell).lineage()}
    if key not in found:
        raise KdqError(f"kdq.train={key} is not one of this cell's models: {', '.join(found)}")
    with recorded(cell.output, {key: found[key].name}, job):
        obtain(cell.store, found[key])
