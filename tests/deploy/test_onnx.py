"""Exported graphs against the networks they were made from, in ONNX Runtime and in onnx's own reference evaluator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torchvision.models import ResNet, SwinTransformer, VisionTransformer
from torchvision.models.resnet import Bottleneck

import kdq
from kdq.deploy import runtime
from kdq.deploy.calibrate import histograms
from kdq.deploy.onnx_files import onnx_models
from kdq.deploy.runtime import logits, session
from kdq.models import CifarResNet
from kdq.models.build import build
from kdq.quant.activations import RANGES, Histogram
from kdq.quant.batches import logits_of
from kdq.quant.layers import layer_name
from tests.conftest import OWN_NORMALIZATION
from tests.quant.conftest import ReluNet, trained_norms

SHAPE = (3, 9, 9)


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, *SHAPE)


def _run(model: bytes, images: Tensor) -> Tensor:
    return torch.from_numpy(logits(session(model, 1), images))


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


def test_the_float_graph_is_the_network_for_any_batch(images: Tensor) -> None:
    torch.manual_seed(0)
    network = trained_norms(ReluNet())
    quantized, _ = kdq.quantize(network, [images], bits=3, act_bits=None)
    model = onnx_models(quantized, SHAPE, ["fp32"])["fp32"]
    graph = onnx.load_from_string(model).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    for batch in (1, 7):
        with torch.no_grad():
            torch.testing.assert_close(_run(model, images[:batch]), quantized(images[:batch]), rtol=1e-4, atol=1e-5)
    with pytest.raises(kdq.KdqError, match=r"takes images of 3x9x9 .* have 3x8x9"):
        _run(model, images[:, :, 1:])


def test_pooling_reads_no_indices_made_from_the_number_of_images() -> None:
    """They are how the exporter keeps the strides of what was pooled; OpenVINO computed something else from them."""
    network = CifarResNet(8, 10, width=0.25, **OWN_NORMALIZATION).eval()
    graph = onnx.load_from_string(onnx_models(network, SHAPE, ["fp32"])["fp32"]).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds[kinds.index("GlobalAveragePool") :] == ["GlobalAveragePool", "Reshape", "Gemm"]


class Headed(nn.Module):
    """Features made of one image's channels or tokens in the way of ``head``, and what is told beside the logits."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head, self.conv, self.mix, self.fc = head, nn.Conv2d(3, 8, 3, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        if self.head == "maximum":
            return self.fc(x.relu().amax((2, 3)))
        if self.head == "tokens":
            tokens = x.flatten(2).transpose(1, 2)
            return self.fc((tokens + self.mix(tokens).relu()).mean(1, keepdim=True).flatten(1))
        features = x.relu().mean((2, 3))
        return {"features": features, "logits": self.fc(features)}


@pytest.mark.parametrize("head", ["maximum", "tokens", "dictionary"])
def test_both_runtimes_compute_the_networks_own_logits(images: Tensor, head: str) -> None:
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(Headed(head).eval(), [images], bits=4, solver="rtn")
    models = onnx_models(quantized, SHAPE, ["fp32", "int8"], [images])
    with torch.no_grad():
        expected = logits_of(quantized(images))
    spread = float(expected.max() - expected.min())
    runners = [{name: runtime.runner(session(model)) for name, model in models.items()}, runtime.openvino(models)]
    for name, tolerance in (("fp32", 1e-4), ("int8", 0.03 * spread)):
        for run in runners:
            found = torch.from_numpy(run[name](images.numpy()).copy())
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_int8_of_a_network_whose_own_quantizers_round_everything(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(7), nn.Flatten(), nn.Linear(8, 5)).eval()
    quantized, _ = kdq.quantize(network, [images], bits=4, act_bits=8)
    model = onnx_models(quantized, SHAPE, ["int8"], [images])["int8"]
    with torch.no_grad():
        expected = quantized(images)
    torch.testing.assert_close(_run(model, images), expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("bits", "kind", "opset"), [(2, "UINT2", 25), (3, "UINT4", 21), (12, "UINT16", 21)])
