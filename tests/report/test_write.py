"""The report as a whole: which files, from no rows to many, and what a failing part leaves."""

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import kdq.report.html
from kdq.cli.report import main
from kdq.records.failures import Failure, forget, record
from kdq.records.rows import COLUMNS, Row, read_rows, table
from kdq.report import accuracy_table, write_report
from kdq.report.cells import cells, missing, named, settings
from kdq.report.figures import draw_settings
from kdq.report.material import Material
from kdq.report.tables import fitting_tables, markdown_accuracies

FIGURES = ("accuracy_vs_bits", "accuracy_vs_total_bits", "accuracy_vs_bytes", "accuracy_vs_latency", "drop_vs_bits")
FILES = {"results.csv", "results.parquet", "report.md", "report.html"} | {
    f"{stem}.{kind}" for stem in FIGURES for kind in ("png", "svg", "pdf")
}


def _grid(row: Callable[..., Row]) -> list[Row]:
    rows = [row(seed=seed, bits=bits, top1=96.0 + 2 * seed - 4 / bits) for seed in (0, 1) for bits in (2, 4)]
    return [*rows, row(method="teacher", bits=2, data="cifar10_jpeg", top1=50.0)]


def test_report_from_rows_is_idempotent(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, _grid(row))
    with caplog.at_level(logging.INFO):  # as in a job
        written = write_report(tmp_path)
    assert {record.name.partition(".")[0] for record in caplog.records} <= {"kdq"}
    assert written.failures == []
    first = {path.name: path.read_bytes() for path in written.files}
    assert set(first) == FILES
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in written.files} == first
    assert not list(tmp_path.rglob(".*"))


def test_the_tables_hold_every_row(tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]) -> None:
    folder_of(tmp_path, _grid(row))
    write_report(tmp_path)
    wanted = table(read_rows(tmp_path / "rows"))
    assert len(wanted) == 5
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "results.parquet"), wanted)
    measured = wanted.dropna(axis=1)
    csv = pd.read_csv(tmp_path / "results.csv", keep_default_na=False, dtype=measured.dtypes.to_dict())
    assert list(csv.columns) == COLUMNS
    pd.testing.assert_frame_equal(csv[list(measured)], measured)


def test_settings_without_a_column_are_not_averaged_in_silence(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(
        tmp_path, [row(seed=0, bits=2, top1=top1, config_hash=digest * 16) for top1, digest in ((9, "a"), (8, "b"))]
    )
    write_report(tmp_path)
    assert "1 of 1 cells hold several rows of one seed" in caplog.text
    caplog.clear()
    folder_of(tmp_path / "one", _grid(row))
    write_report(tmp_path / "one")
    assert "several rows" not in caplog.text
    assert (tmp_path / "report" / "settings.png").is_file()
    assert not (tmp_path / "one" / "report" / "settings.png").exists()


def test_of_a_search_each_row_is_drawn_and_its_front_ringed(row: Callable[..., Row]) -> None:
    tried = [(2, 90.0, 600), (2, 91.0, 600), (3, 90.5, 700), (3, 94.0, 700), (4, 93.0, 800), (8, 95.0, 1500)]
    rows = [
        row(bits=bits, val_top1=val, size_bytes=size, config_hash=f"{i}" * 16)
        for i, (bits, val, size) in enumerate(tried)
    ]
    other = row(method="dkd", config_hash="f" * 16)
    part = settings(named([*rows, other]))
    assert set(part["config_hash"]) == {row.config_hash for row in rows}  # of dkd nothing was searched
    panel = Figure().subplots()
    draw_settings(panel, part, {("vkd", "resnet20"): {"marker": "o"}})
    points, front = panel.lines
    assert sorted(zip(*points.get_data(), strict=True)) == sorted((size, val) for _, val, size in tried)
    best = [
        (size, val)
        for _, val, size in tried
        if not any(s <= size and v >= val and (s, v) != (size, val) for _, v, s in tried)
    ]
    assert sorted(zip(*front.get_data(), strict=True)) == sorted(best)


def test_figures_have_the_width_and_the_letters_of_a_style(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path, [row(bits=bits) for bits in (2, 4)])
    for style, inches in (("ieee", 3.5), ("grayscale", 6.4)):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path), "--style", style])
        assert ended.value.code == 0
        drawn = (tmp_path / "report" / "accuracy_vs_bits.pdf").read_bytes()
        (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", drawn)
        assert float(box) == pytest.approx(72 * inches, abs=0.1)
        assert b"/Subtype /Image" not in drawn
        assert b"/Subtype /Type3" not in drawn
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--style", "iee"])
    assert ended.value.code == 2
    assert "no style iee (did you mean ieee?)" in capsys.readouterr().err


def test_report_in_markdown(tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]) -> None:
    folder_of(tmp_path, _grid(row))
    write_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| vkd | resnet20 | gpfq | 2 | 98.00 ± 0.00 (4,100) | 95.00 ± 1.41 (600) | 96.00 ± 1.41 (600) |" in text
    assert text.count("**digits: which road wins cannot be said, for no row quantized with gpfq is of “quantize") == 1
    assert "<summary>How to read this</summary>" in text
    assert "cifar10\\_jpeg is not the study's cifar10" in text
    assert "| cifar10\\_jpeg | teacher | resnet20 | gpfq | 2 bits | 50.00 | 90.90 | 5 |" in text
    for name in FIGURES:
        assert f"({name}.png)" in text


def test_missing_and_doubled_cells_are_marked(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]
) -> None:
    rows = [row(bits=2), row(bits=3), row(method="dkd", bits=3, top1=90.0), row(method="dkd", bits=3, top1=92.0)]
    folder_of(tmp_path, rows)
    write_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| dkd | resnet20 | gpfq | 1 | 98.00 (4,100) | missing | 91.00 (600) |" in text
    assert "MISSING: digits, dkd (resnet20), gpfq has 0 of 1 seeds at 2 bits." in text
    assert "1 of 3 cells hold several rows of one seed" in text


