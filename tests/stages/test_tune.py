"""The stage between quantization and the row: trained once, found again, resumed, planned; rows of what was trained."""

import json
import os
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import kdq
from kdq.cli.app import CONFIG_PATH
from kdq.records.rows import Row
from kdq.stages.cell import Cell
from kdq.stages.pipeline import run, train
from kdq.stages.quantize import quantized_once
from kdq.stages.train import planned
from kdq.stages.tune import tuned_models
from kdq.sweep.plan import make_plan
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from tests.stages.test_train import SMALL, entries

ASKED = [
    *(override for override in SMALL if override != "quant=none"),
    "method=teacher",
    "quant.calibration_images=64",
]
TUNE = ["tune=qad", "tune.recipe.epochs=2", "tune.recipe.batch_size=16"]


def config(output: Path, *overrides: str) -> Any:
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        tune = [] if "tune=none" in overrides else TUNE
        return hydra.compose("config", [*ASKED, *tune, *overrides, f"paths.output_dir={output}"])


def test_what_is_left_float_counts_in_the_row(tmp_path: Path) -> None:
    (row,) = run(config(tmp_path, "quant.bits=2", "quant.keep_float=[conv1]"))
    (plain,) = run(config(tmp_path, "quant.bits=2", "quant.keep_float=[conv1]", "tune=none"))
    assert (row.avg_bits, row.weight_bits_total) == (plain.avg_bits, plain.weight_bits_total)
    assert row.avg_bits > 2


def test_rows_say_what_was_trained_and_what_it_computes(tmp_path: Path) -> None:
    cfg = config(tmp_path, "quant.bits=[2,4]")
    rows = run(cfg)
    (batch,) = Cell(cfg).images.evaluation("test", torch.device("cpu"))
    for row, bits in zip(rows, (2, 4), strict=True):
        assert (row.tune, row.tune_epochs, row.bits, row.avg_bits) == ("qad", 2, bits, bits)
        assert row.tune_seconds is not None
        assert row.tune_seconds > 0
        network = kdq.load(tmp_path / row.artifact).to(memory_format=torch.channels_last)
        assert {weight.levels for weight in network.quantized_weights.values()} == {2**bits}
        with torch.no_grad():
            logits = network(batch[0])
        assert row.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, batch[1]).item(), abs=1e-5)
    assert entries(tmp_path) == [
        "digits-baseline-resnet20-s0",
        "digits-teacher-resnet20-s0-best-b2-qad",
        "digits-teacher-resnet20-s0-best-b4-qad",
    ]
    stored = [json.loads(path.read_text()) for path in sorted((tmp_path / "store").glob("*-qad-*/metrics.json"))]
    assert [row.val_top1 for row in rows] == pytest.approx([facts["val_top1"] for facts in stored], abs=1e-4)
    assert run(cfg) == rows
    (tmp_path / rows[0].artifact).unlink()  # made again from what was trained
    assert run(cfg) == rows


def test_no_tuning_leaves_the_row_as_it_was(tmp_path: Path) -> None:
    """Its key too; the two rows stand side by side."""
    (plain,) = run(config(tmp_path, "quant.bits=2", "tune=none"))
    (tuned,) = run(config(tmp_path, "quant.bits=2"))
    assert (plain.tune, plain.tune_seconds, plain.tune_epochs) == ("", None, None)
    assert plain.config_hash != tuned.config_hash
    assert (plain.top1_float, plain.size_bytes) == (tuned.top1_float, tuned.size_bytes)


def test_a_rate_of_zero_and_frozen_batchnorm_give_the_row_of_quantization(tmp_path: Path) -> None:
    for act_bits in ("null", "8"):
        asked = ["quant.bits=2", f"quant.act_bits={act_bits}"]
        (plain,) = run(config(tmp_path, *asked, "tune=none"))
        (tuned,) = run(config(tmp_path, *asked, "tune.recipe.lr=0", "tune.batchnorm=frozen"))
        for column in ("top1", "nll", "ece", "avg_bits", "weight_bits_total"):
            assert getattr(plain, column) == getattr(tuned, column)


def test_a_training_that_spoils_the_network_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logged: list[Any] = []
    monkeypatch.setattr("kdq.stages.training.log_model", lambda *args: logged.append(args[-2:]))
    asked = ["quant.bits=4", "teacher.recipe.epochs=20"]  # the teacher has learned what can be lost
    (plain,) = run(config(tmp_path, *asked, "tune=none"))
    (tuned,) = run(
        config(tmp_path, *asked, "tune=qat", "tune.recipe.lr=3", "tune.recipe.epochs=1", "tune.images=100000")
    )
    assert "tune.images=100000, but there are" in caplog.text
    assert (tuned.nll, tuned.top1) == (plain.nll, plain.top1)
    assert "before it was tuned" in caplog.text
    weights, facts = logged[-1]
    (entry,) = (tmp_path / "store").glob("*-qat-*")
    metrics = json.loads((entry / "metrics.json").read_text())
    assert facts["best_epoch"] == -1
    assert facts["val_top1"] == metrics["val_top1"] == pytest.approx(metrics["val_top1_start"], abs=1e-4)
    torch.testing.assert_close(weights, load_file(entry / "weights.safetensors"), rtol=0, atol=0)