def test_codes_are_stored_in_the_narrowest_type(images: Tensor, bits: int, kind: str, opset: int) -> None:
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(trained_norms(ReluNet()), [images], bits=bits)
    data = onnx_models(quantized, SHAPE, ["codes"])["codes"]
    model = onnx.load_from_string(data)
    codes = [item for item in model.graph.initializer if item.name.endswith("_codes")]
    assert {onnx.TensorProto.DataType.Name(item.data_type) for item in codes} == {kind}
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
    with torch.no_grad():
        torch.testing.assert_close(_run(data, images), quantized(images), rtol=1e-4, atol=1e-5)


def test_codes_decode_to_the_very_weight_and_take_no_more_bytes_than_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    quantized, _ = kdq.quantize(CifarResNet(8, 10, width=2), [images], bits=4, solver="rtn")
    packed = tmp_path / "packed.kdq"
    kdq.save(quantized, packed)
    data = onnx_models(kdq.load(packed), (3, 16, 16), ["codes"])["codes"]
    assert len(data) <= 1.1 * packed.stat().st_size
    constants = _constants(onnx.load_from_string(data))
    codes, zero, scale = (constants[f"fc.weight_{part}"].astype(np.float32) for part in ("codes", "zero", "scale"))
    assert np.array_equal((codes - zero) * scale, quantized.fc.weight.detach().numpy())  # no BatchNorm follows it
    assert (zero % 1 == 0.5).any()


class _Standardized(nn.Conv2d):
    """Layers that compute their parameters when they run: what BatchNorm would be folded into is not there."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(input, weight, self.bias)


class _LargeBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.conv2d(input, self.weight, self.bias * 9)


class _NoBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight)


class _Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.kernel)


def test_quantized_layers_that_stay_float_are_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    bits = {"0.kernel": 4, "2": 16, "5": 17}  # "codes" ends at 16
    network = nn.Sequential(_Kernel(), nn.ReLU(), nn.Conv2d(4, 4, 7), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    quantized, _ = kdq.quantize(network.eval(), [images], bits=bits)
    onnx_models(quantized, SHAPE, ["codes", "int8"], [images], "mse")
    told = [record.getMessage() for record in caplog.records if record.name.startswith("kdq.deploy")]
    assert told == [f"these layers stay float in {x}: the exporter changed them: 0.kernel" for x in ("codes", "INT8")]


class _AroundOne(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, 1 + self.weight, self.bias)


@pytest.mark.parametrize("layer", [_Standardized, _LargeBias, _NoBias, _Kernel, nn.Conv2d])
def test_what_a_layer_or_a_norm_computes_is_not_folded(images: Tensor, layer: Any) -> None:
    torch.manual_seed(0)
    made = layer() if layer is _Kernel else layer(3, 4, 3)
    norm = (_AroundOne if layer is nn.Conv2d else nn.BatchNorm2d)(4)
    network = trained_norms(nn.Sequential(made, norm, nn.ReLU(), nn.Flatten()))
    model = onnx_models(network, SHAPE, ["fp32"])["fp32"]
    with torch.no_grad():
        torch.testing.assert_close(_run(model, images), network(images), rtol=1e-4, atol=1e-5)


class _TwoReaders(nn.Module):
    """A layer whose output its BatchNorm reads, and a sum: it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.norm(y) + y).mean((2, 3))


def test_a_norm_that_shares_its_input_is_not_folded(images: Tensor) -> None:
    torch.manual_seed(0)
    network = trained_norms(_TwoReaders())
    models = onnx_models(network, SHAPE, calibration=[images])
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(_run(models["fp32"], images), expected, rtol=1e-4, atol=1e-5)
    assert (_run(models["int8"], images) - expected).abs().max() < 0.05 * expected.abs().max()


