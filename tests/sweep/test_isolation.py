"""Jobs that share a process leave nothing to each other, whether they succeed or fail."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import wandb
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tests.cli.test_app import CIRCUMSTANCES
from tests.conftest import TINY


def _state() -> dict[str, Any]:
    """What a job could leave in its process."""
    return {
        "environment": {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "HYDRA_FULL_ERROR")},
        "folder": os.getcwd(),
        "handlers": {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)},
        "process group": torch.distributed.is_initialized(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "gpu memory": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        "W&B run": wandb.run,
        "bars and watchers": [t.name for t in threading.enumerate() if "Status" in t.name],
    }


def _rows(output: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in (output / "rows").glob("*.json")]
    return {row["config_hash"]: {k: v for k, v in row.items() if k not in CIRCUMSTANCES} for row in rows}


def test_the_order_and_the_failures_of_other_jobs_change_nothing(cli: Any, tmp_path: Path) -> None:
    arguments = [*(a for a in TINY if a != "logger=none"), "quant.bits=[2,8]"]
    assert cli("method=vkd", *arguments, f"paths.output_dir={tmp_path}/alone")[0] == 0
    before = _state()
    code, _, err = cli("-m", "method=vkd,baseline", "student.recipe.lr=1e30,0.1", *arguments)
    assert code == 1
    assert "kdq: 4 of 8 rows are missing" in err
    after = _state()
    assert {k: v for k, v in after.items() if v != before[k]} == {}
    assert not HydraConfig.initialized()
    GlobalHydra.instance().clear()
    alone, together = _rows(tmp_path / "alone"), _rows(tmp_path)
    assert len(alone) == 2
    assert {key: together[key] for key in alone} == alone
