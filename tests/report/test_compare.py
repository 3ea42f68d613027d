"""Two sweeps side by side."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kdq.cli.report import main
from kdq.records.rows import Row
from kdq.report.compare import compare, summary


def test_cells_are_matched_by_their_axes(row: Callable[..., Row]) -> None:
    a = [row(bits=2, top1=90.0), row(bits=3, top1=95.0), row(bits=4), row(bits=8, size_bytes=800)]
    b = [row(bits=2, top1=91.5), row(bits=3, top1=95.0, device="gpu"), row(bits=5), row(bits=8, size_bytes=801)]
    found = compare(a, b)
    assert not found.same
    assert found.changed["bits"].tolist() == [2, 8]
    assert (found.only_a["bits"].tolist(), found.only_b["bits"].tolist()) == ([4], [5])
    assert summary(found, "A", "B") == (
        "1 cells are the same, 2 changed (top-1 by +0.75 points on average), 1 are only in A, 1 only in B."
    )


def test_a_sweep_is_itself(row: Callable[..., Row]) -> None:
    rows = [row(bits=bits, seed=seed) for bits in (2, 3) for seed in (0, 1)]
    assert compare(rows, rows[::-1]).same


def test_rows_that_share_their_axes_are_matched_by_hash(row: Callable[..., Row]) -> None:
    short, long = row(top1=80.0, config_hash="b"), row(top1=90.0, config_hash="a")
    found = compare([short, long], [short])
    assert found.changed.empty
    assert found.only_a["top1_a"].tolist() == [90.0]
    other = row(top1=91.0, config_hash="c")
    assert compare([short, long], [short, other]).changed[["top1_a", "top1_b"]].values.tolist() == [[90.0, 91.0]]


def test_the_command(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a = folder_of(tmp_path / "a", [row(bits=2, top1=90.0), row(bits=3)])
    b = folder_of(tmp_path / "b", [row(bits=2, top1=91.5)])
    (tmp_path / "empty").mkdir()
    codes = []
    for pair in ((a, b), (a, a), (a, tmp_path / "empty"), (a, tmp_path / "nowhere")):
        with pytest.raises(SystemExit) as ended:
            main(["--compare", *map(str, pair)])
        codes.append(ended.value.code)
    assert codes == [1, 0, 2, 2]
    out, err = capsys.readouterr()
    for more in ([str(a)], ["--style", "ieee"], ["--publish", str(tmp_path / "public")]):
        with pytest.raises(SystemExit, match="2"):
            main([*more, "--compare", str(a), str(b)])
        assert "it takes neither a third folder nor" in capsys.readouterr().err
    assert "+1.50" in out
    assert "0 cells are the same, 1 changed" in out
    assert "2 cells are the same, 0 changed" in out
    assert len(err.splitlines()) == 2
    assert not (a / "report").exists()


def test_searches_are_matched_by_their_budgets(row: Callable[..., Row]) -> None:
    """Whatever their hashes: both budgets have rows of 3 bits at most."""
    a = [row(search="greedy", bits=3, avg_bits=b, top1=90 + b, config_hash=h) for b, h in ((2.5, "x"), (3.0, "a"))]
    b = [row(search="greedy", bits=3, avg_bits=b, top1=90 + b, config_hash=h) for b, h in ((2.5, "b"), (3.0, "y"))]
    assert compare(a, b).same
