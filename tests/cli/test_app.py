"""The command line from end to end, on real digits with networks that train in a second."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

import kdq
from kdq.data.images import Images
from kdq.data.sets import digits
from kdq.train.evaluate import evaluate
from kdq.utils.messages import describe
from tests.conftest import TINY, data_config

#: Columns that hold what a run took, or where it was, and not what it found.
CIRCUMSTANCES = ["latency_ms_torch", "train_seconds", "quantize_seconds", "wandb_run"]
METHODS = ("teacher", "baseline", "vkd")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The quickstart's grid with tiny networks, run as a user runs it."""
    output = tmp_path_factory.mktemp("grid")
    arguments = [a for a in TINY if a != "logger=none"]
    command = [sys.executable, "-m", "kdq", "experiment=quickstart", *arguments, f"paths.output_dir={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=output)
    assert done.returncode == 0, done.stderr
    return output, done


def test_quickstart_ends_with_table_plots_and_the_way_to_its_runs(grid: Any) -> None:
    output, done = grid
    for words in ("float", "2 bits", "3 bits", "4 bits", "8 bits", "32 bits", *METHODS):
        assert words in done.stdout
    for path in (
        "results.csv",
        "report/report.html",
        "report/report.md",
        "report/accuracy_vs_bits.png",
        "report/accuracy_vs_bytes.png",
    ):
        assert str(output / path) in done.stdout
        assert (output / path).stat().st_size > 0
    assert f"wandb leet {output / 'runs' / 'wandb'}" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        "store",
        "rows",
        "runs",
        "report",
        "results.csv",
        "results.parquet",
    }


def test_every_cell_has_a_row_and_its_file_has_the_size_it_says(grid: Any) -> None:
    output, _ = grid
    table = pd.read_csv(output / "results.csv")
    cells = [(method, bits) for method in METHODS for bits in (2, 3, 4, 8, 32)]
    assert sorted(zip(table["method"], table["bits"], strict=True)) == sorted(cells)
    for row in table.itertuples():
        assert (output / row.artifact).stat().st_size == row.size_bytes
        assert row.drop == pytest.approx(row.top1_float - row.top1, abs=1e-3)
        assert row.weight_bits_total == row.bits * row.weight_bits_total / row.avg_bits
        if row.bits == 32:
            assert row.top1 == row.top1_float
    one = table[table["method"] == "vkd"].set_index("bits")
    assert one["size_bytes"].is_monotonic_increasing
    saved = one.loc[8, "size_bytes"] - one.loc[2, "size_bytes"]
    weights = one.loc[8, "weight_bits_total"] / 8
    # Narrow widths store zero points too, and the header names the widths.
    assert 0.75 < saved / (weights * 6 / 8) < 1.05


def test_a_packed_file_is_the_network_of_its_row(grid: Any) -> None:
    output, _ = grid
    images = Images(digits(), data_config(train_limit=256))
    table = pd.read_csv(output / "results.csv")
    for row in table[table["bits"].isin([2, 8])].itertuples():
        network = kdq.load(output / row.artifact)
        found = evaluate(network, images.evaluation("test", torch.device("cpu")), 10)
        assert {name: getattr(row, name) for name in found} == found
        values = network.layer1[0].conv1.weight[0].unique()  # type: ignore[index,union-attr]
        assert len(values) <= 2**row.bits


def test_running_again_makes_nothing_new(grid: Any, cli: Any) -> None:
    output, _ = grid
    before = {path: path.stat().st_mtime_ns for folder in ("rows", "store") for path in (output / folder).rglob("*.*")}
    code, out, err = cli("experiment=quickstart", *TINY, f"paths.output_dir={output}")
    assert (code, err) == (0, "")
    assert "32 bits" in out
    after = {path: path.stat().st_mtime_ns for folder in ("rows", "store") for path in (output / folder).rglob("*.*")}
    assert after == before


def test_each_model_is_trained_once_and_the_teacher_is_shared(grid: Any) -> None:
    output, _ = grid
    entries = sorted(re.sub("-[0-9a-f]{16}$", "", p.name) for p in (output / "store").glob("digits-*"))
    assert entries == ["digits-baseline-resnet20-s0", "digits-baseline-resnet20-s0", "digits-vkd-resnet20-s0"]
    configs = [(p / "config.yaml").read_text() for p in (output / "store").glob("digits-*")]
    assert sum("others: {}" in text for text in configs) == 2
    assert len(list((output / "runs" / "wandb").glob("offline-run-*"))) == 7  # three of each and the sweep


