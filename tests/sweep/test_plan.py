"""What a sweep launches, against the literal list of models and rows of its cells."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from rich.console import Console

from kdq.records.rows import write_row
from kdq.stages.cell import Cell
from kdq.stages.pipeline import run, train
from kdq.stages.train import planned
from kdq.sweep.plan import Overrides, Plan, make_plan
from kdq.sweep.show import cost, duration, print_plan, summary
from kdq.utils.config import compose
from tests.conftest import TINY
from tests.rows import ROW

METHODS = ("teacher", "baseline", "vkd", "mixup", "dml", "dkd")
BITS = (2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 26, 32)


def config(output: Path) -> Any:
    return lambda overrides: compose([*overrides, *TINY, f"paths.output_dir={output}"])


def plan_of(output: Path, cells: Sequence[Overrides]) -> Plan:
    return make_plan(cells, config(output), output)


def grid(**axes: Sequence[Any]) -> list[Overrides]:
    names = [name.replace("__", ".") for name in axes]
    return [
        tuple(f"{n}={value}" for n, value in zip(names, point, strict=True))
        for point in itertools.product(*axes.values())
    ]


def kinds(plan: Plan) -> list[dict[str, int]]:
    return [{k: sum(job.kind == k for job in wave) for k in {job.kind for job in wave}} for wave in plan.waves]


def test_six_methods_twelve_widths_two_seeds_are_twelve_trainings_and_twelve_passes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid(method=METHODS, seed=(0, 1), quant__bits=BITS))
    assert len(plan.rows) == 6 * 12 * 2
    # A teacher and a baseline for each seed, DML's students beside them; then what the teachers teach; then rows.
    assert kinds(plan) == [{"teacher": 2, "student": 4}, {"student": 6}, {"rows": 12}]
    assert sum(len(job.makes) for job in plan.waves[-1]) == 144
    for number, wave in enumerate(plan.waves):
        earlier = {key for before in plan.waves[:number] for job in before for key in job.makes}
        assert all(job.needs <= earlier for job in wave)
    assert [len(job.needs) for job in plan.waves[-1]].count(2) == 6  # of a distilled student and its teacher


def test_the_keys_of_jobs_are_those_of_a_cell_alone(tmp_path: Path) -> None:
    """Every job of the plan, run in order as a launcher would, finds what it needs, and nothing is left to make."""
    cells = grid(method=("vkd", "dml"), quant__bits=(2, 4))
    cells = [(*cell, "method.weights=baseline") if "method=dml" in cell else cell for cell in cells]
    plan = plan_of(tmp_path, cells)
    assert kinds(plan) == [{"teacher": 1, "student": 1}, {"student": 2}, {"rows": 2}]
    dml = next(job for job in plan.waves[1] if "dml" in job.name)
    assert dml.needs == {key for job in plan.waves[0] if job.kind == "student" for key in job.makes}
    for job in plan.jobs:
        cfg = config(tmp_path)(job.overrides)
        store = {path.name for path in (tmp_path / "store").glob("[!.]*-*")}
        if job.kind == "rows":
            assert {row.config_hash for row in run(cfg)} == set(job.makes)
            assert {path.name for path in (tmp_path / "store").glob("[!.]*-*")} == store  # nothing was trained
        else:
            (key,) = job.makes
            train(cfg, key)
            new = {path.name for path in (tmp_path / "store").glob("[!.]*-*")} - store
            assert {name for name in new if name.endswith(key)} == new - {
                n for n in new if "-peer-" in n or "-student-" in n
            }
    assert plan_of(tmp_path, cells).jobs == []


def test_what_is_there_is_not_launched(tmp_path: Path) -> None:
    cells = grid(method=("teacher", "baseline", "vkd"), quant__bits=(2, 4))
    run(config(tmp_path)(("method=baseline", "quant.bits=[2]")))
    plan = plan_of(tmp_path, cells)
    names = [[job.name for job in wave] for wave in plan.waves]
    assert [sorted(wave) for wave in names] == [
        ["digits-teacher-resnet20-s0"],
        ["digits-vkd-resnet20-s0"],
        ["digits-baseline-resnet20-s0-best", "digits-teacher-resnet20-s0-best", "digits-vkd-resnet20-s0-best"],
    ]
    (half,) = [job for job in plan.waves[-1] if "baseline" in job.name]
    assert list(half.makes.values()) == ["digits-baseline-resnet20-s0-best-b4"]
    assert plan.models_there == 1
    assert plan.speed > 0


def test_a_student_that_is_there_needs_no_teacher(tmp_path: Path) -> None:
    run(config(tmp_path)(("method=vkd", "quant.bits=4")))
    teacher = planned(Cell(config(tmp_path)(("method=vkd",)))).needs[0]
    (folder,) = (tmp_path / "store").glob(f"*-{teacher.key}")
    shutil.rmtree(folder)
    assert kinds(plan_of(tmp_path, grid(method=("vkd",), quant__bits=(2,)))) == [{"rows": 1}]


def test_cells_that_mean_the_same_row_are_one(tmp_path: Path) -> None:
    """A teacher's row knows nothing of how students learn."""
    plan = plan_of(tmp_path, grid(method=("teacher",), student__recipe__lr=(0.1, 0.2), quant__bits=(4,)))
    assert len(plan.rows) == 1
    assert kinds(plan) == [{"teacher": 1}, {"rows": 1}]


