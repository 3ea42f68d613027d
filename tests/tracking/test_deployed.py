"""What W&B shows of exported models: the columns of their rows, in the run of the rows."""

from pathlib import Path
from typing import Any

import pytest

from kdq.records.rows import Row, read_rows
from kdq.stages.quantize_log import DEPLOYED
from tests.conftest import TINY
from tests.offline_runs import OfflineRun, offline_runs

QUICK = ["deploy=onnx", "deploy.runs=3", "deploy.batch=4", "deploy.calibration_images=64"]


@pytest.fixture
def kdq_runs(tmp_path: Path, cli: Any) -> Any:
    """Run ``kdq -m ARGUMENTS``; returns the quantize and the report runs so far, and the row of the widest."""

    def run(*arguments: str) -> tuple[list[OfflineRun], list[OfflineRun], Row]:
        tiny = [argument for argument in TINY if argument != "logger=none"]
        code, _, error = cli("-m", *tiny, "method=baseline", *arguments)
        assert code == 0, error
        row = max(read_rows(tmp_path / "rows"), key=lambda row: row.bits)
        return offline_runs(tmp_path, "quantize"), offline_runs(tmp_path, "report"), row

    return run


def test_a_finished_cell_continues_its_run_when_it_is_deployed(kdq_runs: Any) -> None:
    kdq_runs("quant.bits=4")
    (first, second), reports, row = kdq_runs("quant.bits=4", *QUICK)
    assert first.run["run_id"] == second.run["run_id"]
    assert first.config == second.config
    assert Path(row.wandb_run).resolve() == first.folder
    assert not first.history("quantize/top1_onnx_int8")
    (point,) = second.history("quantize/top1_onnx_int8")
    assert point["_step"] > max(line["_step"] for line in first.history("_step"))
    assert point["quantize/bits"] == 4
    for name in (name for name in DEPLOYED if getattr(row, name) is not None):
        assert point[f"quantize/{name}"] == pytest.approx(getattr(row, name)), name
        assert second.axes[f"quantize/{name}"] == "quantize/bits"
    table = reports[-1].table("report/accuracy_vs_latency_digits_table")
    assert table == [{"latency_ms": pytest.approx(row.latency_ms_onnx_int8), "top1": row.top1_onnx_int8}]
    assert "report/accuracy_vs_latency_digits" not in reports[0].charts


def test_a_new_cell_tells_everything_in_one_run(kdq_runs: Any) -> None:
    (run,), _, row = kdq_runs("quant.bits=4", *QUICK)
    for column in ("top1", "bops", "latency_ms_torch", "top1_onnx_int8", "throughput_onnx_fp32"):
        (point,) = run.history(f"quantize/{column}")
        assert (point["quantize/bits"], point[f"quantize/{column}"]) == (4, pytest.approx(getattr(row, column)))
    assert run.exit_code == 0
