"""The answer's numbers for a grid small enough to work out by hand.

The teacher has 400 and 1600 bytes at 2 and 4 bits, the student 100 and 400. By seed (0, 1):

    teacher  2 bits 80, 82   4 bits 94, 96   float 97, 97
    vkd      2 bits 70, 72   4 bits 88, 90   float 91, 91
    baseline 2 bits 60, 62   4 bits 86, 86   float 87, 87
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import pytest
import scipy.stats

from kdq.records.rows import Row
from kdq.report import answer
from kdq.report.cells import by_seed, named

ACCURACY = {
    "teacher": {2: (80, 82), 4: (94, 96), "float": (97, 97)},
    "vkd": {2: (70, 72), 4: (88, 90), "float": (91, 91)},
    "baseline": {2: (60, 62), 4: (86, 86), "float": (87, 87)},
}


def grid(row: Callable[..., Row], **changes: object) -> list[Row]:
    rows = []
    for method, by_width in ACCURACY.items():
        for bits in (2, 4):
            for seed in (0, 1):
                size = {2: 100, 4: 400}[bits] * (4 if method == "teacher" else 1)
                values = {
                    "method": method,
                    "arch": "big" if method == "teacher" else "small",
                    "bits": bits,
                    "seed": seed,
                    "top1": float(by_width[bits][seed]),
                    "top1_float": float(by_width["float"][seed]),
                    "size_bytes": size,
                    "float_bytes": 12_800 if method == "teacher" else 3200,
                }
                rows.append(row(**values | changes))
    return rows


@pytest.fixture
def frame(row: Callable[..., Row]) -> pd.DataFrame:
    return by_seed(named(grid(row)))


def test_at_equal_bits(frame: pd.DataFrame) -> None:
    found = answer.at_equal_bits(frame)
    vkd = found[found["method"] == "vkd"].set_index("width")
    assert vkd["difference"].to_dict() == {2: -10, 4: -6, math.inf: -6}
    assert set(vkd["teacher"]) == {"big"}
    wanted = scipy.stats.ttest_ind([88, 90], [94, 96], equal_var=False)
    assert vkd.loc[4, "p"] == pytest.approx(wanted.pvalue)
    assert math.isnan(vkd.loc[math.inf, "p"])  # no spread
    assert (vkd[["n_a", "n_b"]] == 2).all().all()


def test_at_equal_bytes(frame: pd.DataFrame) -> None:
    found = answer.at_equal_bytes(answer.curve_pairs(frame))
    vkd = found[found["method"] == "vkd"].set_index("bytes")
    # Measured sizes where both have an accuracy: 400 (the teacher's 2 bits, the student's 4), 1600 and 3200.
    assert list(vkd.index) == [400, 1600, 3200]
    assert vkd.loc[400, "difference"] == pytest.approx(89 - 81)
    # 1600 is two thirds of the way from 400 to 3200 on a logarithmic axis; 3200 a third from 1600 to 12800.
    assert vkd.loc[1600, "difference"] == pytest.approx((89 + 2 * (91 - 89) / 3) - 95)
    assert vkd.loc[3200, "difference"] == pytest.approx(91 - (95 + (97 - 95) / 3))


def test_crossover(frame: pd.DataFrame) -> None:
    found = answer.crossovers(answer.curve_pairs(frame))
    vkd = found[found["method"] == "vkd"].iloc[0]
    at_400, at_1600 = 8.0, 89 + 4 / 3 - 95
    wanted = 400 * 4 ** (at_400 / (at_400 - at_1600))
    assert vkd["bytes"] == pytest.approx(wanted)
    assert vkd["below"] == "student"
    # Both seeds: 70 -> 88 -> 91 against 80 -> 94 -> 97, and the same two points higher up to 4 bits.
    single = [400 * 4 ** (8 / (8 - ((top1 + 2 * (91 - top1) / 3) - (top1 + 6)))) for top1 in (88, 90)]
    assert (vkd["low"], vkd["high"]) == pytest.approx((min(single), max(single)))
    assert vkd["n"] == 2


def test_extents(frame: pd.DataFrame) -> None:
    vkd = answer.extents(answer.curve_pairs(frame)).set_index("method").loc["vkd"]
    assert vkd[["student_from", "student_to", "student_top1_from"]].tolist() == [100, 3200, 71]
    assert vkd[["teacher_from", "teacher_to", "teacher_top1_from"]].tolist() == [400, 12_800, 81]


def test_degradation(frame: pd.DataFrame) -> None:
    found = answer.degradation(frame)
    narrow = found[found["width"] == 2]
    assert narrow["method"].tolist() == ["teacher", "vkd", "baseline"]
    assert narrow["drop"].tolist() == [16, 20, 26]
    assert narrow["difference"].iloc[1:].tolist() == [4, 10]
    assert math.isnan(narrow["p"].iloc[0])
    assert narrow["p"].iloc[1] == pytest.approx(scipy.stats.ttest_ind([21, 19], [17, 15], equal_var=False).pvalue)


def test_control(frame: pd.DataFrame) -> None:
    found = answer.control(frame).set_index("width")
    assert set(found["method"]) == {"vkd"}
    assert found["difference"].to_dict() == {2: 10, 4: 3, math.inf: 4}


def test_other_data_and_quantizers_are_never_mixed(row: Callable[..., Row]) -> None:
    rows = [r for r in grid(row) if r.method == "teacher"]
    rows += [r for r in grid(row, quantizer="rtn") if r.method == "vkd"]
    rows += [r for r in grid(row, data="pets") if r.method == "baseline"]
    frame = by_seed(named(rows))
    for found in (answer.at_equal_bits(frame), answer.control(frame)):
        assert found.empty
    assert answer.curve_pairs(frame) == []


def test_sizes_that_do_not_overlap_give_no_line(row: Callable[..., Row]) -> None:
    rows = [r for r in grid(row, float_bytes=0) if r.bits == 2]
    pairs = answer.curve_pairs(by_seed(named(rows)))
    assert len(pairs) == 2
    assert answer.at_equal_bytes(pairs).empty
    assert answer.crossovers(pairs).empty


def test_nothing_from_nothing() -> None:
    frame = by_seed(named([]))
    assert answer.at_equal_bits(frame).empty
    assert answer.degradation(frame).empty
    assert answer.control(frame).empty
    assert answer.curve_pairs(frame) == []
