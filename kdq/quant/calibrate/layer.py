"""A layer as a matrix problem: its weights as rows, its inputs as the patches those rows are multiplied with.

A layer is what happens when ``F.linear`` or a convolution is called with a parameter of the network, whatever module
calls it: an ``nn.Linear``, the attention that reads the weights of its ``nn.Linear``, or code of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: dict[Any, type[nn.Module]] = {torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
#: The modules that call these functions with a weight of their own.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LayerCall:
    """A call of ``F.linear`` or a convolution.

    Attributes:
        module: a module that does the same but for the bias, for what asks a layer about stride, padding and so on.
        function: with all but the first three arguments: called with input, weight and bias.
    """

    weight: Tensor
    bias: Tensor | None
    module: nn.Module
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def layer_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, LayerCall] | None:
    """The input and the layer that a torch function is called for, if it is for a layer.

    >>> inputs, call = layer_call(F.linear, (torch.ones(2, 3), torch.ones(4, 3)), {})
    >>> call.module
    Linear(in_features=3, out_features=4, bias=False)
    """
    if function is not F.linear and function not in _CONVOLUTIONS:
        return None
    given = dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)
    inputs, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if function is F.linear:
        module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        outputs, channels, *kernel = weight.shape
        channels *= given.get("groups", 1)
        module = _CONVOLUTIONS[function](channels, outputs, tuple(kernel), **given, bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return inputs, LayerCall(weight, bias, module, lambda x, w, b: function(x, w, b, **given))


@cache
def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that does not hand itself whole to a tensor's ``__torch_function__``, but
    the functions that it calls."""
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda arguments: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class EachLayer(TorchFunctionMode):
    """Within it, ``meet(weight, run)`` gives the output of every layer that runs, and may call ``run`` for it."""

    def __init__(self, meet: Callable[[Tensor, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.meet = meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # holds two layers
            with self:
                return opened(func)(*args, **kwargs)
        run = partial(func, *args, **kwargs)
        _, call = layer_call(func, args, kwargs) or (None, None)
        return run() if call is None else self.meet(call.weight, run)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weights as ``(groups, rows, columns)``: one row per output channel, one column per weight of its patch."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return weight.detach().reshape(groups, weight.shape[0] // groups, -1)


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs as ``(groups, patches, columns)``, so that ``patches @ weight_matrix.mT`` is the layer's output
    (without bias), one row per output position.

    Convolutions take their patches with their own stride, padding and dilation.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(layer._reversed_padding_repeated_twice):
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    spatial = len(layer.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        extent = dilation * (kernel - 1) + 1
        inputs = inputs.unfold(2 + axis, extent, stride)[..., ::dilation]
    # (batch, channels, *positions, *kernel) -> (batch, *positions, channels, *kernel)
    inputs = inputs.movedim(1, 1 + spatial)
    grouped = inputs.unflatten(1 + spatial, (layer.groups, -1)).movedim(1 + spatial, 0)
    return grouped.flatten(2 + spatial).flatten(1, 1 + spatial)


def channel_axis(layer: nn.Module) -> int:
    """The axis of the layer's output that its bias runs along."""
    return -1 if isinstance(layer, nn.Linear) else 1
