"""The row: what one cell of the grid found, a flat record in a file of its own."""

import dataclasses
import difflib
import json
import logging
import os
import reprlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pandas as pd
from pydantic import AfterValidator, Field, Strict, TypeAdapter, ValidationError

from kdq.utils.errors import KdqError, message
from kdq.utils.files import parse_json, regular, write_text
from kdq.utils.hub import HUB, ROW, fetch

log = logging.getLogger(__name__)

#: Version of the columns below; a reader reads all earlier ones.
ROW_FORMAT = 4


def _encodable(text: str) -> str:
    text.encode()  # half of a surrogate pair cannot be written anywhere
    return text


def _file_name(name: str) -> str:
    if "\0" in name or Path(name).name != name:
        raise ValueError(f"{name!r} is no part of a file's name")
    return name


def _below(path: str) -> str:
    if Path(path).is_absolute() or {"..", "\0"} & {*Path(path).parts, *path}:
        raise ValueError(f"{path!r} leads out of the folder")
    return path


def _writable(config: dict[str, Any]) -> dict[str, Any]:
    json.dumps(config, ensure_ascii=False).encode()
    return config


Text = Annotated[str, Strict(), AfterValidator(_encodable)]
Name = Annotated[Text, AfterValidator(_file_name)]
Int = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, Strict()]
Percent = Annotated[float, Strict(), Field(ge=0, le=100)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[Int, Field(gt=0)]
Config = Annotated[dict[str, Any], AfterValidator(_writable)]


@dataclass(frozen=True)
class Row:
    """One cell. Accuracies and drops are in percent (points), sizes in bytes, times in seconds unless named ``_ms``,
    throughputs in images a second. What was not measured is None: rows of earlier formats, and cells without
    ``deploy``, lack the columns behind ``act_bits``. ``val_top1`` is the accuracy on validation images; before
    format 4 that of the float model, or of the tuned one.

    This class is the schema: reading (:func:`read_rows`) and the types of :func:`table` follow from its annotations.
    """

    data: Name
    method: Name
    arch: Name
    role: Text
    seed: Int
    quantizer: Name
    alphabet: Text
    bits: Int
    avg_bits: Positive
    search: Text
    top1_float: Percent
    top1: Percent
    top5: Float
    drop: Float
    nll: Float
    ece: Float
    val_top1: Float
    params: Int
    weight_bits_total: Int
    size_bytes: Bytes
    float_bytes: Bytes
    macs: Int
    calibration_images: Int
    latency_ms_torch: Float
    train_seconds: Float
    quantize_seconds: Float
    device: Text
    kdq_version: Text
    git_sha: Text
    config_hash: Name
    wandb_run: Text
    artifact: Annotated[Text, AfterValidator(_below)]
    act_bits: Int = 32
    bops: Int | None = None
    top1_onnx_fp32: Float | None = None
    top1_onnx_int8: Float | None = None
    onnx_fp32_bytes: Int | None = None
    onnx_int8_bytes: Int | None = None
    latency_ms_onnx_fp32: Float | None = None
    latency_ms_onnx_int8: Float | None = None
    latency_p95_ms_onnx_fp32: Float | None = None
    latency_p95_ms_onnx_int8: Float | None = None
    throughput_onnx_fp32: Float | None = None
    throughput_onnx_int8: Float | None = None
    throughput_batch: Int | None = None
    latency_threads: Int | None = None
    deploy_hash: Text | None = None
    threads: Int | None = None  # of the CPU, on which most steps of the training were taken
    tune: Text = ""  # how the quantized network was trained on
    tune_seconds: Float | None = None
    tune_epochs: Int | None = None
    limited: Text = ""  # the trainer's flags that made this a trial: fast_dev_run, limit_train_batches, ...
    classes: Int | None = None
    epochs: Int | None = None  # of the training of the float model; 0: its weights were read from a file
    recipe: Text = ""  # of that training, in words
    top1_onnx_codes: Float | None = None
    onnx_codes_bytes: Int | None = None
    latency_ms_onnx_codes: Float | None = None
    latency_p95_ms_onnx_codes: Float | None = None
    throughput_onnx_codes: Float | None = None
    deployed: Text | None = None  # the format that deploy=best keeps, and its measurements
    top1_deployed: Float | None = None
    latency_ms_deployed: Float | None = None
    val_top1_float: Float | None = None  # of the float model on the validation images
    versions: Text = ""  # of what computed it, beside kdq
    config: Config | None = None  # what composes the cell again, interpolations as written: kdq-reproduce
    row_format: Int = ROW_FORMAT

    @property
    def name(self) -> str:
        """What people tell rows apart by, and packed networks in W&B."""
        more = [*([f"A{self.act_bits}"] if self.act_bits < 32 else []), *([self.tune] if self.tune else [])]
        return "-".join([self._stem, *more])

    @property
    def file_name(self) -> str:
        """The name of its file, and without the suffix of its packed network."""
        return f"{self._stem}-{self.config_hash}.json"

    @property
    def _stem(self) -> str:
        return f"{self.data}-{self.method}-{self.arch}-s{self.seed}-{self.quantizer}-b{self.bits}"


#: Bytes of a row's file name: file systems take 255, and a file that is being written has some more.
LONGEST_NAME = 240
#: Columns of tables: everything but the config, which is no single value.
COLUMNS = [field.name for field in dataclasses.fields(Row) if field.name != "config"]
#: Columns that tell cells apart, in the order tables are sorted by.
AXES = ["data", "method", "arch", "seed", "quantizer", "alphabet", "act_bits", "tune", "bits"]


def has(row: Row, columns: Mapping[str, Any]) -> bool:
    """Whether all of the optional ``columns`` were measured, and say what is asked of them where that is not None."""
    values = [(getattr(row, column), asked) for column, asked in columns.items()]
    return all(value is not None and asked in (None, value) for value, asked in values)


def differences(row: Row, made: Row, columns: Iterable[str]) -> list[str]:
    """``top1 97.21 -> 97.49`` for each column that is another."""
    pairs = ((name, getattr(row, name), getattr(made, name)) for name in columns)
    return [f"{name} {before or 'not recorded'} -> {after}" for name, before, after in pairs if before != after]


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
    for path in [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("[!.]*.json"))]:  # no half-written one
        published = path.suffix == ".jsonl"
        if hashes is not None and not published and path.stem.rpartition("-")[2] not in hashes:
            continue
        try:
            content = regular(path).read_bytes()
        except OSError as error:
            _skip(str(path), error, skipped)
            continue
        for number, text in enumerate(content.splitlines() if published else [content], 1):
            try:
                row = _row(parse_json(text))
            except ValueError as error:
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
    """The row in one file."""
    try:
        return _row(parse_json(regular(path).read_text()))
    except FileNotFoundError as error:
        raise KdqError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise KdqError(f"{path} is not a row of kdq's: {message(error)}") from error


