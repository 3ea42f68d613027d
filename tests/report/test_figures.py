"""Figures that can be read: nothing is cut off, nothing lies over something else, no two models look alike."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest

from kdq.records.rows import Row
from kdq.report import figures
from kdq.report.cells import cells, named
from kdq.report.latency import timed_models
from kdq.report.style import styled

METHODS = [
    *("teacher", "baseline", "vkd", "mixup", "dml", "dkd", "fitnets", "at", "sp", "rkd", "pkt", "nst", "vid", "crd"),
    *("ofd", "simkd", "dist", "nkd", "ttm", "rld", "ctkd", "mlkd", "tfkd", "byot"),
]
LONG = "photographs_of_all_my_animals_of_224_pixels", "a_long_name_that_tells_runs_apart", "best_with_many_options_A4"
#: Data sets, methods, quantizers and widths.
GRIDS: dict[str, tuple[Any, ...]] = {
    "one cell": (["digits"], ["vkd"], ["gpfq"], [4]),
    "all methods": (["cifar10"], METHODS, ["best"], [2, 3, 4, 8]),
    "long names": ([LONG[0]], ["teacher", LONG[1]], [LONG[2]], [2, 4]),
    "many panels": (["cifar100", "cifar10_jpeg", "fashion_mnist", "pets"], ["teacher", "vkd"], ["best", "rtn"], [2, 8]),
    "many widths": (["cifar10", "cifar100", "digits"], ["vkd"], ["best"], [*range(2, 33)]),
}


def _rows(row: Callable[..., Row], grid: str) -> list[Row]:
    rows = []
    for data, method, quantizer, bits in product(*GRIDS[grid]):
        times, arch = (3, "resnet56") if method == "teacher" else (1, "resnet20")
        sizes = {
            "size_bytes": times * 30_000 * bits,
            "float_bytes": times * 1_000_000,
            "weight_bits_total": 10**5 * bits,
        }
        rows.append(
            row(data=data, method=method, arch=arch, quantizer=quantizer, bits=bits, top1=90 + bits / 8, **sizes)
        )
    return rows


@pytest.mark.parametrize(("grid", "style"), [*((grid, "screen") for grid in GRIDS), ("many panels", "ieee")])
def test_nothing_is_cut_off_or_covered(grid: str, style: str, row: Callable[..., Row]) -> None:
    frame = named(_rows(row, grid))
    found = cells(frame)
    for part, draw in (
        (found, figures._against_bits),
        (found, figures._against_bytes),
        (found, figures._drops),
        (timed_models(frame), figures._against_latency),
    ):
        with styled(style):
            figure = figures._panels(part, draw, figures._looks(found))
        figure.draw_without_rendering()
        (legend,) = figure.legends
        boxes = [panel.get_tightbbox() for panel in figure.axes] + [legend.get_window_extent()]
        assert not any(_overlap(a, b) for a, b in combinations(boxes, 2))
        for x, y in (corner for box in boxes for corner in (box.min, box.max)):
            assert -2 <= x <= figure.bbox.width + 2
            assert -2 <= y <= figure.bbox.height + 2
        for panel in figure.axes:
            assert panel.get_window_extent().height > figure.dpi * 0.7
            low, high = panel.get_xlim()
            shown = [
                tick.label1.get_window_extent()
                for tick in panel.xaxis.get_major_ticks()
                if low <= tick.get_loc() <= high
            ]
            assert shown
            assert not any(_overlap(a, b) for a, b in combinations(shown, 2))


def _overlap(a: Any, b: Any) -> bool:
    """By more than a pixel: of boxes that touch, rounding decides."""
    width, height = (min(a.max[i], b.max[i]) - max(a.min[i], b.min[i]) for i in (0, 1))
    return bool(width > 1 and height > 1)


def test_no_two_models_look_alike(row: Callable[..., Row]) -> None:
    rows = [row(method=method, tune=tune) for method, tune in product(METHODS, ("", "qad", "qat"))]
    rows += [row(method=method, arch="resnet8x4") for method in METHODS]
    looks = figures._looks(cells(named(rows)))
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks) == len(rows)
    assert all(looks[name, arch]["color"] == looks[name.split(" + ")[0], arch]["color"] for name, arch in looks)
