"""Two output folders side by side: what changed between two sweeps of the same grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from rich.markup import escape
from rich.table import Table

from kdq.records.rows import AXES, Row, table
from kdq.report.cells import printable, width_name, widths

#: Accuracies closer than this, in points, are the same: rows of earlier versions carry float32's rounding.
SAME_POINTS = 1e-3
#: The terminal shows so many changed cells, the largest changes first.
SHOWN = 40
_CELL = [*AXES, "search", "width"]
_KEYS = [*_CELL, "which"]


@dataclass(frozen=True)
class Comparison:
    """``both``: one line per cell of both, with ``top1_a``, ``top1_b``, ``size_bytes_a``, ``size_bytes_b`` and
    ``changed``; ``only_a``, ``only_b``: the cells of one alone."""

    both: pd.DataFrame
    only_a: pd.DataFrame
    only_b: pd.DataFrame

    @property
    def changed(self) -> pd.DataFrame:
        return self.both[self.both["changed"]]

    @property
    def same(self) -> bool:
        return self.changed.empty and self.only_a.empty and self.only_b.empty


def compare(a: Sequence[Row], b: Sequence[Row]) -> Comparison:
    """Match the rows of two sweeps by their axes. Rows of one sweep that share all axes (their settings differ in
    something that has no column) are matched by equal ``config_hash`` first, then in the order of their hashes."""
    joined = _keyed(a, b).merge(_keyed(b, a), on=_KEYS, how="outer", suffixes=("_a", "_b"), indicator=True)
    both = joined[joined["_merge"] == "both"]
    top1 = (both["top1_a"] - both["top1_b"]).abs() > SAME_POINTS
    both = both.assign(changed=top1 | (both["size_bytes_a"] != both["size_bytes_b"]))
    return Comparison(both, joined[joined["_merge"] == "left_only"], joined[joined["_merge"] == "right_only"])


def _keyed(rows: Sequence[Row], others: Sequence[Row]) -> pd.DataFrame:
    """The rows with a number ``which`` that tells those of equal axes apart, known hashes of the other sweep first."""
    known = {row.config_hash for row in others}
    frame = table(rows)
    frame = frame.assign(alone=[row.config_hash not in known for row in rows], width=widths(frame))
    frame = frame.sort_values([*_CELL, "alone", "config_hash"])
    frame["which"] = frame.groupby(_CELL).cumcount()
    return frame[[*_KEYS, "top1", "size_bytes"]]


def summary(found: Comparison, a: str, b: str) -> str:
    """One sentence: how many cells are the same, changed, or in one sweep only."""
    changed = found.changed
    mean = (changed["top1_b"] - changed["top1_a"]).mean() if len(changed) else 0.0
    moved = f" (top-1 by {mean:+.2f} points on average)" if len(changed) else ""
    return (
        f"{len(found.both) - len(changed)} cells are the same, {len(changed)} changed{moved}, "
        f"{len(found.only_a)} are only in {a}, {len(found.only_b)} only in {b}."
    )


def comparison_table(found: Comparison, a: str, b: str) -> Table:
    """The changed cells, the largest change of accuracy first, then those of one sweep only."""
    order = (found.changed["top1_b"] - found.changed["top1_a"]).abs().sort_values(ascending=False, kind="stable").index
    lines = pd.concat([found.changed.loc[order], found.only_a, found.only_b])
    cut = f"; {len(lines) - SHOWN} more are not shown" if len(lines) > SHOWN else ""
    text = Table(title=f"A = {escape(a)}, B = {escape(b)}{cut}")
    text.add_column("cell")
    for name in ("top-1 A", "top-1 B", "change", "bytes A", "bytes B", "change"):
        text.add_column(name, justify="right", no_wrap=True)
    for _, line in lines.head(SHOWN).iterrows():
        text.add_row(_name(line), *_numbers(line, "top1", ",.2f"), *_numbers(line, "size_bytes", ",.0f"))
    return text


def _name(line: pd.Series) -> str:
    quantizer = line["quantizer"] + (f" A{line['act_bits']}" if line["act_bits"] < 32 else "")
    again = f" ({line['which'] + 1}.)" if line["which"] else ""
    width = width_name(line["width"], bool(line["search"]))
    return escape(
        printable(f"{line['data']} {line['method']} {line['arch']} {quantizer} {width} seed {line['seed']}{again}")
    )


def _numbers(line: pd.Series, column: str, form: str) -> tuple[str, str, str]:
    a, b = line[f"{column}_a"], line[f"{column}_b"]
    change = "" if pd.isna(a) or pd.isna(b) else f"{b - a:+{form}}"
    return ("–" if pd.isna(a) else f"{a:{form}}"), ("–" if pd.isna(b) else f"{b:{form}}"), change
