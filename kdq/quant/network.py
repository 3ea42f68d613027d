"""Quantize a whole network in one forward pass: the walk that meets every layer in the order it runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdq.errors import KdqError
from kdq.quant.alphabet import ALPHABETS, Alphabet, check_bits, decode
from kdq.quant.gpfq import gpfq
from kdq.quant.lanes import Lanes
from kdq.quant.layer import QUANTIZABLE, patches, weight_matrix
from kdq.quant.rtn import rtn

#: ``(weight, gram, cross, alphabet) -> quantized weight``; see :func:`kdq.quant.gpfq.gpfq` for the shapes.
Solver = Callable[[Tensor, Tensor, Tensor, Alphabet], Tensor]
SOLVERS: dict[str, Solver] = {"rtn": rtn, "gpfq": gpfq}
#: One width for every layer, or the width of each layer by name.
Bits = int | Mapping[str, int]
#: Images pushed through a layer at a time, whatever batches the caller has, so that sums, and hence codes, do not
#: depend on those.
CHUNK = 64


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's weight as stored: ``decode(codes)`` is the tensor the quantized network computes with.

    Attributes:
        codes: int64, in the weight's own shape.
        scale, zero: float32 ``(out_channels,)``.
        levels: size of the alphabet.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    levels: int

    @property
    def bits(self) -> int:
        return max(1, (self.levels - 1).bit_length())

    def decode(self) -> Tensor:
        rows = self.codes.flatten(1)
        return decode(rows, self.scale[:, None], self.zero[:, None], self.levels).view(self.codes.shape)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. ``error`` is ``||Y - Y_q|| / ||Y||`` of its outputs on the calibration images, the
    float layer fed by the float network and the quantized layer by the quantized network."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    levels: int
    error: float


@dataclass
class Report:
    """Per-layer results in the order the layers ran, and the seconds of the pass (shared by all its widths)."""

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def weights(self) -> int:
        return sum(_numel(layer.shape) for layer in self.layers)

    @property
    def weight_bits_total(self) -> int:
        """Bits of all codes together."""
        return sum(layer.bits * _numel(layer.shape) for layer in self.layers)

    @property
    def avg_bits(self) -> float:
        """Bits per weight over the quantized layers."""
        return self.weight_bits_total / self.weights


def quantize(
    model: nn.Module, batches: Iterable[Any], bits: Bits = 4, solver: str | Solver = "gpfq", **options: Any
) -> tuple[nn.Module, Report]:
    """Quantize the weights of ``model`` on calibration images.

    Args:
        model: any network of convolutions and linear layers; it is not modified.
        batches: input tensors, or tuples whose first item is one. They are run in eval mode.
        bits: 2 to 32, or a mapping from layer name to bits that names every layer.
        solver: ``"gpfq"``, ``"rtn"``, or a function ``(weight, gram, cross, alphabet) -> quantized weight``.
        options: see :func:`quantize_widths`.

    Returns:
        A copy of the model whose weights take only their alphabets' values, with the codes in its attribute
        ``quantized_weights`` (name to :class:`QuantizedWeight`), and the per-layer report.

    Raises:
        KdqError: there is no calibration image, a layer that holds weights cannot be quantized (name it in
            ``exclude`` to leave it float) or never runs, or ``bits`` is out of range.
    """
    return quantize_widths(model, batches, [bits], solver, **options)[0]


def quantize_widths(
    model: nn.Module,
    batches: Iterable[Any],
    widths: Sequence[Bits],
    solver: str | Solver = "gpfq",
    *,
    alphabet: str | Callable[[Tensor, int], Alphabet] = "uniform",
    exclude: Collection[str] = (),
    on_layer: Callable[[str], None] | None = None,
) -> list[tuple[nn.Module, Report]]:
    """:func:`quantize` for several widths in one pass that shares the float network's part.

    Args:
        alphabet: ``"uniform"`` or a function ``(weight (groups, rows, columns), bits) -> Alphabet``.
        exclude: names of modules whose weights (and those of what is inside them) stay float.
        on_layer: called with a layer's name when it is done, for a progress bar.
    """
    start = time.perf_counter()
    layers = quantizable_layers(model, exclude)
    walk = _Walk(
        layers={name: [_bits_of(width, name) for width in widths] for name in layers},
        solver=_named(SOLVERS, solver, "solver"),
        alphabet=_named(ALPHABETS, alphabet, "alphabet"),
        on_layer=on_layer or (lambda name: None),
    )
    for width in widths:
        if isinstance(width, Mapping) and (unknown := sorted(set(width) - set(layers))):
            raise KdqError(f"bits name layers that are not quantized: {', '.join(unknown[:4])}")
    runner = copy.deepcopy(model).eval()
    inputs, walk.padding = _first_lanes(batches, len(widths) + 1, next(model.parameters()).device)
    with torch.no_grad(), _rerouted(runner, walk, layers):
        runner(inputs)
    if missed := [name for name in layers if name not in walk.weights]:
        raise KdqError(f"layers never ran on the calibration images: {', '.join(missed[:4])}; name them in exclude")
    for report in walk.reports:
        report.seconds = time.perf_counter() - start
    return [
        (with_quantized_weights(model, {name: walk.weights[name][index] for name in layers}), walk.reports[index])
        for index in range(len(widths))
    ]


def with_quantized_weights(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> nn.Module:
    """A copy of ``model`` in eval mode that computes with ``weights``, kept as its ``quantized_weights``."""
    quantized = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = quantized.get_submodule(name).weight
            assert isinstance(parameter, Tensor)
            parameter.copy_(weight.decode())
    quantized.quantized_weights = dict(weights)  # type: ignore[assignment]
    return quantized


def quantizable_layers(model: nn.Module, exclude: Collection[str] = ()) -> list[str]:
    """Names of the convolutions and linear layers, in registration order, without those inside ``exclude``.

    Raises:
        KdqError: another module holds a weight of two or more dimensions, or ``exclude`` names no module.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in exclude if name not in modules]:
        raise KdqError(f"exclude names no module of the network: {', '.join(unknown)}")

    def excluded(name: str) -> bool:
        return any(name == outer or name.startswith(f"{outer}.") for outer in exclude)

    layers = []
    for name, module in modules.items():
        if excluded(name):
            continue
        if isinstance(module, QUANTIZABLE):
            layers.append(name)
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim >= 2:
                raise KdqError(
                    f"cannot quantize {name or 'the network itself'}.{parameter} of a {type(module).__name__}: only "
                    f"{', '.join(kind.__name__ for kind in QUANTIZABLE)} are known; exclude={name!r} leaves it float"
                )
    if not layers:
        raise KdqError("the network has no convolution or linear layer to quantize")
    return layers


