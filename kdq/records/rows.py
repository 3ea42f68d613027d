"""The row: what one cell of the grid found, a flat record in a file of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kdq.utils.errors import KdqError
from kdq.utils.files import parse_json, replacing, write_text

log = logging.getLogger(__name__)

#: Version of the columns below; a reader reads all earlier ones.
ROW_FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One cell. Accuracies and drops are in percent (points), sizes in bytes, times in seconds unless named ``_ms``,
    throughputs in images a second. What was not measured is None: rows of format 1, and cells without ``deploy``, lack
    the columns behind ``act_bits``."""

    data: str
    method: str
    arch: str
    role: str
    seed: int
    quantizer: str
    alphabet: str
    bits: int
    avg_bits: float
    search: str
    top1_float: float
    top1: float
    top5: float
    drop: float
    nll: float
    ece: float
    val_top1: float
    params: int
    weight_bits_total: int
    size_bytes: int
    float_bytes: int
    macs: int
    calibration_images: int
    latency_ms_torch: float
    train_seconds: float
    quantize_seconds: float
    device: str
    kdq_version: str
    git_sha: str
    config_hash: str
    wandb_run: str
    artifact: str
    act_bits: int = 32
    bops: int | None = None
    top1_onnx_fp32: float | None = None
    top1_onnx_int8: float | None = None
    onnx_fp32_bytes: int | None = None
    onnx_int8_bytes: int | None = None
    latency_ms_onnx_fp32: float | None = None
    latency_ms_onnx_int8: float | None = None
    latency_p95_ms_onnx_fp32: float | None = None
    latency_p95_ms_onnx_int8: float | None = None
    throughput_onnx_fp32: float | None = None
    throughput_onnx_int8: float | None = None
    throughput_batch: int | None = None
    latency_threads: int | None = None
    deploy_hash: str | None = None
    threads: int | None = None  # of the CPU, on which most steps of the training were taken
    row_format: int = ROW_FORMAT

    @property
    def file_name(self) -> str:
        return (
            f"{self.data}-{self.method}-{self.arch}-s{self.seed}-{self.quantizer}-b{self.bits}-{self.config_hash}.json"
        )


COLUMNS = [field.name for field in dataclasses.fields(Row)]
#: Columns that tell cells apart, in the order tables are sorted by.
AXES = ["data", "method", "arch", "seed", "quantizer", "alphabet", "act_bits", "bits"]


def has(row: Row, columns: Mapping[str, Any]) -> bool:
    """Whether all of the optional ``columns`` were measured, and say what is asked of them where that is not None."""
    found = {column: getattr(row, column) for column in columns}
    return all(value is not None and columns[column] in (None, value) for column, value in found.items())


def write_row(folder: Path, row: Row) -> Path:
    """Write ``row`` atomically to its own file below ``folder``."""
    path = folder / row.file_name
    write_text(path, json.dumps(dataclasses.asdict(row), indent=1) + "\n")
    return path


def read_rows(folder: Path, hashes: Container[str] | None = None, skipped: list[str] | None = None) -> list[Row]:
    """The rows below ``folder``, sorted by what tells them apart: of files that hold one each, and of published ones
    (``*.jsonl``) that hold one on every line. A damaged row is named in a warning and left out.

    Args:
        hashes: the ``config_hash`` of the rows that are wanted; other files, of which there may be thousands, are not
            opened.
        skipped: gets a line for each damaged row.
    """
    rows: dict[str, Row] = {}
    # A row's own file comes last: it may have got columns since it was published.
    for path in [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("*.json"))]:
        published = path.suffix == ".jsonl"
        if hashes is not None and not published and path.stem.rpartition("-")[2] not in hashes:
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            _skip(str(path), error, skipped)
            continue
        for number, text in enumerate(content.splitlines() if published else [content], 1):
            try:
                row = _row(parse_json(text))
            except (ValueError, TypeError, AttributeError) as error:
                _skip(f"{path}:{number}" if published else str(path), error, skipped)
                continue
            if hashes is None or row.config_hash in hashes:
                rows[row.config_hash] = row
    return sorted(rows.values(), key=lambda row: [getattr(row, axis) for axis in [*AXES, "config_hash"]])


def _skip(where: str, error: Exception, skipped: list[str] | None) -> None:
    log.warning("skipping the damaged row %s (%s)", where, error)
    if skipped is not None:
        skipped.append(f"{where} ({error})")


def read_row(path: Path) -> Row:
    """The row in one file.

    Raises:
        KdqError: it is not there, or is no row.
    """
    try:
        return _row(parse_json(path.read_text()))
    except FileNotFoundError as error:
        raise KdqError(f"no file {path}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise KdqError(f"{path} is not a row of kdq's: {' '.join(str(error).split())}") from error


def _row(values: dict[str, Any]) -> Row:
    if values.get("row_format", 0) > ROW_FORMAT:
        raise ValueError(f"row format {values['row_format']} is newer than this kdq: update kdq")
    row = Row(**{name: values[name] for name in values if name in COLUMNS})
    for field in dataclasses.fields(Row):
        value, (name, _, optional) = getattr(row, field.name), str(field.type).partition(" | ")
        if value is None and optional:
            continue
        kind = {"str": str, "int": int, "float": float}[name]
        if isinstance(value, bool) or not isinstance(value, (kind, int) if kind is float else kind):
            raise ValueError(f"{field.name} is {value!r}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{field.name} has {len(str(value))} digits")
    # Files are written by these names, and read.
    if Path(row.file_name).name != row.file_name or "\0" in row.file_name:
        raise ValueError(f"{row.file_name!r} is no name of a file")
    if Path(row.artifact).is_absolute() or {"..", "\0"} & {*Path(row.artifact).parts, *row.artifact}:
        raise ValueError(f"artifact {row.artifact!r} leads out of the folder")
    impossible = [name for name in ("top1", "top1_float") if not 0 <= getattr(row, name) <= 100]
    impossible += [name for name in ("size_bytes", "float_bytes", "avg_bits") if not 0 < getattr(row, name) < math.inf]
    if impossible:
        raise ValueError(f"{impossible[0]} is {getattr(row, impossible[0])}")
    return row


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows as a data frame with :data:`COLUMNS`, also when there is none."""
    frame = pd.DataFrame([vars(row) for row in rows], columns=COLUMNS)
    # Whole numbers stay whole where some are missing.
    kinds = {"int | None": "Int64", "float | None": "float64"}
    optional = {field.name: kinds[field.type] for field in dataclasses.fields(Row) if field.type in kinds}
    return frame.astype(optional)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the merged table atomically."""
    with replacing(path) as temporary:
        table(rows).to_csv(temporary, index=False)
