"""Layers inside of networks: their names, what they give, and which of them methods compare.

Layers are named as :meth:`torch.nn.Module.named_modules` names them; ``NAME`` is what the module gives, ``NAME:input``
what it takes. Hooks are there only while a network runs to be looked at, so that no copy, file or checkpoint of a
network has them, and what they show is the network's own tensor, not a copy.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdq.utils.checks import nearest
from kdq.utils.errors import KdqError

#: Behind a module's name: what it takes, not what it gives.
INPUT = ":input"
#: Why a method that looks inside takes no compiled network.
COMPILED = (
    "{} looks inside of its networks, where compiled ones show nothing: give networks that are not compiled, "
    "trainer.compile=false"
)


@contextmanager
def watched(
    network: nn.Module, names: Iterable[str], take: Callable[[Any], Any] = lambda feature: feature
) -> Iterator[dict[str, Any]]:
    """What ``network`` has at its layers ``names`` when it runs in the block, in the order in which layers end; of a
    layer that runs several times the last. ``take`` is called on a feature when it is made. What a layer takes and
    overwrites, as torchvision's ReLUs do, is a copy.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> with watched(network, ["1:input"]) as features:
    ...     _ = network(torch.zeros(2, 1, 2, 2))
    >>> features["1:input"].shape
    torch.Size([2, 4])
    """
    modules, seen = dict(network.named_modules()), dict[str, Any]()

    def hooked(name: str) -> RemovableHandle:
        def keep(module: nn.Module, args: Any, *output: Any) -> None:
            seen.pop(name, None)
            taken = args[0].clone() if getattr(module, "inplace", False) and not output else args[0]
            seen[name] = take(output[0] if output else taken)

        module = modules[name.removesuffix(INPUT)]
        return module.register_forward_pre_hook(keep) if name.endswith(INPUT) else module.register_forward_hook(keep)

    handles = [hooked(name) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def to_look_into(network: nn.Module, who: str) -> nn.Module:
    """A copy of ``network`` in eval mode, for ``who`` to look at what its layers give."""
    if network._compiled_call_impl is not None:  # hooks are no part of what guards it: it may run without them
        raise KdqError(COMPILED.format(who))
    return copy.deepcopy(network).eval()


def found_layers(network: nn.Module, images: Tensor, where: str) -> list[str]:
    """The layers that methods compare by default, by a look at the features that ``network`` makes of ``images``.

    The stages are those that a network names itself as ``network.kdq_stages``; or else the last of the outermost layers
    that give maps of each size above one pixel. The ``embedding`` is what the last linear layer takes; ``all``: both.
    ``unactivated`` is what the ReLUs take that end the stages; of a stage that ends with none, itself.

    >>> from kdq.models import resnet18
    >>> found_layers(resnet18(num_classes=10), torch.zeros(1, 3, 32, 32), "embedding")
    ['fc:input']
    """
    if where == "all":
        return [name for part in ("stages", "embedding") for name in found_layers(network, images, part)]
    if where == "unactivated":
        stages = found_layers(network, images, "stages")
        relus = [name for name, module in network.named_modules() if isinstance(module, (nn.ReLU, nn.ReLU6))]
        given = {name: feature for name, (feature, _) in looked_at(network, images, [*stages, *relus]).items()}
        last = {id(given[relu]): f"{relu}{INPUT}" for relu in relus if relu in given}
        return [last.get(id(given[stage]), stage) for stage in stages]
    named: Any = getattr(network, "kdq_stages", None)
    if where != "embedding" and named is not None:
        return list(named)
    modules = {name: module for name, module in network.named_modules() if name}
    features = {name: x for name, (x, changed) in looked_at(network, images, modules).items() if not changed}
    if where == "embedding":
        linear = [name for name in features if isinstance(modules[name], nn.Linear)]
        found = [f"{name}{INPUT}" for name in linear[-1:]]
    else:
        ends: dict[Any, str] = {}
        height, width = images.shape[2:]
        for name, feature in features.items():
            size = feature.shape[2:]
            is_map = feature.ndim == 4 and size.numel() > 1 and abs(size[0] - size[1] * height / width) <= 1
            if is_map and (size not in ends or name.count(".") <= ends[size].count(".")):
                ends.pop(size, None)  # in the order of the last ones
                ends[size] = name
        found = list(ends.values())
    if not found:
        kind = "linear layer" if where == "embedding" else "stages of maps"
        raise KdqError(f"no {kind} found in {type(network).__name__}: name student_layers and teacher_layers")
    return found


def averaged_maps(network: nn.Module, images: Tensor) -> tuple[str, list[int], str]:
    """The outermost layer that gives the maps whose means over their pixels the last linear layer takes; their shape,
    without the batch; that linear layer.

    >>> from kdq.models import CifarResNet
    >>> averaged_maps(CifarResNet(8, num_classes=10).eval(), torch.randn(1, 3, 32, 32))
    ('layer3', [64, 8, 8], 'fc')
    """
    (embedding,) = found_layers(network, images, "embedding")
    features = looked_at(network, images, [name for name, _ in network.named_modules() if name] + [embedding])
    taken = features[embedding][0]
    maps = {name: x for name, (x, changed) in features.items() if x.ndim == 4 and not changed}
    near = 1e-4 * taken.abs().max()
    alike = {name: x.mean((2, 3)) for name, x in maps.items() if x.shape[:2] == taken.shape}
    means = [name for name, mean in alike.items() if (mean - taken).abs().max() <= near]
    if not means:
        raise KdqError(f"{type(network).__name__}'s classifier takes no means of a layer's maps over their pixels")
    outermost = max(reversed(means), key=lambda name: maps[name].shape[2:].numel())
    return outermost, list(maps[outermost].shape[1:]), embedding.removesuffix(INPUT)


def looked_at(network: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, tuple[Tensor, bool]]:
    """The features at ``names`` that are tensors, without gradient, and whether what follows changes them in place."""
    first = next(network.parameters())
    with torch.no_grad(), watched(network, names, lambda x: (x, getattr(x, "_version", 0))) as seen:
        network(images.to(first.device, first.dtype))
    tensors = {name: (x, version) for name, (x, version) in seen.items() if isinstance(x, Tensor)}
    return {name: (x, x._version != version) for name, (x, version) in tensors.items()}


def check_names(network: nn.Module, role: str, names: Sequence[str]) -> None:
    """Refuse a name that is no layer of ``network``, the ``role`` of a method."""
    if isinstance(names, str):
        raise KdqError(f"method.{role}_layers={names} must be a list: [{names}]")
    known = [name for name, _ in network.named_modules() if name]
    for name in names:
        if name.removesuffix(INPUT) not in known:
            outer = ", ".join(name for name in known if "." not in name)
            raise KdqError(
                f"method.{role}_layers: the {role} has no layer {name!r}{nearest(name, known)}; it begins with {outer}"
            )
