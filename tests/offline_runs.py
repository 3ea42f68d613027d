"""W&B runs as they lie on disk, read back with W&B's own tool."""

import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any


class OfflineRun:
    """One segment of a run: the folder of one ``wandb.init``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        tool = Path(sys.executable).with_name("wandb")
        command = [str(tool), "leet", "inspect", "--json", str(self.folder)]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return [json.loads(line) for line in text.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict[str, Any]:
        """``run_id, display_name, job_type, run_group, tags, resume ...``"""
        (run,) = self.of("run")
        return run

    @property
    def config(self) -> dict[str, Any]:
        return {name: value for name, value in self.run["config"]["update"].items() if name != "_wandb"}

    @property
    def exit_code(self) -> int | None:
        """None: the run never ended."""
        found = self.of("exit")
        return found[0].get("exit_code", 0) if found else None

    def history(self, metric: str) -> list[dict[str, Any]]:
        """The rows that have ``metric``, in order, each with its ``_step``."""
        return [row["item"] for row in self.of("history") if metric in row["item"]]

    @property
    def axes(self) -> dict[str, str]:
        """Metric or pattern to the metric it is drawn over."""
        return {m.get("name") or m["glob_name"]: m["step_metric"] for m in self.of("metric") if "step_metric" in m}

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in self.of("summary"):
            found |= record.get("update", {})
        return found

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """Models; tables are artifacts, too, but not of ours."""
        return [artifact for artifact in self.of("artifact") if artifact["type"] != "run_table"]

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """Custom charts by name: the Vega preset, its title and what its fields show."""
        found = {}
        for record in self.of("config"):
            for name, value in record.get("update", {}).items():
                if name.startswith("_wandb.visualize."):
                    found[name.removeprefix("_wandb.visualize.")] = value["panel_config"]
        return found

    def table(self, name: str) -> list[dict[str, Any]]:
        """The last table of this name, as one dict a row."""
        (row,) = self.history(f"{name}.path")[-1:]
        stored = json.loads((self.folder / "files" / row[f"{name}.path"]).read_text())
        return [dict(zip(stored["columns"], values, strict=True)) for values in stored["data"]]


def offline_runs(output: Path, job_type: str = "") -> list[OfflineRun]:
    """The runs below kdq's ``output`` folder, oldest first."""
    folders = (output / "runs" / "wandb").glob(f"*run-*-{job_type}*")
    runs = [OfflineRun(folder) for folder in folders if not folder.is_symlink()]
    return sorted(runs, key=lambda run: run.run["start_time"])
