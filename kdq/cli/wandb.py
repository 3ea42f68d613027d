"""``kdq-wandb link`` and ``kdq-wandb workspace``: what needs a W&B account, after the runs are there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdq.records.rows import read_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error is one line and a non-zero exit code."""
    parser = argparse.ArgumentParser(prog="kdq-wandb", description="Weights & Biases: lineage and dashboards.")
    commands = parser.add_subparsers(dest="command", required=True)
    link = commands.add_parser("link", help="connect the uploaded models: teacher -> student -> quantized")
    view = commands.add_parser("workspace", help="save a view of the project with kdq's panels, one for each data set")
    view.add_argument("dir", nargs="?", default="outputs", type=Path, help="paths.output_dir of the runs")
    view.add_argument("--dry-run", action="store_true", help="print the view as JSON instead; needs no account")
    for command in (link, view):
        command.add_argument("--project", default="kdq", help="logger.wandb.project of the runs (kdq)")
        command.add_argument("--entity", help="user or team; default: that of your login")
        command.add_argument("--sweep", help="only runs of this sweep (the W&B group)")
    options = parser.parse_args(arguments)
    try:
        _link(options) if options.command == "link" else _workspace(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"kdq-wandb: {message}")


def _link(options: argparse.Namespace) -> None:
    from kdq.tracking.link import link

    api = _api()
    missing = link(api, f"{options.entity or api.default_entity}/{options.project}", options.sweep, print)
    if missing:
        sys.exit(f"kdq-wandb: {missing} models are missing: upload them (`wandb sync DIR/runs/wandb`) and link again")


def _workspace(options: argparse.Namespace) -> None:
    rows = read_rows(options.dir / "rows")
    if not rows:
        sys.exit(f"kdq-wandb: no rows below {options.dir}: give the paths.output_dir of a run")
    from kdq.tracking.workspace import workspace

    entity = options.entity or ("entity" if options.dry_run else _api().default_entity)
    for data in sorted({row.data for row in rows}):
        deployed = any(row.latency_ms_onnx_int8 for row in rows if row.data == data)
        view = workspace(entity, options.project, data, options.sweep, deployed)
        if options.dry_run:
            print(json.dumps(view._model.model_dump(mode="json", by_alias=True, exclude_none=True), indent=1))
        else:
            view.save()
            print(f"{view.name}: {view.url}")


def _api() -> Any:
    """W&B's API of whoever is logged in."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        sys.exit("kdq-wandb: nobody is logged in to W&B: run `wandb login`, and `wandb sync DIR/runs/wandb` to upload")
    return wandb.Api()
