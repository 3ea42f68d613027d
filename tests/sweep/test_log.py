"""What a W&B user sees of one sweep: a grid with tiny networks, read back from its offline runs."""

import base64
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdq.records.rows import Row, read_rows
from kdq.report.cells import named
from kdq.report.words import answers
from tests.conftest import TINY
from tests.offline_runs import OfflineRun, offline_runs

ARGUMENTS = [argument for argument in TINY if argument != "logger=none"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[OfflineRun]]:
    """Two widths of a teacher and of the student that dkd makes of it, and a bit search, in one process."""
    from hydra.core.global_hydra import GlobalHydra

    from kdq.cli.app import main

    output = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (
            ["-m", "sweep=study", "method=teacher,dkd", "quant.bits=[2,4]"],
            [
                "-m",
                "sweep=search",
                "method=teacher",
                "quant=greedy",
                "quant.search.candidates=[2,4,8]",
                "quant.search.validation_images=64",
            ],
        ):
            patch.setattr("sys.argv", ["kdq", *arguments, *ARGUMENTS, f"paths.output_dir={output}"])
            GlobalHydra.instance().clear()
            main()
    return output, offline_runs(output)


def one(runs: list[OfflineRun], job_type: str, method: str | None = None, group: str = "study") -> OfflineRun:
    """The only run of these."""
    mine = [run for run in runs if (run.run["job_type"], run.run["run_group"]) == (job_type, group)]
    (found,) = [run for run in mine if method in (None, run.config["method"])]
    return found


def test_one_run_for_each_stage_and_one_for_each_sweep(sweep: Any) -> None:
    _, runs = sweep
    names = [(run.run["run_group"], run.run["job_type"], run.run["display_name"]) for run in runs]
    assert sorted(names) == [
        ("search", "quantize", "digits-teacher-resnet20-s0-greedy-b2-8"),
        ("search", "report", "report-search"),
        ("study", "distill", "digits-dkd-resnet20-s0"),
        ("study", "quantize", "digits-dkd-resnet20-s0-best-b2,4"),
        ("study", "quantize", "digits-teacher-resnet20-s0-best-b2,4"),
        ("study", "report", "report-study"),
        ("study", "teacher", "digits-teacher-resnet20-s0"),
    ]
    assert {run.run["project"] for run in runs} == {"kdq"}
    assert {run.exit_code for run in runs} == {0}


def test_every_axis_is_a_flat_key(sweep: Any) -> None:
    _, runs = sweep
    cell = one(runs, "quantize", "dkd")
    expected = {
        "data": "digits",
        "role": "student",
        "method": "dkd",
        "arch": "resnet20",
        "seed": 0,
        "teacher": "resnet20",
        "quantizer": "best",
        "alphabet": "uniform",
        "act_bits": 32,
        "bits": [2, 4],
        "search": "",
        "series": "dkd resnet20 best",
        "net/width": 0.25,
        "recipe/epochs": 2,
        "method/temperature": 4.0,
        "quant/calibration_images": 64,
        "data/train_limit": 256,
    }
    assert {name: cell.config[name] for name in expected} == expected
    assert not any(isinstance(value, dict) for run in runs for value in run.config.values())
    assert sorted(cell.run["tags"]) == ["2bit", "4bit", "best", "digits", "dkd", "resnet20", "s0"]


def test_a_training_logs_its_terms_speed_and_learning_rate(sweep: Any) -> None:
    _, runs = sweep
    run = one(runs, "distill", "dkd")
    assert run.axes["*"] == "trainer/global_step"
    losses = run.history("train/loss")
    assert [row["epoch"] for row in losses] == [0, 1]  # two steps an epoch, logged once in each
    for row in losses:
        assert row["train/loss"] == pytest.approx(row["train/ce"] + row["train/tckd"] + row["train/nckd"], rel=1e-3)
    assert [row["epoch"] for row in run.history("val/top1")] == [row["epoch"] for row in run.history("train/top1")]
    rates = [row["train/lr"] for row in run.history("train/lr")]
    assert rates[-1] < rates[0]
    assert rates[-1] == pytest.approx(0, abs=1e-3)  # one cycle
    speeds = run.history("train/images_per_second")
    assert [row["trainer/global_step"] for row in speeds] == [row["trainer/global_step"] for row in losses] == [1, 3]
    assert all(row["train/images_per_second"] > 0 for row in speeds)
    best = max(row["val/top1"] for row in run.history("val/top1"))
    assert run.summary["val_top1"] == pytest.approx(100 * best)


