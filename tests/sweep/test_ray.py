"""A real Ray on this machine: the same rows as without it, and a worker that is killed takes nothing with it."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_app import CIRCUMSTANCES
from tests.conftest import TINY

pytest.importorskip("ray")

LETHAL_NET = """
import os, signal, sys
from kdq.models import CifarResNet

def net(lethal=False, **options):
    if lethal and sys.argv[0].endswith("default_worker.py"):  # Ray's; not the command, which plans
        os.kill(os.getpid(), signal.SIGKILL)
    return CifarResNet(**options)
"""
CELL = ("-m", "method=baseline", "quant.bits=[2,8]", "student.net._target_=lethal_net.net", *TINY)


def rows(output: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((output / "rows").glob("*.json"))]
    return [{name: value for name, value in row.items() if name not in CIRCUMSTANCES} for row in found]


@pytest.mark.timeout(300)
def test_a_grid_over_ray_is_the_same_and_a_worker_that_is_killed_fails_alone(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lethal_net.py").write_text(LETHAL_NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for Ray's workers
    code, _, err = cli(*CELL, "hydra/launcher=ray", "+student.net.lethal=true,false")
    assert code == 1
    which = r"kdq: failed: digits-baseline-resnet20-s0 \+student\.net\.lethal=true: the job's Ray worker died: "
    assert re.search(which, err, re.IGNORECASE), err
    assert "kdq: 2 of 4 rows are missing" in err
    assert len(list(tmp_path.glob("runs/*/*/output.log"))) == 3  # two trainings, one job of rows
    code, _, err = cli(*CELL, "+student.net.lethal=false", f"paths.output_dir={tmp_path}/alone")
    assert code == 0, err
    assert len(rows(tmp_path / "alone")) == 2
    assert rows(tmp_path) == rows(tmp_path / "alone")


def test_what_ray_cannot_give_is_said_at_once(cli: Any) -> None:
    arguments = ("-m", "hydra/launcher=ray", "method=baseline", *TINY)
    _, _, err = cli(*arguments, "trainer.devices=auto")
    assert "hydra/launcher=ray: give trainer.devices a number, not auto" in err
    _, _, err = cli(*arguments, "hydra.launcher.num_cpus=1000")
    assert "a job asks Ray for 1000 CPUs and there are" in err
