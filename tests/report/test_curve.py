"""Curves against numbers worked out by hand."""

import numpy as np
import pandas as pd

from kdq.report.curve import Curve, curve, shared_sizes


def _model(points: list[tuple[int, float, float, float]], float_bytes: float = 0.0, tune: str = "") -> pd.DataFrame:
    """Lines ``(seed, width, size, top1)``."""
    frame = pd.DataFrame(points, columns=["seed", "width", "size_bytes", "top1"])
    return frame.assign(float_bytes=float_bytes, top1_float=99.0, tune=tune)


def test_between_sizes_it_is_linear_in_their_logarithm() -> None:
    found = curve(_model([(0, 2, 100, 80.0), (0, 4, 400, 90.0)]))
    assert found is not None
    # 200 is half way from 100 to 400 on a logarithmic axis.
    np.testing.assert_allclose([found.at(size)[0] for size in (100, 200, 400)], [80, 85, 90])


def test_nothing_is_extrapolated() -> None:
    found = curve(_model([(0, 2, 100, 80.0), (0, 4, 400, 90.0)]))
    assert found is not None
    assert all(np.isnan(found.at(size)[0]) for size in (99, 401))


def test_the_float_model_is_its_largest_file() -> None:
    found = curve(_model([(0, 2, 100, 80.0)], float_bytes=1600))
    assert found is not None
    np.testing.assert_allclose([found.at(size)[0] for size in (100, 400, 1600)], [80, 89.5, 99])


def test_a_larger_file_may_be_worse() -> None:
    found = curve(_model([(0, 2, 100, 80.0), (0, 3, 200, 70.0), (0, 4, 400, 90.0)]))
    assert found is not None
    assert found.at(200)[0] == 70


def test_of_widths_of_one_size_the_widest_counts() -> None:
    found = curve(_model([(0, 2, 100, 80.0), (0, 3, 200, 70.0), (0, 4, 200, 90.0)]))
    assert found is not None
    np.testing.assert_allclose([found.at(size)[0] for size in (100, 200)], [80, 90])


def test_the_float_model_of_a_tuned_network_is_no_file_of_its() -> None:
    found = curve(_model([(0, 2, 100, 80.0)], float_bytes=1600, tune="qad"))
    assert found is not None
    assert found.sizes.tolist() == [100]


def test_seeds_that_share_widths_count_with_what_they_share() -> None:
    points = [(0, 2, 100, 80.0), (0, 4, 400, 90.0), (1, 2, 104, 82.0), (1, 4, 400, 91.0), (2, 2, 100, 10.0)]
    found = curve(_model([*points, (0, 3, 200, 99.0)]))  # the third seed has one width, the first one more than others
    assert found is not None
    assert found.seeds == (0, 1)
    np.testing.assert_allclose(found.sizes, [102, 400])
    np.testing.assert_allclose(found.top1, [[80, 90], [82, 91]])


def test_of_seeds_that_share_nothing_the_first_counts() -> None:
    found = curve(_model([(0, 2, 100, 80.0), (0, 4, 400, 90.0), (1, 3, 200, 85.0), (1, 8, 800, 91.0)]))
    assert found is not None
    assert found.seeds == (0,)


def test_three_seeds_of_one_width_are_a_point() -> None:
    found = curve(_model([(seed, 2, 100, 80.0 + seed) for seed in range(3)]))
    assert found is not None
    np.testing.assert_allclose(found.at(100), [80, 81, 82])


def test_no_size_no_curve() -> None:
    assert curve(_model([(0, 2, 0, 80.0), (0, 4, 100, float("nan"))])) is None


def test_curves_are_compared_where_both_are() -> None:
    a = Curve(np.array([100.0, 200.0, 400.0]), np.zeros((1, 3)), (0,))
    b = Curve(np.array([150.0, 300.0, 900.0]), np.zeros((1, 3)), (0,))
    assert shared_sizes(a, b).tolist() == [150, 200, 300, 400]
    assert shared_sizes(a, Curve(np.array([500.0]), np.zeros((1, 1)), (0,))).tolist() == []
