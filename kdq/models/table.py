"""The networks that a stored file may name, and the arguments it may give them. Nothing else that a file says is
called.

A file comes from anyone. What it names is looked up in a table, its arguments are held against a schema and against
what the file holds, and the network is built on the meta device, where a tensor is a shape without memory.
"""

import inspect
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from kdq.models import cifar, libraries, networks, reused
from kdq.utils.errors import KdqError
from kdq.utils.names import STABLE

#: How an argument is checked: the type it has (a list is one of numbers, a dict names a network of the table that takes
#: no other), or the words or numbers it may be.
Kind = type | tuple[str | int, ...]


@dataclass(frozen=True)
class Entry:
    """A network of the table."""

    target: str  # the name that files give it, whatever its path is today
    build: Callable[..., nn.Module]
    takes: Mapping[str, Kind]  # the arguments that a file may give
    widest: int = 1  # channels of its widest layer at width 1, where it has one


#: The largest network that is built without a look at what holds its weights: ten thousand tensors, 4 GB of values.
LARGEST = (10_000, 2**30)
_OWN: dict[str, Kind] = {"num_classes": int, "in_channels": int}
_NORMALIZED: dict[str, Kind] = {**_OWN, **dict.fromkeys(["mean", "std", "data_mean", "data_std"], list)}
_TORCHVISION: dict[str, Kind] = {
    **dict.fromkeys(["num_classes", "groups", "width_per_group", "round_nearest", "image_size", "stem_width"], int),
    **dict.fromkeys(["dropout", "dropout_aux", "attention_dropout", "drop_rate", "stochastic_depth_prob"], float),
    **dict.fromkeys(["width_mult", "layer_scale"], float),
    **dict.fromkeys(["aux_logits", "transform_input", "init_weights", "zero_init_residual", "progress"], bool),
    **dict.fromkeys(["memory_efficient", "reduced_tail", "dilated"], bool),
}


@cache
def table() -> dict[str, Entry]:
    """The entries by name: the stable names of kdq's networks, and ``torchvision.models.NAME`` for each network that
    torchvision lists for classification."""
    stems: dict[str, Kind] = {**_NORMALIZED, "stem": ("cifar", "imagenet")}
    planes: dict[str, Kind] = {**_NORMALIZED, "depth": int, "width": float, "shortcut": ("A", "B"), "stem": int}
    listed = torchvision.models.list_models(module=torchvision.models)
    inside: dict[str, Kind] = {"net": dict, "maps": str, "classifier": str, "channels": int, "features": int}
    by_name: dict[str, Kind] = {**_TORCHVISION, **_NORMALIZED, "name": tuple(listed)}
    del by_name["in_channels"]
    own: list[Entry] = [
        Entry("kdq.models.CifarResNet", networks.CifarResNet, planes, 64),
        Entry("kdq.models.WhitenedNet", networks.WhitenedNet, {**_OWN, "width": float}, 256),
        Entry("kdq.models.WideResNet", cifar.WideResNet, {**_OWN, "depth": int, "width": int}, 64),
        Entry("kdq.models.CifarVGG", cifar.CifarVGG, {**_OWN, "depth": tuple(cifar.VGG)}),
        Entry("kdq.models.CifarMobileNetV2", cifar.CifarMobileNetV2, {**_OWN, "width": float}, 1920),
        Entry("kdq.models.CifarShuffleNetV1", cifar.CifarShuffleNetV1, _OWN),
        Entry("kdq.models.CifarShuffleNetV2", cifar.CifarShuffleNetV2, _OWN),
        Entry("kdq.models.resnet18", networks.resnet18, stems),
        Entry("kdq.models.resnet34", networks.resnet34, stems),
        Entry("kdq.models.resnet50", networks.resnet50, stems),
        Entry("kdq.models.torchvision_model", libraries.torchvision_model, by_name),
        Entry("kdq.models.reused_classifier", reused.reused_classifier, inside),
    ]
    entries = {STABLE[entry.target]: entry for entry in own}
    for name in listed:
        # Weights are the file's own: nothing is ever fetched.
        build = partial(torchvision.models.get_model_builder(name), weights=None)
        entries[f"torchvision.models.{name}"] = Entry(f"torchvision.models.{name}", build, _TORCHVISION)
    return entries


def stored_name(net: Mapping[str, Any]) -> dict[str, Any]:
    """``net`` as files say it: one name for each network of the table, whatever path it was called by."""
    entry = table().get(STABLE.get(str(net.get("_target_")), str(net.get("_target_"))))
    named = {name: stored_name(value) if isinstance(value, Mapping) else value for name, value in net.items()}
    return named if entry is None else {**named, "_target_": entry.target}


def name_of(network: nn.Module) -> dict[str, Any] | None:
    """What files say that ``network`` is; None where it does not say so itself, or was changed since it was built."""
    net: Mapping[str, Any] | None = getattr(network, "kdq_net", None)
    if net is None or (is_in_table(net) and _modules(_shaped(net, *LARGEST)) != _modules(network)):
        return None
    return stored_name(net)


