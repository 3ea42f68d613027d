"""One forward pass that carries the calibration images through several versions of a network at once.

A :class:`Lanes` stands for one activation of the network: lane 0 is the float network's, the others belong to the
quantized versions (one per bit width), and every lane is cut into chunks of images. It is a ``torch.Tensor`` to the
network's own code; every torch function called on it is carried out for each lane and chunk. Hence any forward
method works as it is written, values are freed when it drops them, and the work of all versions shares one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Lanes(Tensor):
    """Tensors by lane and chunk that answer to torch functions as one.

    Chunks have equal shapes, and metadata (``shape``, ``dtype``, ``device``) is a chunk's. Lanes that still agree,
    such as all of them before the first quantized layer, hold the very same tensors and are computed once.
    """

    lanes: list[list[Tensor]]

    @staticmethod
    def __new__(cls, lanes: Sequence[Sequence[Tensor]]) -> Lanes:
        first = lanes[0][0]
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device, requires_grad=False
        )
        wrapper.lanes = [list(lane) for lane in lanes]
        return wrapper

    def __init__(self, lanes: Sequence[Sequence[Tensor]]) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Lanes(lanes={len(self.lanes)}, chunks={len(self.lanes[0])}, chunk={tuple(self.lanes[0][0].shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _lanes_in((args, kwargs))
        if _writes_in_place(func, kwargs):
            _unshare(found[0], found[1:])
        first = found[0]
        results: list[list[Any]] = []
        for lane in range(len(first.lanes)):
            results.append([])
            for chunk in range(len(first.lanes[0])):
                earlier = _same_inputs(found, lane, chunk)
                if earlier is not None:
                    results[lane].append(results[earlier][chunk])
                    continue
                result = func(*_pick(args, lane, chunk), **_pick(kwargs, lane, chunk))
                if result is not None and not _holds_tensor(result):
                    return result  # metadata, the same for every lane and chunk
                results[lane].append(result)
        return None if results[0][0] is None else _gather(results)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func} reached a Lanes without passing through torch's functions")

    def map(self, function: Callable[[int, Tensor], Tensor]) -> Lanes:
        """``function(lane, chunk)`` for every chunk of every lane."""
        return Lanes([[function(index, chunk) for chunk in lane] for index, lane in enumerate(self.lanes)])


def _lanes_in(value: Any) -> list[Lanes]:
    if isinstance(value, Lanes):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [lanes for item in value for lanes in _lanes_in(item)]


def _pick(value: Any, lane: int, chunk: int) -> Any:
    """``value`` with every Lanes in it replaced by its tensor of ``lane`` and ``chunk``."""
    if isinstance(value, Lanes):
        return value.lanes[lane][chunk]
    if isinstance(value, dict):
        return {key: _pick(item, lane, chunk) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        picked = [_pick(item, lane, chunk) for item in value]
        return type(value)(picked) if type(value) in (list, tuple) else value
    return value


def _same_inputs(found: list[Lanes], lane: int, chunk: int) -> int | None:
    """An earlier lane whose tensors are the very same ones, if there is one."""
    for earlier in range(lane):
        if all(value.lanes[lane][chunk] is value.lanes[earlier][chunk] for value in found):
            return earlier
    return None


def _writes_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return bool(kwargs.get("inplace")) or augmented or name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")


def _unshare(target: Lanes, others: list[Lanes]) -> None:
    """Give a lane its own copy of a tensor it shares with a lane that is about to write something else into it."""
    for lane in range(1, len(target.lanes)):
        for chunk, tensor in enumerate(target.lanes[lane]):
            shared = any(target.lanes[earlier][chunk] is tensor for earlier in range(lane))
            if shared and _same_inputs([target, *others], lane, chunk) is None:
                target.lanes[lane][chunk] = tensor.clone()


def _holds_tensor(result: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return any(isinstance(item, Tensor) for item in result)
    return isinstance(result, Tensor)


def _gather(results: list[list[Any]]) -> Any:
    sample = results[0][0]
    if isinstance(sample, Tensor):
        return Lanes(results)
    gathered = (
        Lanes([[value[index] for value in lane] for lane in results]) if isinstance(item, Tensor) else item
        for index, item in enumerate(sample)
    )
    return list(gathered) if isinstance(sample, list) else tuple(gathered)
