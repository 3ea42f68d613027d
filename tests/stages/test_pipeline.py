"""A job from its config to its rows, when several ask for the same ones at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

import kdq.stages.pipeline
from kdq.stages.pipeline import run
from kdq.utils.config import compose
from tests.conftest import TINY


def test_equal_and_overlapping_jobs_at_once_quantize_every_width_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(*overrides: str) -> DictConfig:
        fixed = ["method=baseline", "logger=none", f"paths.output_dir={tmp_path}"]
        return compose([*TINY, *fixed, *overrides])

    run(config("quant=none"))  # trains
    made, real = [], kdq.stages.pipeline.quantize

    def quantize(cell: Any, entry: Any, keys: dict[str, str], *rest: Any) -> Any:
        made.extend(keys)
        return real(cell, entry, keys, *rest)

    monkeypatch.setattr(kdq.stages.pipeline, "quantize", quantize)
    # Each with a config of its own, as processes have: OmegaConf's nodes are not made for several threads.
    asked = [config(f"quant.bits={bits}") for bits in ["[2,8]"] * 4 + ["[4,8]"] * 2]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(run, asked))
    assert sorted(made) == ["2", "4", "8"]
    assert [[row.bits for row in rows] for rows in found] == [[2, 8]] * 4 + [[4, 8]] * 2
    assert len({row.artifact for rows in found for row in rows}) == 3
    assert found[0] == found[3]
    assert not list((tmp_path / "store/.locks").iterdir())
