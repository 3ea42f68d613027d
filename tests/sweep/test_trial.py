"""Sweeps that W&B plans: its own ``wandb agent`` starts kdq, against a stand-in for its server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from kdq.records.rows import read_rows
from kdq.sweep import trial
from kdq.sweep.objective import OBJECTIVES
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from tests.conftest import TINY
from tests.notebooks import text
from tests.rows import ROW
from tests.tracking.conftest import server  # noqa: F401
from tests.wandb_server import WandbServer


def test_the_agent_s_run_has_the_row_and_the_stages_have_runs_of_their_own(
    server: WandbServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    tiny = [override for override in TINY if override != "logger=none"]
    own = ["logger.wandb.mode=online", "method=baseline", "quant.bits=4", f"paths.output_dir={tmp_path / 'out'}"]
    server.command = [sys.executable, "-m", "kdq", *tiny, *own, "${args_no_hyphens}"]
    server.trials = [{"student.recipe.lr": 0.1}, {"student.recipe.lr": 0.1}]  # the second one finds the row
    agent = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [agent, "agent", "me/kdq/s1"], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "out" / "rows")
    for name in ("trial0", "trial1"):
        (told,) = server.runs[name].history.values()
        assert told["val_top1"] == row.val_top1
        assert told["size_bytes"] == row.size_bytes
        assert "top1" not in told
        assert (server.runs[name].job_type, server.runs[name].config["student.recipe.lr"]) == ("trial", 0.1)
    others = [run.job_type for name, run in server.runs.items() if not name.startswith("trial")]
    assert sorted(map(str, others)) == ["distill", "quantize"]


def test_what_an_agent_would_not_learn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trial.check_trial(compose([]))
    monkeypatch.setattr(trial, "AGENT", {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"})
    for logger in ("logger=none", "logger=csv", "logger=wandb"):
        with pytest.raises(KdqError, match=r"learns nothing .* logger.wandb.mode=online"):
            trial.check_trial(compose([logger]))
    trial.check_trial(compose(["logger.wandb.mode=online"]))
    with pytest.raises(KdqError, match="one row, not 2"):
        trial.log_trial(compose(["logger.wandb.mode=online"]), [ROW, ROW])


def test_the_sweep_of_the_notebook_composes() -> None:
    """With the first and the last value of each parameter, as W&B's agent puts them in the command."""
    (block,) = re.findall(r"```yaml\n(.*?)```", text("wandb.ipynb"), re.S)
    sweep = yaml.safe_load(block)
    assert OBJECTIVES[sweep["metric"]["name"]] == sweep["metric"]["goal"]
    program, *arguments = sweep["command"]
    assert program == "kdq"
    spans = {name: one.get("values") or [one["min"], one["max"]] for name, one in sweep["parameters"].items()}
    for end in (0, -1):
        args = {name: {"value": values[end]} for name, values in spans.items()}
        given = create_sweep_command_args({"args": args})["args_no_hyphens"]
        cfg = compose([word for part in arguments for word in (given if part == "${args_no_hyphens}" else [part])])
        assert cfg.method.alpha == spans["method.alpha"][end]
        assert isinstance(cfg.quant.bits, int)
        assert cfg.logger.wandb.mode == "online"
