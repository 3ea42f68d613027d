"""Hydra's own sweepers and launchers run the same cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from tests.conftest import TINY


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (output / "rows").glob("*.json")]


@pytest.mark.parametrize(
    "other", [["hydra/sweeper=basic"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_a_grid_runs_under_others(other: list[str], cli: Any, tmp_path: Path) -> None:
    code, _, err = cli("-m", *other, "method=vkd", "seed=0,1", "quant.bits=[2,8]", *TINY)
    assert code == 0, err
    assert sorted((row["seed"], row["bits"]) for row in rows(tmp_path)) == [(0, 2), (0, 8), (1, 2), (1, 8)]
    assert len(list((tmp_path / "store").glob("digits-*"))) == 4


def test_optuna_searches_on_validation_accuracy(cli: Any, tmp_path: Path) -> None:
    arguments = ("experiment=tune_dkd", "hydra.sweeper.n_trials=3", *TINY)
    code, _, err = cli(*arguments)
    assert code == 0, err
    (result,) = tmp_path.glob("runs/*/optimization_results.yaml")
    found = OmegaConf.load(result)
    assert found.best_value == max(row["val_top1"] for row in rows(tmp_path))
    assert set(found.best_params) == {"method.alpha", "method.beta"}
    assert len(rows(tmp_path)) == 3
    code, _, err = cli(*arguments, "hydra/sweeper=kdq")
    assert code == 1
    assert "options of another sweeper; choose it, such as hydra/sweeper=optuna" in err


@pytest.mark.parametrize(
    ("arguments", "kind", "plugin"),
    [(["experiment=tune_dkd"], "sweeper", "optuna"), (["-m", "hydra/launcher=joblib"], "launcher", "joblib")],
)
def test_a_plugin_that_is_not_installed_is_named_with_its_extra(
    arguments: list[str], kind: str, plugin: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Plugins.instance()  # registers those that are installed
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][kind], f"{plugin}.yaml")
    code, _, err = cli(*arguments, *TINY)
    assert code == 1
    assert err == f"kdq: hydra/{kind}={plugin} is a plugin: pip install 'kdq[{plugin}]'\n"


def test_test_images_select_nothing(cli: Any) -> None:
    code, _, err = cli("kdq.objective=top1", "method=baseline", *TINY)
    assert code == 1
    assert "kdq: kdq.objective=top1 cannot be searched for: use val_top1" in err
