"""Networks from what a config or a stored file says of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from kdq.utils.errors import KdqError, no_module

#: Stored files may name an architecture only from these modules: reading a file never runs other code.
TRUSTED_MODULES = ("kdq.models", "torchvision.models")


def build(net: Mapping[str, Any]) -> nn.Module:
    """Call ``net["_target_"]`` with the other entries as keyword arguments; ``num_classes`` only where it takes that.

    The recipe is kept on the network as ``network.kdq_net``, so that a saved file can say how to rebuild it.

    Raises:
        KdqError: the target cannot be imported, is not a network, or refuses the arguments.
    """
    kwargs = {str(key): value for key, value in net.items() if key != "_target_"}
    target = str(net.get("_target_"))
    builder = _resolve(target)
    try:
        signature = inspect.signature(builder)
        if "num_classes" in kwargs and not _takes(signature, "num_classes"):
            del kwargs["num_classes"]
        signature.bind(**kwargs)
    except TypeError as error:
        raise KdqError(f"{target} does not take these arguments ({error}): {sorted(kwargs)}") from error
    network = builder(**kwargs)
    if not isinstance(network, nn.Module):
        raise KdqError(f"{target} returned {type(network).__name__}, not a torch.nn.Module")
    network.kdq_net = {  # type: ignore[assignment]
        "_target_": target,
        **kwargs,
    }
    return network


def _takes(signature: inspect.Signature, name: str) -> bool:
    kinds = (parameter.kind for parameter in signature.parameters.values())
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def is_trusted(net: Mapping[str, Any]) -> bool:
    """Whether the recipe ``net`` names an architecture of :data:`TRUSTED_MODULES`."""
    module, _, name = str(net.get("_target_")).rpartition(".")
    return module in TRUSTED_MODULES and not name.startswith("_")


def build_trusted(net: Mapping[str, Any]) -> nn.Module:
    """:func:`build` for a recipe that was read from a file: only architectures of :data:`TRUSTED_MODULES`."""
    if not is_trusted(net):
        raise KdqError(
            f"the file names the architecture {net.get('_target_')!r}, not one of {', '.join(TRUSTED_MODULES)}: "
            "build it yourself and pass it as load(path, network=...)"
        )
    return build(net)


def _resolve(target: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise KdqError(f"cannot import {target!r}: {no_module(error)}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise KdqError(f"cannot import {target!r}: {error}") from error
