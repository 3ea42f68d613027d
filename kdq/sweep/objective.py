"""What a sweeper that searches, such as Optuna's, is told of a cell: ``kdq.objective``."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdq.records.rows import COLUMNS, Row
from kdq.utils.checks import nearest
from kdq.utils.errors import KdqError

#: Columns of rows that may be searched for, and the better direction of each.
OBJECTIVES = {"val_top1": "maximize", "avg_bits": "minimize", "size_bytes": "minimize", "params": "minimize"}
OBJECTIVES |= dict.fromkeys(("macs", "bops", "latency_ms_torch"), "minimize")
OBJECTIVES |= dict.fromkeys(("latency_ms_onnx_fp32", "latency_ms_onnx_int8", "latency_ms_deployed"), "minimize")

#: The callback that stops a search's weak trainings.
HALVING = "kdq.train.halving.SuccessiveHalving"


def directions(objective: str | Sequence[str] | None) -> str | list[str]:
    """Optuna's ``direction`` for ``kdq.objective``: what the config gives where the user does not.

    >>> directions(["val_top1", "size_bytes"])
    ['maximize', 'minimize']
    """
    if objective is None:
        raise KdqError("a search needs to know what for: give kdq.objective=val_top1")
    chosen = [OBJECTIVES[name] for name in names(objective)]
    return chosen[0] if isinstance(objective, str) else chosen


def names(objective: str | Sequence[str]) -> list[str]:
    """The columns that ``objective`` names; what is measured on test images may not be searched for."""
    asked = [objective] if isinstance(objective, str) else list(objective)
    for name in asked:
        if name not in OBJECTIVES:
            why = ": nothing that is measured on test images selects" if name in COLUMNS else nearest(name, OBJECTIVES)
            raise KdqError(f"kdq.objective={name} cannot be searched for{why}; use one of {', '.join(OBJECTIVES)}")
    if not asked:
        raise KdqError("kdq.objective is empty: give val_top1, or a list such as [val_top1,size_bytes]")
    return asked


def value(objective: str | Sequence[str], rows: Sequence[Row]) -> float | list[float]:
    """What one cell gives; a list where ``objective`` is one."""
    if len(rows) != 1:
        raise KdqError(f"kdq.objective needs one row a cell, not {len(rows)}: give one width in quant.bits")
    values = []
    for name in names(objective):
        if (measured := getattr(rows[0], name)) is None:
            raise KdqError(
                f"kdq.objective={name} was not measured: add deploy={'best' if 'deployed' in name else 'onnx'}"
            )
        if name == "val_top1" and rows[0].row_format < 4 and not rows[0].tune:
            raise KdqError(f"{rows[0].name} is of an older kdq, whose val_top1 was the float model's: remove this row")
        values.append(float(measured))
    return values[0] if isinstance(objective, str) else values


def check_halving(objective: str | Sequence[str] | None, callbacks: Mapping[str, Any]) -> None:
    """Refuse a callback that stops trainings where nobody searches: a stopped one has no row."""
    for name, callback in callbacks.items():
        if not isinstance(callback, Mapping) or callback.get("_target_") != HALVING:
            continue
        if objective != "val_top1" or callback.get("monitor") != "val/top1":
            raise KdqError(
                f"callbacks.{name} stops the weak trainings of a search: give kdq.objective=val_top1 (monitor=val/top1)"
            )
