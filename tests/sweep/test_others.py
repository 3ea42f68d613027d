"""Hydra's own sweepers and launchers run the same cells."""

import dataclasses
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from kdq.sweep.objective import directions, value
from kdq.utils.errors import KdqError
from tests.conftest import TINY
from tests.rows import ROW


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


def test_a_search_that_is_kept_in_a_file_goes_on(cli: Any, tmp_path: Path) -> None:
    kept = ("hydra.sweeper.study_name=s", f"hydra.sweeper.storage='sqlite:///{tmp_path}/search.db'")
    searched = ("kdq.objective=val_top1", "student.recipe.lr=tag(log, interval(0.001, 0.1))")
    arguments = ("-m", "hydra/sweeper=optuna", *kept, *searched, *TINY, "method=baseline", "quant.bits=4")
    for told in (1, 3):
        code, _, err = cli(*arguments, f"hydra.sweeper.n_trials={told - told // 2}")
        assert code == 0, err
        assert len(rows(tmp_path)) == told
        with closing(sqlite3.connect(tmp_path / "search.db")) as database:
            values = [value for (value,) in database.execute("select value from trial_values")]
        assert sorted(values) == sorted(row["val_top1"] for row in rows(tmp_path))


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


def test_a_search_for_two_objectives_finds_what_none_beats_in_both(cli: Any, tmp_path: Path) -> None:
    arguments = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "kdq.objective=[val_top1,size_bytes]")
    code, _, err = cli(*arguments, "method=baseline", *TINY, "student.net.width=choice(0.25,0.3)")
    assert code == 0, err
    (result,) = tmp_path.glob("runs/*/optimization_results.yaml")
    for solution in OmegaConf.load(result).solutions:
        accuracy, size = solution["values"]
        found = rows(tmp_path)
        assert (accuracy, size) in {(row["val_top1"], row["size_bytes"]) for row in found}
        assert not any(row["val_top1"] > accuracy and row["size_bytes"] < size for row in found)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["kdq.objective=top1"], "kdq.objective=top1 cannot be searched for: nothing that is measured on test images"),
        (["kdq.objective=[val_top1,nll]"], "kdq.objective=nll cannot be searched for: nothing that is measured on"),
        (["kdq.objective=val_top"], r"did you mean val_top1\?"),
        (["-m", "hydra/sweeper=optuna", "seed=choice(0,1)"], "needs to know what for: give kdq.objective=val_top1"),
        (["-m", "hydra/sweeper=optuna", "kdq.objective=top1"], "kdq.objective=top1 cannot be searched for: nothing"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_before_anything_is_trained(
    arguments: list[str], answer: str, cli: Any, tmp_path: Path
) -> None:
    code, _, err = cli(*arguments, "method=baseline", *TINY)
    assert code == 1
    assert re.search(answer, err)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("val_top1", "maximize"), ("size_bytes", "minimize"), (["val_top1", "macs"], ["maximize", "minimize"])],
)
def test_a_search_goes_where_its_objective_is_better(objective: Any, expected: Any) -> None:
    assert directions(objective) == expected


def test_an_objective_is_told_as_it_is_asked_for() -> None:
    row = dataclasses.replace(ROW, val_top1=90.0, size_bytes=1000)
    assert value("val_top1", [row]) == 90.0
    assert value(["val_top1", "size_bytes"], [row]) == [90.0, 1000.0]
    with pytest.raises(KdqError, match="one row a cell, not 2"):
        value("val_top1", [row, row])
    with pytest.raises(KdqError, match="an older kdq, whose val_top1 was the float model's"):
        value("val_top1", [dataclasses.replace(row, row_format=3)])
    with pytest.raises(KdqError, match="was not measured"):
        value("latency_ms_onnx_int8", [dataclasses.replace(row, latency_ms_onnx_int8=None)])
