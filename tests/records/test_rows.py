"""Rows on disk."""

import csv
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdq import KdqError
from kdq.records.rows import COLUMNS, Row, find_row, read_rows, table, without_artifacts, write_row
from kdq.report import print_results, write_report
from kdq.report.write import write_csv
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
        lambda text: text.replace('"row_format": 4', '"row_format": 99'),
        lambda text: text.replace('"bops": null', '"bops": 1.5'),
        lambda text: text.replace('"top1": 97.0', '"top1": NaN'),
        lambda text: text.replace('"top1": 97.0', '"top1": 970.0'),
        lambda text: text.replace('"size_bytes": 600', '"size_bytes": -1'),
        lambda text: text.replace('"avg_bits": 4.0', '"avg_bits": Infinity'),
        lambda text: text.replace('"macs": 10000', f'"macs": {10**30}'),
        lambda text: json.dumps({"data": "digits"}),
        lambda text: "\x00\xff",
        *(
            lambda text, field=field: text.replace(f'"{field}": "{getattr(ROW, field)}"', f'"{field}": "\\ud800"')
            for field in ("method", "device", "artifact", "config_hash", "search", "limited")
        ),
        lambda text: text.replace('"seed": 0', '"seed": true'),
        lambda text: text.replace('"method": "vkd"', '"method": "../vkd"'),
        lambda text: text.replace('"artifact": ""', '"artifact": "/etc/passwd"'),
    ],
)
def test_a_damaged_row_is_named_and_left_out(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    write_row(tmp_path, _row(bits=2))
    path = write_row(tmp_path, ROW)
    (tmp_path / f".{path.stem}-half.json").write_text("{")  # another process writes it now
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


REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"


def test_published_rows_of_every_format_are_read(tmp_path: Path) -> None:
    files = sorted(REFERENCE.rglob("rows.jsonl"))
    formats = set()
    for file in files:
        skipped: list[str] = []
        rows, said = read_rows(file.parent, skipped=skipped), [json.loads(line) for line in file.open()]
        assert skipped == []
        by_hash = {row.config_hash: dataclasses.asdict(row) for row in rows}
        for values in said:
            assert by_hash[values["config_hash"]].items() >= values.items()
            formats.add(values["row_format"])
    assert formats == {2, 3, 4}
    older = {name: value for name, value in dataclasses.asdict(ROW).items() if name in COLUMNS[: COLUMNS.index("bops")]}
    (tmp_path / "row-aa.json").write_text(json.dumps(older | {"row_format": 1, "of_a_later_kdq": 3}))
    assert read_rows(tmp_path) == [dataclasses.replace(ROW, row_format=1, val_top1_float=None)]


def test_the_types_of_a_table_are_those_of_the_schema() -> None:
    for rows in ([], [ROW], [ROW, _row(bops=5, top1=97)]):
        types = table(rows).dtypes
        assert [str(types[name]) for name in ("bits", "top1", "bops", "top1_onnx_int8")] == [
            "int64", "float64", "Int64", "float64",
        ]  # fmt: skip
        assert not {name for name in ("data", "artifact", "limited") if "int" in str(types[name]).lower()}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "'"])
def test_a_spreadsheet_runs_no_cell_of_a_table(tmp_path: Path, start: str) -> None:
    asked = f'{start}HYPERLINK("x","y")'
    rows = [ROW, _row(device=asked, search=asked, drop=-1.0)]
    write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as stream:
        plain, changed = csv.DictReader(stream)
    assert changed["device"] == changed["search"] == f"'{asked}"
    assert changed["device"].removeprefix("'") == asked
    assert changed["drop"] == "-1.0"
    assert plain["device"] == ROW.device


def test_a_packed_file_that_is_gone_or_cut_short_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [_row(bits=bits, artifact=f"store/quantized/{bits}.kdq", size_bytes=4) for bits in (2, 3, 4)]
    assert without_artifacts(tmp_path, rows) == []  # published: there is no store
    for row, content in zip(rows, (b"1234", b"123", None), strict=True):
        write_row(tmp_path / "rows", row)
        path = tmp_path / row.artifact
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
    short, gone = without_artifacts(tmp_path, read_rows(tmp_path / "rows"))
    assert short.startswith("store/quantized/3.kdq is cut short")
    assert gone.startswith("store/quantized/4.kdq is gone")
    written = write_report(tmp_path)
    assert written.lacking == [short, gone]
    assert gone in (tmp_path / "report" / "report.md").read_text()
    print_results(Console(), tmp_path, rows, written)
    assert f"not complete: {short} (2 rows" in capsys.readouterr().out


def test_a_row_is_found_by_the_start_of_its_hash_and_asked_for_where_several_begin_so(tmp_path: Path) -> None:
    rows = [dataclasses.replace(ROW, config_hash=name, seed=seed) for seed, name in enumerate(("abc1", "abd2", "f003"))]
    with pytest.raises(KdqError, match=f"no rows below {tmp_path}"):
        find_row("abc1", tmp_path)
    for row in rows:
        write_row(tmp_path / "rows", row)
    assert [find_row(name, tmp_path) for name in ("abc", "abd2", "f")] == rows
    for name, found, missing in (("ab", ("abc1", "abd2"), "f003"), ("abc9", ("abc1",), None), ("", ("f003",), None)):
        with pytest.raises(KdqError) as says:
            find_row(name, tmp_path)
        assert all(each in str(says.value) for each in found)
        assert missing is None or missing not in str(says.value)
        assert ("2 cells" in str(says.value)) == (name == "ab")
