"""Training through the rounding: a quantized network whose layers keep float weights and round them when they run.

    kdq.quantize(model, ...)  ->  fake_quantized(network)  -> train ->  quantized(network)  ->  kdq.save(network, path)

What comes out has the alphabets' number of levels, exactly, and computes what the network in training computed, bit
for bit. The rounding has a derivative of zero almost everywhere; the straight-through estimator (Bengio, Leonard &
Courville 2013, arXiv 1308.3432) takes that of the identity in its place, inside of the alphabet's range.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdq.quant.activations import ActivationQuantizer, remove_hooks
from kdq.quant.layers import holders, layer_name, place_of, weight_of
from kdq.quant.packing.packed import QuantizedWeight, keep_decoded
from kdq.quant.packing.weights import copied, with_float_dtype, with_quantized_weights
from kdq.quant.solvers.alphabet import decode
from kdq.utils.errors import KdqError

#: Up to here the weight's own dtype tells a code from the next one.
_OWN_DTYPE_LEVELS = 2**20


class FakeQuantize(nn.Module):
    """Rounds a layer's weight to its alphabet: a parametrization of the layer's ``weight``.

    >>> rounding = FakeQuantize(torch.tensor([0.5]), zero=torch.ones(1), levels=4)
    >>> rounding(torch.tensor([[-9.0, 0.1, 0.7, 9.0]])).detach()
    tensor([[-0.5000,  0.0000,  0.5000,  1.0000]])

    Args:
        scale: ``(out_channels,)``, or ``(1,)`` for one that they share; learned. Its gradient is divided by
            ``sqrt(weights that share it * largest code)``, so that its steps are of the weights' size (Esser et al.
            2020, arXiv 1902.08153, section 2.2).
        zero: ``(out_channels,)``, the code that stands for zero; it stays as it is.
        levels: size of the alphabet.
    """

    scale: nn.Parameter
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, levels: int) -> None:
        super().__init__()
        self.scale, self.levels = nn.Parameter(scale.clone()), levels
        self.register_buffer("zero", zero.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The values of the alphabet nearest to ``weight`` ``(out_channels, ...)``, in its dtype."""
        return _Round.apply(weight, self.scale, self.zero, self.levels)

    def quantized_weight(self, weight: Tensor) -> QuantizedWeight:
        """``weight`` as it is stored: it decodes to what :meth:`forward` gives."""
        codes, _ = _codes(weight.detach(), self.scale.detach(), self.zero, self.levels)
        scale = _positive(self.scale.detach()).expand(len(weight)).contiguous()
        return QuantizedWeight.of(codes.long().view(weight.shape), scale, self.zero.clone(), self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class _Round(torch.autograd.Function):
    """``decode(encode(weight))`` with LSQ's gradients (equations 3 and 5 of its paper)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        codes, places = _codes(weight, scale, zero, levels)
        inside = (places >= 0) & (places <= levels - 1)
        # Inside, the scale moves a value by what the rounding added; outside, by the end of the range.
        slope = torch.where(inside, codes - places, codes - zero[:, None].to(codes.dtype))
        ctx.save_for_backward(inside, slope)
        ctx.scales, ctx.levels = scale.shape, levels
        return decode(codes, _positive(scale)[:, None], zero[:, None], levels).to(weight.dtype).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inside, slope = ctx.saved_tensors
        rows = gradients[0].flatten(1)
        of_scale = (rows * slope).sum(1, dtype=torch.float32)
        of_scale = of_scale if ctx.scales == of_scale.shape else of_scale.sum().view(1)
        size = (rows.numel() // len(of_scale) * (ctx.levels - 1)) ** 0.5
        return (rows * inside).view(gradients[0].shape), of_scale / size, None, None


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The codes as floats ``(rows, columns)``, and the places between them that the weights are at."""
    dtype = weight.dtype if levels <= _OWN_DTYPE_LEVELS else torch.float64
    places = weight.flatten(1).to(dtype) / _positive(scale)[:, None].to(dtype) + zero[:, None].to(dtype)
    return places.round().clamp_(0, levels - 1), places


def _positive(scale: Tensor) -> Tensor:
    """``scale``, should a step have carried it through zero."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


class FakeQuantizeInput(nn.Module):
    """Rounds a layer's input as an :class:`~kdq.quant.activations.ActivationQuantizer` does, with a scale that is
    learned (LSQ, as above): a child and a forward pre-hook of the layer.

    >>> rounding = FakeQuantizeInput(torch.tensor(0.5), zero=0, bits=2)
    >>> rounding.nearest(torch.tensor([[-1.0, 0.3, 9.0]])).detach()
    tensor([[0.0000, 0.5000, 1.5000]])
    """

    scale: nn.Parameter

    def __init__(self, scale: Tensor, zero: int, bits: int) -> None:
        super().__init__()
        self.scale, self.zero, self.bits = nn.Parameter(scale.clone()), zero, bits

    def forward(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.nearest(inputs[0]), *inputs[1:])

    def nearest(self, values: Tensor) -> Tensor:
        """``values`` ``(batch, ...)`` rounded, in their own dtype."""
        return _RoundInput.apply(values, self.scale, self.zero, self.bits)

    def quantizer(self) -> ActivationQuantizer:
        """The same rounding as it is stored."""
        return ActivationQuantizer(float(_positive(self.scale.detach())), self.zero, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _RoundInput(torch.autograd.Function):
    """The same rounding of a whole tensor, in its dtype: what the kernel of quantized networks gives, bit for bit.

    Every pass over the tensor keeps its dtype: those that make booleans, or go from one type to another, cost a CPU
    four times as much.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero: int, bits: int) -> Tensor:
        low, high, positive = -zero, 2**bits - 1 - zero, _positive(scale)
        rounded = (values * (1 / positive)).round_().clamp_(low, high).mul_(positive)
        ctx.save_for_backward(values, rounded, positive)
        ctx.low, ctx.high = low, high
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, rounded, scale = ctx.saved_tensors
        inside, below = (torch.empty_like(values) for _ in range(2))
        torch.ge(values, ctx.low * scale, out=inside)
        torch.le(values, ctx.high * scale, out=below)
        inside *= below
        slope = torch.addcmul(rounded, values, inside, value=-1).mul_(gradients[0])
        size = (values[0].numel() * (ctx.high - ctx.low)) ** 0.5
        return gradients[0] * inside, slope.sum().to(scale.dtype) / (scale * size), None, None


