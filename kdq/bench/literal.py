"""The published algorithms written down as they are printed: slow, and with nothing shared with kdq's own code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def nearest(value: Tensor, values: Tensor) -> Tensor:
    """The entry of ``values`` ``(rows, levels)`` nearest to ``value`` ``(rows,)``, by looking at all of them; half-way
    between two, the one of even code."""
    odd = torch.arange(values.shape[1], device=values.device) % 2
    choice = ((values - value[:, None]).abs() + 1e-12 * odd).argmin(1, keepdim=True)
    return values.gather(1, choice)[:, 0]


def gpfq(W: Tensor, X: Tensor, Xq: Tensor, values: Tensor) -> Tensor:
    """:func:`recursion` in float64."""
    return recursion(W.double(), X.double(), Xq.double(), values.double())


def recursion(W: Tensor, X: Tensor, Xq: Tensor, values: Tensor, columns: int | None = None) -> Tensor:
    """The recursion over the first ``columns`` columns of ``X``, ``Xq`` ``(m, d)``, for all neurons ``W`` ``(N, d)``.

    ``values`` ``(N, levels)`` lists every neuron's alphabet.
    """
    u = W.new_zeros(W.shape[0], X.shape[0])
    Q = torch.zeros_like(W[:, :columns])
    for t in range(Q.shape[1]):
        u += W[:, t : t + 1] * X[:, t]
        norm = Xq[:, t] @ Xq[:, t]
        q = nearest(u @ Xq[:, t] / norm if norm > 0 else W.new_zeros(len(W)), values)
        u -= q[:, None] * Xq[:, t]
        Q[:, t] = q
    return Q


def conv_patches(layer: Any, x: Tensor) -> list[Tensor]:
    """The inputs of each group's neurons, one row per output position, read off pixel by pixel.

    Each filter of a convolution copies one pixel of its patch, so that the layer's own code decides what a patch is.
    """
    if isinstance(layer, nn.Linear):
        return [x.reshape(-1, x.shape[-1])]
    window = layer.weight[0].numel()
    result = []
    for group in x.chunk(layer.groups, 1):
        picker = copy.deepcopy(layer)
        picker.groups, picker.in_channels, picker.out_channels = 1, group.shape[1], window
        picker.weight = nn.Parameter(torch.eye(window, dtype=x.dtype).view(window, *layer.weight.shape[1:]))
        picker.bias = None
        result.append(picker(group).movedim(1, -1).reshape(-1, window).detach())
    return result


def alphabet_values(scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Every value of every row's alphabet ``(rows, levels)``, from ``scale`` and ``zero`` ``(rows, 1)``."""
    return scale * (torch.arange(levels, dtype=scale.dtype) - zero)


def quantize_network(model: Any, images: Tensor, weights: dict[str, Any]) -> dict[str, Tensor]:
    """Layer by layer from the image on, O(L^2): the input of each layer in the float network and in the network whose
    earlier layers hold what the recursion made of them. ``weights`` gives the alphabets (and the order of layers)."""
    model = copy.deepcopy(model).eval()
    quantized: Any = copy.deepcopy(model)
    done: dict[str, Tensor] = {}
    for name, packed in weights.items():
        x = first_input(model, name, images)
        xq = first_input(quantized, name, images)
        layer = model.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        rows = zip(
            layer.weight.flatten(1).chunk(groups),
            conv_patches(layer, x),
            conv_patches(layer, xq),
            alphabet_values(packed.scale[:, None], packed.zero[:, None], packed.levels).chunk(groups),
            strict=True,
        )
        done[name] = torch.cat([gpfq(*row) for row in rows]).float().view(layer.weight.shape)
        quantized.get_submodule(name).weight.data.copy_(done[name])
    return done


def first_input(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the layer ``name`` is given when ``model`` runs ``images``."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]
