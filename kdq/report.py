"""From rows to what people read: results.csv, report.md, the figures, and the table in the terminal."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from kdq.files import replacing, write_text
from kdq.results import Row, read_rows, table, write_csv

#: What one line of a table or of a figure stands for: a model and the way it was quantized.
SERIES = ["data", "method", "arch", "quantizer"]


def write_report(output: Path) -> list[Path]:
    """Rebuild results.csv, report.md and the figures below ``output`` from its rows; returns the files written."""
    rows = read_rows(output / "rows")
    frame = _named(rows)
    written = [output / "results.csv", output / "report" / "report.md"]
    write_csv(written[0], rows)
    figures = _figures(frame, output / "report") if rows else []
    write_text(written[1], _markdown(frame, figures))
    return written + figures


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Top-1 by model and bits, mean and standard deviation over seeds, with the packed size below."""
    frame = _named(rows)
    widths = sorted(frame["bits"].unique())
    shown = [name for name in SERIES if name == "method" or frame[name].nunique() > 1]
    constant = ", ".join(f"{frame[name].iloc[0]}" for name in SERIES if name not in shown)
    text = Table(title=f"top-1 on the test set in %, size in bytes below ({constant})", show_lines=True)
    for name in shown:
        text.add_column(name, no_wrap=True)
    for name in ["float", *(f"{bits} bits" for bits in widths)]:
        text.add_column(name, justify="right", no_wrap=True)
    for series, group in _series(frame):
        cells = [f"{_mean_std(group.drop_duplicates('seed')['top1_float'])}\n[dim]{_bytes(group['float_bytes'])}[/]"]
        for bits in widths:
            cell = group[group["bits"] == bits]
            cells.append(f"{_mean_std(cell['top1'])}\n[dim]{_bytes(cell['size_bytes'])}[/]" if len(cell) else "-")
        text.add_row(*(value for name, value in zip(SERIES, series, strict=True) if name in shown), *cells)
    return text


def print_results(console: Console, output: Path, rows: Sequence[Row], written: Sequence[Path], runs: Path) -> None:
    """What a run ends with: its table, and where everything is."""
    if rows:
        text = accuracy_table(rows)
        if not console.is_terminal:  # a log has no width that a table could be cut to
            console = Console(width=console.measure(text, options=console.options.update(width=9999)).maximum)
        console.print(text)
    by_name = {path.name: path for path in written}
    places = {
        "results": by_name.get("results.csv"),
        "report": by_name.get("report.md"),
        "accuracy vs bits": by_name.get("accuracy_vs_bits.png"),
        "accuracy vs bytes": by_name.get("accuracy_vs_bytes.png"),
    }
    for name, path in places.items():
        if path is not None:
            console.print(f"{name + ':':<19}{path}", soft_wrap=True, highlight=False)
    if (runs / "wandb").is_dir():
        console.print(f"{'W&B runs:':<19}{runs / 'wandb'}", soft_wrap=True, highlight=False)
        console.print(f"{'browse them with:':<19}wandb leet {runs / 'wandb'}", soft_wrap=True, highlight=False)


