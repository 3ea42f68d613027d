"""A job from its config to its rows: teacher -> student -> quantize, making only what is not there yet."""

from __future__ import annotations

from omegaconf import DictConfig

from kdq.cell import Cell
from kdq.quantize_stage import asked_bits, quantize, row_spec
from kdq.results import Row, read_rows
from kdq.store import key_of
from kdq.train_stage import float_model


def run(cfg: DictConfig) -> list[Row]:
    """The rows that the config asks for, one per width: those on disk, and the missing ones, made in one pass.

    Raises:
        KdqError: with one line that says what is wrong with the config, the data or a stored file.
    """
    cell = Cell(cfg)
    widths, _ = asked_bits(cell), cell.device  # wrong settings are refused before anything is trained
    entry = float_model(cell)
    keys = {bits: key_of(row_spec(cell, entry, bits)) for bits in widths}
    known = {row.config_hash: row for row in read_rows(cell.output / "rows")}
    missing = {bits: key for bits, key in keys.items() if key not in known}
    made = quantize(cell, entry, missing) if missing else {}
    return [made[bits] if bits in made else known[keys[bits]] for bits in widths]
