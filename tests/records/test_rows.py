"""Rows on disk."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kdq.records.rows import COLUMNS, Row, read_rows, write_row
from tests.rows import ROW


def _row(**changes: Any) -> Row:
    row = dataclasses.replace(ROW, **changes)
    return dataclasses.replace(row, config_hash=f"{abs(hash(row)):x}")


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    write_row(tmp_path, ROW)
    assert read_rows(tmp_path) == [ROW]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"bits": 4', '"bits": "four"'),
        lambda text: text.replace('"top1": 97.0', '"top1": null'),
        lambda text: text.replace('"row_format": 2', '"row_format": 99'),
        lambda text: text.replace('"bops": null', '"bops": 1.5'),
        lambda text: text.replace('"top1": 97.0', '"top1": NaN'),
        lambda text: text.replace('"top1": 97.0', '"top1": 970.0'),
        lambda text: text.replace('"size_bytes": 600', '"size_bytes": -1'),
        lambda text: text.replace('"avg_bits": 4.0', '"avg_bits": Infinity'),
        lambda text: text.replace('"macs": 10000', f'"macs": {10**30}'),
        lambda text: json.dumps({"data": "digits"}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_row_is_named_and_left_out(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    write_row(tmp_path, _row(bits=2))
    path = write_row(tmp_path, ROW)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    skipped: list[str] = []
    with caplog.at_level(logging.WARNING):
        assert [row.bits for row in read_rows(tmp_path, skipped=skipped)] == [2]
    assert str(path) in caplog.text
    assert len(skipped) == 1
    assert str(path) in skipped[0]


def test_columns_of_the_design_are_there() -> None:
    asked = """data method arch role seed quantizer alphabet bits avg_bits search top1_float top1 top5 drop nll ece
        params weight_bits_total size_bytes float_bytes macs train_seconds quantize_seconds device kdq_version git_sha
        config_hash wandb_run"""
    assert set(COLUMNS) >= set(asked.split())
    assert any(column.startswith("latency_ms_") for column in COLUMNS)


def test_published_rows_are_read_line_by_line(tmp_path: Path) -> None:
    rows = [_row(bits=bits) for bits in (2, 3, 4)]
    lines = [json.dumps(dataclasses.asdict(row)) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], lines[1][:50], lines[2]]) + "\n")
    skipped: list[str] = []
    assert read_rows(tmp_path, skipped=skipped) == [rows[0], rows[2]]
    assert skipped[0].startswith(f"{tmp_path / 'rows.jsonl'}:2 (")
    assert read_rows(tmp_path, {rows[2].config_hash}) == [rows[2]]
    newer = dataclasses.replace(rows[2], top1_onnx_int8=12.5)
    write_row(tmp_path, newer)
    assert read_rows(tmp_path) == [rows[0], newer]
