"""One forward pass that meets every layer in the order it runs, quantizes it for every width, and goes on.

The calibration images run as :class:`~kdq.quant.calibrate.lanes.Lanes`: the float network's activations X beside each
quantized network's X~. At a layer, G and C are summed over all chunks of images, the weight is solved, and the float
lane passes through W, the others through their Q. No layer is evaluated twice: O(L) for L layers.

From :data:`WIDE` bits up, X~ agrees with X to the precision of what is solved, so wide widths have no lane: they take
``G = C = X'X`` from the float lane, whichever widths share the pass. (Where the alphabet has room for all weights: one
that cuts the largest off, as the published study's does, leaves errors at any width.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdq.quant.activations import ActivationQuantizer, Histogram
from kdq.quant.calibrate.chunks import Chunks, images_axis, in_chunks
from kdq.quant.calibrate.correction import ChannelSums, Norm, corrected_norm
from kdq.quant.calibrate.lanes import Lanes, Tape
from kdq.quant.calibrate.layer import LayerCall, channel_axis, layer_call, weight_matrix
from kdq.quant.calibrate.moments import Moments, PartedMoments
from kdq.quant.calibrate.order import eager
from kdq.quant.calibrate.repeated import later_moments
from kdq.quant.config import QuantConfig
from kdq.quant.distributed import summed
from kdq.quant.layers import weight_of
from kdq.quant.packing.weights import QuantizedWeight
from kdq.quant.report import LayerReport, Report
from kdq.quant.solvers.held_out import PARTS, HeldOut
from kdq.utils.errors import KdqError
from kdq.utils.kernels import exact_kernels

#: Bits from which a width needs no lane of its own.
WIDE = 8


@dataclass
class Version:
    """One width's network in the making."""

    bits: Mapping[str, int]
    lane: int
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    #: New values of biases and running statistics, by their names in the state dict.
    state: dict[str, Tensor] = field(default_factory=dict)
    report: Report = field(default_factory=Report)