class _Chain(nn.Module):
    """Without sums: INT8 rounds exactly what the evaluated network rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.two, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        return self.head(torch.relu(self.two(x)).flatten(1))


class _Norms(nn.Module):
    """Convolutions whose BatchNorm has no parameters, or is one for both."""

    def __init__(self, affine: bool, shared: bool) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 5)
        self.first = nn.BatchNorm2d(8, affine=affine)
        self.second = self.first if shared else nn.BatchNorm2d(8, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.two(self.first(self.one(x)).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize(("affine", "shared"), [(True, False), (False, False), (True, True)])
def test_the_factors_of_every_folded_norm_are_in_the_codes(images: Tensor, affine: bool, shared: bool) -> None:
    torch.manual_seed(0)
    network = _Norms(affine, shared)
    for _ in range(5):
        network(images * 3)
    quantized, _ = kdq.quantize(network.eval(), [images], bits=4)
    models = onnx_models(quantized, SHAPE, calibration=[images])
    assert "BatchNormalization" not in {node.op_type for node in onnx.load_from_string(models["fp32"]).graph.node}
    with torch.no_grad():
        expected = quantized(images)
    for kind, most in (("fp32", 1e-5), ("codes", 1e-5), ("int8", 0.02)):
        assert (_run(models[kind], images) - expected).norm() < most * expected.norm(), kind


class _Twice(_Chain):
    """A layer that runs twice, on tensors of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.two(self.norm(self.one(x)).relu()).relu()).relu().mean((2, 3)))


def test_a_layer_that_runs_twice_is_stored_once(images: Tensor) -> None:
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(trained_norms(_Twice()), [images], bits=4)
    models = onnx_models(quantized, SHAPE, ["codes", "int8"], [images])
    with torch.no_grad():
        expected = quantized(images)
    for kind, most in (("codes", 1e-5), ("int8", 0.05)):
        assert (_run(models[kind], images) - expected).norm() < most * expected.norm(), kind
        kinds = {name: value.size for name, value in _constants(onnx.load_from_string(models[kind])).items()}
        assert [size for name, size in kinds.items() if name.startswith("two.weight_codes")] == [8 * 8 * 9]


def test_a_norm_of_tokens_is_not_folded_into_their_features(images: Tensor) -> None:
    torch.manual_seed(0)
    network = trained_norms(nn.Sequential(nn.Flatten(2), nn.Linear(81, 3), nn.BatchNorm1d(3), nn.Flatten()))
    model = onnx_models(network, SHAPE, ["fp32"])["fp32"]
    with torch.no_grad():
        torch.testing.assert_close(_run(model, images), network(images), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mixed(images: Tensor) -> nn.Module:
    """A residual network with layers of 2 to 8 bits and inputs of 8, as a packed file's user has it."""
    torch.manual_seed(0)
    network = trained_norms(build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 5, "width": 0.5}))
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    bits = {name: 2 + index % 7 for index, name in enumerate(names)}
    quantized, _ = kdq.quantize(network, [images], bits=bits, act_bits=8)
    quantized.kdq_preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "size": [9, 9]}
    quantized.kdq_classes = list("abcde")
    return quantized


@pytest.fixture(scope="module")
def int8(mixed: nn.Module, images: Tensor) -> bytes:
    return onnx_models(mixed, SHAPE, ["int8"], [images])["int8"]


def test_int8_computes_what_was_evaluated(mixed: nn.Module, int8: bytes, images: Tensor) -> None:
    with torch.no_grad():
        expected = mixed(images)
    found = _run(int8, images)
    # Sums of residual blocks are rounded too, which the evaluated network does not do.
    assert (found - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    reference = ReferenceEvaluator(onnx.load_from_string(int8)).run(None, {"image": images[:8].numpy()})[0]
    assert np.abs(reference - found[:8].numpy()).max() < 0.02 * float(expected.max() - expected.min())


def test_layers_of_few_bits_and_sums_round_a_tensor_apart(images: Tensor) -> None:
    torch.manual_seed(0)
    network = trained_norms(build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 5, "width": 0.5}))
    quantized, _ = kdq.quantize(network, [images], bits=8, act_bits=5)
    model = onnx_models(quantized, SHAPE, ["int8"], [images])["int8"]
    kinds = [node.op_type for node in onnx.load_from_string(model).graph.node]
    assert kinds.count("Clip") == 8  # nine layers, two of which read the same tensor twice, and not the sums
    with torch.no_grad():
        expected = quantized(images)
    assert (_run(model, images) - expected).abs().mean() < 0.05 * (expected.max() - expected.min())


