"""A row made again from what it carries: the same, or what is other and why."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdq.cli.reproduce import main
from kdq.records.rows import Row, differences, find_row, read_rows, write_row
from kdq.report.publish import publish
from kdq.report.write import Written
from kdq.stages import pipeline, train
from kdq.stages.cell import Cell
from kdq.stages.check import check_config
from kdq.stages.reproduce import config_of
from kdq.utils.config import compose, plain
from kdq.utils.errors import KdqError
from tests.conftest import TINY
from tests.rows import ROW


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two widths of one pass: a row carries its own alone."""
    output = tmp_path_factory.mktemp("made")
    small = ["data.train_limit=256", "trainer.accelerator=cpu", "seed=3", "quant.calibration_images=64"]
    pipeline.run(compose([*TINY, *small, "method=vkd", "quant.bits=[2,4]", f"paths.output_dir={output}"]))
    return output


def _run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out + said.err


def test_the_same_comes_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in read_rows(folder / "rows") if row.bits == 4)
    publish(folder, Written(read_rows(folder / "rows")), tmp_path / "public")
    asked = [row.config_hash[:6], "--output-dir", tmp_path / "public", "--to", tmp_path / "again"]
    code, said = _run(asked, capsys)
    assert (code, "The same: all of top1_float, top1, " in said) == (0, True), said
    (made,) = read_rows(tmp_path / "again" / "rows")
    assert made.config_hash == row.config_hash
    assert (made.config or {})["quant"] == (row.config or {})["quant"]
    codes, again = (load_file(output / row.artifact) for output in (folder, tmp_path / "again"))
    assert all(torch.equal(codes[name], again[name]) for name in codes.keys() | again.keys())
    code, said = _run(asked, capsys)  # not from a folder where something is
    assert (code, "again exists" in said) == (2, True)


def test_what_was_trained_is_taken_from_a_store_and_an_interrupted_command_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(row for row in read_rows(folder / "rows") if row.bits == 2)
    again, store = tmp_path / "again", folder / "store"
    monkeypatch.setattr(train, "run_training", lambda *_: pytest.fail("it is trained"))
    asked = [row.config_hash, "--output-dir", folder, "--to", again]
    code, said = _run([*asked, "--store", store, "seed=5"], capsys)
    assert (code, f"{store} has no digits-vkd-resnet20-s5-" in said) == (2, True), said
    monkeypatch.setattr(pipeline, "quantize", lambda *_: 1 / 0)
    assert _run([*asked, "--store", store], capsys)[0] == 2
    monkeypatch.undo()
    monkeypatch.setattr(train, "run_training", lambda *_: pytest.fail("it is trained"))
    code, said = _run(asked, capsys)
    assert (code, "The same: all of" in said) == (0, True), said
    code, said = _run([*asked, "--store", store], capsys)
    assert (code, "again exists" in said) == (2, True)


def test_another_result_is_told_with_what_is_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row, *_) = read_rows(folder / "rows")
    other = dataclasses.replace(row, top1=12.0, versions="torch 1", threads=None)
    monkeypatch.setattr(pipeline, "run", lambda cfg: [row])
    code, said = _run([write_row(tmp_path, other), "--to", tmp_path / "again"], capsys)
    assert code == 1
    assert f"NOT the same: top1 12.0 -> {row.top1}." in said
    assert f"Of another making: versions torch 1 -> {row.versions}; threads not recorded -> 1." in said


def test_several_widths_are_refused_before_anything_is_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row, *_) = read_rows(folder / "rows")
    asked = [row.config_hash, "--output-dir", folder, "--to", tmp_path / "again", "quant.bits=[2,4]"]
    code, said = _run(asked, capsys)
    assert (code, "one row is made again: give one width, such as quant.bits=2" in said) == (2, True), said
    assert not (tmp_path / "again").exists()


def test_values_that_are_others_here(folder: Path, tmp_path: Path) -> None:
    (row, *_) = read_rows(folder / "rows")
    cfg = config_of(row, tmp_path, ["quant.calibration_images=32", "seed=5"])
    assert (cfg.quant.calibration_images, cfg.student.seed, cfg.trainer.threads) == (32, 5, row.threads)
    for wrong in ("data.rot=x", "data.name"):
        with pytest.raises(KdqError, match="changes no value of this row's config"):
            config_of(row, tmp_path, [wrong])


