"""Quantize a whole network on calibration images."""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kdq.quant.activations import RANGES
from kdq.quant.calibrate.correction import CORRECTIONS
from kdq.quant.calibrate.layer import QUANTIZABLE
from kdq.quant.calibrate.moments import Moments
from kdq.quant.calibrate.walk import Walk
from kdq.quant.config import SOLVERS, QuantConfig, Solver
from kdq.quant.packing.weights import QuantizedWeight, check_float_dtype, with_float_dtype, with_quantized_weights
from kdq.quant.report import LayerReport, Report
from kdq.quant.solvers.alphabet import check_bits
from kdq.utils.errors import KdqError

__all__ = [
    "SOLVERS",
    "LayerReport",
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


def quantize(
    model: nn.Module, batches: Iterable[Any], bits: Bits = 4, solver: str | Solver = "gpfq", **options: Any
) -> tuple[nn.Module, Report]:
    """Quantize the weights of ``model`` on calibration images.

    Args:
        model: any network of convolutions and linear layers; it is not modified.
        batches: input tensors, or tuples whose first item is one. They are run in eval mode.
        bits: 2 to 32, or a mapping from layer name to bits that names every layer.
        solver: one of :data:`SOLVERS`, or a function ``(weight, gram, cross, alphabet) -> quantized weight``.
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
    exclude: Collection[str] = (),
    first_last_bits: int | None = None,
    act_bits: int | None = None,
    act_range: str = "mse",
    correct: str | None = None,
    isolated: bool = False,
    float_dtype: str | None = None,
    on_layer: Callable[[str], None] | None = None,
    moments: Callable[[nn.Module, bool], Any] = Moments,
    **recipe: Any,
) -> list[tuple[nn.Module, Report]]:
    """:func:`quantize` for several widths in one pass that shares the float network's part.

    Args:
        exclude: names of modules whose weights (and those of what is inside them) stay float.
        first_last_bits: width of the first and the last layer that run, whatever the others have.
        act_bits: round the inputs of every quantized layer too, one scale per tensor; None leaves them float.
        act_range: ``"mse"``, ``"percentile"`` or ``"percentile_99.9"``, see
            :meth:`kdq.quant.activations.Histogram.quantizer`.
        correct: after each layer, put the means of biased channels right (``"bias"``), or the means and variances of
            BatchNorms too (``"batchnorm"``), see :mod:`kdq.quant.calibrate.correction`; None leaves both.
        isolated: solve every layer on the float network's inputs, as if it alone were quantized: its codes then do not
            depend on the widths of the layers before it.
        float_dtype: round what is not quantized (biases, BatchNorm, layers left float) to ``"bf16"`` or ``"fp16"``, to
            be stored in 16 bits; None leaves it in float32.
        on_layer: called with a layer's name when it is done, for a progress bar.
        moments: what sums G and H, see :class:`kdq.quant.calibrate.moments.Moments`.
        recipe: ``alphabet``, ``per_channel``, ``scale``, ``order``, ``refine``, see :mod:`kdq.quant.config`.
    """
    start = time.perf_counter()
    if not widths:
        raise KdqError("there is no width to quantize to")
    if getattr(model, "quantized_activations", None):
        raise KdqError("the network rounds its activations already: quantize the float network it was made of")
    layers, how = check_options(
        model,
        solver,
        exclude=exclude,
        first_last_bits=first_last_bits,
        act_bits=act_bits,
        act_range=act_range,
        correct=correct,
        float_dtype=float_dtype,
        **recipe,
    )
    for name in layers:
        if not model.get_parameter(f"{name}.weight").isfinite().all():
            raise KdqError(f"the weights of {name} are not finite: the training diverged")
    runner = copy.deepcopy(model).eval()
    by_layer = [{name: _bits_of(width, name) for name in layers} for width in widths]
    for width in widths:
        if isinstance(width, Mapping) and (unknown := sorted(set(width) - set(layers))):
            raise KdqError(f"bits name layers that are not quantized: {', '.join(unknown[:4])}")
    iterator = iter(batches)
    if (head := next(iterator, None)) is not None:
        batches = chain([head], iterator)
        order = running_order(runner, head if isinstance(head, Tensor) else head[0], layers)
        if first_last_bits is not None:
            ends = dict.fromkeys((order[0], order[-1]), first_last_bits)
            by_layer = [bits | ends for bits in by_layer]
    walk = Walk(runner, by_layer, how, act_bits, act_range, correct, isolated, moments, on_layer or (lambda name: None))
    walk.run(batches)
    results = []
    for version in walk.versions:
        version.report.seconds = time.perf_counter() - start
        version.report.float_weights = float_weights(model, layers)
        network = with_quantized_weights(model, version.weights, version.activations, version.state)
        if float_dtype is not None:
            network, version.report.float_bits = with_float_dtype(network, float_dtype), 16
        results.append((network, version.report))
    return results


def check_options(
    model: nn.Module,
    solver: str | Solver,
    *,
    exclude: Collection[str],
    first_last_bits: int | None,
    act_bits: int | None,
    act_range: str,
    correct: str | None,
    float_dtype: str | None,
    **recipe: Any,
) -> tuple[list[str], QuantConfig]:
    """The layers to quantize, in registration order, and how: what can be told of the options of
    :func:`quantize_widths` (whose defaults are the only ones) before there are weights and images.

    Raises:
        KdqError: they cannot be.
    """
    if first_last_bits is not None:
        check_bits(first_last_bits)
    if act_bits is not None and (isinstance(act_bits, bool) or not isinstance(act_bits, int) or not 2 <= act_bits <= 8):
        raise KdqError(f"act_bits={act_bits!r} must be a whole number from 2 to 8, or None (null)")
    if act_range not in RANGES:
        raise KdqError(f"act_range={act_range!r} is unknown: use one of {', '.join(RANGES)}")
    if correct not in CORRECTIONS:
        raise KdqError(f"correct={correct!r} is unknown: use bias, batchnorm or None (null)")
    if float_dtype is not None:
        check_float_dtype(float_dtype)
    return quantizable_layers(model, exclude), QuantConfig(solver=solver, **recipe)


def quantizable_layers(model: nn.Module, exclude: Collection[str] = ()) -> list[str]:
    """Names of the convolutions and linear layers, in registration order, without those inside ``exclude``.

    Raises:
        KdqError: another module holds a weight of two or more dimensions, a layer's weight is not its own and only
            its own, or ``exclude`` names no module.
    """
    modules = dict(model.named_modules())
    if isinstance(exclude, str):
        raise KdqError(f"exclude={exclude!r}: give a list of names, [{exclude}]")
    if unknown := [name for name in exclude if name not in modules]:
        near = difflib.get_close_matches(unknown[0], modules, 3, 0.4) or [name for name in modules if name][:4]
        raise KdqError(
            f"the network has no {', '.join(unknown)} to leave float (exclude, keep_float): there is {', '.join(near)}"
        )

    def excluded(name: str) -> bool:
        return any(name == outer or name.startswith(f"{outer}.") for outer in exclude)

    layers = []
    for name, module in modules.items():
        if excluded(name):
            continue
        if isinstance(module, QUANTIZABLE):
            _check_layer(name, module)
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
    owners: dict[int, str] = {}
    for name in layers:
        other = owners.setdefault(id(modules[name].weight), name)
        if other != name:
            raise KdqError(f"{other} and {name} share a weight: give each its own, or name both in exclude")
    return layers


def _check_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight cannot be exchanged for a quantized one."""
    if not name:
        raise KdqError("the network is a single layer, without a name to store it under: wrap it, nn.Sequential(layer)")
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        raise KdqError(
            f"the weight of {name} is computed, by pruning, weight_norm, another parametrization or decode='layer': "
            "make it permanent first (prune.remove, parametrize.remove_parametrizations, decode='once'), or exclude it"
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
    finally:
        for handle in handles:
            handle.remove()
    if len(images) and (missed := [name for name in layers if name not in order]):
        raise KdqError(f"layers never ran on the calibration images: {', '.join(missed[:4])}; name them in exclude")
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
