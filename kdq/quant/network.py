"""Quantize a whole network on calibration images."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdq.quant.batches import images_of
from kdq.quant.calibrate.order import Order, running_order
from kdq.quant.calibrate.walk import Walk
from kdq.quant.config import QuantConfig, configured
from kdq.quant.layers import LeftFloat, left_float, quantizable_layers, unwrapped, weight_of
from kdq.quant.packing.weights import copied, with_float_dtype, with_quantized_weights
from kdq.quant.report import Report
from kdq.quant.solvers.alphabet import check_bits
from kdq.utils.errors import KdqError

#: One width for every layer, or the width of each layer by name.
Bits = int | Mapping[str, int]


class Quantized(NamedTuple):
    """A quantized copy of a network, and what became of each of its layers."""

    network: nn.Module
    report: Report


def quantize(
    model: nn.Module, batches: Iterable[Any], bits: Bits = 4, config: QuantConfig | None = None, **options: Any
) -> Quantized:
    """Quantize the weights of ``model`` on calibration images.

        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> network, report = quantize(model, torch.randn(64, 8).split(16), bits=4, solver="gptq")
        >>> [layer.bits for layer in report.layers]
        [4, 4]

    Args:
        model: any network with convolutions or linear layers, compiled or not; it is not modified. A layer is what
            ``F.linear`` or a convolution is called with; two that share a weight are solved once, on the inputs of
            both. Other parameters, and layers that do not run, stay float: the report lists them.
        batches: input tensors, or batches that hold them, see :func:`kdq.quant.batches.images_of`. They are run in
            eval mode.
        bits: 2 to 32, or a mapping from layer name to bits that names every layer.
        config, options: how: a :class:`~kdq.quant.config.QuantConfig`, its fields, or both; the fields count.

    Returns:
        A copy of the model whose weights take only their alphabets' values, with the codes in its attribute
        ``quantized_weights`` (name to :class:`~kdq.quant.packing.packed.QuantizedWeight`), and the per-layer report.

    Raises:
        KdqError: an option is unknown, there is no calibration image, no layer runs on it, a layer's weight is
            computed by a parametrization, or ``bits`` is out of range.
    """
    return quantize_widths(model, batches, [bits], configured(config, options, ("bits",)))[0]


def quantize_widths(
    model: nn.Module,
    batches: Iterable[Any],
    widths: Sequence[Bits],
    config: QuantConfig = QuantConfig(),  # noqa: B008
    *,
    isolated: bool = False,
    on_layer: Callable[[str], object] = lambda name: None,
) -> list[Quantized]:
    """:func:`quantize` for several widths in one pass that shares the float network's part.

    Args:
        isolated: every layer is solved on the float network's inputs, as if it alone were quantized: its codes then do
            not depend on the widths of the layers before it.
        on_layer: called with a layer's name when it is done, for a progress bar.
    """
    start = time.perf_counter()
    if not widths:
        raise KdqError("there is no width to quantize to")
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):  # which would give its images one by one
        kind = type(batches).__name__
        raise KdqError(f"the batches are a {kind}: pass batches of inputs, such as a DataLoader or [images]")
    model, iterator = unwrapped(model), iter(batches)
    if (head := next((batch for batch in iterator if len(images_of(batch))), None)) is None:
        raise KdqError("there is no calibration image: pass batches of inputs, such as a DataLoader")
    order = check_network(model, images_of(head), config)
    by_layer = [{name: _bits_of(width, name) for name in order.layers} for width in widths]
    for width in widths:
        if isinstance(width, Mapping) and (unknown := sorted(set(width) - set(order.layers))):
            raise KdqError(f"bits name layers that are not quantized: {', '.join(unknown[:4])}")
    if config.first_last_bits is not None:
        ends = dict.fromkeys((order.layers[0], order.layers[-1]), config.first_last_bits)
        by_layer = [bits | ends for bits in by_layer]
    walk = Walk(copied(model).eval(), chain([head], iterator), by_layer, config, isolated, on_layer, order.repeated)
    walk.run()
    left = _left(model, order, config)
    results = []
    for version in walk.versions:
        version.report.seconds = time.perf_counter() - start
        version.report.left = left
        network = with_quantized_weights(model, version.weights, version.activations, version.state)
        if config.float_dtype is not None:
            network, version.report.float_bits = with_float_dtype(network, config.float_dtype), 16
        results.append(Quantized(network, version.report))
    return results


def check_network(model: nn.Module, images: Tensor, config: QuantConfig) -> Order:
    """What ``config`` quantizes of ``model``, which nothing wraps, found by running the first of ``images``."""
    if not isinstance(model, nn.Module):
        raise KdqError(f"the network is a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise KdqError("the network is TorchScript, which runs nothing but tensors: quantize what it was made of")
    candidates = quantizable_layers(model, config.keep_float)
    check_values(model, candidates)
    order = running_order(copied(model).eval(), images, candidates) if candidates else Order([], {}, [], [])
    if not order.layers:
        rest = ", ".join(f"{x.name} of {x.kind} ({x.why})" for x in _left(model, order, config)[:4])
        raise KdqError("the network has no convolution or linear layer to quantize" + (rest and f"; it has {rest}"))
    if config.act_bits is not None and order.bypassed:
        raise KdqError(
            f"act_bits={config.act_bits} rounds the inputs of modules, and something else takes the weights of "
            f"{', '.join(order.bypassed[:4])}: name them in keep_float, or leave act_bits None (null)"
        )
    if config.act_bits is not None and order.repeated:
        raise KdqError(
            f"act_bits={config.act_bits} has one range a layer, and {', '.join(order.repeated[:4])} run more than "
            "once, or share their weight with a layer that runs: name them in keep_float, or leave act_bits None (null)"
        )
    return order


def _left(model: nn.Module, order: Order, config: QuantConfig) -> list[LeftFloat]:
    return left_float(model, order.layers, order.why, quantizable_layers(model, config.keep_float))


def check_values(model: nn.Module, layers: Collection[str]) -> None:
    """Refuse a network without numbers to quantize: on the meta device, in half precision, diverged, or quantized
    before."""
    if getattr(model, "quantized_activations", None):
        raise KdqError("the network rounds its activations already: quantize the float network it was made of")
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.is_meta:
            raise KdqError(f"{name} is on the meta device and has no values: load them first, to_empty(device=...)")
    for name in layers:
        weight = weight_of(model, name)
        if weight.dtype not in (torch.float32, torch.float64):
            raise KdqError(f"the weight of {name} is {weight.dtype}: quantize model.float()")
        if not weight.isfinite().all():
            raise KdqError(f"the weights of {name} are not finite: the training diverged")


def _bits_of(width: Bits, name: str) -> int:
    if isinstance(width, Mapping):
        if name not in width:
            raise KdqError(f"bits name no width for the layer {name}")
        width = width[name]
    return check_bits(width)
