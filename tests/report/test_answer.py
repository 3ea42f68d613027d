"""The answer's numbers for a grid small enough to work out by hand.

The teacher has 400 and 1600 bytes at 2 and 4 bits, the student 100 and 400. By seed (0, 1):

    teacher  2 bits 80, 82   4 bits 94, 96   float 97, 97
    vkd      2 bits 70, 72   4 bits 88, 90   float 91, 91
    baseline 2 bits 60, 62   4 bits 86, 86   float 87, 87
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
import scipy.stats

from kdq.records.rows import Row
from kdq.report import answer
from kdq.report.answer import Place
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


def compared(frame: pd.DataFrame, kind: str, method: str = "vkd", other: str | None = None) -> dict[float, Place]:
    """The places of the one such comparison."""
    (found,) = [
        one
        for one in answer.comparisons(frame)
        if (one.kind, one.a.method) == (kind, method) and other in (None, one.b.method)
    ]
    return {place.at: place for place in found.places}


def test_at_equal_bits(frame: pd.DataFrame) -> None:
    places = compared(frame, "bits")
    assert {width: place.difference.value for width, place in places.items()} == {2: -10, 4: -6, math.inf: -6}
    assert (places[2].a, places[2].b) == (71, 81)
    wanted = scipy.stats.ttest_ind([88, 90], [94, 96], equal_var=False)
    assert places[4].difference.p == pytest.approx(wanted.pvalue)
    assert not places[math.inf].difference.tested  # no spread
    assert {(place.difference.n_a, place.difference.n_b) for place in places.values()} == {(2, 2)}


def test_at_equal_bytes(frame: pd.DataFrame) -> None:
    places = compared(frame, "bytes")
    # Measured sizes where both have an accuracy: 400 (the teacher's 2 bits, the student's 4), 1600 and 3200.
    assert list(places) == [400, 1600, 3200]
    assert places[400].difference.value == pytest.approx(89 - 81)
    # 1600 is two thirds of the way from 400 to 3200 on a logarithmic axis; 3200 a third from 1600 to 12800.
    assert places[1600].difference.value == pytest.approx((89 + 2 * (91 - 89) / 3) - 95)
    assert places[3200].difference.value == pytest.approx(91 - (95 + (97 - 95) / 3))


def test_against_the_plain_student(frame: pd.DataFrame) -> None:
    assert {at: place.difference.value for at, place in compared(frame, "control").items()} == {
        2: 10,
        4: 3,
        math.inf: 4,
    }
    lost = compared(frame, "drop")  # 20 and 2 by vkd, 26 and 1 by the plain student
    assert {at: place.difference.value for at, place in lost.items()} == {2: -6, 4: 1}
    wanted = scipy.stats.ttest_ind([21, 19], [27, 25], equal_var=False)
    assert lost[2].difference.p == pytest.approx(wanted.pvalue)


def test_tuned_models_are_a_road_of_their_own(frame: pd.DataFrame) -> None:
    tuned = frame[frame["method"] == "vkd"].assign(method="vkd + qad", tune="qad")
    tuned["top1"] += 1
    both = pd.concat([frame, tuned])
    assert {place.difference.value for place in compared(both, "tune", "vkd + qad").values()} == {1}
    assert compared(both, "bits", "vkd + qad", "teacher")[2].difference.value == -9
    (contest,) = answer.contests(both)
    assert {road: model.method for road, model in contest.roads.items()} == {
        "teacher": "teacher",
        "student": "vkd",
        "tuned": "vkd + qad",
    }
    sizes = {size: [model.method for model, _ in there] for size, there in contest.leads}
    assert sizes[100] == ["vkd + qad", "vkd"]
    assert sizes[400] == ["vkd + qad", "vkd", "teacher"]
    assert sizes[12_800] == ["teacher"]


@pytest.mark.parametrize("seeds", [(0,), (1, 2), (0, 1, 2)])
def test_a_tuned_network_is_compared_with_its_own_seeds(row: Callable[..., Row], seeds: tuple[int, ...]) -> None:
    """Each seed gains, which the mean over other seeds would hide; sizes and widths agree, for both have one file."""
    plain, gain = (80.0, 90.0, 95.0), (1.0, 1.5, 1.2)
    common = {"bits": 2, "size_bytes": 1000, "float_bytes": 0}
    rows = [row(seed=seed, top1=top1, **common) for seed, top1 in enumerate(plain)]
    rows += [row(seed=seed, top1=plain[seed] + gain[seed], tune="qad", **common) for seed in seeds]
    frame = by_seed(named(rows))
    place = compared(frame, "tune", "vkd + qad")[2]
    mine, other = [plain[seed] + gain[seed] for seed in seeds], [plain[seed] for seed in seeds]
    assert (place.a, place.b) == pytest.approx((sum(mine) / len(seeds), sum(other) / len(seeds)))
    assert (place.difference.n_a, place.difference.n_b, place.difference.paired) == (len(seeds), len(seeds), True)
    if len(seeds) > 1:
        assert place.difference.p == pytest.approx(scipy.stats.ttest_rel(mine, other).pvalue)
    (contest,) = answer.contests(frame)
    (lead,) = [there for _, there in contest.leads]
    assert [model.method for model, _ in lead] == ["vkd + qad", "vkd"]
    assert answer.between(*lead) == place.difference


def test_without_a_seed_in_common_nothing_is_paired(row: Callable[..., Row]) -> None:
    rows = [row(seed=seed, tune="qad" if seed > 1 else "", top1=80.0 + seed, float_bytes=0) for seed in range(4)]
    (place,) = compared(by_seed(named(rows)), "tune", "vkd + qad").values()
    assert (place.difference.n_a, place.difference.n_b, place.difference.paired) == (2, 2, False)


def test_validation_images_choose_who_is_compared(row: Callable[..., Row]) -> None:
    accuracies = {"dkd": (90.0, 1.0), "vkd": (80.0, 99.0)}
    rows = [row(method=name, val_top1_float=val, top1=top1) for name, (val, top1) in accuracies.items()]
    rows.append(row(method="baseline", val_top1_float=99.0))  # the control is compared where nothing is distilled
    (contest,) = answer.contests(by_seed(named(rows)))
    assert contest.roads["student"].method == "dkd"
    (contest,) = answer.contests(by_seed(named(rows[2:])))
    assert contest.roads["student"].method == "baseline"


def test_each_seed_counts_once_in_the_choice(row: Callable[..., Row]) -> None:
    """Of vkd's seeds the better one has more widths."""
    validated = {("vkd", 0): 90.0, ("vkd", 1): 80.0, ("dkd", 0): 86.0, ("dkd", 1): 86.0}
    rows = [row(method=method, seed=seed, bits=2, val_top1_float=top1) for (method, seed), top1 in validated.items()]
    rows += [row(method="vkd", bits=bits, val_top1_float=90.0) for bits in (3, 4)]
    (contest,) = answer.contests(by_seed(named(rows)))
    assert contest.roads["student"].method == "dkd"