def test_what_an_older_kdq_did_not_have_is_given_with_a_plus(folder: Path, tmp_path: Path) -> None:
    (row, *_) = read_rows(folder / "rows")
    config = json.loads(json.dumps(row.config))
    limit = config["data"].pop("test_limit")
    older = dataclasses.replace(row, config=config)
    with pytest.raises(KdqError, match=r"give \+data.test_limit="):
        Cell(config_of(older, tmp_path))
    again = config_of(older, tmp_path, [f"+data.test_limit={'null' if limit is None else limit}"])
    assert Cell(again).recorded() == Cell(config_of(row, tmp_path)).recorded()
    with pytest.raises(KdqError, match="changes no value of this row's config"):  # as Hydra: it is there already
        config_of(row, tmp_path, ["+data.test_limit=5"])


def test_rows_without_a_config_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KdqError, match=r"carries no config: it is of kdq 0 .* the recipe, and the options of"):
        config_of(ROW, tmp_path)


def test_a_stranger_s_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    (row, *_) = read_rows(folder / "rows")
    config = json.loads(json.dumps(row.config))
    for place, target in (
        ("net", {"_target_": "os.system", "command": "true"}),
        ("callbacks", [{"_target_": "os.abort"}]),
    ):
        strange = dataclasses.replace(row, config={**config, "student": {**config["student"], place: target}})
        with pytest.raises(KdqError, match=r"code that is not kdq's: os\.\w+; if you trust it, add --trust"):
            config_of(strange, tmp_path)
    hidden = {"solver": {"_target_": "kdq.quant.solvers.spfq.spfq", "_args_": ["os.system"]}}
    with pytest.raises(KdqError, match="with _args_; if you trust it"):
        config_of(dataclasses.replace(row, config={**config, "quant": hidden}), tmp_path)
    saving = {"save": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "/etc/kdq"}}
    with pytest.raises(KdqError, match="a callback in /etc/kdq; if you trust it"):
        config_of(dataclasses.replace(row, config={**config, "callbacks": saving}), tmp_path)
    augment = {"_target_": "kdq.data.photographs.RandAugment", "ops": 2}
    ours = dataclasses.replace(row, config={**config, "data": {**config["data"], "augment": augment}})
    assert config_of(ours, tmp_path).data.augment.ops == 2
    trusted: Row = dataclasses.replace(row, config={**config, "student": {"net": {"_target_": "mine.network"}}})
    assert config_of(trusted, tmp_path, trust=True).student.net["_target_"] == "mine.network"


def test_a_config_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    (row, *_) = read_rows(folder / "rows")
    flags = {name: value for name, value in row.config["trainer"].items() if name != "precision"}
    for trainer, says in (("cpu", "trainer is a str"), (flags, "trainer.precision='None' is unknown")):
        with pytest.raises(KdqError, match=says):
            Cell(config_of(dataclasses.replace(row, config={**row.config, "trainer": trainer}), tmp_path))


def test_published_configs_name_no_places(tmp_path: Path) -> None:
    config = {"data": {"root": "/home/me/pets", "name": "pets"}, "all": ["/a/b", 1, None]}
    write_row(tmp_path / "rows", dataclasses.replace(ROW, config=config))
    publish(tmp_path, Written(read_rows(tmp_path / "rows")), tmp_path / "public")
    (row,) = read_rows(tmp_path / "public" / "rows")
    assert row.config == {"data": {"root": "pets", "name": "pets"}, "all": ["b", 1, None]}
    assert find_row("aa", tmp_path / "public") == row


def test_columns_that_differ() -> None:
    assert differences(ROW, dataclasses.replace(ROW, top1=96.5), ["top1", "size_bytes"]) == ["top1 97.0 -> 96.5"]


@pytest.mark.parametrize("folder", ["cifar10", "cifar100", "roads", "published_training"])
def test_configs_of_published_rows_are_still_read(folder: str, tmp_path: Path) -> None:
    rows = read_rows(Path(__file__).parents[2] / "outputs" / "reference" / folder / "rows")
    for row in {(row.method, row.quantizer, row.tune): row for row in rows if row.config is not None}.values():
        check_config(config_of(row, tmp_path))


def test_callbacks_that_want_a_logger_have_one(folder: Path, tmp_path: Path) -> None:
    row = read_rows(folder / "rows")[0]
    logging = plain(compose(["callbacks=lr_monitor"]).callbacks)
    check_config(config_of(dataclasses.replace(row, config={**(row.config or {}), "callbacks": logging}), tmp_path))
