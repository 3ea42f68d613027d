"""Quantize a whole network on calibration images."""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdq.quant.batches import images_of
from kdq.quant.calibrate.layer import QUANTIZABLE
from kdq.quant.calibrate.walk import Walk
from kdq.quant.config import SOLVERS, QuantConfig, Solver, configured
from kdq.quant.packing.weights import QuantizedWeight, with_float_dtype, with_quantized_weights
from kdq.quant.report import LayerReport, Report
from kdq.quant.solvers.alphabet import check_bits
from kdq.utils.errors import KdqError

__all__ = [
    "SOLVERS",
    "LayerReport",
    "QuantConfig",
    "Quantized",
    "QuantizedWeight",
    "Report",
    "Solver",
    "quantizable_layers",
    "quantize",
    "quantize_widths",
    "with_quantized_weights",
]

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
        model: any network of convolutions and linear layers; it is not modified.
        batches: input tensors, or batches that hold them, see :func:`kdq.quant.batches.images_of`. They are run in
            eval mode.
        bits: 2 to 32, or a mapping from layer name to bits that names every layer.
        config, options: how: a :class:`~kdq.quant.config.QuantConfig`, its fields, or both; the fields count.

    Returns:
        A copy of the model whose weights take only their alphabets' values, with the codes in its attribute
        ``quantized_weights`` (name to :class:`QuantizedWeight`), and the per-layer report.

    Raises:
        KdqError: an option is unknown, there is no calibration image, a layer that holds weights cannot be quantized
            (name it in ``keep_float`` to leave it float) or never runs, or ``bits`` is out of range.
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
    layers = quantizable_layers(model, config.keep_float)
    check_values(model, layers)
    runner = copy.deepcopy(model).eval()
    by_layer = [{name: _bits_of(width, name) for name in layers} for width in widths]
    for width in widths:
        if isinstance(width, Mapping) and (unknown := sorted(set(width) - set(layers))):
            raise KdqError(f"bits name layers that are not quantized: {', '.join(unknown[:4])}")
    iterator = iter(batches)
    if (head := next(iterator, None)) is not None:
        batches = chain([head], iterator)
        order = running_order(runner, images_of(head), layers)
        if config.first_last_bits is not None:
            ends = dict.fromkeys((order[0], order[-1]), config.first_last_bits)
            by_layer = [bits | ends for bits in by_layer]
    walk = Walk(runner, by_layer, config, isolated, on_layer)
    walk.run(batches)
    results = []
    for version in walk.versions:
        version.report.seconds = time.perf_counter() - start
        version.report.float_weights = float_weights(model, layers)
        network = with_quantized_weights(model, version.weights, version.activations, version.state)
        if config.float_dtype is not None:
            network, version.report.float_bits = with_float_dtype(network, config.float_dtype), 16
        results.append(Quantized(network, version.report))
    return results


def check_network(model: nn.Module, images: Tensor, config: QuantConfig) -> list[str]:
    """The layers of ``model`` that ``config`` quantizes, in the order they run, found by running the first of
    ``images``.

    Raises:
        KdqError: as :func:`quantize`.
    """
    layers = quantizable_layers(model, config.keep_float)
    check_values(model, layers)
    return running_order(copy.deepcopy(model).eval(), images, layers)


def check_values(model: nn.Module, layers: Collection[str]) -> None:
    """Refuse a network without numbers to quantize: on the meta device, diverged, or quantized before.

    Raises:
        KdqError: it is one.
    """
    if getattr(model, "quantized_activations", None):
        raise KdqError("the network rounds its activations already: quantize the float network it was made of")
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.is_meta:
            raise KdqError(f"{name} is on the meta device and has no values: load them first, to_empty(device=...)")
    for name in layers:
        if not model.get_parameter(f"{name}.weight").isfinite().all():
            raise KdqError(f"the weights of {name} are not finite: the training diverged")


def quantizable_layers(model: nn.Module, keep_float: Collection[str] = ()) -> list[str]:
    """Names of the convolutions and linear layers, in registration order, without those inside ``keep_float``.

    Raises:
        KdqError: a layer is lazy, another module holds a weight of two or more dimensions, a layer's weight is not
            its own and only its own, or ``keep_float`` names no module.
    """
    modules = dict(model.named_modules())
    if lazy := [name for name, value in chain(model.named_parameters(), model.named_buffers()) if is_lazy(value)]:
        raise KdqError(f"{lazy[0]} is lazy and has no shape yet: run the network once on a batch first")
    if unknown := [name for name in keep_float if name not in modules]:
        near = difflib.get_close_matches(unknown[0], modules, 3, 0.4) or [name for name in modules if name][:4]
        raise KdqError(
            f"the network has no {', '.join(unknown)} to leave float (keep_float): there is {', '.join(near)}"
        )

    def stays_float(name: str) -> bool:
        return any(name == outer or name.startswith(f"{outer}.") for outer in keep_float)

    layers = []
    for name, module in modules.items():
        if stays_float(name):
            continue
        if isinstance(module, QUANTIZABLE):
            _check_layer(name, module)
            layers.append(name)
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim >= 2:
                raise KdqError(
                    f"cannot quantize {name or 'the network itself'}.{parameter} of a {type(module).__name__}: only "
                    f"{', '.join(kind.__name__ for kind in QUANTIZABLE)} are known; keep_float={[name]} leaves it float"
                )
    if not layers:
        raise KdqError("the network has no convolution or linear layer to quantize")
    owners: dict[int, str] = {}
    for name in layers:
        other = owners.setdefault(id(modules[name].weight), name)
        if other != name:
            raise KdqError(f"{other} and {name} share a weight: give each its own, or name both in keep_float")
    return layers


def _check_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight cannot be exchanged for a quantized one."""
    if not name:
        raise KdqError("the network is a single layer, without a name to store it under: wrap it, nn.Sequential(layer)")
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        raise KdqError(
            f"the weight of {name} is computed, by pruning, weight_norm, another parametrization or decode='layer': "
            "undo that (prune.remove, parametrize.remove_parametrizations, decode='once'), or name it in keep_float"
        )
    if weight.dtype not in (torch.float32, torch.float64):
        raise KdqError(f"the weight of {name} is {weight.dtype}: quantize model.float()")


def running_order(model: nn.Module, images: Tensor, layers: Collection[str]) -> list[str]:
    """The layers in the order they first run, found by running the first image of ``images``.

    Raises:
        KdqError: one of them never runs.
    """
    device = next(model.parameters()).device
    order: dict[str, None] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in layers
    ]
    try:
        with torch.no_grad():
            if len(images):
                model(images[:1].to(device))
    except Exception as error:
        raise KdqError(
            f"the network cannot be called on inputs {tuple(images[:1].shape)} alone "
            f"({type(error).__name__}: {error}): quantize the part that can; a callback has network=..."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if len(images) and (missed := [name for name in layers if name not in order]):
        raise KdqError(f"layers never ran on the calibration images: {', '.join(missed[:4])}; name them in keep_float")
    return list(order) or list(layers)


def float_weights(model: nn.Module, layers: Collection[str]) -> int:
    """Weights of all layers but the ``layers``; one that several layers share counts once."""
    kept = (m for name, m in model.named_modules() if name not in layers)
    weights = {id(p): p for module in kept for p in module.parameters(recurse=False) if p.ndim >= 2}
    return sum(weight.numel() for weight in weights.values())


def _bits_of(width: Bits, name: str) -> int:
    if isinstance(width, Mapping):
        if name not in width:
            raise KdqError(f"bits name no width for the layer {name}")
        width = width[name]
    return check_bits(width)