def test_accuracy_is_drawn_over_bits(sweep: Any) -> None:
    output, runs = sweep
    rows = {(row.method, row.quantizer, row.bits): row for row in read_rows(output / "rows")}
    for method in ("teacher", "dkd"):
        run = one(runs, "quantize", method)
        points = run.history("quantize/top1")
        assert [point["quantize/bits"] for point in points] == [2, 4]
        for point in points:
            row = rows[method, "best", point["quantize/bits"]]
            for column in ("top1", "top5", "drop", "nll", "ece", "size_bytes", "avg_bits"):
                assert point[f"quantize/{column}"] == pytest.approx(getattr(row, column))
                assert run.axes[f"quantize/{column}"] == "quantize/bits"
            assert run.summary[f"top1_{row.bits}bit"] == pytest.approx(row.top1)
        assert not any("*" in name for name in run.axes)
        assert Path(rows[method, "best", 2].wandb_run).resolve() == run.folder


def test_layers_are_a_table(sweep: Any) -> None:
    _, runs = sweep
    run = one(runs, "quantize", "dkd")
    layers = run.table("quantize/layers")
    for asked in ("2", "4"):
        mine = [layer for layer in layers if layer["asked"] == asked]
        assert [layer["layer"] for layer in mine][::9] == ["conv1", "fc"]  # ten layers, first to last
        assert {layer["bits"] for layer in mine} == {int(asked)}
    errors = {asked: sum(x["error"] for x in layers if x["asked"] == asked) for asked in ("2", "4")}
    assert 0 < errors["4"] < errors["2"]
    curves = run.table("quantize/layer_errors_table")
    assert [row["error"] for row in curves] == pytest.approx([layer["error"] for layer in layers])


def test_a_bit_search_shows_its_frontier_and_its_choice(sweep: Any) -> None:
    output, runs = sweep
    run = one(runs, "quantize", "teacher", "search")
    (path,) = (output / "store" / "search").glob("frontier-*.json")
    frontier = json.loads(path.read_text())
    points = run.table("bits/points")
    assert [point["avg_bits"] for point in points] == pytest.approx([p["avg_bits"] for p in frontier["points"]])
    measured = [(p["avg_bits"], p["measure"]["loss"]) for p in frontier["points"] if p["measure"]]
    assert [tuple(point.values()) for point in run.table("bits/frontier_table")] == [
        pytest.approx(point) for point in measured
    ]
    assert {row["layer"]: row["bits"] for row in run.table("bits/chosen_table")} == frontier["chosen"]["assignment"]
    assert run.charts["bits/frontier"]["panelDefId"] == "wandb/scatter/v0"
    assert run.axes["bits/loss"] == "bits/step"


def test_models_go_from_the_teacher_to_the_quantized_student(sweep: Any) -> None:
    output, runs = sweep
    teacher, student = one(runs, "teacher"), one(runs, "distill", "dkd")
    made = {
        run.run["run_id"]: [f"{a['name']}:{run.config['key']}" for a in run.artifacts] for run in (teacher, student)
    }
    assert teacher.config["inputs"] == []
    assert student.config["inputs"] == made[teacher.run["run_id"]]
    assert one(runs, "quantize", "teacher").config["inputs"] == made[teacher.run["run_id"]]
    cell = one(runs, "quantize", "dkd")
    assert cell.config["inputs"] == made[student.run["run_id"]]
    for run in (teacher, student):
        (artifact,) = run.artifacts
        assert run.config["key"] in artifact["aliases"]
        (entry,) = artifact["manifest"]["contents"]
        stored = Path(entry["ref"].removeprefix("file://"))
        assert stored == next((output / "store").glob(f"*-{run.config['key']}")) / "weights.safetensors"
        # Told before the store had it, with the digest of what the store then published.
        assert entry["digest"] == base64.b64encode(hashlib.md5(stored.read_bytes()).digest()).decode()
    rows = {row.config_hash: row for row in read_rows(output / "rows")}
    assert len(cell.artifacts) == 2
    for artifact in cell.artifacts:
        (entry,) = artifact["manifest"]["contents"]
        row = rows[next(alias for alias in artifact["aliases"] if alias != "latest")]
        assert (Path(entry["local_path"]), int(entry["size"])) == (output / row.artifact, row.size_bytes)