def test_the_same_seed_gives_the_same_rows_bit_for_bit(grid: Any, cli: Any, tmp_path: Path) -> None:
    output, _ = grid
    code, _, err = cli("experiment=quickstart", "method=vkd", "quant.bits=[2,8]", *TINY)
    assert code == 0, err
    original = pd.read_csv(output / "results.csv").query("method == 'vkd' and bits in (2, 8)")
    again = pd.read_csv(tmp_path / "results.csv")
    left, right = (frame.drop(columns=CIRCUMSTANCES).reset_index(drop=True) for frame in (original, again))
    pd.testing.assert_frame_equal(left, right, check_exact=True)


def test_one_bad_cell_takes_no_other_with_it(cli: Any, tmp_path: Path) -> None:
    arguments = ("-m", "method=baseline", "student.recipe.lr=1e30,0.05", "quant.bits=4", *TINY)
    code, out, err = cli(*arguments)
    assert code == 1
    failure = [line for line in err.splitlines() if line.startswith("kdq: failed")]
    assert len(failure) == 1
    assert re.search(r"student.recipe.lr=1e\+30: the loss became (nan|inf) at epoch 0, by step \d+: lower", failure[0])
    assert "kdq: 1 of 2 rows are missing" in err
    assert len(list((tmp_path / "rows").glob("*.json"))) == 1
    assert "baseline" in out


def test_rtn_none_excluded_layers_and_an_alphabet_of_ones_own(cli: Any, tmp_path: Path) -> None:
    for quant in (
        ["quant=none"],
        ["quant=rtn", "quant.bits=3"],
        ["quant=gpfq", "quant.bits=3", "quant.keep_float=[layer1]"],
        [
            "quant.name=wide",
            "quant.alphabet={_target_: kdq.quant.solvers.alphabets.paper, _partial_: true, scalar: 1.5}",
        ],
    ):
        code, _, err = cli("method=baseline", *TINY, *quant)
        assert code == 0, err
    rows = {row["quantizer"]: row for row in (json.loads(p.read_text()) for p in (tmp_path / "rows").glob("*.json"))}
    assert rows["none"]["top1"] == rows["none"]["top1_float"]
    assert rows["none"]["bits"] == 32
    assert rows["rtn"]["calibration_images"] == rows["gpfq"]["calibration_images"] == 64
    assert rows["gpfq"]["size_bytes"] > rows["rtn"]["size_bytes"]  # layer1 stays float
    assert (rows["wide"]["alphabet"], rows["wide"]["bits"], rows["wide"]["avg_bits"]) == ("paper", 4, 5)