def rows_below(output: Path, option: str = "") -> list[Row]:
    """The rows of an output folder, at least one; ``option`` names what gives the folder."""
    if rows := read_rows(output / "rows"):
        return rows
    raise KdqError(f"no rows below {output}: give {option}the paths.output_dir of a run")


def find_row(name: str, output: Path) -> Row:
    """The row that ``name`` means: its file, that of a model shared as ``hf:owner/name``, or its ``config_hash`` or the
    start of it among the rows below ``output``; a complaint names what is near."""
    if name.startswith(HUB):
        return read_row(fetch(name, (ROW,)))
    if name.endswith(".json"):
        return read_row(Path(name))
    rows = rows_below(output, "--output-dir, ")
    matching = [row for row in rows if row.config_hash.startswith(name)] if name else []
    if len(matching) == 1:
        return matching[0]
    hashes = [row.config_hash for row in rows]
    near = [row.config_hash for row in matching] or difflib.get_close_matches(name, hashes, 4, 0.3) or hashes
    named = [row for row in rows if row.config_hash in near[:4]]
    listed = ", ".join(f"{row.config_hash} ({row.name})" for row in named)
    problem = f"{len(matching)} cells start with {name!r}" if matching else f"no cell {name!r} below {output}"
    raise KdqError(f"{problem}: {'choose one of' if matching else 'there are for example'} {listed}")


def _row(values: Any) -> Row:
    if isinstance(values, dict) and isinstance(version := values.get("row_format"), int) and version > ROW_FORMAT:
        raise ValueError(f"row format {version} is newer than this kdq: update kdq")
    try:
        row = _schema().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the row"
        raise ValueError(f"{where} is {reprlib.repr(first['input'])}: {first['msg']}") from None
    if len(os.fsencode(row.file_name)) > LONGEST_NAME:
        raise ValueError(f"its names are too long for a file: {reprlib.repr(row.file_name)}")
    return row


#: Made when it is first asked for, and once.
_schema = cache(partial(TypeAdapter, Row))


def whole(output: Path, row: Row) -> bool:
    """Whether the packed file of ``row`` is there with all its bytes."""
    try:
        return (output / row.artifact).stat().st_size == row.size_bytes
    except OSError:
        return False


def without_artifacts(output: Path, rows: Iterable[Row]) -> list[str]:
    """A line for each row below ``output`` whose packed file is gone or cut short. Published rows have none, and are
    none the worse for it: nothing is missing where there is no store."""
    if not (output / "store").is_dir():
        return []
    return [
        f"{row.artifact} is {'cut short' if (output / row.artifact).exists() else 'gone'}: the row's own command makes "
        "it again"
        for row in rows
        if row.artifact and (output / "rows" / row.file_name).is_file() and not whole(output, row)
    ]


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows as a data frame with :data:`COLUMNS`, also when there is none. Whole numbers stay whole where some are
    missing."""
    frame = pd.DataFrame([vars(row) for row in rows], columns=COLUMNS)
    kinds = {name: set(get_args(hint)) or {hint} for name, hint in get_type_hints(Row).items() if name in COLUMNS}
    numbers = {name: "float64" for name, kind in kinds.items() if float in kind}
    numbers |= {name: "Int64" if len(kind) > 1 else "int64" for name, kind in kinds.items() if int in kind}
    return frame.astype(numbers)