def test_other_data_and_quantizers_are_never_mixed(row: Callable[..., Row]) -> None:
    rows = [r for r in grid(row) if r.method == "teacher"]
    rows += [r for r in grid(row, quantizer="rtn") if r.method == "vkd"]
    rows += [r for r in grid(row, data="pets") if r.method == "baseline"]
    assert answer.comparisons(by_seed(named(rows))) == []


def test_sizes_that_do_not_overlap_give_no_place(row: Callable[..., Row]) -> None:
    rows = [r for r in grid(row, float_bytes=0) if r.bits == 2]
    assert compared(by_seed(named(rows)), "bytes") == {}


def test_the_table_has_a_line_for_each_place(frame: pd.DataFrame) -> None:
    found = answer.comparisons(frame)
    table = answer.table(found)
    assert len(table) == sum(len(one.places) for one in found)
    line = table[(table["kind"] == "bits") & (table["method_a"] == "vkd") & (table["at"] == 2)].iloc[0]
    assert line[["a", "b", "difference", "n_a"]].tolist() == [71, 81, -10, 2]


def test_nothing_from_nothing() -> None:
    frame = by_seed(named([]))
    assert answer.comparisons(frame) == []
    assert answer.contests(frame) == []
    assert answer.table([]).empty


def test_widths_that_others_lack_do_not_choose(row: Callable[..., Row]) -> None:
    """At 8 bits DKD is better, in float and tuned; its other widths, or a row of an older kdq, do not hide it."""
    validated = {("dkd", 2): 80.0, ("dkd", 8): 92.0, ("vkd", 8): 91.0}
    rows = [
        row(method=method, bits=bits, val_top1=val, val_top1_float=93.0 if method == "dkd" else 92.0, tune=tune)
        for (method, bits), val in validated.items()
        for tune in ("", "qad")
    ]
    older = [replace(r, val_top1=r.val_top1_float, val_top1_float=None, row_format=3) for r in rows if not r.tune]
    for some in (rows, [*older, *(r for r in rows if r.tune)]):
        (contest,) = answer.contests(by_seed(named(some)))
        assert {road: model.untuned for road, model in contest.roads.items()} == {"student": "dkd", "tuned": "dkd"}


def test_files_a_few_bytes_apart_have_one_size(row: Callable[..., Row]) -> None:
    rows = [row(seed=seed, bits=bits, size_bytes=1000 * bits + 3 * seed) for seed in (0, 1, 2) for bits in (2, 4)]
    rows += [row(bits=bits, size_bytes=1000 * bits + 9, tune="qad") for bits in (2, 4)]
    (contest,) = answer.contests(by_seed(named([replace(r, float_bytes=0) for r in rows])))
    assert [len(there) for _, there in contest.leads] == [2, 2]
