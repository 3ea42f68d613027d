"""W&B runs as they lie on disk, read back with W&B's own tool."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdq.errors import KdqError
from kdq.tracking import run_folder, tracked

WANDB = {"kind": "wandb", "project": "kdq", "entity": None, "mode": "offline"}


def _records(folder: str) -> list[dict[str, Any]]:
    tool = Path(sys.executable).with_name("wandb")
    command = [str(tool), "leet", "inspect", "--json", folder]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def _track(runs: Path, logger: dict[str, Any], fail: bool = False) -> str:
    arguments: dict[str, Any] = {"job_type": "quantize", "name": "cell", "group": "sweep", "config": {"data": "digits"}}
    with tracked(logger, runs, **arguments) as found:
        if found is not None:
            found.log_metrics({"quantize/top1": 97.0, "quantize/bits": 4})
        folder = run_folder(found)
        if fail:
            raise KdqError("bad cell")
    return folder


def test_an_offline_run_holds_name_group_config_and_metrics(tmp_path: Path) -> None:
    records = _records(_track(tmp_path, WANDB))
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["run_group"], run["job_type"]) == ("kdq", "sweep", "quantize")
    assert run["config"]["update"]["data"] == "digits"
    assert any("quantize/top1" in json.dumps(record) for record in records)
    assert next(record for record in records if record["type"] == "exit")["exit"].get("exit_code", 0) == 0


def test_a_failed_stage_is_a_failed_run_and_the_next_starts_its_own(tmp_path: Path) -> None:
    with pytest.raises(KdqError, match="bad cell"):
        _track(tmp_path, WANDB, fail=True)
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [r["exit"]["exit_code"] for r in _records(str(first)) if r["type"] == "exit"] == [1]
    assert Path(_track(tmp_path, WANDB)).resolve() != first.resolve()


def test_online_without_an_account_warns_and_stays_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be stored
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    before = dict(os.environ)
    with caplog.at_level(logging.WARNING):
        folder = _track(tmp_path, WANDB | {"mode": "online"})
    assert "nobody is logged in" in caplog.text
    assert Path(folder).name.startswith("offline-run")
    assert {name for name in os.environ if name not in before} <= {"WANDB_SERVICE"}


def test_csv_and_none(tmp_path: Path) -> None:
    assert _track(tmp_path, {"kind": "none"}) == ""
    assert not list(tmp_path.iterdir())
    assert _track(tmp_path, {"kind": "csv"}) == ""
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "quantize/top1" in metrics.read_text()


@pytest.mark.parametrize("logger", [{"kind": "mlflow"}, WANDB | {"mode": "sometimes"}])
def test_unknown_settings_are_refused(tmp_path: Path, logger: dict[str, Any]) -> None:
    with pytest.raises(KdqError, match="is unknown"):
        _track(tmp_path, logger)