@dataclass
class _Walk:
    """The state of one pass: what each layer's visit leaves behind.

    ``padding`` is the share of the last chunk's rows that repeat an image to make the chunks equal; it counts nowhere.
    """

    layers: dict[str, list[int]]
    solver: Solver
    alphabet: Callable[[Tensor, int], Alphabet]
    on_layer: Callable[[str], None]
    padding: float = 0.0
    weights: dict[str, list[QuantizedWeight]] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reports = [Report() for _ in next(iter(self.layers.values()))]

    def visit(self, name: str, layer: nn.Module, inputs: Lanes) -> Lanes:
        """Stand in for ``layer.forward``: quantize it for every lane, then pass each lane through its own version.

        A layer that runs a second time keeps the codes of its first run.
        """
        first_time = name not in self.weights
        if first_time:
            self.weights[name] = self._solve(name, layer, inputs)
        assert isinstance(layer.weight, Tensor)
        versions = [layer.weight, *(weight.decode() for weight in self.weights[name])]

        def run(lane: int, chunk: Tensor) -> Tensor:
            return torch.func.functional_call(_Original(layer), {"layer.weight": versions[lane]}, chunk)

        outputs = inputs.map(run)
        if first_time:
            self._report(name, layer, outputs)
            self.on_layer(name)
        return outputs

    def _solve(self, name: str, layer: nn.Module, inputs: Lanes) -> list[QuantizedWeight]:
        weight = weight_matrix(layer)
        grams, crosses = second_moments(layer, inputs, self.padding)
        solved = []
        for gram, cross, bits in zip(grams, crosses, self.layers[name], strict=True):
            alphabet = self.alphabet(weight, bits)
            codes = alphabet.encode(self.solver(weight, gram, cross, alphabet))
            assert isinstance(layer.weight, Tensor)
            scale, zero = (value.expand_as(weight[..., :1]).flatten() for value in (alphabet.scale, alphabet.zero))
            solved.append(QuantizedWeight(codes.view(layer.weight.shape), scale, zero, alphabet.levels))
        return solved

    def _report(self, name: str, layer: nn.Module, outputs: Lanes) -> None:
        real = [_real(lane, self.padding) for lane in outputs.lanes]
        reference = sum(float(chunk.double().square().sum()) for chunk in real[0])
        for report, weight, lane in zip(self.reports, self.weights[name], real[1:], strict=True):
            wrong = sum(float((a - b).double().square().sum()) for a, b in zip(real[0], lane, strict=True))
            error = (wrong / reference) ** 0.5 if reference > 0 else 0.0
            shape = tuple(weight.codes.shape)
            report.layers.append(LayerReport(name, type(layer).__name__, shape, weight.bits, weight.levels, error))


