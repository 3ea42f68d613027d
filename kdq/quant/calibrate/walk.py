"""One forward pass that meets every layer in the order it runs, quantizes it for every width, and goes on.

The calibration images run as :class:`~kdq.quant.calibrate.lanes.Lanes`: the float network's activations X beside each
quantized network's X~. At a layer, G and C are summed over all chunks of images, the weight is solved, and the float
lane passes through W, the others through their Q. No layer is evaluated twice: O(L) for L layers.

From :data:`WIDE` bits up, X~ agrees with X to the precision of what is solved, so wide widths have no lane: they take
``G = C = X'X`` from the float lane, whichever widths share the pass. (Where the alphabet has room for all weights: one
that cuts the largest off, as the published study's does, leaves errors at any width.)
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.quant.activations import ActivationQuantizer, Histogram
from kdq.quant.calibrate.correction import channel_moments, corrected_norm
from kdq.quant.calibrate.errors import OutputErrors, moments_error
from kdq.quant.calibrate.images import CalibrationImages
from kdq.quant.calibrate.lanes import Lanes
from kdq.quant.calibrate.layer import LayerCall, channel_axis, layer_call, weight_matrix
from kdq.quant.calibrate.moments import Moments, PartedMoments, Sums
from kdq.quant.calibrate.order import eager
from kdq.quant.calibrate.repeated import later_moments
from kdq.quant.config import QuantConfig
from kdq.quant.layers import weight_of
from kdq.quant.packing.packed import QuantizedWeight
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
        batches: the calibration images, as of :func:`kdq.quant.network.quantize`.
        widths: for each width, the bits of every layer by name.
        config: how.
        isolated: no width has a lane: every layer is solved as if it alone were quantized.
        on_layer: called with a layer's name when it is solved.
        repeated: the layers that run more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        widths: Sequence[Mapping[str, int]],
        config: QuantConfig,
        isolated: bool,
        on_layer: Callable[[str], object],
        repeated: Collection[str],
    ) -> None:
        self.model, self.config, self.on_layer, self.repeated = model, config, on_layer, repeated
        self.versions: list[Version] = []
        lanes = 1
        for bits in widths:
            shared = isolated or (config.act_bits is None and config.covers and min(bits.values()) >= WIDE)
            self.versions.append(Version(bits, 0 if shared else lanes))
            lanes += not shared
        self.apart = [version for version in self.versions if version.lane]  # those with a lane of their own
        self.names = {id(weight_of(model, name)): name for name in widths[0]}
        self.ends = {*[*widths[0]][:1], *[*widths[0]][-1:]}
        self.tensors = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
        device, parts = next(model.parameters()).device, PARTS if config.preset.held_out else 0
        self.images = CalibrationImages(batches, lanes, self.meet, device, parts)
        self.errors = OutputErrors()
        self.norms: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        self.later: dict[str, Sums] = {}

    def run(self) -> None:
        """Quantize every layer; the results are in ``versions``."""
        try:
            with torch.no_grad(), eager(), exact_kernels(next(self.model.parameters()).device):
                if self.repeated:
                    new, images = partial(self._new_moments, symmetric=True), self.images.inputs()
                    self.later = later_moments(self.model, self.names, self.repeated, new, images)
                self.model(self.images.start())
                self.images.finish()
            for version in self.apart:
                layers = version.report.layers
                version.report.layers = [replace(x, error=self.errors.of(x.name)[version.lane]) for x in layers]
        finally:
            self.images.close()

    def meet(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Lanes | None:
        """Do what a torch function was called for, if it is a layer's, or a BatchNorm's that is put right."""
        if function is F.batch_norm and self.config.correct == "batchnorm":
            given = dict(signature(F.batch_norm).bind(*args, **kwargs).arguments)
            inputs = given.pop("input")
            known = isinstance(inputs, Lanes) and id(given["running_mean"]) in self.tensors
            return self.visit_norm(given, inputs) if known else None
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
            if (bits := self.config.input_bits(name in self.ends)) is not None:
                self._fit_activations(name, inputs, bits)
            self._solve(name, call.module, inputs)
        outputs = self.images.pass_through(self._forward(name, call), inputs)
        bias = self.tensors.get(id(call.bias))
        if self.config.correct is not None and bias is not None:
            outputs = self._correct_bias(bias, call, outputs)
        if first_time:
            outputs = self.images.pass_through(partial(self._compare, name), outputs)
            self.on_layer(name)
        return outputs

    def visit_norm(self, given: Mapping[str, Any], inputs: Lanes) -> Lanes:
        """Stand in for ``F.batch_norm(inputs, **given)``: re-estimate its running statistics for every version."""
        buffers = ("running_mean", "running_var")
        names = [self.tensors[id(given[buffer])] for buffer in buffers]
        if names[0] not in self.norms:
            mean, variance = self._channel_sums(inputs, 1)
            running = given["running_mean"], given["running_var"], given.get("eps", 1e-5)
            new = {lane: corrected_norm(*running, mean, variance, lane) for lane in range(1, len(inputs.lanes))}
            self.norms[names[0]] = new
            for version in self.apart:
                version.state |= dict(zip(names, new[version.lane], strict=True))
        found = self.norms[names[0]]

        def run(lane: int, x: Tensor) -> Tensor:
            return F.batch_norm(x, **{**given, **(dict(zip(buffers, found[lane], strict=True)) if lane else {})})

        return self.images.pass_through(lambda values: values.map(run), inputs)

    def _correct_bias(self, name: str, call: LayerCall, outputs: Lanes) -> Lanes:
        """What comes out with a bias that is corrected for every version."""
        bias, axis = call.bias, channel_axis(call.module)
        assert bias is not None
        if any(name not in version.state for version in self.apart):  # each bias once
            mean, _ = self._channel_sums(outputs, axis)
            for version in self.apart:
                version.state[name] = (bias - (mean[version.lane] - mean[0])).to(bias)
        shifts = {version.lane: version.state[name] - bias for version in self.apart}

        def run(lane: int, y: Tensor) -> Tensor:
            return (y.movedim(axis, -1) + shifts[lane]).movedim(-1, axis) if lane in shifts else y

        return self.images.pass_through(lambda values: values.map(run), outputs)

    def _channel_sums(self, values: Lanes, axis: int) -> tuple[Tensor, Tensor]:
        return channel_moments((chunk.lanes for chunk, _ in self.images.each(values)), axis)

    def _compare(self, name: str, outputs: Lanes) -> Lanes:
        """Add up how far the lanes are from the float one, and pass them on."""
        self.errors.add(name, self.images.real(outputs).lanes)
        return Lanes(outputs.lanes)

    def _forward(self, name: str, call: LayerCall) -> Callable[[Lanes], Lanes]:
        weights: dict[int, Tensor] = {0: call.weight}
        quantizers: dict[int, ActivationQuantizer] = {}
        for version in self.apart:
            weights[version.lane] = version.weights[name].decode()
            if name in version.activations:
                quantizers[version.lane] = version.activations[name]

        def run(lane: int, x: Tensor) -> Tensor:
            x = quantizers[lane].nearest(x) if lane in quantizers else x
            return call.function(x, weights[lane], call.bias)

        return lambda inputs: inputs.map(run)

    def _fit_activations(self, name: str, inputs: Lanes, bits: int) -> None:
        histograms = {version.lane: Histogram() for version in self.versions}
        for chunk, _ in self.images.each(inputs):
            for lane, histogram in histograms.items():
                histogram.add(chunk.lanes[lane])
        for version in self.versions:
            version.activations[name] = histograms[version.lane].quantizer(bits, self.config.act_range)

    def _solve(self, name: str, layer: nn.Module, inputs: Lanes) -> None:
        weight = weight_matrix(layer)
        assert isinstance(layer.weight, Tensor)
        shape = layer.weight.shape
        for version, grams, crosses in self._moments(name, layer, inputs):
            gram, cross, held_out = grams.all, crosses.all, None
            if grams.held_out is not None and crosses.held_out is not None:
                held_out = HeldOut(grams.held_out, crosses.held_out, grams.patches)
            if not (gram.isfinite().all() and cross.isfinite().all()):
                raise KdqError(f"the inputs of {name} are not finite: look at the calibration images and the network")
            try:
                values, alphabet = self.config.solve(weight, gram, cross, version.bits[name], held_out)
            except KdqError as refused:
                raise KdqError(f"{name}: {refused}") from refused
            scale, zero = (x.expand_as(weight[..., :1]).flatten().contiguous() for x in (alphabet.scale, alphabet.zero))
            codes = alphabet.encode(values)
            made = QuantizedWeight.of(codes.view(shape), scale, zero, alphabet.levels)
            # The outputs of lane 0 are the float network's; those of the others are compared on the way.
            error = 0.0 if version.lane else moments_error(weight, alphabet.decode(codes), gram)
            version.weights[name] = made
            kind = type(layer).__name__
            version.report.layers.append(LayerReport(name, kind, tuple(shape), made.bits, made.levels, error))

    def _new_moments(self, layer: nn.Module, symmetric: bool) -> PartedMoments:
        return PartedMoments(self.config.moments or Moments, layer, symmetric, self.images.some_held_out)

    def _moments(self, name: str, layer: nn.Module, inputs: Lanes) -> Iterator[tuple[Version, Sums, Sums]]:
        """``G = X~'X~`` and ``C = X~'X`` for every version.

        Lanes that still agree with the float lane share one matrix, which then is both.
        """
        own = {
            version.lane: version.activations.get(name)
            for version in self.versions
            if inputs.lanes[version.lane] is not inputs.lanes[0] or name in version.activations
        }
        grams = {lane: self._new_moments(layer, True) for lane in own}
        crosses = {lane: self._new_moments(layer, False) for lane in own}
        if shared := len(own) < len({version.lane for version in self.versions}):
            grams[0] = self._new_moments(layer, True)
        for chunk, held_out in self.images.each(inputs):
            x = chunk.lanes[0]
            if shared:
                grams[0].add(x, x, held_out)
            for lane, quantizer in own.items():
                x_tilde = chunk.lanes[lane] if quantizer is None else quantizer.nearest(chunk.lanes[lane])
                grams[lane].add(x_tilde, x_tilde, held_out)
                crosses[lane].add(x_tilde, x, held_out)
        totals: dict[int, tuple[Sums, Sums]] = {}
        for version in self.versions:
            lane = version.lane if version.lane in own else 0
            if lane not in totals:
                gram = grams.pop(lane).total()
                cross = crosses.pop(lane).total() if lane in own else gram
                if name in self.later:
                    gram, cross = gram.plus(self.later[name]), cross.plus(self.later[name])
                totals[lane] = gram, cross
            yield (version, *totals[lane])
            if lane:
                del totals[lane]