def test_a_network_with_packed_weights_exports_alike(
    mixed: nn.Module, int8: bytes, images: Tensor, tmp_path: Any
) -> None:
    kdq.save(mixed, tmp_path / "net.kdq")
    packed = kdq.load(tmp_path / "net.kdq", decode="layer")
    assert onnx_models(packed, SHAPE, ["int8"], [images])["int8"] == int8
    with torch.no_grad():
        assert torch.equal(packed(images), mixed(images))  # and stays as it was


def test_int8_keeps_the_levels_and_says_so(mixed: nn.Module, int8: bytes) -> None:
    model = onnx.load_from_string(int8)
    constants, seen = _constants(model), 0
    for name, weight in mixed.quantized_weights.items():
        codes = constants[f"{name}.weight_codes"]
        assert codes.dtype == np.int8
        assert constants[f"{name}.weight_scale"].shape == (codes.shape[0],)
        if weight.bits < 8:
            assert all(len(np.unique(row)) <= weight.levels for row in codes)
            seen += 1
    assert seen > 5
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert "of 2, 3, 4, 5, 6, 7" in about["kdq.weights"]
    assert json.loads(about["kdq.preprocess"]) == mixed.kdq_preprocess
    assert json.loads(about["kdq.classes"]) == list("abcde")
    assert not any(constant.dtype == np.float32 and constant.size > 64 for constant in constants.values())


def test_every_kernel_is_an_integer_one(int8: bytes, tmp_path: Any) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 3
    onnxruntime.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert kinds.count("QLinearConv") == 9
    assert kinds.count("QLinearAdd") == 3
    assert kinds.count("QLinearGlobalAveragePool") == kinds.count("QGemm") == 1
    assert not {"Conv", "Relu", "Add", "Gemm", "ReduceMean", "GlobalAveragePool"} & set(kinds)
    assert kinds.count("QuantizeLinear") == 1  # of the image
    assert "DequantizeLinear" not in kinds


class _Means(nn.Module):
    """Means over height and width, with and without these axes, and one over other axes, which pools nothing."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((-1, -2), keepdim=True)
        return pooled.flatten(1) + x.mean((2, 3)) + x.mean((1, 2), keepdim=True).mean(3).flatten(1)


def test_bottlenecks_keep_their_predictions_in_int8() -> None:
    """At eight bits: all weights are rounded again, as not all of their codes fit INT8."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    network = trained_norms(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16))
    quantized, _ = kdq.quantize(network, [images[:16]], bits=8, solver="rtn")
    found = _run(onnx_models(quantized, (3, 32, 32), ["int8"], [images[:32]])["int8"], images)
    with torch.no_grad():
        expected = quantized(images)
    assert (found - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    clear = expected.topk(2).values.diff().abs().flatten() > 0.05 * (expected.max() - expected.min())
    assert clear.float().mean() > 0.2
    assert torch.equal(found.argmax(1)[clear], expected.argmax(1)[clear])


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_layers_on_tokens_are_integer_ones_and_keep_their_codes(kind: str) -> None:
    torch.manual_seed(0)
    network: nn.Module = VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=5)
    if kind == "swin":
        network = SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    images = torch.randn(64, 3, 32, 32)
    quantized, report = kdq.quantize(network, [images], bits=4)
    models = onnx_models(quantized, (3, 32, 32), ["int8", "codes"], [images])
    constants = {name: _constants(onnx.load_from_string(model)) for name, model in models.items()}
    for found in constants.values():
        coded = {layer_name(name.removesuffix("_codes")) for name in found if name.endswith("weight_codes")}
        assert coded == {layer.name for layer in report.layers}
    with torch.no_grad():
        expected = quantized(images)
    torch.testing.assert_close(_run(models["codes"], images), expected, rtol=1e-3, atol=1e-4)
    error = (_run(models["int8"], images) - expected).square().mean() / expected.var()
    assert error < 0.01