def test_tuned_models_have_a_lineage_and_names_of_their_own(tmp_path: Path, cli: Any) -> None:
    few = ("quant.bits=[2,4]", "tune.recipe.epochs=1", "tune.recipe.batch_size=64")
    for asked in (("tune=none",), ("tune=qad", *few), ("tune=qad", "quant.act_bits=8", *few)):
        code, _, err = cli("method=teacher", "quant.bits=[2,4]", *asked, *ARGUMENTS)
        assert code == 0, err
    runs = offline_runs(tmp_path)
    tunings = offline_runs(tmp_path, "tune")
    assert {(run.config["method"], run.config["role"], run.config["tune"]) for run in tunings} == {
        ("teacher", "teacher", "qad")
    }
    assert all({"teacher", "best", "qad"} <= set(run.run["tags"]) for run in tunings)
    made = {f"{a['name']}:{alias}": run for run in runs for a in run.artifacts for alias in a["aliases"]}
    takers = [run for run in runs if run.run["job_type"] in ("tune", "quantize")]
    for run in takers:
        assert len(run.config["inputs"]) == len(set(run.config["inputs"]))
        stages = [made[name].run["job_type"] for name in run.config["inputs"]]
        tuned = run.run["job_type"] == "quantize" and run.config["tune"]
        assert stages == (["tune", "tune"] if tuned else ["teacher"])
    quantized = [a["name"] for run in offline_runs(tmp_path, "quantize") for a in run.artifacts]
    assert len(quantized) == len(set(quantized)) == len(read_rows(tmp_path / "rows")) == 6


def test_the_run_of_the_sweep_has_all_rows_and_the_front(sweep: Any) -> None:
    output, runs = sweep
    rows = [row for row in read_rows(output / "rows") if row.quantizer == "best"]
    run = one(runs, "report")
    table = run.table("report/rows")
    assert {line["config_hash"]: line["top1"] for line in table} == {row.config_hash: row.top1 for row in rows}
    assert set(table[0]) >= {"data", "method", "bits", "size_bytes", "top1"}
    (said,) = answers(named(rows))
    assert run.summary["answer/digits"] == said.headline
    assert [line["comparison"] for line in run.table("report/comparisons")] == [line.cells[0] for line in said.lines]
    lines = run.table("report/accuracy_vs_bits_digits_table")
    assert [(line["curve"], line["avg_bits"], line["top1"]) for line in lines] == [
        (f"{row.method} resnet20 best", row.avg_bits, row.top1)
        for row in sorted(rows, key=lambda r: (r.method, r.bits))
    ]
    front = [(point["quantize/size_bytes"], point["pareto/digits"]) for point in run.history("pareto/digits")]
    assert front == [
        (row.size_bytes, row.top1) for row in sorted(rows, key=lambda row: row.size_bytes) if _unbeaten(row, rows)
    ]
    assert run.axes == {"pareto/digits": "quantize/size_bytes"}
    assert set(run.charts) == {f"report/{n}_digits" for n in ("accuracy_vs_bits", "frontiers", "accuracy_vs_bytes")}


def _unbeaten(row: Row, rows: list[Row]) -> bool:
    return not any(r.size_bytes <= row.size_bytes and r.top1 >= row.top1 and r is not row for r in rows)


def test_a_killed_training_goes_on_in_its_run(tmp_path: Path, cli: Any) -> None:
    arguments = [*ARGUMENTS, "method=baseline", "quant=none", "student.recipe.epochs=150"]
    command = [sys.executable, "-m", "kdq", *arguments, f"paths.output_dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # Killed between W&B's first writing and the end.
        while process.poll() is None and not any(b"val/top1" in log.read_bytes() for log in _logs(tmp_path)):
            time.sleep(0.02)
        process.kill()
    assert list((tmp_path / "store/.work").glob("*/last.ckpt")), "the training was over before it could be killed"
    code, _, err = cli(*arguments)
    assert code == 0, err
    first, second = offline_runs(tmp_path, "distill")
    assert first.run["run_id"] == second.run["run_id"]
    assert (first.exit_code, second.exit_code) == (None, 0)
    epochs = [[row["epoch"] for row in run.history("val/top1")] for run in (first, second)]
    assert epochs[0] == list(range(len(epochs[0])))
    assert 0 < epochs[1][0] <= epochs[0][-1] + 50  # W&B writes once a second: what it had not written is lost
    assert epochs[1] == list(range(epochs[1][0], 150))
    steps = [row["_step"] for run in (first, second) for row in run.history("val/top1")]
    assert steps == sorted(set(steps))


def _logs(output: Path) -> list[Path]:
    return list((output / "runs" / "wandb").glob("offline-run-*-distill-*/*.wandb"))
