"""Rows to report about."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kdq.records.rows import Row, write_row
from tests.rows import ROW

#: Names that rows may hold, and that must come out as the text they are.
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "$policy ${script}",
    "[bold]x[/] | y\n# z",
    "$\\frac{$ _x",
    "a\u2028b\x00c\x1b[2J",
    "x" * 50,
]


def make_row(**changes: Any) -> Row:
    """A row whose ``drop``, ``avg_bits`` and hash follow from the rest unless they are given."""
    if "method" in changes:
        changes.setdefault("role", "teacher" if changes["method"] == "teacher" else "student")
    row = dataclasses.replace(ROW, **changes)
    row = dataclasses.replace(
        row, drop=changes.get("drop", row.top1_float - row.top1), avg_bits=changes.get("avg_bits", float(row.bits))
    )
    digest = hashlib.sha256(repr(row).encode()).hexdigest()[:16]
    return dataclasses.replace(row, config_hash=changes.get("config_hash", digest))


def many_rows(count: int) -> list[Row]:
    """``count`` different rows: data sets, quantizers, methods, widths, seeds, in the proportions of a big grid."""
    methods = ["teacher", "baseline", "vkd", "mixup", "dml", "dkd"]
    rows = []
    for number, (seed, data, quantizer, bits, method) in enumerate(
        product(
            range(10_000),
            ["cifar10", "cifar100", "digits", "pets"],
            ["rtn", "gpfq", "gptq", "qronos", "best"],
            [2, 3, 4, 6, 8],
            methods,
        )
    ):
        if number == count:
            break
        teacher = method == "teacher"
        top1 = 95.0 - 40 / 2**bits - methods.index(method) - (number * 7919 % 97) / 97
        rows.append(
            make_row(
                data=data,
                method=method,
                arch="resnet50" if teacher else "resnet18",
                seed=seed,
                quantizer=quantizer,
                bits=bits,
                top1=top1,
                top1_float=96.0 - methods.index(method),
                size_bytes=(6 if teacher else 3) * 100_000 * bits + seed,
                float_bytes=94_000_000 if teacher else 44_000_000,
                latency_ms_torch=3.0 if teacher else 1.0,
            )
        )
    return rows


def write_rows(output: Path, rows: list[Row]) -> Path:
    for row in rows:
        write_row(output / "rows", row)
    return output


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def rows_of() -> Callable[[int], list[Row]]:
    return many_rows


@pytest.fixture
def folder_of() -> Callable[[Path, list[Row]], Path]:
    return write_rows


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """An output folder whose rows hold :data:`HOSTILE` wherever they hold text; where a file is named after it, without
    what no file's name may have."""
    output = tmp_path / "hostile"
    (output / "rows").mkdir(parents=True)
    names = [text.replace("/", "\\").replace("\0", "") for text in HOSTILE]
    for number, text in enumerate(HOSTILE):
        few = {"data": names[number % 2], "quantizer": names[number % 3 + 2]}
        named = dict.fromkeys(("method", "arch", "config_hash"), names[number])
        row = make_row(role="student", **few, **named, search=text, device=text)
        (output / "rows" / f"{number}.json").write_text(json.dumps(vars(row)))
    return output
