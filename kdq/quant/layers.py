"""Which parameters of a network are weights of layers, what they are called, and which of them stay float.

A layer has the name of its weight without the last word: ``fc`` is ``fc.weight``, ``attention.in_proj`` is
``attention.in_proj_weight``. Any parameter of two or more dimensions may be one; whether it is says the network, when
it runs: see :mod:`kdq.quant.calibrate.order`.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from kdq.quant.calibrate.layer import LAYERS
from kdq.quant.packing.packed import is_packed
from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class LeftFloat:
    """A parameter of two or more dimensions that was not quantized, the module that holds it, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    why: str


def unwrapped(network: nn.Module) -> nn.Module:
    """The network beneath ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 1)))
    Linear(in_features=2, out_features=1, bias=True)
    """
    while True:
        if isinstance(network, (DataParallel, DistributedDataParallel)):
            network = network.module
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        else:
            return network


def layer_name(parameter: str) -> str:
    """The layer whose weight a parameter is.

    >>> layer_name("encoder.fc.weight"), layer_name("attention.in_proj_weight"), layer_name("class_token")
    ('encoder.fc', 'attention.in_proj', 'class_token')
    """
    return parameter.removesuffix("_weight" if parameter.endswith("_weight") else ".weight")


def place_of(network: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """The module that holds a layer's weight, and the attribute under which."""
    for name in (f"{layer}.weight", f"{layer}_weight", layer):
        path, _, attribute = name.rpartition(".")
        try:
            module = network.get_submodule(path)
        except AttributeError:
            continue
        if module._parameters.get(attribute) is not None or parametrize.is_parametrized(module, attribute):
            return module, attribute
    raise KdqError(f"{layer} does not fit the network, which has no such layer")


def holders(network: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules and attributes that hold each parameter, by its ``id``: several where a weight is shared."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for attribute, value in module._parameters.items():
            found.setdefault(id(value), []).append((module, attribute))
    return found


def weight_of(network: nn.Module, layer: str) -> Tensor:
    """The weight that a layer of ``network`` computes with.

    >>> weight_of(nn.MultiheadAttention(8, 2), "in_proj").shape
    torch.Size([24, 8])
    """
    module, attribute = place_of(network, layer)
    weight = getattr(module, attribute)
    assert isinstance(weight, Tensor)
    return weight


def quantizable_layers(network: nn.Module, keep_float: Collection[str] = ()) -> list[str]:
    """Names of what may be layers, in registration order, without ``keep_float``.

    Args:
        keep_float: names of layers, parameters and modules (for all that is inside them), and patterns
            (:mod:`fnmatch`) of such names.
    """
    everything = chain(network.named_parameters(), network.named_buffers())
    if lazy := [name for name, value in everything if is_lazy(value)]:
        raise KdqError(f"{lazy[0]} is lazy and has no shape yet: run the network once on a batch first")
    kept = _kept(network, keep_float)
    for name, module in network.named_modules():
        if any(is_packed(module, attribute) for attribute in getattr(module, "parametrizations", ())):
            user = name or "the network"
            raise KdqError(f"{user} decodes its weight as it runs: load the network with decode='once' to quantize it")
        if isinstance(module, LAYERS) and "weight" not in module._parameters:
            if all(id(value) in kept for value in module.parameters() if value.ndim >= 2):
                continue
            raise KdqError(
                f"the weight of {name} is computed, by pruning, weight_norm or another parametrization: undo that "
                "(prune.remove, parametrize.remove_parametrizations), or name it in keep_float"
            )
    large = ((name, value) for name, value in network.named_parameters() if value.ndim >= 2)
    found = [layer_name(name) for name, value in large if id(value) not in kept and value.is_floating_point()]
    return [*dict.fromkeys(found)]


def left_float(
    network: nn.Module,
    layers: Collection[str],
    why: Mapping[str, str] | None = None,
    candidates: Collection[str] | None = None,
) -> list[LeftFloat]:
    """The parameters of two or more dimensions that are not the weights of ``layers``; one that several modules share
    is there once. What is not among the ``candidates`` was left float by ``keep_float``, others for what ``why`` says.
    """
    found = []
    for parameter, value in network.named_parameters():
        name = layer_name(parameter)
        if value.ndim >= 2 and (name not in layers or weight_of(network, name) is not value):
            kept = candidates is not None and name not in candidates
            kind = type(network.get_submodule(parameter.rpartition(".")[0])).__name__
            reason = "keep_float" if kept else (why or {}).get(name, "no layer")
            if not value.is_floating_point():
                reason = f"its numbers are {value.dtype}"
            elif name in layers:  # as foo_weight beside foo.weight
                reason = f"its name is that of the layer {name}, of another weight"
            found.append(LeftFloat(parameter, kind, tuple(value.shape), reason))
    return found


def _kept(network: nn.Module, keep_float: Collection[str]) -> set[int]:
    """The ``id`` of every parameter that ``keep_float`` names, under any of its names."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    kept: set[int] = set()
    for entry in keep_float:
        named = {id(value) for name, value in parameters.items() if _names(entry, name)}
        if not named and not any(fnmatchcase(name, entry) for name in modules):
            known = [*modules, *map(layer_name, parameters), *parameters]
            near = difflib.get_close_matches(entry, known, 3, 0.4) or modules[:4]
            raise KdqError(
                f"the network has no {entry} to leave float (keep_float): there is {', '.join(dict.fromkeys(near))}"
            )
        kept |= named
    return kept


def _names(entry: str, parameter: str) -> bool:
    """Whether ``entry`` is a parameter, its layer, or a module around it."""
    words = parameter.split(".")
    around = (".".join(words[:count]) for count in range(1, len(words) + 1))
    return any(fnmatchcase(name, entry) for name in (*around, layer_name(parameter)))
