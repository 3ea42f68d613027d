"""The published recursion written down as it is printed: slow, and with nothing shared with kdq's own code."""

import torch
from torch import Tensor, nn


def nearest(value: Tensor, values: Tensor) -> Tensor:
    """The entry of ``values`` ``(rows, levels)`` nearest to ``value`` ``(rows,)``, by looking at all of them; half-way
    between two, the one of even code."""
    odd = torch.arange(values.shape[1], device=values.device) % 2
    choice = ((values - value[:, None]).abs() + 1e-12 * odd).argmin(1, keepdim=True)
    return values.gather(1, choice)[:, 0]


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


def alphabet_values(scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Every value of every row's alphabet ``(rows, levels)``, from ``scale`` and ``zero`` ``(rows, 1)``."""
    return scale * (torch.arange(levels, dtype=scale.dtype) - zero)


def first_input(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the layer ``name`` is given when ``model`` runs ``images``."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]
