"""The benchmark of exported models says about each what it compares."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import kdq
from kdq.bench import runtimes
from kdq.bench.deploy import main, static
from kdq.deploy.onnx_files import onnx_models
from kdq.deploy.runtime import logits, openvino, session
from kdq.models import CifarResNet
from kdq.records.rows import read_rows
from tests.conftest import OWN_NORMALIZATION, TINY
from tests.quant.conftest import trained_norms


def test_every_format_is_compared_and_memory_is_near_the_packed_size(tmp_path: Path) -> None:
    quick = ["deploy.runs=2", "deploy.batch=4", "deploy.calibration_images=64", "bench.threads=1", "bench.repeats=2"]
    main([*TINY, "method=baseline", "quant.bits=3", *quick, f"paths.output_dir={tmp_path}"])
    (found,) = json.loads((tmp_path / "report" / "bench_deploy.json").read_text())
    (row,) = read_rows(tmp_path / "rows")
    assert {name: found[name] for name in ("top1", "top1_onnx_int8", "onnx_int8_bytes")} == {
        "top1": row.top1,
        "top1_onnx_int8": row.top1_onnx_int8,
        "onnx_int8_bytes": row.onnx_int8_bytes,
    }
    for batch in (1, 4):
        for name, first, others in (
            ("ONNX Runtime, 1 threads", "fp32", ("int8", "static")),
            ("torch, 1 threads", "float", ("decode=layer", "decode=once")),
        ):
            for other in others:
                ratios = found[f"{name}, batch {batch}: {first} / {other}, median_ms"].split()
                assert len(ratios) == 2
                assert all(float(ratio) > 0 for ratio in ratios)
            least, median, p95 = map(float, found[f"{name}, batch {batch}: {first} min, median, p95 ms"].split())
            assert 0 < least <= median <= p95
    ratios = {key for key in found if key.startswith("runtimes, 1 threads, batch 1: ONNX Runtime int8 / ")}
    assert {key.split("/ ")[1] for key in ratios} >= {f"torch eager, {kind}_ms" for kind in ("median", "min")}
    held = {decode: found[f"decode={decode}: held_bytes"] for decode in ("layer", "once")}
    assert held["layer"] < 1.05 * row.size_bytes < held["once"]


def test_onnx_runtimes_own_export_is_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    float_model = onnx_models(CifarResNet(8, 10, width=0.25).eval(), (3, 8, 8), ["fp32"])["fp32"]
    (tmp_path / "float.onnx").write_bytes(float_model)
    graph = onnx.load(static(tmp_path / "float.onnx", [torch.randn(20, 3, 8, 8)], tmp_path / "int8.onnx")).graph
    constants = {item.name: item for item in graph.initializer}
    weights = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"} & set(constants)
    kinds = [constants[name].data_type for name in weights if len(constants[name].dims) == 4]
    assert kinds == [onnx.TensorProto.INT8] * 9


def test_openvino_computes_what_onnx_runtime_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, models = torch.randn(4, 3, 32, 32) + 3 * torch.randn(4, 3, 1, 1), {}
    network, _ = kdq.quantize(trained_norms(CifarResNet(20, 10, **OWN_NORMALIZATION)), [images], bits=4, solver="rtn")
    for kind, data in onnx_models(network, (3, 32, 32), calibration=[images]).items():
        models[kind] = tmp_path / f"{kind}.onnx"
        models[kind].write_bytes(data)
    runners = openvino(models, 1)
    assert set(runners) == {"fp32", "int8", "codes"}
    for kind, runner in runners.items():
        reference = logits(session(models[kind]), images)
        np.testing.assert_allclose(
            runner(images.numpy()), reference, atol=0.05 * np.ptp(reference) if kind == "int8" else 1e-4
        )


def test_what_openvino_does_not_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    assert openvino({"fp32": tmp_path / "model.onnx"}, 1) == {}
    assert "OpenVINO does not read the fp32 model" in caplog.text


def test_inductors_int8_is_near_the_float_network() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    network, images = CifarResNet(8, 10, width=0.25).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected, found = network(images), runtimes.inductor_int8(network, [images])(images)
    torch.testing.assert_close(found, expected, atol=0.1 * float(expected.max() - expected.min()), rtol=0)
    assert any(isinstance(module, torch.nn.ReLU) for module in network.modules())  # a copy was changed


def test_no_relu_is_lost_on_the_way_to_inductor() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected, found = network(images), runtimes.inductor_int8(network.eval(), [images])(images)
    torch.testing.assert_close(found, expected, atol=0.1 * float(expected.max() - expected.min()), rtol=0)
