"""A job from its config to its rows: teacher -> student -> quantize, making only what is not there yet."""

from __future__ import annotations

from omegaconf import DictConfig

from kdq.cell import Cell
from kdq.quantize_stage import asked_widths, quantize, row_spec
from kdq.results import Row, read_rows
from kdq.store import key_of
from kdq.train_stage import float_model


def run(cfg: DictConfig) -> list[Row]:
    """The rows that the config asks for, one per width: those on disk, and the missing ones, made in one pass.

    Raises:
        KdqError: with one line that says what is wrong with the config, the data or a stored file.
    """
    cell = Cell(cfg)
    asked, _ = asked_widths(cell), cell.device  # wrong settings are refused before anything is trained
    entry = float_model(cell)
    keys = {width: key_of(row_spec(cell, entry, width)) for width in asked}
    known = {row.config_hash: row for row in read_rows(cell.output / "rows")}
    missing = {width: key for width, key in keys.items() if key not in known}
    made = quantize(cell, entry, missing) if missing else {}
    return [made[width] if width in made else known[keys[width]] for width in asked]