MISTAKES = [
    (["quant.bit=3"], r"unknown option quant.bit; valid here: .*bits.*did you mean quant.bits\?"),
    (["metod=vkd"], r"unknown option metod; valid here: data, .*did you mean method\?"),
    (["method=kd"], r"there is no method=kd; choose one of .*vkd"),
    (["model@student=resnet19"], r"there is no model=resnet19; choose one of custom, .*resnet18"),
    (["student.net.deepth=20"], r"unknown option student.net.deepth.*did you mean student.net.depth"),
    (["quant.search.avg_bits=1"], r"a bit search is chosen with quant=greedy"),
    (["quant.bits=1"], r"bits=1 must be a whole number from 2 to 32"),
    (["quant.bits=33"], r"bits=33 must be"),
    (["quant.bits=[2,4.5]"], r"bits=4.5 must be"),
    (["quant.bits=many"], r"bits='many' must be"),
    (["quant.bits=[]"], r"quant.bits is empty"),
    (["data=image_folder"], r"data.root has no value: give data.root="),
    (["data=image_folder", "data.root=/nowhere"], r"no folder /nowhere/train"),
    (["data.val_fraction=1.5"], r"data.val_fraction=1.5 must lie between 0 and 1"),
    (["data.test_limit=0"], r"data.test_limit=0 must be at least 1"),
    (["method=vkd,baseline"], r"method=vkd,baseline has several values: kdq -m runs a grid"),
    ([f"teacher.weights={__file__}"], r"test_app.py: it is no checkpoint of tensors alone; save a state_dict"),
    (["teacher.weights=/nowhere.pt"], r"no weights file at /nowhere.pt: give teacher.weights="),
    (["teacher.net.num_classes=7"], r"resnet20 gives 7 logits but data=digits has 10 classes"),
    (["student.net.in_channels=3", "method=baseline"], r"resnet20 cannot take images of shape \(1, 8, 8\)"),
    (["student.net._target_=kdq.models.nothing", "method=baseline"], r"cannot import 'kdq.models.nothing'"),
    (["student.recipe.schedule=steps", "method=baseline"], r"recipe.schedule='steps' is unknown: use one of"),
    (["student.recipe.epochs=many", "method=baseline"], r"recipe.epochs='many' must be a whole number"),
    (["student.recipe.lr=fast", "method=baseline"], r"recipe.lr='fast' must be a number"),
    (["quant=greedy", "method=baseline", "quant.search.avg_bits=1"], r"the bit search cannot meet its budget"),
    (["quant=greedy", "method=baseline", "quant.search=5"], r"quant.search=5 has options of its own: quant.search."),
    (["quant.keep_float=5", "method=baseline"], r"keep_float=5: give a list of names, \[5\]"),
    (["data.source._target_=null", "method=baseline"], r"data.source._target_=None names nothing: give the path of"),
    (["logger=csv", "+logger.mine._target_=null"], r"logger.mine._target_=None names nothing: give the path of"),
    (
        ["quant=greedy", "method=baseline", "+quant.search={method: exact, cost: bytes}"],
        "cost=bytes prices the steps of",
    ),
    (["quant=greedy", "method=baseline", "quant.search.avg_bits=null"], r"has no budget: give avg_bits, size_bytes or"),
    (["quant.solver=bset", "method=baseline"], r"solver='bset' is unknown: use one of .*gpfq"),
    (["quant.alphabet=greek", "method=baseline"], r"alphabet='greek' is unknown"),
    (
        ["quant.alphabet={_target_: datetime.timedelta}", "method=baseline"],
        r"alphabet=datetime.timedelta\(0\) is neither one of uniform, .* nor a function",
    ),
    (["student=resnet20"], r"student=resnet20 is no choice: a network is chosen with model@student=resnet20"),
    (["quant.keep_float=fc", "method=baseline"], r"keep_float='fc': give a list of names, \[fc\]"),
    (["hydra.sweeper.dry_run=true"], r"dry_run=true shows the plan of several runs: add -m"),
    (["data.name=a/b"], r"data.name='a/b' must be letters, digits"),
    (["seed=abc"], r"seed='abc' must be a whole number from 0 to 2147483647"),
    (["student.seed=-1"], r"student.seed=-1 must be a whole number"),
    (
        ["quant=greedy", "quant.search.size_bytes=10", "method=baseline"],
        r"cannot meet its budget of 10 bytes: the smallest packed file with these candidates takes \d{4}",
    ),
    (["quant.act_bits=9", "method=baseline"], r"act_bits=9 must be a number from 2 to 8"),
    (["quant.calibration_images=0", "method=baseline"], r"quant.calibration_images=0 must be at least 1"),
    (["quant=greedy", "quant.search.method=anneal", "method=baseline"], r"method='anneal' is unknown"),
    (["trainer.precision=8", "method=baseline"], r"trainer.precision=.?8.? is unknown: use one of auto, 32-true"),
    (["quant.keep_float=[layer9]", "method=baseline"], r"the network has no layer9 to leave float"),
    pytest.param(
        ["trainer.accelerator=gpu"],
        r"trainer.accelerator=gpu but torch finds no device",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
    ),
    (["paths.output_dir=/proc/nowhere"], r"/proc/nowhere"),
]


@pytest.mark.parametrize(("arguments", "answer"), MISTAKES)
def test_a_mistake_is_answered_in_one_line(cli: Any, tmp_path: Path, arguments: list[str], answer: str) -> None:
    logging.disable(logging.CRITICAL)
    code, _, err = cli(*TINY, *arguments)
    logging.disable(logging.NOTSET)
    assert code == 1
    lines = [line for line in re.split(r"[\r\n]+", err) if line.startswith("kdq: ")]
    assert len(lines) == 1
    assert re.search(answer, lines[0])
    assert "Traceback" not in err
    assert not list(tmp_path.glob("rows/*"))


def test_a_budget_that_layers_left_float_break_is_refused_before_the_training(cli: Any, tmp_path: Path) -> None:
    code, _, err = cli(*TINY, "quant=greedy", "method=baseline", "quant.keep_float=[layer3]")
    assert code == 1
    assert re.search(r"budget of 3 bits on average: the least with .* is \d\d.*, layers left float included", err)
    assert not (tmp_path / "store").exists()


