"""``deploy=onnx`` in a cell, ``kdq-export``, and the serving script of its notebook, as a user runs them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kdq
from kdq.cli.export import main
from kdq.data.folder import decode_image
from kdq.data.images import Images
from kdq.data.sets import digits
from kdq.deploy.runtime import runner, session, top1
from kdq.records.rows import read_rows
from kdq.stages.deploy import IN_OPENVINO
from tests.conftest import TINY, data_config
from tests.notebooks import files

QUICK = ["deploy.runs=5", "deploy.batch=8", "deploy.threads=1", "deploy.calibration_images=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two cells, first without ``deploy`` and then with it, as a grid: the folder, the rows before and after."""
    output = tmp_path_factory.mktemp("deploy")
    command, cell = [sys.executable, "-m", "kdq"], [*TINY, "method=baseline", f"paths.output_dir={output}"]
    subprocess.run([*command, *cell, "quant.bits=[3,8]"], check=True, capture_output=True, timeout=200)
    before = read_rows(output / "rows")
    grid = ["-m", *cell, "quant.bits=3,8", "deploy=onnx", *QUICK]
    done = subprocess.run([*command, *grid], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return output, before, read_rows(output / "rows")


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``kdq-export ARGUMENTS``; returns what it prints, or its error."""

    def call(*arguments: object) -> str:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return call


def test_a_finished_row_gets_the_columns_it_lacks(run: Any) -> None:
    output, before, after = run
    assert [row.top1_onnx_int8 for row in before] == [None, None]
    for old, row in zip(before, after, strict=True):
        packed = output / row.artifact
        assert (row.config_hash, row.top1, row.quantize_seconds) == (old.config_hash, old.top1, old.quantize_seconds)
        for kind, size in (("fp32", row.onnx_fp32_bytes), ("int8", row.onnx_int8_bytes)):
            assert packed.with_suffix(f".{kind}.onnx").stat().st_size == size
        assert row.top1_onnx_fp32 == pytest.approx(row.top1, abs=0.3)  # one of 360 images
        assert row.top1_onnx_int8 == pytest.approx(row.top1, abs=1.5)
        assert row.latency_p95_ms_onnx_int8 >= row.latency_ms_onnx_int8 > 0
        assert row.throughput_onnx_fp32 > 0
        assert (row.throughput_batch, row.latency_threads) == (8, 1)
        assert old.bops == row.bops < 32 * 32 * row.macs


def test_ones_own_network_is_deployed_by_its_config(cli: Any, export: Any, tmp_path: Path) -> None:
    """Its packed file alone is not trusted to name what is called."""
    own = ["model@student=custom", "student.name=small", "student.net._target_=tests.networks.small"]
    quick = ["deploy=onnx", "deploy.runs=3", "deploy.batch=8", "deploy.threads=1", "deploy.calibration_images=64"]
    tiny = [override for override in TINY if not override.startswith(("student.net.", "model@student"))]
    code, _, error = cli(*tiny, *own, *quick, "method=baseline", "quant.bits=4", f"paths.output_dir={tmp_path}")
    assert code == 0, error
    (row,) = read_rows(tmp_path / "rows")
    assert row.arch == "small"
    assert row.top1_onnx_int8 == pytest.approx(row.top1, abs=1.5)
    with pytest.raises(kdq.KdqError, match=r"names the architecture 'tests.networks.small'"):
        kdq.load(tmp_path / row.artifact)
    cell = (row.config_hash, "--output-dir", tmp_path, "--to", tmp_path)
    for kind in ("torch", "onnx-fp32"):  # the second is there
        alone = tmp_path / Path(row.artifact).with_suffix(".fp32.onnx")
        alone.unlink(missing_ok=True)
        said = export(*cell, "--format", kind)
        assert "does not say an architecture that kdq builds by itself: add the model's overrides" in said
        assert "model@student=custom student.name=NAME student.net._target_=PACKAGE.FUNCTION" in said
        assert "bytes" in export(*cell, "--format", kind, *own)
    assert read_rows(tmp_path / "rows") == [row]


def test_a_cell_that_has_everything_is_not_measured_again(run: Any, cli: Any) -> None:
    output, _, rows = run
    code, _, error = cli(
        *TINY, "method=baseline", "quant.bits=[3,8]", "deploy=onnx", *QUICK, f"paths.output_dir={output}"
    )
    assert code == 0, error
    assert read_rows(output / "rows") == rows


def test_other_settings_are_measured_again_and_alone(run: Any, cli: Any, tmp_path: Path) -> None:
    output, _, rows = run
    shutil.copytree(output, tmp_path / "copy")
    cell = [*TINY, "method=baseline", "quant.bits=8", "deploy=onnx", *QUICK, f"paths.output_dir={tmp_path / 'copy'}"]
    code, _, error = cli(*cell, "deploy.act_range=mes")
    assert code == 1
    assert "deploy.act_range='mes' is unknown: use one of mse, percentile, percentile_99.9, closest" in error
    for wrong in ("deploy.batch=0", "deploy.calibration_images=-1", "deploy.runs=0", "deploy.threads=0"):
        code, _, error = cli(*cell, wrong)
        assert code == 1
        assert f"{wrong} must be a number of at least 1" in error
    code, _, error = cli(*cell, "deploy.formats=[]")
    assert "deploy.formats is empty" in error
    code, _, error = cli(*cell, "deploy.batch=4", "deploy.formats=[fp32]")
    assert code == 0, error
    (again,) = [row for row in read_rows(tmp_path / "copy" / "rows") if row.bits == 8]
    assert (again.throughput_batch, again.top1_onnx_int8, again.latency_ms_onnx_int8) == (4, None, None)
    assert again.top1_onnx_fp32 == next(row.top1_onnx_fp32 for row in rows if row.bits == 8)
    files = [(tmp_path / "copy" / again.artifact).with_suffix(f".{kind}.onnx").is_file() for kind in ("fp32", "int8")]
    assert files == [True, False]


def test_best_keeps_the_fastest_that_is_accurate_enough(run: Any, cli: Any, tmp_path: Path) -> None:
    output, _, _ = run
    shutil.copytree(output, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.onnx"):
        path.unlink()
    cell = [*TINY, "method=baseline", "quant.bits=3", *QUICK, f"paths.output_dir={tmp_path / 'copy'}", "deploy=best"]
    for tolerance in (100, -100):  # every format is accurate enough; none is
        code, out, error = cli(*cell, f"deploy.tolerance={tolerance}")
        assert code == 0, error
        (row,) = [row for row in read_rows(tmp_path / "copy" / "rows") if row.bits == 3]
        times = {kind: getattr(row, f"latency_ms_onnx_{kind}") for kind in ("int8", "codes")}
        kept = row.deployed.removesuffix(IN_OPENVINO)
        assert row.top1_deployed == pytest.approx(getattr(row, f"top1_onnx_{kept}"), abs=1)
        assert (tmp_path / "copy" / row.artifact).with_suffix(f".{kept}.onnx").is_file()
        if kept == row.deployed:
            assert row.latency_ms_deployed == times[kept]
        if tolerance > 0:
            assert row.latency_ms_deployed <= min(times.values())
            assert len(list((tmp_path / "copy").rglob("*.onnx"))) == 1
        else:
            assert "is kept" in out + error


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_best_keeps_to_the_runtimes_that_are_asked_for(run: Any, cli: Any, tmp_path: Path, runtime: str) -> None:
    output, _, _ = run
    shutil.copytree(output, tmp_path / "copy")
    cell = [*TINY, "method=baseline", "quant.bits=3", *QUICK, f"paths.output_dir={tmp_path / 'copy'}", "deploy=best"]
    code, _, error = cli(*cell, f"deploy.runtimes=[{runtime}]", "deploy.tolerance=100")
    assert code == 0, error
    (row,) = [row for row in read_rows(tmp_path / "copy" / "rows") if row.bits == 3]
    assert row.deployed.endswith(IN_OPENVINO) == (runtime == "openvino")
    for runtimes in ("[]", "[tensorrt]"):
        code, _, error = cli(*cell, f"deploy.runtimes={runtimes}")
        assert code == 1
        assert "use one of onnxruntime, openvino" in error


def test_best_of_other_formats_is_chosen_again(
    run: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _, _ = run
    shutil.copytree(output, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.onnx"):
        path.unlink()
    cell = [*TINY, "method=baseline", "quant.bits=3", *QUICK, f"paths.output_dir={tmp_path / 'copy'}", "deploy=best"]
    cell += ["deploy.tolerance=100", "deploy.runtimes=[onnxruntime]"]
    code, _, error = cli(*cell, "deploy.formats=[int8,codes]")
    assert code == 0, error
    (row,) = [row for row in read_rows(tmp_path / "copy" / "rows") if row.bits == 3]
    (other,) = {"int8", "codes"} - {row.deployed}
    code, _, error = cli(*cell, f"deploy.formats=[{other}]")
    assert code == 0, error
    (again,) = [row for row in read_rows(tmp_path / "copy" / "rows") if row.bits == 3]
    assert (again.deployed, getattr(again, f"top1_onnx_{row.deployed}")) == (other, None)
    assert [path.suffixes[-2] for path in (tmp_path / "copy").rglob("*.onnx")] == [f".{other}"]

    monkeypatch.setattr("kdq.stages.deploy.openvino", lambda *_: {})
    monkeypatch.setattr("kdq.stages.deploy.top1", lambda *_: pytest.fail("it is measured"))
    code, _, error = cli(*cell, "deploy.runtimes=[openvino]", "deploy.formats=[codes]")
    assert code == 1
    assert "OpenVINO reads none of deploy.formats=['codes']: add int8, or onnxruntime" in error


def test_a_grid_knows_that_columns_are_missing_when_deploying_failed(run: Any, cli: Any) -> None:
    output, _, rows = run
    packed = output / rows[0].artifact
    kept, path = packed.read_bytes(), output / "rows" / rows[0].file_name
    row = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(row) | {"top1_onnx_int8": None}))
        packed.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        code, _, error = cli(
            "-m", *TINY, "method=baseline", "quant.bits=3,8", "deploy=onnx", *QUICK, f"paths.output_dir={output}"
        )
        assert code == 1
        assert re.search("damaged|checksum", error)
        assert "-b3" in error
        assert "-b8" not in error
    finally:
        packed.write_bytes(kept)
        path.write_text(row)


def test_unknown_formats_are_refused_before_anything_is_made(cli: Any, tmp_path: Path) -> None:
    code, _, error = cli(*TINY, "deploy=onnx", "deploy.formats=[int4]")
    assert code == 1
    assert "fp32, int8" in error
    code, _, error = cli(*TINY, "deploy=none", "deploy.formats=[int8]")
    assert (code, "deploy.formats needs deploy=onnx or deploy=best" in error) == (1, True), error
    assert not (tmp_path / "store").exists()


def test_every_format_of_a_cell(run: Any, export: Any, tmp_path: Path) -> None:
    output, _, rows = run
    row = rows[0]
    data = Images(digits(), data_config(train_limit=256))
    images = torch.cat([batch for batch, _ in data.evaluation("test", torch.device("cpu"))])
    with torch.no_grad():
        expected = kdq.load(output / row.artifact)(images)

    said = export(row.config_hash[:6], "--output-dir", output, "--to", f"{tmp_path}/v1.0/")
    assert (tmp_path / "v1.0" / Path(row.artifact).name).read_bytes() == (output / row.artifact).read_bytes()
    assert f"{row.size_bytes:,} bytes" in said

    export(output / "rows" / row.file_name, "--format", "torch", "--to", tmp_path / "model.pt2")
    with torch.no_grad():
        found = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    said = export(output / row.artifact, "--format", "onnx-int8", "--to", tmp_path / "model.int8.onnx")
    assert f"{row.top1:.2f} as evaluated" in said
    assert (tmp_path / "model.int8.onnx").stat().st_size == row.onnx_int8_bytes

    # Settings of its own are measured and said; the row is of the grid.
    said = export(
        output / row.artifact, "--format", "onnx-int8", "--to", tmp_path / "other.onnx", "deploy.calibration_images=32"
    )
    found = float(re.search(r"top-1 ([\d.]+) on the test set, .* as evaluated", said).group(1))  # type: ignore[union-attr]
    models = (tmp_path / "other.onnx").read_bytes(), (tmp_path / "model.int8.onnx").read_bytes()
    assert models[0] != models[1]
    batches = data.evaluation("test", torch.device("cpu"))
    assert found == pytest.approx(top1(runner(session(models[0])), batches), abs=0.005)
    assert read_rows(output / "rows") == rows


def test_a_row_of_fewer_images_is_compared_on_these(cli: Any, export: Any, tmp_path: Path) -> None:
    cell = [*TINY, "method=baseline", "quant.bits=8", "data.test_limit=50", "data.split_seed=3"]
    assert cli(*cell)[0] == 0
    (row,) = read_rows(tmp_path / "rows")
    said = export(row.config_hash, "--output-dir", tmp_path, "--format", "onnx-fp32", "--to", tmp_path)
    assert f"top-1 {row.top1:.2f} on the test set, {row.top1:.2f} as evaluated" in said


def test_a_packed_file_alone(run: Any, export: Any, tmp_path: Path) -> None:
    output, _, rows = run
    shutil.copy(output / rows[0].artifact, tmp_path / "alone.kdq")
    said = export(tmp_path / "alone.kdq", "--format", "onnx-fp32", "--to", tmp_path)
    assert "not measured" in said
    assert (tmp_path / "alone.fp32.onnx").is_file()
    said = export(tmp_path / "alone.kdq", "--format", "onnx-int8", "--to", tmp_path)
    assert "INT8 needs calibration images" in said
    assert "data=image_folder" in said
    export(tmp_path / "alone.kdq", "--format", "onnx-int8", "--to", tmp_path, "data=digits")
    assert (tmp_path / "alone.int8.onnx").is_file()


@pytest.mark.parametrize(
    ("channels", "size", "words"), [(1, 12, r"1x8x8 \(.*\), in 1x12x12"), (3, 8, "1 channels, in 3")]
)
def test_images_of_another_size_or_kind_are_refused(
    run: Any, export: Any, tmp_path: Path, channels: int, size: int, words: str
) -> None:
    output, _, rows = run
    for part in ("train", "test"):
        for label in range(10):
            (tmp_path / "photos" / part / str(label)).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (20, 20)).save(tmp_path / "photos" / part / str(label) / f"{index}.png")
    shutil.copy(output / rows[0].artifact, tmp_path / "alone.kdq")
    data = ["data=image_folder", f"data.root={tmp_path}/photos", "data.name=photos", f"paths.data_dir={tmp_path}"]
    data += [f"data.image_size={size}", f"data.in_channels={channels}"]
    said = export(tmp_path / "alone.kdq", "--format", "onnx-int8", "--to", tmp_path, *data)
    assert re.fullmatch(f"kdq-export: the network takes images of {words}", said.replace("those of photos have", "in"))


def test_mistakes_are_one_line_that_says_what_to_do(run: Any, export: Any, tmp_path: Path) -> None:
    output, _, rows = run
    near = export("feedbeef", "--output-dir", output)
    assert "no cell 'feedbeef'" in near
    assert rows[0].config_hash in near
    assert "no rows below" in export("feedbeef", "--output-dir", tmp_path)
    assert "no file" in export(tmp_path / "gone.kdq")
    assert "no file" in export(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{}")
    assert "not a row" in export(tmp_path / "bad.json")
    wrong = export(rows[0].config_hash, "--output-dir", output, "--format", "onnx-int8", "data=cifar10")
    assert "the cell is of data digits, not cifar10" in wrong
    mistyped = export(rows[0].config_hash, "--output-dir", output, "--format", "onnx-int8", "deploy.nothing=1")
    assert "deploy.nothing; valid here: formats, calibration_images, act_range, batch, runs, threads" in mistyped
    copied = export(rows[0].config_hash, "--output-dir", output, "data=cifar10", "--to", tmp_path)
    assert "data=cifar10: the packed file is copied as it is" in copied
    free = export(rows[0].config_hash, "--output-dir", output, "--license", "mit", "--to", tmp_path)
    assert "--license mit is of a model on the hub: give --to hf:owner/name" in free
    imageless = export(
        rows[0].config_hash, "--output-dir", output, "--format", "torch", "data=cifar10", "--to", tmp_path
    )
    assert "data=cifar10: the torch format needs no images; its overrides are of the model" in imageless
    assert not [*tmp_path.glob("*.kdq"), *tmp_path.glob("*.pt2")]
    assert "\n" not in near + wrong + mistyped + copied + free + imageless


def test_the_notebooks_script_classifies_an_image_file(run: Any, tmp_path: Path) -> None:
    """With onnxruntime alone: importing torch or kdq would fail."""
    output, _, rows = run
    blocked = "import sys\nsys.modules.update(torch=None, kdq=None)\n"
    (tmp_path / "classify.py").write_text(blocked + files("deploy.ipynb")["classify.py"])
    shutil.copy((output / rows[-1].artifact).with_suffix(".int8.onnx"), tmp_path / "model.int8.onnx")
    pixels, labels = digits().test_images.numpy(), digits().test_labels.tolist()
    network = kdq.load(output / rows[-1].artifact)
    batch = next(iter(Images(digits(), data_config(test_limit=5)).evaluation("test", torch.device("cpu"))))[0]
    with torch.no_grad():
        expected = network(batch).argmax(1).tolist()
    for index, found in enumerate(expected[:2]):
        Image.fromarray(np.squeeze(pixels[index], -1)).save(tmp_path / "image.png")
        done = subprocess.run(
            [sys.executable, "classify.py", "image.png"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == str(found), (done.stderr, labels[index])
    about = json.loads(kdq_metadata(tmp_path / "model.int8.onnx")["kdq.preprocess"])
    assert about["size"] == [8, 8]


def test_the_notebooks_script_sees_the_pixels_that_the_network_was_measured_on(tmp_path: Path) -> None:
    """Of images of any shape: scaled and cropped as an image folder is read."""
    code = "image = " + files("deploy.ipynb")["classify.py"].split("image = ", 1)[1].split("pixels = ")[0]
    random = np.random.default_rng(0)
    for number, shape in enumerate([(48, 160), (90, 64), (32, 32), (256, 256), (900, 1200)]):
        file = tmp_path / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)).save(file)
        known: dict[str, Any] = {"sys": type("sys", (), {"argv": ["", str(file)]}), "Image": Image}
        exec(code, known | {"card": {"mean": [0] * 3}, "width": 32, "height": 32}, found := {})
        assert np.array_equal(np.asarray(found["image"]), decode_image(file, 32, 3)), shape


def kdq_metadata(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