def _named(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows with rounded activations told in the quantizer's name: ``gpfq A8``."""
    frame = table(rows)
    if len(frame):
        rounded = frame["act_bits"] < 32
        frame.loc[rounded, "quantizer"] += " A" + frame.loc[rounded, "act_bits"].astype(str)
    return frame


def _series(frame: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """The frame's lines, in the order of :data:`SERIES`."""
    return [(tuple(map(str, name)), group) for name, group in frame.groupby(SERIES, sort=True)]


def _markdown(frame: pd.DataFrame, figures: Sequence[Path]) -> str:
    lines = ["# kdq report", ""]
    if frame.empty:
        return "\n".join([*lines, "No rows yet: run `kdq experiment=quickstart`.", ""])
    lines += [
        f"{len(frame)} rows. Top-1 on the test set in percent (mean ± std over seeds), packed bytes in brackets.",
        "",
    ]
    for data, part in frame.groupby("data"):
        widths = sorted(part["bits"].unique())
        head = ["method", "arch", "quantizer", "float", *(f"{bits} bits" for bits in widths)]
        lines += [f"## {data}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for series, group in _series(part):
            cells = [f"{_mean_std(group.drop_duplicates('seed')['top1_float'])} ({_bytes(group['float_bytes'])})"]
            for bits in widths:
                cell = group[group["bits"] == bits]
                cells.append(f"{_mean_std(cell['top1'])} ({_bytes(cell['size_bytes'])})" if len(cell) else "–")
            lines.append("| " + " | ".join([*series[1:], *cells]) + " |")
        lines.append("")
    lines += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in figures if path.suffix == ".png"]
    return "\n".join([*lines, ""])


def _figures(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Accuracy against bits and against bytes, one panel per data set, as PNG and SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullFormatter, NullLocator

    written = []
    sets = list(frame.groupby("data"))
    for stem, x, label in (
        ("accuracy_vs_bits", "avg_bits", "bits per weight"),
        ("accuracy_vs_bytes", "size_bytes", "packed size (bytes)"),
    ):
        figure = Figure(figsize=(1.5 + 4.5 * len(sets), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(sets), squeeze=False)[0]
        for panel, (data, part) in zip(panels, sets, strict=True):
            for number, (series, group) in enumerate(_series(part)):
                points = group.groupby("bits").agg(
                    x=(x, "mean"), top1=("top1", "mean"), std=("top1", "std"), n=("top1", "size")
                )
                name = " ".join(series[1:3]) + (f" {series[3]}" if part["quantizer"].nunique() > 1 else "")
                color = f"C{number % 10}"
                panel.errorbar(
                    points["x"],
                    points["top1"],
                    points["std"].fillna(0),
                    label=name,
                    color=color,
                    marker="o",
                    ms=4,
                    capsize=2,
                )
                panel.axhline(group["top1_float"].mean(), color=color, lw=0.8, ls=":")
            panel.set(xscale="log", xlabel=label, ylabel="top-1 (%)", title=str(data))
            panel.grid(alpha=0.3)
            if x == "avg_bits":
                ticks = sorted(part["bits"].unique())
                panel.xaxis.set_major_locator(FixedLocator(ticks))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.set_xticks(ticks, [str(tick) for tick in ticks])
            else:
                # Labels at 1, 2 and 5 of each decade: all nine would run into each other.
                panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                panel.xaxis.set_major_formatter(EngFormatter("B"))
                panel.xaxis.set_minor_formatter(NullFormatter())
        panels[-1].legend(title="dotted: float", fontsize=8, title_fontsize=8, loc="lower right")
        for suffix in (".png", ".svg"):
            path = folder / f"{stem}{suffix}"
            # No dates and no random ids inside: equal rows make equal files.
            with replacing(path) as temporary, rc_context({"svg.hashsalt": "kdq"}):
                metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
                figure.savefig(temporary, dpi=160, metadata=metadata)
            written.append(path)
    return written


def _mean_std(values: pd.Series) -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def _bytes(values: pd.Series) -> str:
    return f"{values.mean():,.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """``kdq-report [DIR]``."""
    parser = argparse.ArgumentParser(
        prog="kdq-report", description="Rebuild results.csv, report.md and the figures from the rows under DIR."
    )
    parser.add_argument("dir", nargs="?", default="outputs", type=Path, help="paths.output_dir of the run")
    output = parser.parse_args(arguments).dir
    logging.basicConfig(format="kdq-report: %(message)s")
    if not output.is_dir():
        sys.exit(f"kdq-report: no folder {output}: give the paths.output_dir of a run")
    try:
        written = write_report(output)
    except OSError as error:
        sys.exit(f"kdq-report: cannot write the report: {error}")
    print_results(Console(), output, read_rows(output / "rows"), written, output / "runs")
