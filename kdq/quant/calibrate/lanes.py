"""A network's activation in several versions of the network at once.

A :class:`Lanes` holds one tensor per version: lane 0 is the float network's, the others belong to quantized ones. It is
a ``torch.Tensor`` to the network's own code; every torch function called on it is carried out for each lane. Hence any
forward method works as it is written, values are freed when it drops them, and all versions share one run. What a
function did can be noted on a :class:`Tape` and repeated for other images, and a layer's can be done in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from kdq.quant.calibrate.layer import opened
from kdq.utils.errors import KdqError

PLAIN = "the network writes images into a tensor that was made, used or split without them: use x.new_zeros(...)"


class Lanes(Tensor):
    """Tensors by lane that answer to torch functions as one.

    Metadata (``shape``, ``dtype``, ``device``) is lane 0's. Lanes that still agree, such as all of them before the
    first quantized layer, hold the very same tensor and are computed once.
    """

    lanes: list[Tensor]
    tape: Tape | None
    key: int
    alive: ClassVar[WeakValueDictionary[int, Lanes]] = WeakValueDictionary()  # all of them, by ``id``

    @staticmethod
    def __new__(cls, lanes: Sequence[Tensor]) -> Lanes:
        first = lanes[0]
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device, requires_grad=False
        )
        wrapper.lanes, wrapper.tape, wrapper.key = list(lanes), None, -1
        cls.alive[id(wrapper)] = wrapper
        return wrapper

    def __init__(self, lanes: Sequence[Tensor]) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Lanes(lanes={len(self.lanes)}, shape={tuple(self.lanes[0].shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # holds two layers
            return opened(func)(*args, **kwargs)
        found = lanes_in((args, kwargs))
        with torch.autocast(found[0].lanes[0].device.type, enabled=False):  # also where the network's code asks for it
            return cls._carry_out(func, args, kwargs, found)

    @classmethod
    def _carry_out(cls, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], found: list[Lanes]) -> Any:
        tape = next((value.tape for value in found if value.tape is not None), None)
        if tape is not None and (done := tape.meet(func, args, kwargs)) is not None:
            return done
        written = _written(func, args, kwargs)
        for target in written:
            if tape is not None and not isinstance(target, Lanes):
                _join(target, len(found[0].lanes), tape)
        found = lanes_in((args, kwargs)) if written else found
        for target in written:
            _unshare(target, found)
        results: list[Any] = []
        for lane in range(len(found[0].lanes)):
            if (earlier := _same_inputs(found, lane)) is not None:
                results.append(results[earlier])
                continue
            result = func(*_pick(args, lane), **_pick(kwargs, lane))
            if result is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                return result  # metadata, the same for every lane
            results.append(result)
        gathered = tree_map(lambda *each: Lanes(each) if isinstance(each[0], Tensor) else each[0], *results)
        if tape is not None:
            tape.record(func, args, kwargs, gathered)
        return gathered

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func} reached a Lanes without passing through torch's functions")

    def map(self, function: Callable[[int, Tensor], Tensor]) -> Lanes:
        """``function(lane, tensor)`` for every lane."""
        return Lanes([function(lane, tensor) for lane, tensor in enumerate(self.lanes)])


def lanes_in(value: Any) -> list[Lanes]:
    """Every Lanes in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Lanes)]


def _pick(value: Any, lane: int) -> Any:
    return tree_map_only(Lanes, lambda lanes: lanes.lanes[lane], value)


def _same_inputs(found: list[Lanes], lane: int) -> int | None:
    """An earlier lane whose tensors are the very same ones, if there is one."""
    for earlier in range(lane):
        if all(value.lanes[lane] is value.lanes[earlier] for value in found):
            return earlier
    return None


