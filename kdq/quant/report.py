"""What a quantization did to each layer."""

import math
from dataclasses import dataclass, field

from kdq.quant.layers import LeftFloat


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. ``error`` is ``||Y - Y_q|| / ||Y||`` of its outputs on the calibration images, the
    float layer fed by the float network and the quantized layer by the quantized network."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    levels: int
    error: float


@dataclass
class Report:
    """Per-layer results in the order the layers ran, what was left float, with how many bits, and the seconds of the
    pass (shared by all its widths)."""

    layers: list[LayerReport] = field(default_factory=list)
    left: list[LeftFloat] = field(default_factory=list)
    seconds: float = 0.0
    float_bits: int = 32

    @property
    def float_weights(self) -> int:
        """Weights left float: those of layers, and other parameters of two or more dimensions."""
        return sum(math.prod(parameter.shape) for parameter in self.left)

    @property
    def weights(self) -> int:
        """Weights of all layers, and those left float."""
        return sum(math.prod(layer.shape) for layer in self.layers) + self.float_weights

    @property
    def weight_bits_total(self) -> int:
        """Bits of all codes, and of the weights left float, together."""
        return sum(layer.bits * math.prod(layer.shape) for layer in self.layers) + self.float_bits * self.float_weights

    @property
    def avg_bits(self) -> float:
        """Bits per weight; a weight left float counts with its 32, or 16 where those were rounded."""
        return self.weight_bits_total / self.weights
