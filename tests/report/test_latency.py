"""Which latency is shown: of the integer network where it was measured."""

from __future__ import annotations

import pandas as pd
import pytest

from kdq.report.latency import shown_latency

_TORCH = {"latency_ms_torch": [1.0, 2.0], "top1_float": [90.0, 91.0]}
_FLOAT = {"latency_ms_onnx_fp32": [1.0, None], "top1_onnx_fp32": [90.0, None]}
_INT8 = {"latency_ms_onnx_int8": [None, 0.5], "top1_onnx_int8": [None, 89.0]}


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (_TORCH, "latency_ms_torch"),
        (_TORCH | _FLOAT, "latency_ms_onnx_fp32"),
        (_TORCH | _FLOAT | _INT8, "latency_ms_onnx_int8"),
        (_TORCH | {key: [None, None] for key in _INT8}, "latency_ms_torch"),
    ],
)
def test_the_nearest_to_deployment(columns: dict[str, list[float]], wanted: str) -> None:
    found = shown_latency(pd.DataFrame(columns))
    assert found.column == wanted
    assert found.top1 in columns
    assert ("INT8" in found.label) == ("int8" in wanted)
