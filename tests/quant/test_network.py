"""The walk against a reference that quantizes layer by layer from the image, with the literal recursion."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor, nn

import kdq
from kdq import KdqError
from kdq.quant.calibrate.chunks import in_chunks
from kdq.quant.config import QuantConfig
from kdq.quant.network import quantize, quantize_widths
from kdq.records.store import weights_file
from tests.quant import literal

Conv = Callable[..., nn.Module]


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.codes for name, weight in model.quantized_weights.items()}


def assert_same_codes(found: nn.Module, other: nn.Module) -> None:
    assert codes(found).keys() == codes(other).keys()
    for name, value in codes(found).items():
        assert torch.equal(value, codes(other)[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_walk_equals_quantizing_layer_by_layer(relu_net: nn.Module, bits: int) -> None:
    images = torch.randn(40, 3, 9, 9)
    quantized, report = kdq.quantize(relu_net, images.split(16), bits=bits, solver="gpfq")
    expected = literal.quantize_network(relu_net, images, quantized.quantized_weights)
    for name, weight in expected.items():
        assert torch.equal(quantized.get_submodule(name).weight, weight), name
    order = ["stem", "grouped", "depthwise", "shortcut", "mix", "head"]
    assert [layer.name for layer in report.layers] == order


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(7, 4), (7,)),
    "linear on tokens": (nn.Linear(7, 4), (5, 7)),
    "1x1": (nn.Conv2d(5, 4, 1), (5, 6, 6)),
    "1x1 stride 2": (nn.Conv2d(5, 4, 1, stride=2), (5, 7, 7)),
    "3x3 same": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "3x3 valid": (nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "3x3 on one pixel": (nn.Conv2d(3, 4, 3, padding=1), (3, 1, 1)),
    "3x3 stride 2": (nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 8, 7)),
    "3x3 dilation 2": (nn.Conv2d(3, 4, 3, padding=2, dilation=2), (3, 7, 6)),
    "3x3 dilation 2 stride 3": (nn.Conv2d(2, 4, 3, padding=3, dilation=2, stride=3), (2, 9, 9)),
    "4x2 padding 2,0 stride 1,2": (nn.Conv2d(3, 4, (4, 2), padding=(2, 0), stride=(1, 2)), (3, 6, 7)),
    "same by name": (nn.Conv2d(3, 4, 4, padding="same"), (3, 6, 5)),
    "7x7 stride 2": (nn.Conv2d(2, 4, 7, padding=3, stride=2), (2, 11, 11)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 5)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", stride=2), (3, 6, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 6, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 5)),
    "1-D": (nn.Conv1d(3, 4, 5, padding=2, stride=2), (3, 11)),
    "3-D": (nn.Conv3d(2, 4, 3, padding=1), (2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_gets_the_codes_of_the_recursion(name: str) -> None:
    torch.manual_seed(1)
    layer, shape = LAYERS[name]
    first = nn.Linear(shape[-1], shape[-1])  # so that the layer's quantized inputs differ from the float ones
    model, images = nn.Sequential(first, nn.ReLU(inplace=True), layer), torch.randn(30, *shape)
    quantized, _ = kdq.quantize(model, [images], bits=3, solver="gpfq")
    expected = literal.quantize_network(model, images, quantized.quantized_weights)
    assert torch.equal(quantized[2].weight, expected["2"])


def test_many_widths_in_one_pass_equal_single_passes(relu_net: nn.Module) -> None:
    images, widths = torch.randn(30, 3, 9, 9), [2, 3, 4, 8, 12, 32]
    together = quantize_widths(relu_net, [images], widths)
    for width, (quantized, report) in zip(widths, together, strict=True):
        alone, alone_report = kdq.quantize(relu_net, [images], bits=width)
        assert_same_codes(quantized, alone)
        assert [layer.error for layer in report.layers] == [layer.error for layer in alone_report.layers]


def test_codes_do_not_depend_on_the_batches(relu_net: nn.Module) -> None:
    images = torch.randn(150, 3, 9, 9)  # several chunks, the last one not full
    reference, _ = kdq.quantize(relu_net, [images], bits=3)
    for batches in (images.split(1), images.split(37), [(batch, None) for batch in images.split(100)]):
        assert_same_codes(kdq.quantize(relu_net, batches, bits=3)[0], reference)


def test_the_same_call_twice_gives_the_same_codes(relu_net: nn.Module) -> None:
    images = torch.randn(80, 3, 9, 9)
    assert_same_codes(*(kdq.quantize(relu_net, [images], bits=2)[0] for _ in range(2)))


def test_the_model_is_not_modified(relu_net: nn.Module) -> None:
    relu_net.train()
    before = copy.deepcopy(relu_net.state_dict())
    kdq.quantize(relu_net, [torch.randn(10, 3, 9, 9)], bits=2)
    assert all(torch.equal(value, before[name]) for name, value in relu_net.state_dict().items())
    assert relu_net.training
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in relu_net.modules())


def test_32_bits_match_the_float_network(relu_net: nn.Module) -> None:
    images = torch.randn(10, 3, 9, 9)
    quantized, _ = kdq.quantize(relu_net, [images], bits=32)
    with torch.no_grad():
        assert torch.allclose(quantized(images), relu_net(images), rtol=1e-4, atol=1e-5)


def test_error_falls_with_bits_and_gpfq_beats_rounding(relu_net: nn.Module) -> None:
    images = torch.randn(200, 3, 9, 9)
    final = {}
    for solver in ("rtn", "gpfq"):
        results = quantize_widths(relu_net, [images], [2, 3, 4, 8], QuantConfig(solver))
        final[solver] = [report.layers[-1].error for _, report in results]
        assert final[solver] == sorted(final[solver], reverse=True)
    assert final["gpfq"][0] < final["rtn"][0]


class Twice(nn.Module):
    """A layer that runs twice, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.loop = nn.Conv2d(6, 6, 3, padding=1)
        self.alias = self.loop
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in (self.loop, self.alias):
            x = torch.relu(layer(x)) + x
        return self.head(x.mean((2, 3)))