def test_the_options_named_are_those_of_the_choice_made(cli: Any) -> None:
    _, _, error = cli("model@student=resnet18", "student.net.deepth=3")
    assert "unknown option student.net.deepth; valid here: _target_, stem, num_classes" in error


@pytest.mark.parametrize("grid_of", [[], ["-m", "seed=0,1"]])
def test_ctrl_c_during_a_training_ends_the_command_and_a_rerun_goes_on(grid_of: list[str], tmp_path: Path) -> None:
    """Lightning catches it first and ends with another exit code."""
    arguments = ["method=baseline", "quant=none", *TINY, "student.recipe.epochs=9999", f"paths.output_dir={tmp_path}"]
    for goes_on in (False, True):
        with subprocess.Popen(
            [sys.executable, "-m", "kdq", *grid_of, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=tmp_path,
            # Whoever started the tests may have told them to ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        ) as process:
            assert process.stderr is not None
            said = ""
            while not re.search(r"epoch \d+/9999", said):
                said += process.stderr.read(1)
            process.send_signal(signal.SIGINT)
            said += process.stderr.read()
        assert process.returncode == 130
        assert "kdq: interrupted; the same command goes on from " in said
        assert "Traceback" not in said
        logs = "".join(log.read_text() for log in tmp_path.rglob("*.log"))
        assert bool(re.search(r"going on after epoch \d+ of 9999", logs)) == goes_on


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/tmpa1b2c3"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    ],
)
def test_a_full_disk_is_called_one(error: Exception) -> None:
    """The words are what Python, safetensors and torch said on a full tmpfs."""
    assert describe(error).startswith("a disk is full: make room where paths.output_dir and paths.data_dir are")


def test_debug_shows_where(cli: Any) -> None:
    with pytest.raises(kdq.KdqError, match="bits=1"):
        cli(*TINY, "quant.bits=1", "kdq.debug=true")


def test_stored_weights_that_were_damaged_are_refused(cli: Any, tmp_path: Path) -> None:
    assert cli(*TINY, "method=baseline", "quant.bits=4")[0] == 0
    (weights,) = tmp_path.glob("store/digits-*/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = cli(*TINY, "method=baseline", "quant.bits=3")
    assert code == 1
    assert f"kdq: {weights} does not match its checksum: delete the folder" in err


def test_a_teacher_from_a_file_is_used_as_it_is(cli: Any, tmp_path: Path) -> None:
    assert cli(*TINY, "method=teacher", "quant=none", f"paths.output_dir={tmp_path}/a")[0] == 0
    (weights,) = tmp_path.glob("a/store/digits-*/weights.safetensors")
    code, _, err = cli(
        *TINY, "method=teacher", "quant=none", f"teacher.weights={weights}", f"paths.output_dir={tmp_path}/b"
    )
    assert code == 0, err
    rows = [json.loads(next((tmp_path / name / "rows").glob("*")).read_text()) for name in "ab"]
    assert rows[0]["nll"] == rows[1]["nll"]
    assert rows[0]["val_top1"] == pytest.approx(rows[1]["val_top1"], abs=1e-3)
    assert len(list((tmp_path / "b" / "store").glob("digits-loaded-*"))) == 1


@pytest.mark.parametrize("quant", ["gpfq", "none"])
def test_floats_of_16_bits_are_what_is_evaluated_and_stored(cli: Any, tmp_path: Path, quant: str) -> None:
    found = {}
    for dtype in ("null", "bf16"):
        output = tmp_path / dtype
        code, _, error = cli(
            *TINY, "method=baseline", f"quant={quant}", f"quant.float_dtype={dtype}", f"paths.output_dir={output}"
        )
        assert code == 0, error
        row = found[dtype] = json.loads(next((output / "rows").glob("*.json")).read_text())
        network = kdq.load(output / row["artifact"])
        images = Images(digits(), data_config(train_limit=256)).evaluation("test", torch.device("cpu"))
        assert evaluate(network.to(memory_format=torch.channels_last), images, 10)["nll"] == row["nll"]
    assert found["bf16"]["size_bytes"] < found["null"]["size_bytes"]
    if quant == "none":
        assert (found["bf16"]["avg_bits"], found["null"]["avg_bits"]) == (16, 32)
