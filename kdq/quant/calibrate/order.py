"""The layers of a network in the order they run, found by running it on one image."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdq.quant.calibrate.lanes import Lanes, Tape, lanes_in
from kdq.quant.calibrate.layer import LAYERS, layer_call
from kdq.quant.layers import weight_of
from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class Order:
    """What one image met on its way.

    Attributes:
        layers: in the order they first run.
        why: why the others do not count, by name, where they are weights of layers' modules.
        bypassed: those of the ``layers`` whose module is not called: something else takes its weight.
        repeated: those of the ``layers`` that run more than once.
    """

    layers: list[str]
    why: dict[str, str]
    bypassed: list[str]
    repeated: list[str]


def running_order(model: nn.Module, images: Tensor, layers: Collection[str]) -> Order:
    """Which of the ``layers`` run in ``model``, found by running the first image of ``images``.

    A weight that anything but ``F.linear`` or a convolution takes, too, such as an embedding, is no layer.

    Raises:
        KdqError: the network cannot be called on images.
    """
    device = next(model.parameters()).device
    names = {id(weight_of(model, name)): name for name in layers}
    order: dict[str, int] = {}
    others: dict[str, str] = {}
    called: dict[str, bool] = {}

    def meet(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        tape.calls.clear()
        inputs, call = layer_call(function, args, kwargs) or (None, None)
        if call is not None:
            if (name := names.get(id(call.weight))) is not None and isinstance(inputs, Lanes):
                order[name] = order.get(name, 0) + 1
            return
        for value in tree_leaves((args, kwargs)):
            if (name := names.get(id(value))) is not None:
                others[name] = f"used by {getattr(function, '__name__', function)}"

    def note(name: str, *arguments: Any) -> None:
        called[name] = called.get(name, False) or bool(lanes_in(arguments))

    tape = Tape(meet)
    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.no_grad(), eager():
            model(tape.watch(Lanes([images[:1].clone().to(device)])))  # a network may write into it
    except Exception as error:
        raise KdqError(
            f"the network cannot be called on inputs {tuple(images[:1].shape)} alone "
            f"({type(error).__name__}: {error}): quantize the part that can; a callback has network=..."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        if name in layers and name not in order and isinstance(module, LAYERS):
            others[name] = {
                None: "never called",
                False: "takes nothing of the images",
                True: "changes its weight before it uses it",
            }[called.get(name)]
    running = [name for name in order if name not in others]
    bypassed = [name for name in running if name not in called]
    return Order(running, others, bypassed, [name for name in running if order[name] > 1])


@contextmanager
def eager() -> Iterator[None]:
    """Runs what ``torch.compile`` compiled as it was written: compiled code knows nothing of :class:`Lanes`."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