def test_the_terminal_marks_missing_cells(row: Callable[..., Row]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(accuracy_table([row(bits=2), row(method="[red]dkd", bits=3)]))
    console.print(accuracy_table([row(bits=4, act_bits=8), row(bits=4)]))
    assert "gpfq A8" in console.export_text(clear=False)
    lines = [line for line in console.export_text().splitlines() if "dkd" in line]
    assert len(lines) == 1
    assert [cell.strip() for cell in lines[0].split("│")[1:-1]] == ["[red]dkd", "98.00", "missing", "97.00"]


def test_what_no_grid_has_is_not_marked(row: Callable[..., Row]) -> None:
    """Another data set's widths, and those at which a network was not tuned: no warning misses them either."""
    rows = [row(data="a", bits=2), *(row(data="b", bits=bits, method="dkd") for bits in (3, 4))]
    rows += [row(data="b", bits=3, method="dkd", tune="qad"), row(data="b", bits=3)]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(accuracy_table(rows))
    found = cells(named(rows))
    lines = [line for line in console.export_text().splitlines() if "missing" in line]
    marked = [line for line in markdown_accuracies(found) if "missing" in line]
    assert len(lines) == len(marked) == len(missing(found)) == 1
    assert "vkd" in lines[0]
    assert "vkd" in marked[0]


def test_a_table_too_wide_for_the_terminal_becomes_several(row: Callable[..., Row]) -> None:
    rows = [row(bits=bits, seed=seed) for bits in (2, 3, 4, 6, 8, 32) for seed in (0, 1)]
    for width, count in ((200, 1), (72, 2), (60, 3), (20, 6)):
        tables = fitting_tables(rows, Console(width=width))
        shown = [column.header for table in tables for column in table.columns]
        assert len(tables) == count
        assert [name for name in shown if str(name).endswith(" bits")] == [f"{b} bits" for b in (2, 3, 4, 6, 8, 32)]


def test_no_rows_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 0
    assert "report.html" in capsys.readouterr().out
    assert "No rows yet" in (tmp_path / "report" / "report.md").read_text()
    assert list(pd.read_csv(tmp_path / "results.csv").columns) == COLUMNS
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_row_is_named_everywhere(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, [row()])
    (tmp_path / "rows" / "bad.json").write_text('{"data": ')
    with caplog.at_level(logging.WARNING):
        assert write_report(tmp_path).failures == []
    assert "bad.json" in caplog.text
    for name in ("report.md", "report.html"):
        assert "bad.json" in (tmp_path / "report" / name).read_text()


def test_models_near_chance_are_said_first(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(classes=10, bits=2, top1=11.0), row(classes=10, bits=3, top1=30.0), row(classes=2, bits=4, top1=54.0)]
    folder_of(tmp_path, [*rows, row(bits=8, top1=1.0)])  # of an older row, the classes are not known
    said = Material(tmp_path).warnings
    assert [line.split(" has ")[0] for line in said if "CHANCE" in line] == [
        f"NEAR CHANCE: digits, vkd (resnet20), gpfq, {bits} bits" for bits in (2, 4)
    ]
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.index("NEAR CHANCE") < shown.index("digits: which road")


def test_failed_cells_are_named(tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]) -> None:
    folder_of(tmp_path, [row()])
    for number in range(12):
        record(tmp_path, Failure(f"cell-{number:02}", f"key{number}", "out of <memory>", "", []))
    text = "\n".join(Material(tmp_path).warnings)
    assert "Failed: cell-00: out of <memory>" in text
    assert "Failed: cell-09" in text
    assert "2 more failed" in text
    forget(tmp_path, {f"key{number}" for number in range(12)})
    assert Material(tmp_path).warnings == []


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path,
    row: Callable[..., Row],
    folder_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_of(tmp_path, [row()])
    (tmp_path / "results.csv").mkdir()  # cannot be replaced by a file
    monkeypatch.setattr(kdq.report.html, "_plotly", lambda: 1 / 0)
    written = write_report(tmp_path)
    assert {path.name for path in written.files} == FILES - {"results.csv", "report.html"}
    assert ["results.csv" in written.failures[0], "ZeroDivisionError" in written.failures[1]] == [True, True]
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 1
    assert "report.md" in capsys.readouterr().out


def test_a_published_study_reads_like_its_source(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]
) -> None:
    source, public = tmp_path / "source", tmp_path / "public"
    rows = [dataclasses.replace(one, wandb_run="/home/me/outputs/runs/wandb/offline-run-1-x") for one in _grid(row)]
    folder_of(source, rows)
    with pytest.raises(SystemExit) as done:
        main([str(source), "--publish", str(public)])
    assert {one.wandb_run for one in read_rows(public / "rows")} == {"offline-run-1-x"}
    assert "/home/me" not in (public / "results.csv").read_text()
    assert done.value.code == 0
    assert {path.name for path in public.rglob("*.*")} == FILES - {"results.parquet", "report.html"} | {"rows.jsonl"}
    with pytest.raises(SystemExit) as done:
        main(["--compare", str(source), str(public)])
    assert done.value.code == 0
    for wrong in ([str(source), "--publish", str(source)], ["--compare", "a", "b", "--publish", str(public)]):
        with pytest.raises(SystemExit) as done:
            main([word if word not in ("a", "b") else str(source) for word in wrong])
        assert done.value.code == 2
    before = (public / "report" / "report.md").read_bytes()
    write_report(public)
    assert (public / "report" / "report.md").read_bytes() == before
