"""A job from its config to its rows: teacher -> student -> quantize -> tune -> deploy, making only what is missing."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from kdq.records.failures import Job, recorded
from kdq.records.lock import locked
from kdq.records.rows import Row, differences, has, read_rows, whole, write_row
from kdq.records.store import key_of
from kdq.stages.asked import complete, row_keys, row_spec
from kdq.stages.cell import Cell
from kdq.stages.deploy import asked_columns, deploy
from kdq.stages.quantize import arch_of, quantize
from kdq.stages.quantize_log import log_deployed, tracked_rows
from kdq.stages.train import Model, obtain, planned
from kdq.stages.tune import tuned, tuned_models
from kdq.utils.errors import KdqError

log = logging.getLogger(__name__)

#: Columns of a row that say what was found, whatever the machine and the time it took.
FOUND = ("top1_float", "top1", "top5", "nll", "ece", "avg_bits", "weight_bits_total", "size_bytes", "macs", "bops")


@dataclass(frozen=True)
class Wanted:
    """What a cell asks for; rows are named as :func:`kdq.stages.asked.asked_bits` names them."""

    cell: Cell
    model: Model  # whose weights are quantized
    tuned: dict[str, Model]  # what each row's network is trained on to, if it is
    keys: dict[str, str]  # the config_hash of each row
    columns: dict[str, Any]  # of deploy, that each row must have: see complete

    def known(self) -> dict[str, Row]:
        """The rows on disk, by their keys."""
        return {row.config_hash: row for row in read_rows(self.cell.output / "rows", set(self.keys.values()))}

    def missing(self, known: Mapping[str, Row]) -> dict[str, str]:
        """The keys, by name, of rows that are not among the ``known`` ones, or not complete there."""
        complete_ones = {key for key, row in known.items() if complete(self.cell.output, row, self.columns)}
        return {name: key for name, key in self.keys.items() if key not in complete_ones}


def wanted_by(cell: Cell) -> Wanted:
    """Raises KdqError for what cannot be made, before anything is."""
    model = planned(cell)
    trained_on = tuned_models(cell, model)
    return Wanted(cell, model, trained_on, row_keys(cell, model, trained_on), asked_columns(cell))


def run(cfg: DictConfig, job: Job = Job()) -> list[Row]:  # noqa: B008
    """The rows that the config asks for, one per width: those on disk, and the missing ones, made in one pass; then the
    columns of ``deploy`` that they lack. ``job``: named in the record that a failure leaves."""
    cell = Cell(cfg)
    _ = cell.device  # a wrong setting is refused before anything is trained
    wanted = wanted_by(cell)
    known = wanted.known()
    names = {key: f"{cell.name}-b{name}" for name, key in wanted.missing(known).items()}
    if names:
        # One process at a time for a model and a quantizer, whatever the widths; equal commands find what the first
        # one made. The log, whose end may wait for a server, is closed when the lock is free.
        lock = cell.output / "store" / ".locks" / f"{key_of(row_spec(cell, wanted.model, None))}.lock"
        with recorded(cell.output, names, job), ExitStack() as log_of_rows, locked(lock, f"rows of {cell.name}"):
            known = _completed(wanted, log_of_rows)
    return [known[key] for key in wanted.keys.values()]


def _completed(wanted: Wanted, log_of_rows: ExitStack) -> dict[str, Row]:
    """The rows on disk with the missing ones, packed files and columns, all told in one log, which stays open."""
    cell, known = wanted.cell, wanted.known()
    rows, lacking, missing = dict(known), wanted.missing(known), {}
    if not lacking:
        return rows
    for name, key in lacking.items():
        row = known.get(key)
        if row is None or not whole(cell.output, row):
            missing[name] = key
            if row is not None:
                log.warning("the packed file %s is gone or cut short: it is made again", cell.output / row.artifact)
    entry = obtain(cell.store, wanted.model) if missing else None
    made_on = {name: obtain(cell.store, wanted.tuned[name]) for name in missing if wanted.tuned}
    arch = arch_of(cell, entry) if entry else next(iter(rows.values())).arch
    track = log_of_rows.enter_context(tracked_rows(cell, wanted.model, wanted.tuned, arch, wanted.keys))
    if entry:
        networks = {name: tuned(cell, entry, made) for name, made in made_on.items()}
        made = quantize(cell, entry, missing, track, networks)
        rows |= {missing[name]: _again(cell, known.get(missing[name]), row) for name, row in made.items()}
    for key, row in rows.items():
        if not has(row, wanted.columns):
            rows[key] = deploy(cell, row)
            log_deployed(track, rows[key])
    return rows


def _again(cell: Cell, before: Row | None, made: Row) -> Row:
    """The row to keep of one that was there and one made for its packed file: the first, with its times and columns, if
    they found the same, else the new one."""
    if before is None:
        return made
    if differ := differences(before, made, FOUND):
        log.warning("made again, %s differs: %s", made.artifact, ", ".join(differ))
        return made
    write_row(cell.output / "rows", before)
    return before


def train(cfg: DictConfig, key: str, job: Job = Job()) -> None:  # noqa: B008
    """Make one of the models that the config's rows need, and no row: a job of a sweep's first waves."""
    cell = Cell(cfg)
    _ = cell.device
    model = planned(cell)
    lasts = tuned_models(cell, model).values() or [model]
    models = {needed.key: needed for last in lasts for needed in last.lineage()}
    if key not in models:
        raise KdqError(f"kdq.train={key} is not one of this cell's models: {', '.join(models)}")
    with recorded(cell.output, {key: models[key].name}, job):
        obtain(cell.store, models[key])
