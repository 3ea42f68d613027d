"""Networks that compute with quantized weights."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdq.quant.activations import ActivationQuantizer
from kdq.quant.calibrate.order import eager
from kdq.quant.layers import place_of, weight_of
from kdq.quant.packing.packed import QuantizedWeight, is_packed
from kdq.utils.checks import one_of
from kdq.utils.errors import KdqError

Network = TypeVar("Network", bound=nn.Module)

#: What values that are not quantized may be rounded to.
FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def copied(network: Network) -> Network:
    """A copy of ``network`` that shares its codes, which never change.

    What modules compute from their parameters and keep, such as a pruned weight, is copied by its values.
    """
    codes = getattr(network, "quantized_weights", {}).values()
    memo: dict[int, Any] = {id(weight): weight for weight in codes}
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(network, memo)


def with_quantized_weights(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    activations: Mapping[str, ActivationQuantizer] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of ``model`` in eval mode that computes with ``weights``, kept as its ``quantized_weights``.

    Args:
        activations: quantizers of the inputs of layers, by name, kept as its ``quantized_activations``.
        state: new values of other entries of the state dict.
    """
    quantized = copied(model).eval()
    with torch.no_grad():
        for name, weight in weights.items():
            weight_of(quantized, name).copy_(weight.decode())
        entries = quantized.state_dict()
        for name, value in (state or {}).items():
            entries[name].copy_(value)
    for name, quantizer in (activations or {}).items():
        quantized.get_submodule(name).register_forward_pre_hook(quantizer)
    quantized.quantized_weights = dict(weights)  # type: ignore[assignment]
    quantized.quantized_activations = dict(activations or {})  # type: ignore[assignment]
    return quantized


@contextmanager
def standing_in(network: nn.Module, quantized: nn.Module) -> Iterator[None]:
    """While it lasts, ``network`` computes what ``quantized`` does, a copy made by :func:`with_quantized_weights`.

    Afterwards it is as it was, bit for bit.
    """
    activations: Mapping[str, ActivationQuantizer] = quantized.quantized_activations  # type: ignore[assignment]
    with ExitStack() as stack:
        stack.enter_context(state_kept(network))
        if activations:
            stack.enter_context(eager())  # compiled code may run without hooks
        for name, quantizer in activations.items():
            stack.callback(network.get_submodule(name).register_forward_pre_hook(quantizer).remove)
        network.load_state_dict(quantized.state_dict())
        yield


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards ``module`` has the state that it has now, whatever was loaded."""
    before = copy.deepcopy(module.state_dict())
    try:
        yield
    finally:
        module.load_state_dict(before, strict=False)  # a state dict of one's own may leave things out


def same_state(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two state dicts hold equal tensors, wherever these lie."""
    return state.keys() == other.keys() and all(
        torch.equal(value.to(other[name].device), other[name])
        for name, value in state.items()
        if isinstance(value, Tensor)
    )


def with_float_dtype(network: nn.Module, name: str) -> nn.Module:
    """A copy of ``network`` whose values outside of the quantized weights (biases, BatchNorm, layers left float) are
    rounded to a 16-bit float, which is what :func:`kdq.save` then stores. It computes in float32 as before.

    Args:
        name: one of :data:`FLOAT_DTYPES`.
    """
    dtype = FLOAT_DTYPES[one_of("float_dtype", name, FLOAT_DTYPES)]
    rounded = copied(network)
    for entry, value in float_entries(rounded, getattr(network, "quantized_weights", {})).items():
        if value.is_floating_point():
            value.copy_(value.to(dtype))
            if not value.isfinite().all():
                raise KdqError(f"{entry} holds values too large for {name}: use float_dtype=bf16")
    rounded.kdq_float_dtype = name  # type: ignore[assignment]
    return rounded


def float_entries(network: nn.Module, weights: Collection[str]) -> dict[str, Tensor]:
    """The entries of the state dict that are not quantized: without the ``weights`` of layers, under any of their
    names, decoded or packed."""
    codes = {id(weight_of(network, name)) for name in weights if not is_packed(*place_of(network, name))}
    aliases = {name for name, value in network.named_parameters(remove_duplicate=False) if id(value) in codes}
    packed = tuple(
        f"{name}.parametrizations.{attribute}."
        for name, module in network.named_modules(remove_duplicate=False)
        for attribute in getattr(module, "parametrizations", ())
        if is_packed(module, attribute)
    )
    state = network.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise KdqError(f"{other[0]} is no tensor, and packed files hold nothing else: let get_extra_state return one")
    return {name: value for name, value in state.items() if name not in aliases and not name.startswith(packed)}
