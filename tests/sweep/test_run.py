"""Waves as they are launched: what failed, what is on record, what the terminal says. Launchers that lie and die."""

import dataclasses
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdq.records.failures import Failure, Job, read_failures, record, recorded
from kdq.records.rows import write_row
from kdq.stages.pipeline import run, train
from kdq.sweep.plan import Plan, make_plan
from kdq.sweep.run import run_plan
from kdq.sweep.show import failure_lines
from kdq.sweep.status import Status, present
from kdq.utils.config import compose
from kdq.utils.errors import StoppedTrialError
from tests.conftest import TINY
from tests.rows import ROW


class Launcher:
    """Runs jobs here, as kdq's task function does; ``fails`` maps a word of a job's overrides to what happens to it."""

    def __init__(self, output: Path, fails: dict[str, Any] | None = None) -> None:
        self.output, self.fails, self.launched = output, fails or {}, list[list[str]]()

    def __call__(self, jobs: list[list[str]], number: int) -> Sequence[Any]:
        self.launched.append([job[-1] if "kdq.train" in job[-1] else "rows" for job in jobs])
        return [self._run(job) for job in jobs]

    def _run(self, job: list[str]) -> Any:
        own = {word.partition("=")[0]: word.partition("=")[2].strip("'") for word in job}
        (self.output / "runs" / own["hydra.sweep.subdir"]).mkdir(parents=True)
        returned = type("JobReturn", (), {"_return_value": None})()
        for word, happens in self.fails.items():
            if word in own["hydra.job.name"]:
                if isinstance(happens, SystemError):
                    raise happens  # the launcher itself
                returned._return_value = happens
                return returned
        cfg = compose([word for word in job if not word.startswith("hydra.")])
        if key := own.get("kdq.train"):
            train(cfg, key)
        else:
            run(cfg)
        return returned


def plan(output: Path, *cells: tuple[str, ...]) -> Plan:
    whole = [(*cell, *TINY, f"paths.output_dir={output}") for cell in cells]
    return make_plan(whole, lambda overrides: compose(list(overrides)), output)


CELLS = [(f"method={method}", "quant.bits=[2,4]") for method in ("teacher", "baseline", "vkd")]


def sweep(output: Path, launcher: Launcher) -> tuple[Plan, list[Failure]]:
    made = plan(output, *CELLS)
    return made, run_plan(made, launcher, output / "runs", Status(Console(stderr=True), made, live=False))


def test_a_grid_is_made_in_three_waves_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = Launcher(tmp_path)
    assert sweep(tmp_path, launcher)[1] == []
    assert [len(wave) for wave in launcher.launched] == [2, 1, 3]
    assert len(list((tmp_path / "rows").glob("*.json"))) == 6
    said = capsys.readouterr().err
    for line in ("wave 1 of 3: 2 jobs (1 teacher, 1 student)", "[6/6] digits-vkd-resnet20-s0-best: rows done in"):
        assert line in said
    again = Launcher(tmp_path)
    assert sweep(tmp_path, again)[1] == []
    assert again.launched == []


def test_a_model_that_fails_takes_only_what_needs_it(tmp_path: Path) -> None:
    failing = Launcher(tmp_path, {"vkd-resnet20-s0": ValueError("out of memory\nwith a trace")})
    made, failures = sweep(tmp_path, failing)
    assert [len(wave) for wave in failing.launched] == [2, 1, 2]
    assert [failure.name for failure in failures] == [
        "digits-vkd-resnet20-s0",
        "digits-vkd-resnet20-s0-best-b2",
        "digits-vkd-resnet20-s0-best-b4",
    ]
    assert read_failures(tmp_path).keys() == {failure.key for failure in failures}
    assert len({failure.log for failure in failures}) == 1
    assert all("ValueError: out of memory with a trace" in failure.cause for failure in failures)
    first, second = failure_lines(made, failures)
    assert first.startswith("failed: digits-vkd-resnet20-s0 method=vkd: ValueError: out of memory with a trace")
    assert second == "not made, because they need what failed: digits-vkd-resnet20-s0-best"
    # The same command again makes only those, and their records go.
    again = Launcher(tmp_path)
    assert sweep(tmp_path, again)[1] == []
    assert [len(wave) for wave in again.launched] == [1, 1]
    assert read_failures(tmp_path) == {}