def test_means_over_height_and_width_are_pools(images: Tensor) -> None:
    model = onnx_models(_Means(), SHAPE, ["fp32"])["fp32"]
    graph = onnx.load_from_string(model).graph
    kinds = [node.op_type for node in graph.node]
    assert (kinds.count("GlobalAveragePool"), kinds.count("ReduceMean")) == (2, 2)
    assert {item.name for item in graph.initializer} <= {name for node in graph.node for name in node.input}
    torch.testing.assert_close(_run(model, images), _Means()(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_without_sums_int8_is_the_evaluated_network(images: Tensor, act_bits: int) -> None:
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(trained_norms(_Chain()), [images], bits=4, act_bits=act_bits)
    model = onnx_models(quantized, SHAPE, ["int8"])["int8"]  # no range is missing: no calibration
    with torch.no_grad():
        expected = quantized(images)
    wrong = (_run(model, images) - expected).abs()
    assert wrong.median() < 1e-4
    # A value on the border between two codes may fall to either side, and what follows with it.
    assert (wrong < 1e-3).all(1).float().mean() > 0.75


def test_ranges_are_those_of_the_quantizer(images: Tensor) -> None:
    torch.manual_seed(0)
    network = trained_norms(_Chain())
    model = onnx.load_from_string(onnx_models(network, SHAPE, ["fp32"])["fp32"])
    tensors = [next(node.input[0] for node in model.graph.node if node.op_type == kind) for kind in ("Conv", "Gemm")]
    found = {tensor: found.quantizer(8) for tensor, found in histograms(model, tensors, images.split(20)).items()}
    expected = [Histogram(), Histogram()]
    expected[0].add(images)
    with torch.no_grad():
        expected[1].add(torch.relu(network.two(torch.relu(network.norm(network.one(images))))))
    for tensor, histogram in zip(tensors, expected, strict=True):
        assert found[tensor].scale == pytest.approx(histogram.quantizer(8).scale, rel=1e-6)
        assert found[tensor].zero == histogram.quantizer(8).zero


class _Outlying(_Chain):
    """One channel has values that dwarf the others', and the logits hardly depend on it."""

    def __init__(self, size: float) -> None:
        super().__init__()
        with torch.no_grad():
            self.one.weight[0] *= size
            self.two.weight[:4, 0] /= size


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_the_closest_range_is_that_of_the_closest_model(size: float, images: Tensor) -> None:
    torch.manual_seed(0)
    network = trained_norms(_Chain()) if size == 1 else _Outlying(size)
    made = {choice: onnx_models(network, SHAPE, ["int8"], [images], choice)["int8"] for choice in (*RANGES, "closest")}
    with torch.no_grad():
        expected = network.eval()(images).log_softmax(1)
    apart = {
        choice: float((expected.exp() * (expected - _run(model, images).log_softmax(1))).sum(1).mean())
        for choice, model in made.items()
    }
    assert apart["closest"] == pytest.approx(min(apart[choice] for choice in RANGES), rel=1e-3)
    assert made["closest"] in [made[choice] for choice in RANGES]


def test_an_unknown_range_is_refused(images: Tensor) -> None:
    with pytest.raises(kdq.KdqError, match="act_range='all' is unknown"):
        onnx_models(_Chain(), SHAPE, ["int8"], [images], "all")


class _NoOnnx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(self.conv(x)).mean((2, 3))


class _Branching(_NoOnnx):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize(("network", "words"), [(_NoOnnx, "has no .*i0e"), (_Branching, "torch cannot export")])
def test_what_cannot_be_exported_is_named_in_one_line(
    network: type[nn.Module], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kdq.KdqError, match=words) as refused:
        onnx_models(network(), SHAPE, ["fp32"])
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().out == ""


def test_missing_calibration_packages_and_formats_are_told(mixed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kdq.KdqError, match="needs calibration images"):
        onnx_models(mixed, SHAPE, ["int8"])
    with pytest.raises(kdq.KdqError, match="needs calibration images and got none"):
        onnx_models(mixed, SHAPE, ["int8"], [])
    with pytest.raises(kdq.KdqError, match="fp32, int8"):
        onnx_models(mixed, SHAPE, ["int4"])
    monkeypatch.setattr(runtime, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(kdq.KdqError, match=r"onnxruntime not installed: pip install 'kdq\[deploy\]'"):
        onnx_models(mixed, SHAPE, ["int8"])
