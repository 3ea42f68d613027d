"""Every layer of a network quantized once at every candidate width, and what each choice costs."""

import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.bitsearch.search import Budget, Costs, cost_of
from kdq.quant.bitsearch.trace import Assignment
from kdq.quant.config import QuantConfig
from kdq.quant.distributed import gathered, rank
from kdq.quant.layers import left_float, weight_of
from kdq.quant.network import quantize_widths
from kdq.quant.operations import multiply_adds_by_layer
from kdq.quant.packing.file import load_packed, save_packed, stored_bytes
from kdq.quant.packing.packed import QuantizedWeight
from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class Bank:
    """What a bit search chooses from."""

    weights: Mapping[str, Mapping[int, QuantizedWeight]]  # weights[layer][bits]
    bits: Costs  # the cost of each choice in bits of weights
    bytes: Costs  # and in bytes of the packed file
    other_bytes: int  # of the packed file, whatever is chosen
    float_weights: int  # the weights of layers that are left float
    float_bits: int  # and what they take together
    seconds: float  # that the filling took

    @property
    def count(self) -> float:
        """Weights of all layers together, those left float included."""
        shapes = [next(iter(choices.values())).shape for choices in self.weights.values()]
        return float(self.float_weights + sum(shape.numel() for shape in shapes))

    def avg_bits(self, assignment: Assignment) -> float:
        return (cost_of(self.bits, assignment) + self.float_bits) / self.count

    def size_bytes(self, assignment: Assignment) -> int:
        """The packed file's size, but for some bytes of its header."""
        return self.other_bytes + round(cost_of(self.bytes, assignment))

    def prices(self, cost: str, model: nn.Module, image: Tensor) -> Costs:
        """What a step of the search saves, by the name of the ``cost``, for one ``image`` ``(1, ...)``."""
        if cost == "bops":
            counts = multiply_adds_by_layer(model, image, self.weights)
            return {
                name: {width: float(weight.bits * counts[name]) for width, weight in choices.items()}
                for name, choices in self.weights.items()
            }
        return {"weight_bits": self.bits, "bytes": self.bytes}[cost]

    def budget(self, search: SearchConfig, spare: int, top1: float) -> Budget:
        """The limits of ``search``, ``spare`` bytes less, as what the choices may cost; drops count from ``top1``."""
        limits: list[tuple[Costs, float]] = []
        if search.avg_bits is not None:
            least = (sum(min(costs.values()) for costs in self.bits.values()) + self.float_bits) / self.count
            _check_average(search.avg_bits, least, self.float_weights)
            # Rounded, for an average times the count may come out a hair below the whole number that it was made of.
            limits.append((self.bits, round(search.avg_bits * self.count, 3) - self.float_bits))
        if search.size_bytes is not None:
            size, smallest = search.size_bytes - spare, sum(min(sizes.values()) for sizes in self.bytes.values())
            if size < self.other_bytes + smallest:
                raise KdqError(
                    f"the bit search cannot meet its budget of {size} bytes: the smallest packed file with these "
                    f"candidates takes {self.other_bytes + smallest:.0f}"
                )
            limits.append((self.bytes, size - self.other_bytes))
        return Budget(limits, search.max_drop, top1)


def fill_bank(
    model: nn.Module,
    batches: Iterable[Any],
    widths: Sequence[int],
    config: QuantConfig = QuantConfig(),  # noqa: B008
    folder: Path | None = None,
) -> Bank:
    """Quantize every layer of ``model`` at every width, in one pass, unless ``folder`` has them.

    Each layer is solved on the float network's inputs. Solved on those of a network whose layers all have its own
    width, it would make up for errors that the stitched network does not have.

    ``folder`` keeps them as packed files, one for each width, for searches of the same arguments. It is read if every
    process sees all of them.
    """
    start = time.perf_counter()
    files = {bits: folder / f"{bits}.kdq" for bits in widths} if folder else {}
    if files and all(gathered(all(file.exists() for file in files.values()))):
        versions = [load_packed(file, model) for file in files.values()]
    else:
        versions = [version for version, _ in quantize_widths(model, batches, widths, config, isolated=True)]
        for version, file in zip(versions, files.values(), strict=False) if rank() == 0 else ():
            save_packed(version, file)
    by_width: list[Any] = [version.quantized_weights for version in versions]
    layers = list(by_width[-1])
    weights = {name: {bits: by_width[i][name] for i, bits in enumerate(widths)} for name in layers}
    size = {name: {bits: float(stored_bytes(weight)) for bits, weight in weights[name].items()} for name in layers}
    # By what is stored: an alphabet may take more bits than the width says, and the ends may have widths of their own.
    bits = {n: {b: float(weight.bits * weight.shape.numel()) for b, weight in weights[n].items()} for n in layers}
    other = packed_size(versions[-1]) - round(math.fsum(size[name][widths[-1]] for name in layers))
    left = sum(math.prod(x.shape) for x in left_float(model, layers))
    float_bits = left * (32 if config.float_dtype is None else 16)
    return Bank(weights, bits, size, other, left, float_bits, time.perf_counter() - start)


def check_average(model: nn.Module, layers: Sequence[str], search: SearchConfig, config: QuantConfig) -> None:
    """Refuse, before anything is quantized, an average that what is left float beside ``layers`` puts out of reach."""
    if search.avg_bits is None:
        return
    left = sum(math.prod(x.shape) for x in left_float(model, layers))
    bits = 32 if config.float_dtype is None else 16
    narrowest = min(*search.candidates, config.first_last_bits or 32)
    others = sum(weight_of(model, name).numel() for name in layers)
    _check_average(search.avg_bits, (left * bits + others * narrowest) / (left + others), left)


def _check_average(avg_bits: float, least: float, left: int) -> None:
    if avg_bits < least:
        with_float = ", layers left float included" if left else ""
        raise KdqError(
            f"the bit search cannot meet its budget of {avg_bits:g} bits on average: the least with these "
            f"candidates is {math.ceil(1000 * least) / 1000:g}{with_float}"
        )


def packed_size(network: nn.Module) -> int:
    """Bytes of the packed file of ``network``."""
    with tempfile.TemporaryDirectory() as folder:
        return save_packed(network, Path(folder) / "network.kdq")