def test_a_launcher_that_dies_does_not_undo_what_is_done(tmp_path: Path) -> None:
    """A pool that loses one worker raises for all jobs; those that were made before are made."""
    dying = Launcher(tmp_path, {"digits-vkd-resnet20-s0-best": SystemError("the pool is broken")})
    _, failures = sweep(tmp_path, dying)
    assert [failure.name for failure in failures] == [f"digits-vkd-resnet20-s0-best-b{bits}" for bits in (2, 4)]
    assert "the pool is broken" in failures[0].cause
    assert len(list((tmp_path / "rows").glob("*.json"))) == 4


def test_a_job_that_says_all_is_well_and_made_nothing_has_failed(tmp_path: Path) -> None:
    _, failures = sweep(tmp_path, Launcher(tmp_path, {"baseline-resnet20-s0-best": None}))
    assert {failure.cause for failure in failures} == {"the job ended without a result"}
    assert len(failures) == 2


def test_a_training_that_its_search_has_stopped_has_not_failed(tmp_path: Path) -> None:
    for error in (ValueError("no"), StoppedTrialError("weak", 0.5)):
        with pytest.raises(type(error)), recorded(tmp_path, {"key": "name"}, Job()):
            raise error
        assert list(read_failures(tmp_path)) == ["key"] * isinstance(error, ValueError)


def test_records_that_cannot_be_read_count_as_none(tmp_path: Path) -> None:
    record(tmp_path, Failure("cell", "abc", "cause", "log", ["method=vkd"]))
    (tmp_path / "failed" / "damaged-def.json").write_text("{")
    assert read_failures(tmp_path).keys() == {"abc"}


def test_the_screen_tells_waiting_jobs_from_running_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdq.sweep.status.INTERVAL", 0.01)
    said = io.StringIO()
    made, console = plan(tmp_path, *CELLS), Console(file=said, force_terminal=True, width=120)
    status, jobs = Status(console, made, live=True), made.waves[0]
    folders = [tmp_path / "runs" / str(number) for number in range(len(jobs))]
    (folders[0] / "slurm").mkdir(parents=True)  # in a queue
    (folders[1] / ".hydra").mkdir(parents=True)
    with status.wave(jobs, folders):
        while "0 done, 1 running, 0 failed, 1 waiting" not in said.getvalue():  # or the test's time is up
            time.sleep(0.05)
    assert jobs[1].name in said.getvalue()
    assert jobs[0].name not in said.getvalue()


def test_a_refused_submission_takes_no_submitted_job_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdq.sweep import slurm

    ends = {"a": "done a", "c": "done c"}

    def submit(name: str) -> Any:
        if name == "b":
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        return type("Job", (), {"done": lambda self: True, "results": lambda self: [ends[name]]})()

    monkeypatch.setattr(slurm, "_submit", submit)
    monkeypatch.setattr(slurm, "failed", lambda task, error: f"{task}: {error}")
    assert slurm.launch(["a", "b", "c"]) == [  # type: ignore[list-item]
        "done a",
        "b: RuntimeError: QOSMaxSubmitJobPerUserLimit (kdq.debug=true shows where)",
        "done c",
    ]


def test_rows_are_done_when_they_have_the_columns_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model.kdq").write_bytes(b" " * ROW.size_bytes)
    row = dataclasses.replace(ROW, artifact="model.kdq")
    write_row(tmp_path / "rows", row)
    assert present(tmp_path, [ROW.config_hash]) == {ROW.config_hash}
    assert not present(tmp_path, [ROW.config_hash], {"top1_onnx_int8": None})
    write_row(tmp_path / "rows", dataclasses.replace(row, top1_onnx_int8=97.0, deploy_hash="a"))
    assert present(tmp_path, [ROW.config_hash], {"top1_onnx_int8": None, "deploy_hash": "a"})
    assert not present(tmp_path, [ROW.config_hash], {"top1_onnx_int8": None, "deploy_hash": "b"})
    (tmp_path / "model.kdq").unlink()
    assert not present(tmp_path, [ROW.config_hash])
