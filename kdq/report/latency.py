"""Which of the measured latencies to show accuracy against."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Latency:
    """A column of milliseconds per image, the accuracy of what was timed, and words for both."""

    column: str
    top1: str
    label: str
    note: str


_KINDS = (
    Latency(
        "latency_ms_onnx_int8",
        "top1_onnx_int8",
        "latency (ms, ONNX Runtime INT8, batch 1)",
        "Latency and top-1 of the exported INT8 networks in ONNX Runtime; cells that were not exported are not shown.",
    ),
    Latency(
        "latency_ms_onnx_fp32",
        "top1_onnx_fp32",
        "latency (ms, ONNX Runtime float32, batch 1)",
        "Latency and top-1 of the exported float32 networks in ONNX Runtime; cells that were not exported are not "
        "shown.",
    ),
    Latency(
        "latency_ms_torch",
        "top1_float",
        "latency (ms, PyTorch float32, batch 1)",
        "Latency and top-1 of the float networks in PyTorch, which computes with packed weights as floats, at no other "
        "speed. deploy=onnx measures integer arithmetic.",
    ),
)


def shown_latency(cells: pd.DataFrame) -> Latency:
    """The integer network's where any cell has it, else the exported float network's, else PyTorch's: one figure never
    mixes them."""
    for kind in _KINDS[:-1]:
        if {kind.column, kind.top1} <= set(cells.columns) and cells[kind.column].notna().any():
            return kind
    return _KINDS[-1]
