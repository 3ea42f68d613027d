"""The stage that quantizes: an evaluation with the callback attached; rows and packed files that are there or not."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import kdq
import kdq.quant.callback
import kdq.stages.quantize as stage
from kdq.quant.bitsearch import bank
from kdq.records.rows import Row, read_rows
from kdq.stages.asked import complete
from kdq.stages.cell import Cell
from kdq.stages.pipeline import run
from kdq.utils.config import compose
from tests.stages.test_train import SMALL

ASKED = [
    *(override for override in SMALL if override != "quant=none"),
    "method=baseline",
    "quant.calibration_images=64",
]


def config(output: Path, *overrides: str) -> Any:
    return compose([*ASKED, *overrides, f"paths.output_dir={output}"])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The widths of every pass of a callback through a network."""
    seen: list[list[int]] = []
    real = kdq.quant.callback.quantize_widths

    def record(model: Any, batches: Any, widths: Any, *args: Any, **options: Any) -> Any:
        seen.append(list(widths))
        return real(model, batches, widths, *args, **options)

    monkeypatch.setattr(kdq.quant.callback, "quantize_widths", record)
    return seen


def test_rows_of_several_widths_are_one_pass_and_say_what_their_files_compute(
    tmp_path: Path, passes: list[list[int]]
) -> None:
    cfg = config(tmp_path, "quant.bits=[2,4,8]", "quant.act_bits=8")
    rows = run(cfg)
    assert passes == [[2, 4, 8]]
    assert [row.bits for row in rows] == [2, 4, 8]
    (batch,) = Cell(cfg).images.evaluation("test", torch.device("cpu"))
    for row in rows:
        assert Path(row.artifact).stem == Path(row.file_name).stem  # one name for both
        network = kdq.load(tmp_path / row.artifact).to(memory_format=torch.channels_last)
        with torch.no_grad():
            logits = network(batch[0])
        right = (logits.argmax(1) == batch[1]).double().mean().item()
        assert row.top1 == pytest.approx(100 * right, abs=1e-4)
        assert row.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, batch[1]).item(), abs=1e-5)
        assert row.drop == pytest.approx(row.top1_float - row.top1, abs=1e-4)
        assert row.val_top1 == pytest.approx(accuracy(network, cfg, "val"), abs=1e-4)
    assert len({row.top1_float for row in rows}) == 1
    (entry,) = (tmp_path / "store").glob("digits-baseline-*/metrics.json")
    assert {row.val_top1_float for row in rows} == {json.loads(entry.read_text())["val_top1"]}
    assert run(cfg) == rows
    assert len(passes) == 1


def accuracy(network: torch.nn.Module, cfg: Any, part: str) -> float:
    right, count = 0, 0
    with torch.no_grad():
        for images, labels in Cell(cfg).images.evaluation(part, torch.device("cpu")):
            right, count = right + int((network(images).argmax(1) == labels).sum()), count + len(labels)
    return 100 * right / count


def checksum(packed: Path) -> str:
    """Of the header and all tensors; safetensors writes the two entries of its metadata in any order."""
    with safe_open(packed, "pt") as file:
        return str(file.metadata()["sha256"])


@pytest.mark.parametrize("left", [None, 0, 100])
def test_a_packed_file_that_is_gone_or_cut_short_is_made_again_and_nothing_else(
    tmp_path: Path, passes: list[list[int]], left: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path, "quant.bits=[2,3,4]")
    rows = run(cfg)
    files = {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    packed = tmp_path / rows[1].artifact
    before, content = checksum(packed), packed.read_bytes()
    packed.unlink()
    if left is not None:
        packed.write_bytes(content[:left])
    assert not complete(tmp_path, rows[1], {})
    with caplog.at_level(logging.WARNING):
        assert run(cfg) == rows
    assert passes == [[2, 3, 4], [3]]
    assert {path: path.read_bytes() for path in files} == files
    assert checksum(packed) == before
    assert "is gone or cut short" in caplog.text
    assert "differs" not in caplog.text


def test_a_file_made_again_that_measures_something_else_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path, "quant.bits=3")
    (row,) = run(cfg)
    path = tmp_path / "rows" / row.file_name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nll": 7.5}))
    (tmp_path / row.artifact).unlink()
    with caplog.at_level(logging.WARNING):
        (again,) = run(cfg)
    assert f"differs: nll 7.5 -> {row.nll}" in caplog.text
    assert (again.nll, again.top1) == (row.nll, row.top1)
    assert read_rows(tmp_path / "rows") == [again]


def test_rows_are_published_without_their_packed_files(tmp_path: Path, passes: list[list[int]]) -> None:
    cfg = config(tmp_path, "quant.bits=3")
    (row,) = run(cfg)
    own = tmp_path / "rows" / row.file_name
    (tmp_path / "rows" / "published.jsonl").write_text(json.dumps(vars(row)) + "\n")
    own.unlink()
    (tmp_path / row.artifact).unlink()
    assert run(cfg) == [row]
    assert len(passes) == 1
    assert isinstance(row, Row)


def test_searches_of_one_model_share_what_they_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace, and the layers at every width, depend on everything but the budget."""
    filled = []
    real = bank.quantize_widths
    monkeypatch.setattr(bank, "quantize_widths", lambda *args, **how: filled.append(args) or real(*args, **how))
    made = ["quant=greedy", "quant.search.candidates=[2,4,8]", "quant.search.validation_images=64"]
    for average in (4.0, 3.0):
        (row,) = run(config(tmp_path, *made, f"quant.search.avg_bits={average}"))
        assert row.search == "greedy"
        assert row.avg_bits <= average
    folder = tmp_path / "store" / "search"
    assert len(list(folder.glob("trace-*.json"))) == 1
    assert len(list(folder.glob("frontier-*.json"))) == 2
    assert len(filled) == 1


def test_a_budget_of_bytes_is_one_of_the_row_s_own_file(tmp_path: Path) -> None:
    """Which says, beside the weights, what its images and classes are."""
    asked = ["quant=greedy", "quant.search.candidates=[2,4,8]", "quant.search.validation_images=32"]
    (row,) = run(config(tmp_path, *asked, "quant.search.avg_bits=4"))
    budget = row.size_bytes - 300
    (small,) = run(config(tmp_path, *asked, "quant.search.avg_bits=null", f"quant.search.size_bytes={budget}"))
    assert budget - 500 < small.size_bytes <= budget


def test_a_float_model_is_measured_once_for_all_quantizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = []
    real = stage.test
    monkeypatch.setattr(stage, "test", lambda *args: tests.append(args) or real(*args))
    (first,) = run(config(tmp_path, "quant=rtn", "quant.bits=4"))
    (second,) = run(config(tmp_path, "quant=gpfq", "quant.bits=4"))
    assert (first.top1_float, len(tests)) == (second.top1_float, 3)
    (kept,) = (tmp_path / "store" / "evaluated").iterdir()
    kept.write_text('{"top1": 1.0}')  # damaged
    (third,) = run(config(tmp_path, "quant=gptq", "quant.bits=4"))
    assert (third.top1_float, len(tests)) == (first.top1_float, 5)
    run(config(tmp_path, "quant=gptq", "quant.bits=4", "trainer.limit_test_batches=1"))
    assert len(tests) == 7
    (fewer,) = run(config(tmp_path, "quant=gptq", "quant.bits=4", "data.test_limit=7"))
    assert len(tests) == 9
    assert fewer.top1_float in [round(100 * right / 7, 4) for right in range(8)]
