"""Networks from what the user's own config says of them; for what files say see :mod:`kdq.models.table`."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from kdq.utils.calls import imported, parameters
from kdq.utils.errors import KdqError


def build(net: Mapping[str, Any]) -> nn.Module:
    """Call ``net["_target_"]`` with the other entries that are not None; ``num_classes`` only where it takes that. A
    ``net`` among them that has a ``_target_``, too, is built first.

    The recipe is kept on the network as ``network.kdq_net``, so that a saved file can say how to rebuild it."""
    kwargs = {str(key): value for key, value in net.items() if key != "_target_" and value is not None}
    target = str(net.get("_target_"))
    builder = imported("net", target)
    if (taken := parameters(builder)) is not None and "num_classes" not in taken:
        kwargs.pop("num_classes", None)
    try:
        inspect.signature(builder).bind(**kwargs)
    except TypeError as error:
        raise KdqError(f"{target} does not take these arguments ({error}): {sorted(kwargs)}") from error
    said = dict(kwargs)
    if isinstance(kwargs.get("net"), Mapping) and "_target_" in kwargs["net"]:
        kwargs["net"] = build(kwargs["net"])
        said["net"] = kwargs["net"].kdq_net
    network = builder(**kwargs)
    if not isinstance(network, nn.Module):
        raise KdqError(f"{target} returned {type(network).__name__}, not a torch.nn.Module")
    network.kdq_net = {"_target_": target, **said}  # type: ignore[assignment]
    return network