def _written(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that a function writes into."""
    name, into = getattr(func, "__name__", ""), kwargs.get("out")
    augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    if kwargs.get("inplace") or augmented or name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__"):
        into = args[0] if args else kwargs.get("input")
    return [into] if isinstance(into, Tensor) else list(into or ())


def _join(target: Tensor, lanes: int, tape: Tape) -> None:
    """Make a plain tensor, such as ``torch.zeros`` gives, one of the images' values: it is about to hold some."""
    if type(target) is not Tensor or torch._C._storage_Use_Count(target.untyped_storage()._cdata) > 2:  # it has views
        raise KdqError(PLAIN)
    before = target.clone()
    target.__class__ = Lanes
    vars(target).update(vars(Lanes([before.clone()] * lanes)))
    Lanes.alive[id(target)] = target  # type: ignore[assignment]
    tape.record(lambda: Lanes([before.clone()] * lanes), (), {}, target)


def _unshare(target: Lanes, found: list[Lanes]) -> None:
    """Give a lane and its views a copy of memory that it shares with a lane about to write something else into it."""
    for lane in range(1, len(target.lanes)):
        place = target.lanes[lane].untyped_storage().data_ptr()
        shared = any(x.untyped_storage().data_ptr() == place for x in target.lanes[:lane])
        if shared and _same_inputs(found, lane) is None:
            own = target.lanes[lane].untyped_storage().clone()
            for value in list(Lanes.alive.values()):
                if lane < len(value.lanes) and (x := value.lanes[lane]).untyped_storage().data_ptr() == place:
                    value.lanes[lane] = x.new_empty(0).set_(own, x.storage_offset(), x.shape, x.stride())


#: The values of one chunk, by the keys a tape knows them under.
Values = dict[int, Lanes]


@dataclass(frozen=True)
class _Value:
    key: int


@dataclass(frozen=True)
class _Call:
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    needs: list[int]
    results: list[int]


#: Does what a torch function was called for, or leaves it (None) to the function.
Meet = Callable[[Callable[..., Any], Any, Any], "Lanes | None"]


class Tape:
    """The calls that the first chunk made since the last stop.

    Args:
        meet: is shown every call, function, arguments and keywords, before it is carried out.
    """

    def __init__(self, meet: Meet) -> None:
        self.meet = meet
        self.calls: list[_Call] = []
        self._count = 0

    def watch(self, lanes: Lanes) -> Lanes:
        """Give ``lanes`` a key, and note from now on what is done with it."""
        lanes.tape, lanes.key = self, self._count
        self._count += 1
        return lanes

    def record(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Note a call and what came out of it."""
        needs = [lanes.key for lanes in lanes_in((args, kwargs))]
        args, kwargs = tree_map_only(Lanes, lambda lanes: _Value(lanes.key), (args, kwargs))
        results = [self.watch(lanes).key for lanes in lanes_in(result)]
        self.calls.append(_Call(func, args, kwargs, needs, results))

    def alive(self) -> set[int]:
        """Keys of the values that the network's code still holds."""
        return {lanes.key for lanes in list(Lanes.alive.values()) if lanes.tape is self}

    def replay(self, values: Values) -> Values:
        """Carry out the noted calls on another chunk's values; what remains of these afterwards."""
        alive = self.alive()
        last_use: dict[int, int] = {}
        for index, call in enumerate(self.calls):
            last_use |= dict.fromkeys([*call.needs, *call.results], index)
        for index, call in enumerate(self.calls):
            result = _repeat(call, values)
            values |= dict(zip(call.results, lanes_in(result), strict=True))
            del result
            values = {k: v for k, v in values.items() if k in alive or last_use.get(k, -1) > index}
        return {key: value for key, value in values.items() if key in alive}


def _repeat(call: _Call, values: Values) -> Any:
    if lanes_in((call.args, call.kwargs)):  # a plain tensor then
        raise KdqError(PLAIN)
    args, kwargs = tree_map_only(_Value, lambda value: values[value.key], (call.args, call.kwargs))
    return call.func(*args, **kwargs)
