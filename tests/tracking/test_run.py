"""Stages that tell what they do to CSV files, or to nobody."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from kdq.tracking.open import tracked
from kdq.tracking.run import Artifact, RunInfo, RunLogger, flat
from kdq.utils.errors import KdqError


def _tell_everything(track: RunLogger) -> None:
    track.axis("bits", ["top1"])
    track.metrics({"bits": 4, "top1": 97.0})
    track.summary({"top1": 97.0})
    track.table("layers", ["layer"], [["conv1"]])
    track.lines("curves", "title", "x", "y", {"a": [(1, 2)]})
    track.points("points", "title", "x", "y", [(1, 2)])
    track.bars("bars", "title", "layer", "bits", [("conv1", 2)])
    track.made(Artifact("digits", "0123", "float", Path("nowhere"), {}))


@pytest.mark.parametrize(("kind", "files"), [("none", []), ("csv", ["hparams.yaml", "metrics.csv"])])
def test_csv_keeps_metrics_and_config_and_none_nothing(kind: str, files: list[str], tmp_path: Path) -> None:
    with tracked({"kind": kind}, tmp_path, RunInfo("quantize", "cell", "sweep", "key", {"data": "digits"})) as track:
        _tell_everything(track)
    found = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(found) == files
    assert track.folder == ""
    if kind == "csv":
        (row,) = csv.DictReader(found["metrics.csv"].open())
        assert (float(row["bits"]), float(row["top1"])) == (4, 97)
        assert "data: digits" in found["hparams.yaml"].read_text()


@pytest.mark.parametrize(
    "logger",
    [
        {"kind": "mlflow"},
        {"kind": "wandb", "mode": "sometimes", "upload": "none"},
        {"kind": "wandb", "mode": "offline", "upload": "most"},
    ],
)
def test_unknown_settings_are_refused(tmp_path: Path, logger: dict[str, Any]) -> None:
    with (
        pytest.raises(KdqError, match=r"logger\.(kind|mode|upload)='\w+' is unknown: use "),
        tracked(logger, tmp_path, RunInfo("quantize", "cell", "sweep", "key")),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_nested_config_becomes_flat() -> None:
    assert flat({"net": {"depth": 8, "stem": {"width": 2}}, "seed": 0}) == {
        "net/depth": 8,
        "net/stem/width": 2,
        "seed": 0,
    }


def test_what_a_failed_stage_told_is_kept(tmp_path: Path) -> None:
    def stage() -> None:
        with tracked({"kind": "csv"}, tmp_path, RunInfo("quantize", "cell", "sweep", "key")) as track:
            track.metrics({"top1": 97.0})
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stage()
    (file,) = tmp_path.rglob("metrics.csv")
    assert "97.0" in file.read_text()