#: What a :func:`fake_quantized` network rounds: of each layer the size of its alphabet and the number of its scales,
#: and the zero and the bits of its input where that is rounded, too. Plain values, for a checkpoint.
Layout = Mapping[str, Mapping[str, int]]


def fake_quantized(network: nn.Module) -> nn.Module:
    """A trainable copy of a network made by :func:`kdq.quantize`, or read by :func:`kdq.load`.

    Every quantized layer has its float weights in ``parametrizations.weight.original``, which begin at the values of
    its codes, and its :class:`FakeQuantize`; with ``act_bits`` its :class:`FakeQuantizeInput`, too. What is float, such
    as biases and BatchNorm, trains as it is.

    >>> from kdq.quant.network import quantize
    >>> network, _ = quantize(nn.Sequential(nn.Linear(8, 3)), [torch.randn(64, 8)], bits=2, act_bits=4)
    >>> training = fake_quantized(network)
    >>> images = torch.randn(5, 8)
    >>> torch.equal(training(images), network(images)), torch.equal(quantized(training)(images), network(images))
    (True, True)

    Raises:
        KdqError: no layer of the network is quantized, or it decodes its weights whenever they run.
    """
    weights: Mapping[str, Any] = getattr(network, "quantized_weights", {})
    activations: Mapping[str, ActivationQuantizer] = getattr(network, "quantized_activations", {})
    if not weights:
        raise KdqError("the network has no quantized weights: give what kdq.quantize or kdq.load returned")
    trainable = copied(network)
    if not any(parameter.requires_grad for parameter in trainable.parameters()):  # frozen, as a teacher is
        for parameter in trainable.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    places = holders(trainable)
    for name, weight in weights.items():
        module, attribute = place_of(trainable, name)
        if parametrize.is_parametrized(module, attribute):
            raise KdqError(f"{name} decodes its weight as it runs: load the network with decode='once' to train it")
        if len(places[id(module._parameters[attribute])]) > 1:
            raise KdqError(f"{name} shares its weight with another layer: give each its own, or train without rounding")
        shared = len(weight.scale) > 1 and bool((weight.scale == weight.scale[0]).all())
        rounding = FakeQuantize(weight.scale[:1] if shared else weight.scale, weight.zero, weight.levels)
        _round_weight(module, attribute, rounding)
    for name, quantizer in activations.items():
        layer = trainable.get_submodule(name)
        remove_hooks(layer, ActivationQuantizer)
        _round_input(layer, FakeQuantizeInput(torch.tensor(quantizer.scale), quantizer.zero, quantizer.bits))
    del trainable.quantized_weights, trainable.quantized_activations
    return trainable


