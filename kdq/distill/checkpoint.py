"""What a checkpoint says of a network's architecture, so that ``load_from_checkpoint(path)`` can build it again.

Networks that kdq builds say what they are: a name of its table and the arguments. Of others, and of those that were
changed since, the checkpoint holds the pickled structure, as bytes: these run code when they are read, so nothing reads
them unless the caller says ``weights_only=False``. Lightning's default is to load weights only.
"""

import copy
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdq.models.table import build_small, name_of
from kdq.utils.errors import KdqError

#: A network, or the description of one in a checkpoint.
Network = nn.Module | Mapping[str, Any]
log = logging.getLogger(__name__)


def described(network: nn.Module) -> dict[str, Any] | Tensor | None:
    """The architecture of ``network`` for a checkpoint; None where Python cannot pickle it."""
    if (net := name_of(network)) is not None:
        return net
    stream = io.BytesIO()
    try:
        torch.save(_without_weights(network), stream)
    except Exception as error:  # classes inside functions, lambdas, and whatever else cannot be pickled
        log.debug("the structure of %s is not in its checkpoints: %s", type(network).__name__, error)
        return None
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def built(description: Any, name: str) -> nn.Module:
    """The network of a :func:`described` architecture, or ``description`` itself if it is a network."""
    if isinstance(description, nn.Module):
        return description
    if isinstance(description, Mapping):
        return build_small(description)
    if description is not None and not isinstance(description, Tensor):
        raise KdqError(f"{name}={description!r} is no network: give a torch.nn.Module")
    raise KdqError(
        f"the checkpoint names no network that kdq builds by itself: give load_from_checkpoint(path, {name}=network), "
        "or weights_only=False if you trust whoever wrote the file"
    )


def check_held(checkpoint: Mapping[str, Any], described: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose state dict does not hold, by name, tensors of these shapes with all of their values."""
    for name, tensor in described.items():
        held = checkpoint["state_dict"].get(name)
        expanded = held is not None and held.untyped_storage().nbytes() < held.nbytes  # one value, said to be many
        if held is None or held.shape != tensor.shape or expanded:
            found = None if held is None else tuple(held.shape)
            raise KdqError(f"the checkpoint does not fit: {name} must be {tuple(tensor.shape)}, and is {found}")


def rebuilt(checkpoint: Mapping[str, Any], name: str, build: Callable[[], nn.ModuleList]) -> nn.ModuleList:
    """What ``build`` makes from a checkpoint's numbers, if that is what the checkpoint holds under ``name``: they ask
    for no more memory than the file itself."""
    with torch.device("meta"):
        check_held(checkpoint, {f"{name}.{key}": value for key, value in build().state_dict().items()})
    return build()


def unpickled(description: Any) -> Any:
    """The structure behind pickled bytes, which runs what they say; anything else as it is."""
    if not isinstance(description, Tensor):
        return description
    network = torch.load(io.BytesIO(description.cpu().numpy().tobytes()), weights_only=False)
    for module in network.modules():  # the weights come with the state dict
        for group in (module._parameters, module._buffers):
            for key, value in group.items():
                if value is not None and value.is_meta:
                    empty = torch.empty_like(value, device="cpu")
                    group[key] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return network


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose state dict takes no memory; buffers that are not in it are kept."""
    memo: dict[int, Any] = {}
    for value in network.state_dict(keep_vars=True).values():
        empty = value.detach().to("meta")
        memo[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(network, memo)
