"""Per-layer widths from packed files, frontiers from what searches write; damaged and hostile ones."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import kdq
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.bitsearch.mixed import search_bits
from kdq.records.rows import Row
from kdq.report.layers import frontiers, mixed_widths


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def test_widths_come_from_the_packed_file(tmp_path: Path, network: nn.Module, row: Callable[..., Row]) -> None:
    mixed, _ = kdq.quantize(network, [torch.randn(8, 1, 8, 8)], bits={"0": 5, "3": 2})
    same, _ = kdq.quantize(network, [torch.randn(8, 1, 8, 8)], bits=3)
    kdq.save(mixed, tmp_path / "mixed.kdq")
    kdq.save(same, tmp_path / "same.kdq")
    rows = [
        row(artifact="mixed.kdq", search="greedy", bits=3, avg_bits=2.2, config_hash="a"),
        row(artifact="same.kdq", search="greedy", bits=3, avg_bits=3.0, config_hash="b"),
        row(artifact="gone.kdq", search="greedy", bits=3, avg_bits=2.2, config_hash="c"),
    ]
    found = mixed_widths(tmp_path, rows)
    assert list(found) == ["a"]
    assert (found["a"].layers, found["a"].bits, found["a"].weights) == (["0", "3"], [5, 2], [36, 432])


def test_a_damaged_file_is_named(tmp_path: Path, row: Callable[..., Row], caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.kdq").write_bytes(b"x" * 40)
    with caplog.at_level(logging.WARNING):
        assert mixed_widths(tmp_path, [row(artifact="bad.kdq", search="greedy", bits=3, avg_bits=2.2)]) == {}
    assert "bad.kdq" in caplog.text


def test_frontiers_are_what_the_search_found(tmp_path: Path, network: nn.Module, row: Callable[..., Row]) -> None:
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,)))]
    found = search_bits(network, batches, batches, SearchConfig(avg_bits=3.0, candidates=(2, 4, 8)))
    found.write_frontier(tmp_path / "store" / "search" / "frontier-abc.json")
    read = frontiers(tmp_path, [row(config_hash="abc"), row(config_hash="../abc"), row(config_hash="none")])
    assert list(read) == ["abc"]
    assert read["abc"].avg_bits == found.avg_bits
    assert read["abc"].size_bytes == found.size_bytes
    points = found.found.points
    assert points[read["abc"].chosen].assignment == found.found.chosen.assignment
    for loss, point in zip(read["abc"].loss, points, strict=True):
        assert math.isnan(loss) if point.measure is None else loss == point.measure.loss


@pytest.mark.parametrize("text", ["", "[]", '{"points": 3}', json.dumps({"points": [], "chosen": {"assignment": {}}})])
def test_a_damaged_frontier_is_named(
    tmp_path: Path, text: str, row: Callable[..., Row], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store" / "search" / "frontier-abc.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert frontiers(tmp_path, [row(config_hash="abc")]) == {}
    assert str(path) in caplog.text