class Walk:
    """The state of one pass over ``model``, which is not modified.

    Args:
        widths: for each width, the bits of every layer by name.
        config: how.
        isolated: no width has a lane: every layer is solved as if it alone were quantized.
        on_layer: called with a layer's name when it is solved.
        repeated: the layers that run more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Sequence[Mapping[str, int]],
        config: QuantConfig,
        isolated: bool,
        on_layer: Callable[[str], object],
        repeated: Collection[str] = (),
    ) -> None:
        self.model, self.config, self.on_layer, self.repeated = model, config, on_layer, repeated
        self.versions: list[Version] = []
        lanes = 1
        for bits in widths:
            shared = isolated or (config.act_bits is None and config.covers and min(bits.values()) >= WIDE)
            self.versions.append(Version(bits, 0 if shared else lanes))
            lanes += not shared
        self.lanes = lanes
        self.tape = Tape(self.meet)
        self.names = {id(weight_of(model, name)): name for name in widths[0]}
        self.parameters = {id(value): name for name, value in model.named_parameters()}
        self.chunks = Chunks(next(model.parameters()).device)
        self.images: list[int] = []
        #: One chunk of how many is held out; 0: none.
        self.parts = 0
        self.current = 0
        self.errors: dict[str, Tensor] = {}
        self.norms: dict[str, dict[int, dict[str, Tensor]]] = {}
        self.later: dict[str, tuple[Tensor, Tensor | None, int]] = {}

    def run(self, batches: Iterable[Any]) -> None:
        """Quantize every layer; the results are in ``versions``."""
        device = self.chunks.device
        first: Tensor | None = None
        parts = PARTS if self.config.preset.held_out else 0
        for images, count in in_chunks(batches, device, parts):
            if first is None:
                first = images
            else:
                self.chunks.put(len(self.images), {0: Lanes([images] * self.lanes)})
            self.images.append(count)
        if first is None:
            raise KdqError("there is no calibration image: pass batches of inputs, such as a DataLoader")
        # With few images a process may have no chunk to hold out; then nobody does.
        self.parts = 0 if summed(torch.tensor(float(len(self.images) < parts), device=device)) else parts
        try:
            with torch.no_grad(), eager(), exact_kernels(device):
                self.later = self._later_moments(first) if self.repeated else {}
                with _rerouted(self._visitors()):
                    self.model(self.tape.watch(Lanes([first] * self.lanes)))
                    for _ in self._each_chunk(None):
                        pass
            self._finish_errors()
        finally:
            self.chunks.close()

    def meet(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Lanes | None:
        """Do what a torch function was called for, if it is a layer's."""
        inputs, call = layer_call(function, args, kwargs) or (None, None)
        if call is None or (name := self.names.get(id(call.weight))) is None or not isinstance(inputs, Lanes):
            return None
        return self.visit(name, call, inputs)

    def visit(self, name: str, call: LayerCall, inputs: Lanes) -> Lanes:
        """Stand in for a layer: quantize it for every version, then pass each lane through its own.

        A layer that runs a second time, or shares its weight with another, keeps the codes of its first run, which are
        solved on the inputs of all.
        """
        first_time = name not in self.versions[0].weights
        if first_time:
            if self.config.act_bits is not None:
                self._fit_activations(name, inputs, self.config.act_bits)
            self._solve(name, call.module, inputs)
        outputs = self._noted(self._forward(name, call), inputs)
        bias = self.parameters.get(id(call.bias))
        if self.config.correct is not None and bias is not None:
            if first_time:
                self._correct_bias(bias, call, outputs)
            outputs = self._noted(self._shift(bias, call), outputs)
        if first_time:
            outputs = self._noted(self._error(name), outputs)
            self.on_layer(name)
        return outputs

    def visit_norm(self, name: str, norm: Norm, inputs: Lanes) -> Lanes:
        """Stand in for ``norm.forward``: re-estimate its running statistics for every version."""
        if name not in self.norms:
            mean, variance = self._channel_sums(inputs, 1)
            self.norms[name] = {lane: corrected_norm(norm, mean, variance, lane) for lane in range(1, self.lanes)}
            for version in self.versions:
                new = self.norms[name].get(version.lane, {})
                version.state |= {f"{name}.{buffer}": value for buffer, value in new.items()}

        def run(lane: int, x: Tensor) -> Tensor:
            buffers = {f"layer.{buffer}": value for buffer, value in self.norms[name].get(lane, {}).items()}
            return torch.func.functional_call(_Original(norm), buffers, x)

        return self._noted(lambda values: values.map(run), inputs)

    def _visitors(self) -> list[tuple[nn.Module, Callable[[Lanes], Lanes]]]:
        """The modules whose forward methods the walk takes over, each with its replacement."""
        found: list[tuple[nn.Module, Callable[[Lanes], Lanes]]] = []
        if self.config.correct == "batchnorm":
            norms = ((name, module) for name, module in self.model.named_modules() if isinstance(module, Norm))
            found += [(m, partial(self.visit_norm, name, m)) for name, m in norms if m.running_mean is not None]
        return found

    def _noted(self, function: Callable[[Lanes], Lanes], inputs: Lanes) -> Lanes:
        """``function(inputs)``, to be repeated for the other chunks."""
        outputs = function(inputs)
        self.tape.record(function, (inputs,), {}, outputs)
        return outputs

    def _correct_bias(self, name: str, call: LayerCall, outputs: Lanes) -> None:
        mean, _ = self._channel_sums(outputs, channel_axis(call.module))
        assert call.bias is not None
        for version in self.versions:
            if version.lane:
                version.state[name] = (call.bias - (mean[version.lane] - mean[0])).to(call.bias)

    def _shift(self, name: str, call: LayerCall) -> Callable[[Lanes], Lanes]:
        """A function that adds to each lane what its bias was corrected by."""
        assert call.bias is not None
        axis = channel_axis(call.module)
        shifts = {version.lane: version.state[name] - call.bias for version in self.versions if version.lane}

        def run(lane: int, y: Tensor) -> Tensor:
            return (y.movedim(axis, -1) + shifts[lane]).movedim(-1, axis) if lane in shifts else y

        return lambda outputs: outputs.map(run)

    def _channel_sums(self, values: Lanes, axis: int) -> tuple[Tensor, Tensor]:
        sums = ChannelSums(axis)
        for chunk in self._each_chunk(values):
            sums.add(chunk.lanes)
        return sums.finish()

    def _error(self, name: str) -> Callable[[Lanes], Lanes]:
        """A function that adds up how far the lanes are from the float one, and passes them on."""

        def add(outputs: Lanes) -> Lanes:
            self._add_error(name, outputs)
            return Lanes(outputs.lanes)

        return add

    def _forward(self, name: str, call: LayerCall) -> Callable[[Lanes], Lanes]:
        weights: dict[int, Tensor] = {0: call.weight}
        quantizers: dict[int, ActivationQuantizer] = {}
        for version in self.versions:
            if version.lane:
                weights[version.lane] = version.weights[name].decode()
                if name in version.activations:
                    quantizers[version.lane] = version.activations[name]

        def run(lane: int, x: Tensor) -> Tensor:
            x = quantizers[lane].nearest(x) if lane in quantizers else x
            return call.function(x, weights[lane], call.bias)

        return lambda inputs: inputs.map(run)

    def _each_chunk(self, inputs: Lanes | None) -> Iterator[Lanes]:
        """Bring every waiting chunk to where the first one is, and give the values of ``inputs`` in each."""
        if inputs is not None:
            self.current = 0
            yield self._real(inputs)
        for index in range(1, len(self.images)):
            self.current = index
            values = self.tape.replay(self.chunks.take(index))
            if inputs is not None:
                yield self._real(values[inputs.key])
            self.chunks.put(index, values)
        self.tape.calls.clear()
        self.current = 0

    def _real(self, value: Lanes) -> Lanes:
        """``value`` without what repeats an image to fill the last chunk."""
        if (count := self.images[self.current]) == (size := self.images[0]):
            return value
        axis, outer, inner = images_axis(value.lanes[0], size, count)

        def cut(x: Tensor) -> Tensor:
            return x.unflatten(axis, (outer, size, inner)).narrow(axis + 1, 0, count).flatten(axis, axis + 2)

        return Lanes(_same([cut(lane) for lane in value.lanes], value.lanes))

    def _fit_activations(self, name: str, inputs: Lanes, bits: int) -> None:
        histograms = {version.lane: Histogram() for version in self.versions}
        for chunk in self._each_chunk(inputs):
            for lane, histogram in histograms.items():
                histogram.add(chunk.lanes[lane])
        for version in self.versions:
            version.activations[name] = histograms[version.lane].quantizer(bits, self.config.act_range)

    def _solve(self, name: str, layer: nn.Module, inputs: Lanes) -> None:
        weight = weight_matrix(layer)
        for version, gram, cross, held_out in self._moments(name, layer, inputs):
            if not (gram.isfinite().all() and cross.isfinite().all()):
                raise KdqError(f"the inputs of {name} are not finite: look at the calibration images and the network")
            try:
                values, alphabet = self.config.solve(weight, gram, cross, version.bits[name], held_out)
            except KdqError as refused:
                raise KdqError(f"{name}: {refused}") from refused
            assert isinstance(layer.weight, Tensor)
            scale, zero = (x.expand_as(weight[..., :1]).flatten() for x in (alphabet.scale, alphabet.zero))
            codes = alphabet.encode(values).view(layer.weight.shape)
            version.weights[name] = QuantizedWeight(codes, scale.contiguous(), zero.contiguous(), alphabet.levels)
            error = 0.0
            if version.lane == 0:  # its outputs are never computed, but G knows their error
                wrong = alphabet.decode(alphabet.encode(values)) - weight
                size = ((weight @ gram) * weight).sum()
                error = float((((wrong @ gram) * wrong).sum().clamp_min(0) / size) ** 0.5) if size != 0 else 0.0
            kind, shape = type(layer).__name__, tuple(layer.weight.shape)
            weights = version.weights[name]
            version.report.layers.append(LayerReport(name, kind, shape, weights.bits, weights.levels, error))

    def _later_moments(self, first: Tensor) -> dict[str, tuple[Tensor, Tensor | None, int]]:
        """See :func:`later_moments`; of the waiting chunks, and of the first one."""

        def chunks() -> Iterator[tuple[Tensor, bool]]:
            for index, count in enumerate(self.images):
                values = self.chunks.take(index) if index else {0: Lanes([first])}
                yield values[0].lanes[0][:count].clone(), self._held_out(index)  # a network may write into it
                if index:
                    self.chunks.put(index, values)

        new = partial(self._new_moments, symmetric=True)
        return later_moments(self.model, self.names, self.repeated, new, chunks())

    def _new_moments(self, layer: nn.Module, symmetric: bool) -> PartedMoments:
        return PartedMoments(self.config.moments or Moments, layer, symmetric, self.parts > 0)

    def _held_out(self, index: int) -> bool:
        """Whether the images of a chunk are."""
        return self.parts > 0 and index % self.parts == self.parts - 1

    def _moments(
        self, name: str, layer: nn.Module, inputs: Lanes
    ) -> Iterator[tuple[Version, Tensor, Tensor, HeldOut | None]]:
        """``G = X~'X~`` and ``C = X~'X`` for every version, each ``(groups, d, d)``, and what they hold of held-out
        images.

        Lanes that still agree with the float lane share one matrix, which then is both.
        """
        own = {
            version.lane: version.activations.get(name)
            for version in self.versions
            if inputs.lanes[version.lane] is not inputs.lanes[0] or name in version.activations
        }
        new = partial(self._new_moments, layer)
        grams = {lane: new(True) for lane in own}
        crosses = {lane: new(False) for lane in own}
        if shared := len(own) < len({version.lane for version in self.versions}):
            grams[0] = new(True)
        for chunk in self._each_chunk(inputs):
            x, held_out = chunk.lanes[0], self._held_out(self.current)
            if shared:
                grams[0].add(x, x, held_out)
            for lane, quantizer in own.items():
                x_tilde = chunk.lanes[lane] if quantizer is None else quantizer.nearest(chunk.lanes[lane])
                grams[lane].add(x_tilde, x_tilde, held_out)
                crosses[lane].add(x_tilde, x, held_out)
        totals: dict[int, tuple[Tensor, Tensor, HeldOut | None]] = {}
        for version in self.versions:
            lane = version.lane if version.lane in own else 0
            if lane not in totals:
                patches = grams[lane].patches()
                gram, part = grams.pop(lane).total()
                cross, cross_part = crosses.pop(lane).total() if lane in own else (gram, part)
                if name in self.later:
                    more, more_part, more_patches = self.later[name]
                    gram, cross, patches = gram + more, cross + more, patches + more_patches
                    if part is not None and cross_part is not None and more_part is not None:
                        part, cross_part = part + more_part, cross_part + more_part
                judged = None if part is None or cross_part is None else HeldOut(part, cross_part, patches)
                totals[lane] = gram, cross, judged
            yield (version, *totals[lane])
            if lane:
                del totals[lane]

    def _add_error(self, name: str, outputs: Lanes) -> None:
        y = self._real(outputs).lanes
        sums = torch.stack([y[0].double().square().sum(), *((x - y[0]).double().square().sum() for x in y[1:])])
        self.errors[name] = self.errors[name] + sums if name in self.errors else sums

    def _finish_errors(self) -> None:
        for version in self.versions:
            if not version.lane:
                continue
            for index, layer in enumerate(version.report.layers):
                sums = summed(self.errors[layer.name].clone())
                error = float((sums[version.lane] / sums[0]) ** 0.5) if sums[0] != 0 else 0.0
                version.report.layers[index] = LayerReport(**(vars(layer) | {"error": error}))


class _Original(nn.Module):
    """A module's own forward method, beneath the one :func:`_rerouted` put over it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, inputs)


@contextmanager
def _rerouted(visitors: Sequence[tuple[nn.Module, Callable[[Lanes], Lanes]]]) -> Iterator[None]:
    """While it lasts, the modules call what is given in place of their forward methods."""
    try:
        for module, visit in visitors:
            module.forward = visit
        yield
    finally:
        for module, _ in visitors:
            vars(module).pop("forward", None)


def _same(made: list[Tensor], of: list[Tensor]) -> list[Tensor]:
    """``made`` with one object wherever ``of`` has one."""
    return [made[next(i for i, other in enumerate(of) if other is tensor)] for tensor in of]
