"""``kdq-wandb link``, ``workspace`` and ``report``: what needs a W&B account, after the runs are there."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdq.records.rows import Row, rows_below
from kdq.utils.errors import message


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error is one line and a non-zero exit code."""
    parser = argparse.ArgumentParser(prog="kdq-wandb", description="Weights & Biases: lineage and dashboards.")
    commands = parser.add_subparsers(dest="command", required=True)
    link = commands.add_parser("link", help="connect the uploaded models: teacher -> student -> quantized")
    view = commands.add_parser("workspace", help="save a view of the project with kdq's panels, one for each data set")
    text = commands.add_parser("report", help="make a W&B Report: the answer in words, its tables, and panels")
    for command in (view, text):
        command.add_argument("dir", nargs="?", default="outputs", type=Path, help="paths.output_dir of the runs")
        command.add_argument("--dry-run", action="store_true", help="print it instead; needs no account")
    for command in (link, view, text):
        command.add_argument("--project", default="kdq", help="logger.wandb.project of the runs (kdq)")
        command.add_argument("--entity", help="user or team; default: that of your login")
        command.add_argument(
            "--sweep", help="only runs of this sweep (the W&B group); words and tables are of all rows"
        )
    options = parser.parse_args(arguments)
    try:
        {"link": _link, "workspace": _workspace, "report": _report}[options.command](options)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(f"kdq-wandb: {message(error) or type(error).__name__}")


def _link(options: argparse.Namespace) -> None:
    from kdq.tracking.link import link

    api = _api()
    missing = link(api, f"{options.entity or api.default_entity}/{options.project}", options.sweep, print)
    if missing:
        sys.exit(f"kdq-wandb: {missing} models are missing: upload them (`wandb sync DIR/runs/wandb`) and link again")


def _entity(options: argparse.Namespace) -> str:
    return options.entity or ("entity" if options.dry_run else _api().default_entity)


def _deployed(rows: Sequence[Row]) -> frozenset[str]:
    """The data sets of exported models."""
    return frozenset(row.data for row in rows if row.latency_ms_onnx_int8)


def _workspace(options: argparse.Namespace) -> None:
    rows = rows_below(options.dir)
    from kdq.tracking.workspace import workspace

    entity, deployed = _entity(options), _deployed(rows)
    for data in sorted({row.data for row in rows}):
        view = workspace(entity, options.project, data, options.sweep, data in deployed)
        if options.dry_run:
            print(json.dumps(view._model.model_dump(mode="json", by_alias=True, exclude_none=True), indent=1))
        else:
            view.save()
            print(f"{view.name}: {view.url}")


def _report(options: argparse.Namespace) -> None:
    rows = rows_below(options.dir)
    from kdq.report.markdown import answer_text
    from kdq.report.material import Material
    from kdq.report.tables import markdown_accuracies
    from kdq.tracking.wandb_report import report

    material, texts = Material(options.dir), {}
    for answer in material.answers:
        cells = material.cells[material.cells["data"] == answer.data]
        table = [
            "Top-1 in percent (packed bytes), mean ± standard deviation over seeds:",
            "",
            *markdown_accuracies(cells),
        ]
        texts[answer.data] = "\n".join([*answer_text(answer, places=False), *table])
    if options.dry_run:  # of the panels W&B makes nothing without its server
        print(*texts.values(), sep="\n")
        return
    made = report(_entity(options), options.project, texts, options.sweep, _deployed(rows))
    made.save()
    print(f"{made.title}: {made.url}")


def _api() -> Any:
    """W&B's API of whoever is logged in."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        sys.exit("kdq-wandb: nobody is logged in to W&B: run `wandb login`, and `wandb sync DIR/runs/wandb` to upload")
    return wandb.Api()
