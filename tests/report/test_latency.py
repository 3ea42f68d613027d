"""Which latency is shown: of the integer network where it was measured; one point for each model."""

from collections.abc import Callable

import pandas as pd
import pytest

from kdq.records.rows import Row
from kdq.report.cells import cells, named
from kdq.report.latency import shown_latency, timed_models

_NONE: dict[str, list[float | None]] = {
    f"{column}_{kind}": [None, None]
    for column in ("latency_ms", "top1")
    for kind in ("onnx_fp32", "onnx_int8", "deployed")
} | {"latency_threads": [None, None]}
_TORCH = _NONE | {"latency_ms_torch": [1.0, 2.0], "top1_float": [90.0, 91.0]}
_FLOAT = {"latency_ms_onnx_fp32": [1.0, None], "top1_onnx_fp32": [90.0, None]}
_INT8 = {"latency_ms_onnx_int8": [None, 0.5], "top1_onnx_int8": [None, 89.0]}

_KEPT = {"latency_ms_deployed": [None, 0.5], "top1_deployed": [None, 89.0]}


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (_TORCH, "latency_ms_torch"),
        (_TORCH | _FLOAT, "latency_ms_onnx_fp32"),
        (_TORCH | _FLOAT | _INT8, "latency_ms_onnx_int8"),
        (_TORCH | _FLOAT | _INT8 | _KEPT, "latency_ms_deployed"),
    ],
)
def test_the_nearest_to_deployment(columns: dict[str, list[float]], wanted: str) -> None:
    found = shown_latency(pd.DataFrame(columns))
    assert found.column == wanted
    assert found.top1 in columns
    assert ("INT8" in found.label) == ("int8" in wanted)


def test_the_rows_of_a_model_are_measurements_of_one_network(row: Callable[..., Row]) -> None:
    rows = [
        row(bits=bits, seed=seed, top1_onnx_int8=80.0 + bits + seed, latency_ms_onnx_int8=ms)
        for bits, seed, ms in ((4, 0, 0.6), (8, 0, 0.4), (8, 1, 0.5))
    ]
    (line,) = timed_models(named([*rows, row(bits=2)])).rename(columns={"count": "n"}).itertuples()
    assert (line.ms, line.ms_low, line.ms_high, line.n) == (0.5, 0.4, 0.6, 3)
    assert (line.top1, line.top1_std) == (88.5, pytest.approx(0.5**0.5))


def test_formats_that_are_kept_are_networks_of_their_own(row: Callable[..., Row]) -> None:
    rows = [
        row(bits=bits, deployed=kind, top1_deployed=90.0, latency_ms_deployed=ms)
        for bits, kind, ms in ((2, "fp32", 0.9), (4, "int8", 0.3), (8, "int8", 0.5))
    ]
    assert sorted(timed_models(named(rows))["ms"]) == [pytest.approx(0.4), 0.9]


def test_latencies_on_other_devices_are_not_compared(row: Callable[..., Row]) -> None:
    rows = [
        row(method=method, seed=seed, latency_ms_torch=ms, device=device)
        for method, seed, ms, device in (
            ("teacher", 0, 1.0, "NVIDIA H200"),
            ("teacher", 1, 9.0, "cpu x1"),
            ("baseline", 0, 5.0, "cpu x2"),
            ("vkd", 0, 0.5, "NVIDIA H200"),
        )
    ]
    found = timed_models(named([*rows, row(seed=1, latency_ms_torch=4.0, device="cpu x1")]))
    assert dict(zip(found["method"], found["ms"], strict=True)) == {"teacher": 9.0, "baseline": 5.0, "vkd": 4.0}


def test_only_latencies_on_as_many_threads_are_compared(row: Callable[..., Row]) -> None:
    rows = [
        row(bits=bits, method=method, latency_ms_onnx_int8=ms, top1_onnx_int8=90.0, latency_threads=threads)
        for bits, method, ms, threads in (
            (4, "teacher", 4.0, 1),
            (8, "teacher", 1.0, 4),
            (8, "baseline", 0.5, 4),
            (4, "vkd", 2.0, 1),
            (8, "vkd", 2.0, 1),
        )
    ]
    frame = named([*rows, row(data="pets", latency_ms_onnx_int8=7.0, top1_onnx_int8=90.0, latency_threads=2)])
    found = timed_models(frame)
    assert list(zip(found["method"], found["ms"], strict=True)) == [("teacher", 4.0), ("vkd", 2.0), ("vkd", 7.0)]
    assert found["label"].str.extract(r"batch 1, (.*)\)")[0].tolist() == ["1 thread", "1 thread", "2 threads"]
    (digits,) = {shown_latency(part).label for data, part in cells(frame).groupby("data") if data == "digits"}
    assert digits == found["label"].iloc[0]
