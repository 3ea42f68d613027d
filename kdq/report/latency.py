"""Which of the measured latencies to show accuracy against, and what all measurements of a model come to."""

from dataclasses import dataclass, replace

import pandas as pd


@dataclass(frozen=True)
class Latency:
    """A column of milliseconds per image, the accuracy of what was timed, and words for both."""

    column: str
    top1: str
    label: str
    note: str


def _kind(name: str, top1: str, runs: str, note: str) -> Latency:
    return Latency(f"latency_ms_{name}", f"top1_{top1}", f"latency (ms, {runs}, batch 1)", note)


_KEPT = "The exported networks, each in the format and runtime that deploy=best keeps."
_FLOAT = (
    "The float networks in PyTorch, which computes with packed weights as floats, at no other speed; deploy=onnx "
    "measures integer arithmetic."
)
_KINDS = (
    _kind("deployed", "deployed", "the format and runtime kept", _KEPT),
    _kind("onnx_int8", "onnx_int8", "ONNX Runtime INT8", "The exported INT8 networks in ONNX Runtime."),
    _kind("onnx_fp32", "onnx_fp32", "ONNX Runtime float32", "The exported float32 networks in ONNX Runtime."),
    _kind("torch", "float", "PyTorch float32", _FLOAT),
)


def shown_latency(cells: pd.DataFrame) -> Latency:
    """That of the format kept (``deploy=best``) where any cell has it, else the integer network's, else the exported
    float network's, else PyTorch's: one figure never mixes them. On how many threads (:func:`kdq.report.cells.named`)
    is said where it is known."""
    for kind in _KINDS[:-1]:
        if (there := cells[kind.column].notna()).any():
            threads = cells.loc[there, "latency_threads"].max()
            said = f", {threads:.0f} thread{'s' if threads > 1 else ''})"
            return replace(kind, label=kind.label.removesuffix(")") + said) if threads > 0 else kind
    return _KINDS[-1]


def timed_models(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each model and quantizer whose latency is shown, from the rows of
    :func:`kdq.report.cells.named`.

    A network runs the same operations whatever the values of its weights, so its rows, of all seeds and widths, are
    repeated measurements: their median ``ms``, smallest ``ms_low`` and largest ``ms_high``, and how many (``count``).
    Formats that ``deploy=best`` keeps are networks of their own. ``top1`` and ``top1_std`` are over the seeds of the
    widest of its widths.
    """
    lines = []
    for data, part in rows.groupby("data", sort=True):
        shown = shown_latency(part)
        part = part[part[[shown.column, shown.top1]].notna().all(axis=1)]
        kept = part["deployed"] if shown.column == "latency_ms_deployed" else part["data"]  # one for all
        for (quantizer, method, arch, _), model in part.groupby(["quantizer", "method", "arch", kept], sort=True):
            ms = model[shown.column]
            top1 = model[model["width"] == model["width"].max()].groupby("seed")[shown.top1].mean()
            spread = ms.median(), ms.min(), ms.max(), len(ms), top1.mean(), top1.std()
            lines.append((str(data), str(quantizer), str(method), str(arch), *spread, shown.label))
    numbers = ["ms", "ms_low", "ms_high", "count", "top1", "top1_std", "label"]
    return pd.DataFrame(lines, columns=["data", "quantizer", "method", "arch", *numbers])
