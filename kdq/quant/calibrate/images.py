"""The calibration images on their way through a network: see :mod:`kdq.quant.calibrate.chunks` for how they travel."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kdq.quant.calibrate.chunks import Chunks, images_axis, in_chunks
from kdq.quant.calibrate.lanes import Lanes, Meet, Tape
from kdq.quant.distributed import summed


class CalibrationImages:
    """All images, in as many lanes as there are networks; the network's own code runs on the first chunk of them.

    Args:
        batches: as of :func:`kdq.quant.network.quantize`, with an image or more.
        lanes: how many.
        meet: is shown every torch function that the first chunk is passed through, see :class:`Tape`.
        device: where the network is.
        parts: one chunk of how many is held out, where every process has enough of them; 0 for none.
    """

    def __init__(self, batches: Iterable[Any], lanes: int, meet: Meet, device: torch.device, parts: int) -> None:
        self._tape, self._chunks = Tape(meet), Chunks(device)
        #: The real images of every chunk; the last one is filled up with copies.
        self._counts: list[int] = []
        self._current = 0
        for images, count in in_chunks(batches, device, parts):
            values = Lanes([images] * lanes)
            if self._counts:
                self._chunks.put(len(self._counts), {0: values})
            else:
                self._first = values
            self._counts.append(count)
        # With few images a process may have no chunk to hold out; then nobody does.
        self._parts = 0 if summed(torch.tensor(float(len(self._counts) < parts), device=device)) else parts

    @property
    def some_held_out(self) -> bool:
        return self._parts > 0

    def inputs(self) -> Iterator[tuple[Tensor, bool]]:
        """The images themselves by chunks, before the network runs, and whether these are held out."""
        for index, count in enumerate(self._counts):
            self._current = index
            values = self._chunks.take(index) if index else {0: self._first}
            yield values[0].lanes[0][:count].clone(), self._held_out  # a network may write into it
            if index:
                self._chunks.put(index, values)
        self._current = 0

    def start(self) -> Lanes:
        """The first chunk, to call the network with."""
        first = self._tape.watch(self._first)
        del self._first
        return first

    def each(self, values: Lanes) -> Iterator[tuple[Lanes, bool]]:
        """``values``, which the first chunk has here, of every chunk, and whether its images are held out.

        The waiting chunks are brought to where the first one is.
        """
        yield self.real(values), self._held_out
        for arrived in self._arrive():
            yield self.real(arrived[values.key]), self._held_out

    def finish(self) -> None:
        """Bring the waiting chunks to the network's end."""
        for _ in self._arrive():
            pass

    def pass_through(self, function: Callable[[Lanes], Lanes], values: Lanes) -> Lanes:
        """``function(values)``, which the other chunks will be passed through as well."""
        outputs = function(values)
        self._tape.record(function, (values,), {}, outputs)
        return outputs

    def real(self, value: Lanes) -> Lanes:
        """``value``, of the chunk that is passed through the network now, without what fills up the last one."""
        if (count := self._counts[self._current]) == (size := self._counts[0]):
            return value
        axis, outer, inner = images_axis(value.lanes[0], size, count)

        def cut(x: Tensor) -> Tensor:
            return x.unflatten(axis, (outer, size, inner)).narrow(axis + 1, 0, count).flatten(axis, axis + 2)

        parts: dict[int, Tensor] = {}  # lanes that share a tensor go on sharing it
        return Lanes([parts[id(x)] if id(x) in parts else parts.setdefault(id(x), cut(x)) for x in value.lanes])

    def close(self) -> None:
        self._chunks.close()

    def _arrive(self) -> Iterator[dict[int, Lanes]]:
        for index in range(1, len(self._counts)):
            self._current = index
            values = self._tape.replay(self._chunks.take(index))
            yield values
            self._chunks.put(index, values)
        self._tape.calls.clear()
        self._current = 0

    @property
    def _held_out(self) -> bool:
        return self._parts > 0 and self._current % self._parts == self._parts - 1