def quantized(network: nn.Module) -> nn.Module:
    """A copy of a :func:`fake_quantized` network that computes with its codes, as :func:`kdq.quantize` gives: in eval
    mode, with ``quantized_weights``. A 16-bit ``float_dtype`` is kept."""
    plain = copied(network)
    layers, activations = _weight_roundings(plain), {}
    weights = {name: rounding.quantized_weight(original) for name, _, original, rounding in layers}
    for _, module, _, _ in layers:
        keep_decoded(module)  # all that it holds
    for name, layer in plain.named_modules():
        if (of_input := _input_rounding(layer)) is not None:
            activations[name] = of_input.quantizer()
            remove_hooks(layer, FakeQuantizeInput)
            del layer.input_rounding
    made = with_quantized_weights(plain, weights, activations)
    dtype: str | None = getattr(network, "kdq_float_dtype", None)
    return made if dtype is None else with_float_dtype(made, dtype)


def roundings(network: nn.Module) -> list[FakeQuantize | FakeQuantizeInput]:
    """Everything in ``network`` that rounds in a :func:`fake_quantized` one's way; nothing in others."""
    return [module for module in network.modules() if isinstance(module, (FakeQuantize, FakeQuantizeInput))]


def rounded_weights(network: nn.Module) -> list[tuple[nn.Parameter, FakeQuantize]]:
    """The float weights of a :func:`fake_quantized` network's layers, each with what rounds it."""
    return [(original, rounding) for _, _, original, rounding in _weight_roundings(network)]


def layout(network: nn.Module) -> dict[str, dict[str, int]]:
    """The :data:`Layout` of a :func:`fake_quantized` network; empty for others."""
    layers: dict[str, dict[str, int]] = {}
    for name, module, _, rounding in _weight_roundings(network):
        layers[name] = {"levels": rounding.levels, "scales": len(rounding.scale)}
        if (of_input := _input_rounding(module)) is not None:
            layers[name] |= {"zero": of_input.zero, "bits": of_input.bits}
    return layers


def with_layout(network: nn.Module, layers: Layout) -> nn.Module:
    """A copy of a float ``network`` that rounds as ``layers`` say: what the state dict of a :func:`fake_quantized` one
    fits."""
    trainable = copied(network)
    for name, numbers in layers.items():
        module, attribute = place_of(trainable, name)
        zero = torch.zeros(len(weight_of(trainable, name)))
        _round_weight(module, attribute, FakeQuantize(torch.ones(numbers["scales"]), zero, numbers["levels"]))
        if "bits" in numbers:
            _round_input(module, FakeQuantizeInput(torch.tensor(1.0), numbers["zero"], numbers["bits"]))
    return trainable


def _round_weight(module: nn.Module, attribute: str, rounding: FakeQuantize) -> None:
    weight = getattr(module, attribute)
    assert isinstance(weight, Tensor)
    parametrize.register_parametrization(module, attribute, rounding.to(weight.device))


def _round_input(layer: nn.Module, rounding: FakeQuantizeInput) -> None:
    rounding.to(next(layer.parameters()).device)
    layer.input_rounding = rounding
    layer.register_forward_pre_hook(rounding)


def _weight_roundings(network: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter, FakeQuantize]]:
    """Every layer whose weight is rounded: its name, the module that holds it, its float weight, and what rounds it."""
    return [
        (layer_name(f"{name}.{attribute}".removeprefix(".")), module, found.original, found[0])
        for name, module in network.named_modules()
        for attribute, found in getattr(module, "parametrizations", {}).items()
        if isinstance(found[0], FakeQuantize)
    ]


def _input_rounding(layer: nn.Module) -> FakeQuantizeInput | None:
    found = layer._modules.get("input_rounding")
    return found if isinstance(found, FakeQuantizeInput) else None