def test_cells_that_deploy_one_row_otherwise_are_refused(tmp_path: Path) -> None:
    for axes in ({"deploy": ("none", "onnx")}, {"deploy": ("onnx",), "deploy__threads": (1, 2)}):
        plan = plan_of(tmp_path, grid(quant__bits=(4, 8), **axes))
        ((overrides, cause),) = plan.impossible
        assert {f"{name.replace('__', '.')}={values[-1]}" for name, values in axes.items()} <= set(overrides)
        assert "a row has one deployment: run deploy=... in a command of its own" in cause
        assert len(plan.rows) == 2
    assert not plan_of(tmp_path, grid(quant__bits=("[2,4]", "[4,8]"), deploy=("onnx", "onnx"))).impossible


def test_lists_of_bits_join_and_candidates_of_a_search_do_not(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [("quant.bits=[2,3]",), ("quant.bits=[3,4]",), ("quant.bits=8",)])
    assert [job.what for job in plan.waves[-1]] == ["4 rows at 2 3 4 8 bits"]
    plan = plan_of(tmp_path, [("quant=greedy", f"quant.search.candidates={c}") for c in ("[2,4]", "[2,8]")])
    assert [job.what for job in plan.waves[-1]] == ["1 row at 2-4 bits", "1 row at 2-8 bits"]


def test_a_sweep_has_one_output_folder(tmp_path: Path) -> None:
    plan = make_plan(
        grid(paths__output_dir=(tmp_path, tmp_path / "b")), lambda given: compose([*given, *TINY]), tmp_path
    )
    assert [(given, "into one folder" in cause) for given, cause in plan.impossible] == [
        ((f"paths.output_dir={tmp_path / 'b'}",), True)
    ]
    assert len(plan.rows) == 1


def test_a_cell_that_cannot_be_planned_is_one_failure_and_a_mistyped_command_is_none_at_all(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid(method=("baseline",), quant__bits=(1, 4)))
    assert [cause for _, cause in plan.impossible] == ["quant.bits=1 must be a whole number from 2 to 32"]
    assert len(plan.rows) == 1
    with pytest.raises(HydraException):
        plan_of(tmp_path, [("method=baseline",), ("method=bseline",)])


def test_widths_that_something_else_follows_are_cells_of_their_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid(method=("baseline",), quant__bits=(4, 8), quant__act_bits=("${quant.bits}",)))
    assert [sorted(job.makes.values()) for job in plan.waves[-1]] == [
        ["digits-baseline-resnet20-s0-best-b4"], ["digits-baseline-resnet20-s0-best-b8"],
    ]  # fmt: skip
    assert not plan.impossible