class Kill(Callback):
    """``kill -9`` in the second epoch of the process that said so."""

    armed = False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if Kill.armed and trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(output: Path, asked: list[str]) -> None:
    """A command that dies while it tunes: the teacher has one epoch."""
    Kill.armed = True
    run(config(output, *asked))


def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["quant.bits=2", "tune.images=32", "tune.alpha=0", "tune.batchnorm=frozen"]
    asked.append("+callbacks.kill._target_=tests.stages.test_tune.Kill")
    passes = []

    def counted(*args: Any) -> Any:
        passes.append(args)
        return quantized_once(*args)

    monkeypatch.setattr("kdq.stages.tune.quantized_once", counted)
    (undisturbed,) = run(config(tmp_path / "undisturbed", *asked))
    assert undisturbed.tune == "qad 32 images"
    (metrics,) = (tmp_path / "undisturbed" / "store").glob("*-qad-*/metrics.json")
    assert json.loads(metrics.read_text())["best_epoch"] == 1  # the last
    process = get_context("forkserver").Process(target=_killed, args=(tmp_path / "killed", asked))
    process.start()
    process.join(280)
    assert process.exitcode == -signal.SIGKILL
    (last,) = (tmp_path / "killed" / "store").glob(".work/*/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 0
    (resumed,) = run(config(tmp_path / "killed", *asked))
    assert len(passes) == 1  # the resumed training begins at the packed file
    assert facts(resumed) == facts(undisturbed)


def facts(row: Row) -> Row:
    """What does not depend on the clock."""
    return replace(
        row, latency_ms_torch=0.0, train_seconds=0.0, quantize_seconds=0.0, tune_seconds=0.0, wandb_run="", threads=None
    )


@pytest.mark.parametrize(
    "asked",
    [
        ["method=dml", "tune=qat", "quant.bits=3"],
        ["method=vkd", "tune.teacher=cell", "quant=best", "quant.bits=2", "quant.float_dtype=bf16"],
        ["quant=greedy", "quant.search.avg_bits=3", "quant.search.validation_images=16"],
    ],
)
def test_every_axis_of_a_grid_composes(asked: list[str], tmp_path: Path) -> None:
    (plain,) = run(config(tmp_path, *(override for override in asked if "tune" not in override), "tune=none"))
    (tuned,) = run(config(tmp_path, *asked))
    assert (plain.avg_bits, plain.bits) == (tuned.avg_bits, tuned.bits)
    assert tuned.size_bytes == pytest.approx(plain.size_bytes, rel=0.01)
    assert tuned.tune_epochs == 2


def test_a_sweep_trains_each_tuned_model_once_before_the_rows(tmp_path: Path) -> None:
    fixed = [override for override in ASKED if override != "method=teacher"]
    cells = [
        (f"method={method}", f"tune={tune}", f"quant.bits={bits}")
        for method in ("teacher", "vkd")
        for tune in ("none", "qad")
        for bits in (2, 4)
    ]

    def composed(cell: Any) -> Any:
        tune = [] if "tune=none" in cell else TUNE
        return compose([*fixed, *tune, *cell, f"paths.output_dir={tmp_path}"])

    plan = make_plan(cells, composed, tmp_path)
    kinds = [sorted({job.kind for job in wave}) for wave in plan.waves]
    assert kinds == [["teacher"], ["student", "tuned"], ["tuned"], ["rows"]]
    assert [len(wave) for wave in plan.waves] == [1, 3, 2, 4]
    for job in plan.jobs:
        if job.kind == "rows":
            assert {row.config_hash for row in run(composed(job.overrides))} == set(job.makes)
        else:
            train(composed(job.overrides), next(iter(job.makes)))
    assert make_plan(cells, composed, tmp_path).jobs == []
    assert len(entries(tmp_path)) == 6


def test_equal_trainings_are_one_model_whatever_they_are_called(tmp_path: Path) -> None:
    def keys(*asked: str) -> list[str]:
        cell = Cell(config(tmp_path, "quant.bits=[2,3]", *asked))
        return [model.key for model in tuned_models(cell, planned(cell)).values()]

    assert keys() == keys("quant.name=mine", "tune.name=mine") == keys("~tune.cutmix")  # which older rows have not
    others = ("tune.images=8", "tune.temperature=2", "tune.cutmix=true", "quant.order=natural")
    assert len(set(keys()).union(*map(keys, others))) == 10


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["quant=none"], "quant=none makes none"),
        (["tune.images=0"], "tune.images=0 must be at least 1"),
        (["tune.teacher=peer"], "self, cell"),
        (["+tune.temprature=2"], "temperature"),
        (["tune.recipe.epochs=0"], "recipe.epochs=0 must be at least 1"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_trained(
    asked: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(KdqError, match=said):
        run(config(tmp_path, *asked))
    assert not list(tmp_path.glob("store/digits-*"))