def _modules(network: nn.Module) -> dict[str, tuple[type, str]]:
    """The kind and the options of each module, without what training adds: roundings, BatchNorm over processes."""
    found: dict[str, tuple[type, str]] = {}
    for name, module in network.named_modules():
        kind = type(module).__bases__[0] if is_parametrized(module) else type(module)
        options = re.sub(r"(, )?(inplace|momentum)=[\w.-]+", "", module.extra_repr())  # no other function
        if not {"parametrizations", "input_rounding"} & {*name.split(".")}:
            found[name] = _BatchNorm if issubclass(kind, _BatchNorm) else kind, options
    return found


def is_in_table(net: Mapping[str, Any]) -> bool:
    """Whether a file that names ``net`` can be read without being told the architecture."""
    try:
        _entry(net)
    except KdqError:
        return False
    return True


def shape_of(net: Mapping[str, Any], tensors: int, values: int) -> nn.Module:
    """The network that a file names, on the meta device.

    Args:
        net: ``{"_target_": name, **arguments}``, as the file says.
        tensors: how many entries the state dict has that the file holds.
        values: how many numbers these have in all.
    """
    network = _shaped(net, tensors, values)
    found = _size(network)
    if found != (tensors, values):
        raise KdqError(
            f"the file does not fit the network: it holds {tensors} tensors with {values} values, but names one of "
            f"{found[0]} with {found[1]}"
        )
    return network


def build_small(net: Mapping[str, Any]) -> nn.Module:
    """The network that a file names, with random weights, where these are read by someone else."""
    found = _size(_shaped(net, *LARGEST))
    if found > LARGEST or found[1] > LARGEST[1]:
        raise KdqError(f"the file names a network of {found[0]} tensors with {found[1]} values: build it yourself")
    return _built(net)


def _built(net: Mapping[str, Any]) -> nn.Module:
    """The network of :func:`_entry`, which says what it is."""
    entry, arguments = _entry(net)
    network = entry.build(
        **{k: _built(value) if isinstance(value, Mapping) else value for k, value in arguments.items()}
    )
    network.kdq_net = {"_target_": entry.target, **arguments}  # type: ignore[assignment]
    return network


def _shaped(net: Mapping[str, Any], tensors: int, values: int) -> nn.Module:
    """``net`` on the meta device, if no number of it makes more than so many tensors and values."""
    entry, arguments = _entry(net)
    for name, value in arguments.items():
        _check_size(entry, name, value, tensors, values)
    try:
        with torch.device("meta"), NumbersOnCpu():
            return _built(net)
    except Exception as error:  # constructors raise anything where numbers do not fit each other
        said = str(error) if isinstance(error, KdqError) else reprlib.repr(" ".join(str(error).split()))
        raise KdqError(f"the file names a {entry.target} that cannot be built: {said}") from None


def _size(network: nn.Module) -> tuple[int, int]:
    state = network.state_dict()
    return len(state), sum(tensor.numel() for tensor in state.values())


class NumbersOnCpu(TorchFunctionMode):
    """Within ``torch.device("meta")``: short lists of numbers stay numbers, for some constructors compute with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu"} | kwargs if func in (torch.arange, torch.tensor) else kwargs))


def _entry(net: Mapping[str, Any]) -> tuple[Entry, dict[str, Any]]:
    """The entry and the arguments of ``net``."""
    elsewhere = "build it yourself and pass it as load(path, network=...)"
    target = net.get("_target_") if isinstance(net, Mapping) else net
    entry = table().get(STABLE.get(target, target)) if isinstance(target, str) else None
    if entry is None:
        raise KdqError(
            f"the file names the architecture {reprlib.repr(target)}, none of kdq's or of torchvision's: {elsewhere}"
        )
    defaults = inspect.signature(entry.build).parameters
    arguments = {
        name: value
        for name, value in net.items()
        if name != "_target_" and not (value is None and name in defaults and defaults[name].default is None)
    }
    for name, value in arguments.items():
        if not _fits(entry.takes.get(name), value):
            raise KdqError(
                f"the file gives {entry.target} the argument {reprlib.repr(name)[1:-1]}={reprlib.repr(value)}, which "
                f"no file may give: {elsewhere}"
            )
    return entry, arguments


def _fits(kind: Kind | None, value: Any) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind is dict:
        return isinstance(value, Mapping) and is_in_table(value) and dict not in _entry(value)[0].takes.values()
    if kind is list:
        return isinstance(value, (list, tuple)) and all(type(x) in (int, float) and abs(x) < math.inf for x in value)
    if kind is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    if kind is int:
        return type(value) is int and value > 0
    return kind in (bool, str) and type(value) is kind


def _check_size(entry: Entry, name: str, value: Any, tensors: int, values: int) -> None:
    """Refuse a number that makes more than the file holds, so that even shapes are quickly made: a layer of the depth
    has a tensor; a class, channel or pixel a value; and a layer of n channels n² values."""
    if isinstance(value, Mapping):
        inner, arguments = _entry(value)
        for part, number in arguments.items():
            _check_size(inner, part, number, tensors, values)
    if entry.takes[name] not in (int, float):
        return
    asked = value
    if name in ("width", "width_mult", "width_per_group", "features"):
        value, limit = value * entry.widest, math.sqrt(values)
    else:
        limit = tensors if name == "depth" else values
    if value > limit:
        raise KdqError(
            f"the file does not fit the network: {entry.target} with {name}={reprlib.repr(asked)} has more than it"
        )
