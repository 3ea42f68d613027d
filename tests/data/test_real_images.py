"""On request only: all 60 000 real CIFAR-10 images, when KDQ_CIFAR10 names a folder with their train/ and test/."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(1800)
@pytest.mark.skipif("KDQ_CIFAR10" not in os.environ, reason="KDQ_CIFAR10 names no folder of CIFAR-10 images")
def test_cifar10_as_a_folder_of_images(cli: Any, tmp_path: Path) -> None:
    """One short epoch is enough to tell real learning, and real quantization, from chance (10 %)."""
    code, _, err = cli(
        "data=image_folder",
        "data.name=cifar10_jpeg",
        f"data.root={os.environ['KDQ_CIFAR10']}",
        "method=baseline",
        "student.recipe.epochs=1",
        "data.train_limit=15000",
        "data.test_limit=2000",
        "quant.calibration_images=256",
        "quant.bits=[2,4,32]",
        "logger=none",
    )
    assert code == 0, err
    rows = {row["bits"]: row for row in (json.loads(p.read_text()) for p in (tmp_path / "rows").glob("*.json"))}
    assert rows[32]["top1"] == pytest.approx(rows[32]["top1_float"], abs=0.1)
    assert rows[4]["top1"] > 30
    assert rows[4]["drop"] < 5
    assert rows[2]["size_bytes"] < rows[4]["size_bytes"] < rows[32]["size_bytes"]