def second_moments(layer: nn.Module, inputs: Lanes, padding: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """``G = X~'X~`` and ``H = X~'X`` of every quantized lane, each ``(groups, d, d)``, summed over the chunks.

    Lanes that still agree with the float lane share one matrix, which then is both.
    """
    lanes = [_real(lane, padding) for lane in inputs.lanes]
    agree = [all(a is b for a, b in zip(inputs.lanes[0], lane, strict=True)) for lane in inputs.lanes]
    agree[0] = any(agree[1:])  # lane 0 stands for all that agree with it
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for chunk, float_chunk in enumerate(lanes[0]):
        x = patches(layer, float_chunk)
        for index, lane in enumerate(lanes):
            if index == 0 and agree[0]:
                gram = _add(sums, 0, 0, x, x)
                sums[0] = (gram, gram)
            elif index and not agree[index]:
                x_tilde = patches(layer, lane[chunk])
                sums[index] = (_add(sums, index, 0, x_tilde, x_tilde), _add(sums, index, 1, x_tilde, x))
    pairs = [sums[0 if agree[index] else index] for index in range(1, len(lanes))]
    return [gram for gram, _ in pairs], [cross for _, cross in pairs]


def _add(sums: Mapping[int, tuple[Tensor, Tensor]], index: int, which: int, left: Tensor, right: Tensor) -> Tensor:
    if index not in sums:
        return left.mT @ right
    return sums[index][which].baddbmm_(left.mT, right)


def _real(chunks: list[Tensor], padding: float) -> list[Tensor]:
    """``chunks`` without the padding rows of the last one."""
    last = chunks[-1]
    return [*chunks[:-1], last[: len(last) - round(padding * len(last))]]


class _Original(nn.Module):
    """A layer's own forward method, beneath the one :func:`_rerouted` put over it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, inputs)


@contextmanager
def _rerouted(model: nn.Module, walk: _Walk, layers: Collection[str]) -> Iterator[None]:
    """While it lasts, the named layers of ``model`` call ``walk.visit`` in place of their forward methods."""
    modules = {name: model.get_submodule(name) for name in layers}
    try:
        for name, module in modules.items():
            module.forward = lambda inputs, name=name, module=module: walk.visit(name, module, inputs)
        yield
    finally:
        for module in modules.values():
            del module.forward


def _first_lanes(batches: Iterable[Any], lanes: int, device: torch.device) -> tuple[Lanes, float]:
    """All calibration inputs in equal chunks, every lane starting from the same tensors, and the share of the last
    chunk that had to be padded with copies of its last image."""
    tensors = [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
    if not tensors or not sum(map(len, tensors)):
        raise KdqError("there is no calibration image: pass batches of inputs, such as a DataLoader")
    images = torch.cat([tensor.to(device) for tensor in tensors])
    count = -(-len(images) // CHUNK)
    size = -(-len(images) // count)
    padding = count * size - len(images)
    chunks = list(torch.cat([images, images[-1:].expand(padding, *images.shape[1:])]).split(size))
    return Lanes([chunks] * lanes), padding / size


def _bits_of(width: Bits, name: str) -> int:
    if isinstance(width, Mapping):
        if name not in width:
            raise KdqError(f"bits name no width for the layer {name}")
        width = width[name]
    return check_bits(width)


def _named(known: Mapping[str, Any], value: Any, what: str) -> Any:
    if isinstance(value, str):
        if value not in known:
            raise KdqError(f"{what}={value!r} is unknown: use one of {', '.join(known)}, or pass a function")
        return known[value]
    return value


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