def test_a_float_network_is_one_row_beside_any_widths(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid(method=("baseline",), quant=("rtn", "none"), quant__bits=(4, 8)))
    names = sorted(name.rpartition("-s0-")[2] for job in plan.waves[-1] for name in job.makes.values())
    assert names == ["none-b32", "rtn-b4", "rtn-b8"]


def test_options_of_a_tuning_go_with_cells_that_have_none(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid(method=("baseline",), tune=("none", "qad"), tune__recipe__epochs=(1,)))
    assert [job.what for job in plan.waves[1]] == ["tuned, 1 epochs"]
    assert not plan.impossible


def test_the_plan_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, grid(method=("vkd",), quant__bits=(2, 4)))
    print_plan(Console(), plan)
    text = capsys.readouterr().out
    for words in ("3 jobs in 3 waves", "teacher, 2 epochs", "2 rows at 2 4 bits", "2 asked for, 0 there, 2 to make"):
        assert words in text
    assert "2 distinct, 0 there, 2 to make" in text
    assert "again" not in text


def test_rows_of_an_older_kdq_that_are_made_again_are_said(tmp_path: Path) -> None:
    """Those of this one's format that another setting made are other rows."""
    alike: dict[str, Any] = {"arch": "resnet20", "quantizer": "best", "bits": 2}
    write_row(tmp_path / "rows", replace(ROW, **alike, config_hash="feed", row_format=2))
    write_row(tmp_path / "rows", replace(ROW, **alike | {"bits": 4}, config_hash="beef"))
    plan = plan_of(tmp_path, grid(method=("vkd",), quant__bits=(2, 4, 8)))
    assert "again:    1 of them, which an older kdq made" in "\n".join(summary(plan))


def test_work_is_three_forward_passes_of_what_learns_and_one_of_what_teaches(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid(method=("baseline", "vkd", "dml"), quant__bits=(4,)))
    works = {job.name: job.work for wave in plan.waves[:2] for job in wave if job.kind == "student"}
    (teacher,) = [job.work for job in plan.jobs if job.kind == "teacher"]
    baseline = works["digits-baseline-resnet20-s0"]
    assert works["digits-dml-resnet20-s0"] == 2 * baseline
    assert works["digits-vkd-resnet20-s0"] == pytest.approx(baseline + teacher / 3)
    # resnet8 of width 1/4 at 8x8, by hand: the stem, three stages of two 3x3 convolutions and two 1x1, the classifier.
    stem, one = 9 * 4 * 64, 2 * 9 * 4 * 4 * 64
    two, three = (9 * 4 * 8 + 9 * 8 * 8 + 4 * 8) * 16, (9 * 8 * 16 + 9 * 16 * 16 + 8 * 16) * 4
    assert baseline == 3 * 2 * 256 * (stem + one + two + three + 16 * 10)


def test_costs_and_times_are_readable() -> None:
    assert [cost(work, 0) for work in (2.5e12, 999.4e9, 999.6e9)] == ["2.5 TMAC", "999 GMAC", "1 TMAC"]
    assert cost(5e8, 5e8) == "0.5 GMAC, 1 s"
    assert cost(0, 1) == "?"
    assert [duration(s) for s in (42, 600, 9000, 400000)] == ["42 s", "10 min", "2.5 h", "4.6 days"]


def test_a_damaged_model_takes_only_its_own_rows_with_it(tmp_path: Path) -> None:
    cells = grid(method=("teacher", "baseline"), quant__bits=(2,))
    made = {}
    for job in plan_of(tmp_path, cells).waves[0]:
        (made[job.kind],) = job.makes
        train(config(tmp_path)(job.overrides), made[job.kind])
    (weights,) = (tmp_path / "store").glob(f"*-{made['student']}/weights.safetensors")
    weights.write_bytes(weights.read_bytes() + b"x")
    plan = plan_of(tmp_path, cells)
    damaged = [cause for _, cause in plan.impossible if "does not match its checksum: delete the folder" in cause]
    assert len(damaged) == 1
    assert len(plan.rows) == len(plan.jobs) == 1