def test_modules_shared_or_called_twice_have_one_weight(tmp_path: Path) -> None:
    quantized, report = kdq.quantize(Twice(), [torch.randn(9, 3, 6, 6)], bits=2)
    assert [layer.name for layer in report.layers] == ["first", "loop", "head"]
    assert quantized.alias is quantized.loop
    assert len(quantized.loop.weight.unique()) <= 4 * 6
    kdq.save(quantized, tmp_path / "twice.kdq")
    loaded, images = kdq.load(tmp_path / "twice.kdq", network=Twice()), torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    kdq.save(loaded, tmp_path / "again.kdq")
    metadata = []  # the header, and the checksum of all tensors; safetensors writes the two in any order
    for name in ("twice.kdq", "again.kdq"):
        with safe_open(tmp_path / name, "pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1]
    stored = load(weights_file(Twice().state_dict()))  # a trained model's file
    assert stored.keys() == Twice().state_dict().keys()


def test_bits_by_layer(relu_net: nn.Module) -> None:
    images = torch.randn(9, 3, 9, 9)
    _, report = kdq.quantize(relu_net, [images], bits=4)
    wanted = {layer.name: 2 + index for index, layer in enumerate(report.layers)}
    quantized, report = kdq.quantize(relu_net, [images], bits=wanted)
    assert {name: weight.bits for name, weight in quantized.quantized_weights.items()} == wanted
    numel = {layer.name: relu_net.get_submodule(layer.name).weight.numel() for layer in report.layers}
    expected = sum(wanted[name] * count for name, count in numel.items()) / sum(numel.values())
    assert report.avg_bits == pytest.approx(expected)


def test_excluded_layers_stay_float_and_feed_the_quantized_inputs(relu_net: nn.Module) -> None:
    images = torch.randn(20, 3, 9, 9)
    quantized, report = kdq.quantize(relu_net, [images], bits=2, solver="gpfq", keep_float=["stem", "mix"])
    assert "stem" not in {layer.name for layer in report.layers}
    assert torch.equal(quantized.stem.weight, relu_net.stem.weight)
    expected = literal.quantize_network(relu_net, images, quantized.quantized_weights)
    assert torch.equal(quantized.head.weight, expected["head"])


def test_errors_say_what_to_do(relu_net: nn.Module) -> None:
    image = torch.randn(2, 3, 9, 9)
    cases: list[tuple[nn.Module, Any, dict, str]] = [
        (relu_net, [], {}, "no calibration image"),
        (relu_net, [image[:0]], {}, "no calibration image"),
        (relu_net, None, {}, "the batches are a NoneType"),
        (relu_net, image, {}, "the batches are a Tensor"),
        (relu_net, [image], {"bits": 1}, "2 to 32"),
        (relu_net, [image], {"bits": {"stem": 4}}, "no width for the layer"),
        (relu_net, [image], {"solver": "magic"}, "gpfq"),
        (relu_net, [image], {"alphabet": "greek"}, "uniform"),
        (relu_net, [image], {"keep_float": ["nothing"]}, "nothing"),
        (
            nn.Sequential(nn.ConvTranspose2d(3, 3, 2)),
            [image],
            {},
            r"0.weight of ConvTranspose2d \(used by",
        ),
        (nn.Sequential(nn.ReLU()), [image], {}, "no convolution or linear"),
    ]
    for model, batches, options, message in cases:
        with pytest.raises(KdqError, match=message) as caught:
            kdq.quantize(model, batches, **options)
        assert "\n" not in str(caught.value)


class Functions(nn.Module):
    """Torch functions between two layers: what ``between`` does must reach every version of the network alike."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.LazyLinear(3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)).flatten(1))


def _add_in_place(x: Tensor) -> Tensor:
    y = x.relu()
    y += x
    y[:, 0] = 0
    y.mul_(2)
    return y


def _view_in_place(x: Tensor) -> Tensor:
    y = x[:, :2]
    y.add_(1)
    return x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "operators": lambda x: (2 * x - 1) / (x.abs() + 1) ** 2,
    "in place": _add_in_place,
    "in place on a view": _view_in_place,
    "relu in place": lambda x: F.relu(x, inplace=True) + x,
    "cat and split": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "stack": lambda x: torch.stack([x, x.flip(1)], 2).sum(2),
    "pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "shape arithmetic": lambda x: x.view(x.shape[0], -1, x.size(2) * x.size(3)).transpose(1, 2),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.flatten(2),) * 3),
    "mean over tuple": lambda x: x.mean((2, 3), keepdim=True) * x.sigmoid(),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "out of torch.tensor": lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1),
    "drop": lambda x: F.dropout(x, 0.5, training=False),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_functions_between_layers(name: str) -> None:
    torch.manual_seed(3)
    model, images = Functions(FUNCTIONS[name]), torch.randn(70, 3, 4, 4)
    with torch.no_grad():
        model(images)
    (two, _), (four, _) = quantize_widths(model, [images], [2, 4], QuantConfig(solver="gpfq"))
    for quantized in (two, four):
        expected = literal.quantize_network(model, images, quantized.quantized_weights)
        assert torch.equal(quantized.last.weight, expected["last"])


@pytest.mark.parametrize("act_bits", [None, 6])
def test_isolated_layers_get_the_codes_of_a_network_where_they_alone_are_quantized(
    relu_net: nn.Module, act_bits: int | None
) -> None:
    images, layers = torch.randn(70, 3, 9, 9), ["stem", "grouped", "depthwise", "shortcut", "mix", "head"]
    together = quantize_widths(relu_net, [images], [2, 4], QuantConfig(act_bits=act_bits), isolated=True)
    for bits, (quantized, _) in zip((2, 4), together, strict=True):
        for name in layers:
            others = [other for other in layers if other != name]
            alone, _ = kdq.quantize(relu_net, [images], bits=bits, keep_float=others, act_bits=act_bits)
            assert torch.equal(codes(quantized)[name], codes(alone)[name]), (bits, name)


def _conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def _normed() -> nn.Sequential:
    network = _conv()
    nn.utils.parametrizations.weight_norm(network[0])
    return network


@pytest.mark.parametrize(
    ("network", "shape", "options", "says"),
    [
        (_conv().half(), (3, 6, 6), {}, r"0 is torch.float16: quantize model.float\(\)"),
        (_conv().forward, (3, 6, 6), {}, r"a method, not a torch\.nn\.Module"),
        (_normed(), (3, 6, 6), {}, r"the weight of 0 is computed.*remove_parametrizations"),
        (_conv(), (3, 6, 6), {"keep_float": "3"}, r"give a list of names, \[3\]"),
        (_conv(), (3, 6, 6), {"keep_float": ["4"]}, r"no 4 to leave float.*there is 0, 1, 2, 3"),
        (_conv(), (3, 6, 6), {"scale": "gram", "per_channel": False}, r"use per_channel=true, or scale=weight"),
    ],
)
def test_what_cannot_be_quantized_is_refused(network: Any, shape: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(KdqError, match=says):
        quantize(network, [torch.randn(8, *shape)], bits=4, **options)


def test_weights_that_are_not_finite_are_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        network[1].weight[0, 0] = float("nan")
    with pytest.raises(KdqError, match="the weights of 1 are not finite"):
        kdq.quantize(network, [torch.randn(8, 4)], bits=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    images = torch.randn(8, 3, 6, 6)
    images[3, 1, 2, 2] = value
    with pytest.raises(KdqError, match="the inputs of 0 are not finite"):
        quantize(_conv(), [images], bits=4)


def test_a_network_whose_inputs_are_rounded_is_not_quantized_again() -> None:
    once, _ = quantize(_conv(), [torch.randn(8, 3, 6, 6)], bits=4, act_bits=8)
    with pytest.raises(KdqError, match="the float network it was made of"):
        quantize(once, [torch.randn(8, 3, 6, 6)], bits=4)


def test_what_the_caller_set_for_training_changes_nothing() -> None:
    """Neither autocast nor a lower precision of matrix products."""
    images = [torch.randn(32, 3, 6, 6)]
    expected, _ = quantize(_conv(), images, bits=12)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = quantize(_conv(), images, bits=12)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


class Autocasting(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_autocast_in_the_networks_own_code_changes_nothing() -> None:
    images = [torch.randn(150, 3, 6, 6)]  # three chunks: what the first one ran under, the others do not
    expected, found = (quantize(kind(*_conv()), images, bits=3) for kind in (nn.Sequential, Autocasting))
    assert [layer.error for layer in expected.report.layers] == [layer.error for layer in found.report.layers]
    assert all(torch.equal(a, b) for a, b in zip(expected[0].parameters(), found[0].parameters(), strict=True))


def test_one_large_batch_is_the_chunks_of_small_ones() -> None:
    images = torch.arange(1000.0).view(250, 4)
    whole = [(chunk.clone(), count) for chunk, count in in_chunks([images], torch.device("cpu"))]
    small = list(in_chunks(images.split(9), torch.device("cpu")))
    assert [count for _, count in whole] == [64, 64, 64, 58]
    assert all(torch.equal(a, b) and n == m for (a, n), (b, m) in zip(whole, small, strict=True))


def test_an_alphabet_that_cuts_weights_off_is_answered_at_wide_widths_too() -> None:
    """One large weight in each row is cut off by the paper alphabet's one radius; the next layer makes up for it, as at
    narrow widths."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        network[0].weight[0] *= 8
    images = [torch.randn(512, 16) @ torch.randn(16, 16)]
    made = {bits: quantize(network, images, bits, solver="gpfq", alphabet="paper") for bits in (6, 7, 8, 12)}
    errors = {bits: report.layers[-1].error for bits, (_, report) in made.items()}
    outputs = {bits: quantized(images[0]) for bits, (quantized, _) in made.items()}
    for bits, found in outputs.items():
        assert float(((found - network(images[0])).norm() / network(images[0]).norm()).detach()) == pytest.approx(
            errors[bits], rel=1e-3
        )
    assert errors[12] <= errors[8] * 1.05 <= errors[6] * 1.1
