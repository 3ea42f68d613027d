"""Rows to cells."""

from collections.abc import Callable

import numpy as np
import pytest

from kdq.records.rows import Row
from kdq.report.cells import (
    by_seed,
    cells,
    float_model,
    missing,
    named,
    pareto,
    printable,
    size_name,
    telling,
    width_name,
)


def test_means_and_spread_are_over_seeds(row: Callable[..., Row]) -> None:
    rows = [row(seed=seed, top1=top1) for seed, top1 in ((0, 90.0), (1, 94.0))]
    (cell,) = cells(named(rows)).to_dict("records")
    assert (cell["top1"], cell["top1_std"], cell["n"], cell["rows"]) == (92, pytest.approx(8**0.5), 2, 2)


def test_a_float_model_counts_each_seed_once(row: Callable[..., Row]) -> None:
    rows = [row(seed=0, bits=bits, top1_float=90.0) for bits in (2, 3, 4)] + [row(seed=1, bits=4, top1_float=94.0)]
    found = float_model(cells(named(rows)))
    assert (found["top1_float"], found["top1_float_std"], found["n"]) == (92, pytest.approx(8**0.5), 2)


def test_rows_of_one_seed_are_one_value(row: Callable[..., Row]) -> None:
    """Settings without a column (epochs, say) must not pass for seeds."""
    rows = [row(seed=0, top1=90.0), row(seed=0, top1=92.0), row(seed=1, top1=93.0)]
    assert by_seed(named(rows))["top1"].tolist() == [91, 93]
    (cell,) = cells(named(rows)).to_dict("records")
    assert (cell["top1"], cell["n"], cell["rows"]) == (92, 2, 3)


def test_quantizers_tell_what_they_differ_in(row: Callable[..., Row]) -> None:
    rows = [row(), row(act_bits=8), row(alphabet="ternary", quantizer="rtn"), row(quantizer="rtn")]
    assert set(named(rows)["quantizer"]) == {"gpfq", "gpfq A8", "rtn ternary", "rtn uniform"}
    assert set(named([row(alphabet="paper", quantizer="published")])["quantizer"]) == {"published (b+1 bits)"}


def test_searched_rows_have_their_average_width(row: Callable[..., Row]) -> None:
    rows = [row(search="greedy", bits=3, avg_bits=average) for average in (2.74, 2.75, 2.99, 3.0)]
    assert named(rows)["width"].tolist() == [2.75, 2.75, 3.0, 3.0]
    assert width_name(2.75, True) == "≤ 2.75 bits"
    assert width_name(3.0) == "3 bits"


def test_missing_cells(row: Callable[..., Row]) -> None:
    rows = [row(method=method, bits=bits, seed=seed) for method in "ab" for bits in (2, 3) for seed in (0, 1)]
    assert missing(cells(named(rows))).empty
    gone = [r for r in rows if (r.method, r.bits) != ("b", 3) and (r.method, r.bits, r.seed) != ("a", 2, 1)]
    found = missing(cells(named(gone)))
    assert found[["method", "width", "n", "wanted"]].values.tolist() == [["a", 2.0, 1, 2], ["b", 3.0, 0, 2]]


def test_weights_from_a_file_are_wanted_once(row: Callable[..., Row]) -> None:
    rows = [row(method="teacher", epochs=0), *(row(method="a", epochs=30, seed=seed) for seed in (0, 1))]
    assert missing(cells(named(rows))).empty
    found = missing(cells(named([*rows, row(method="a", epochs=30, bits=3)])))
    assert found[["method", "width", "n", "wanted"]].values.tolist() == [["a", 3.0, 1, 2], ["teacher", 3.0, 0, 1]]


def test_searches_are_no_part_of_the_grid(row: Callable[..., Row]) -> None:
    rows = [row(method="a", search="greedy", avg_bits=2.9), row(method="b", search="greedy", avg_bits=3.9)]
    assert missing(cells(named(rows))).empty


def test_widths_that_change_nothing_are_left_out_of_curves(row: Callable[..., Row]) -> None:
    rows = [row(bits=bits, drop=drop, quantizer=q) for q in "ab" for bits, drop in ((2, 5.0), (8, 0.1), (32, 0.0))]
    rows += [row(bits=12, drop=0.5, quantizer="b"), row(bits=32, drop=0.0, quantizer="c")]
    found = telling(cells(named(rows)))
    shown = {q: part["width"].tolist() for q, part in found.groupby("quantizer")}
    assert shown == {"a": [2, 8], "b": [2, 8, 12, 32], "c": [32]}


@pytest.mark.parametrize("seed", range(10))
def test_pareto_by_comparing_all_pairs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.integers(1, 12, 30).astype(float), generator.integers(0, 8, 30).astype(float)
    beaten = [
        any((x[j] <= x[i] and y[j] > y[i]) or (x[j] < x[i] and y[j] >= y[i]) for j in range(30)) for i in range(30)
    ]
    wanted = {(x[i], y[i]) for i in range(30) if not beaten[i]}
    found = pareto(list(x), list(y), same=0)
    assert {(x[i], y[i]) for i in found} == wanted
    assert len(found) == len(wanted)
    assert sorted(x[found]) == list(x[found])


def test_a_few_bytes_make_no_smaller_model() -> None:
    assert pareto([1000, 1003, 2000], [80, 90, 95]) == [1, 2]
    assert pareto([1000, 1020, 2000], [80, 90, 95]) == [0, 1, 2]


def test_names_are_printable() -> None:
    assert printable("a\n\x00 b\x1b[31m") == "a b [31m"
    assert len(printable("x" * 500)) == 60
    assert printable("\n") == "(no name)"
    assert [size_name(size) for size in (999, 39_124, 162_999, 999_600, 1_893_640, 4e9)] == [
        "999 B",
        "39.1 kB",
        "163 kB",
        "1,000 kB",
        "1.89 MB",
        "4 GB",
    ]


def test_quantizers_tell_their_calibration_images_where_a_cell_has_several(row: Callable[..., Row]) -> None:
    rows = [row(calibration_images=64), row(calibration_images=256), row(quantizer="rtn"), row(seed=1)]
    assert named(rows)["quantizer"].tolist() == ["gpfq 64 images", "gpfq 256 images", "rtn", "gpfq 64 images"]
    elsewhere = [row(calibration_images=64), row(calibration_images=256, data="pets")]
    assert set(named(elsewhere)["quantizer"]) == {"gpfq"}


def test_trials_are_never_averaged_with_results(row: Callable[..., Row]) -> None:
    rows = [row(seed=0, top1=90.0), row(seed=1, top1=92.0), row(seed=2, top1=10.0, limited="fast_dev_run=True")]
    found = {cell["quantizer"]: cell["top1"] for cell in cells(named(rows)).to_dict("records")}
    assert found == {"gpfq": 91, "gpfq TRIAL fast_dev_run=True": 10}
