"""Layers that run more than once, because modules share a weight or one is called again: one Q must serve all inputs.

With inputs X_1, X_2, ... of the runs, Q is to be near W on all of them, ``min_Q sum_k ||X_k W' - X~_k Q'||^2``, whose
moments are sums, ``G = sum_k X~_k'X~_k`` and ``C = sum_k X~_k'X_k``. When the first run stops to be solved, X~_k of the
later ones is not known, for it depends on Q: the float network's X_k stands for it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from kdq.quant.calibrate.lanes import Lanes, Tape
from kdq.quant.calibrate.layer import layer_call
from kdq.quant.calibrate.moments import PartedMoments, Sums


def later_moments(
    model: nn.Module,
    names: Mapping[int, str],
    repeated: Collection[str],
    new: Callable[[nn.Module], PartedMoments],
    chunks: Iterable[tuple[Tensor, bool]],
) -> dict[str, Sums]:
    """``X_k'X_k`` of the float network, summed over the later runs of the ``repeated`` layers, by their names.

    Args:
        names: the layers' names by the ``id`` of their weight.
        new: what sums for a layer.
        chunks: images, and whether they are held out.
    """
    sums: dict[tuple[str, str], PartedMoments] = {}  # runs of one weight may differ in stride or padding
    met: set[str] = set()
    held_out = False

    def meet(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        tape.calls.clear()
        inputs, call = layer_call(function, args, kwargs) or (None, None)
        name = "" if call is None else names.get(id(call.weight), "")
        if call is None or name not in repeated or not isinstance(inputs, Lanes):
            return
        if name in met:
            moments = sums.setdefault((name, str(call.module)), new(call.module))
            moments.add(inputs.lanes[0], inputs.lanes[0], held_out)
        met.add(name)

    tape = Tape(meet)
    for images, held_out in chunks:  # noqa: B007  meet reads it
        met.clear()
        model(tape.watch(Lanes([images])))
    found: dict[str, Sums] = {}
    for (name, _), moments in sums.items():
        found[name] = moments.total().plus(found[name]) if name in found else moments.total()
    return found
