"""How far the quantized networks' activations are from the float one's."""

import torch
from torch import Tensor

from kdq.quant.distributed import summed


class OutputErrors:
    """``||Y - Y_q|| / ||Y||`` of a layer's outputs, summed over chunks of images.

    >>> errors = OutputErrors()
    >>> errors.add("fc", [torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])])
    >>> errors.of("fc")
    [0.0, 0.2]
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, outputs: list[Tensor]) -> None:
        """Add a chunk's outputs, one tensor per network; the float one's come first."""
        right = outputs[0]
        sums = [right.double().square().sum(), *((y - right).double().square().sum() for y in outputs[1:])]
        self._sums[name] = self._sums.get(name, 0) + torch.stack(sums)

    def of(self, name: str) -> list[float]:
        """Every network's error, over all processes."""
        size, *wrong = summed(self._sums[name].clone())
        return [0.0, *(float((w / size) ** 0.5) if size != 0 else 0.0 for w in wrong)]


def moments_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """The same of outputs that are never computed, from the second moments ``(groups, d, d)`` of their inputs."""
    wrong = quantized - weight
    size = ((weight @ gram) * weight).sum()
    return float((((wrong @ gram) * wrong).sum().clamp_min(0) / size) ** 0.5) if size != 0 else 0.0
