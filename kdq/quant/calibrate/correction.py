"""Put right what rounding does to a channel's mean and variance.

Rounded weights shift the mean of every output channel and widen or narrow its spread, and the next layers are trained
for neither. Both are known on the calibration images: a channel of the float network has mean ``m`` and variance ``v``
there, the quantized network's has ``m~`` and ``v~``.

- A layer with a bias takes the shift out of it: ``b <- b - (m~ - m)`` (bias correction; Nagel et al. 2019, arXiv
  1906.04721).
- A BatchNorm with running mean ``mu`` and variance ``s^2`` is re-estimated so that its outputs have the float network's
  mean and variance: with ``r^2 = v~ / v``,

      (s^2 + eps) <- r^2 (s^2 + eps),    mu <- m~ + r (mu - m).

  Statistics taken afresh from the calibration images would forget what the running ones know of the training set.

Neither adds a byte to the stored network.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kdq.quant.distributed import summed

#: What is put right after each layer: biases, BatchNorm statistics as well, or nothing.
CORRECTIONS = (None, "bias", "batchnorm")


def channel_moments(batches: Iterable[list[Tensor]], axis: int) -> tuple[Tensor, Tensor]:
    """Means and variances of every channel ``(lanes, channels)``, float64, over the ``batches`` of all processes, each
    the activations of every lane with their channels along ``axis``."""
    sums: Any = 0
    for lanes in batches:
        rows = [x.movedim(axis, 0).flatten(1).double() for x in lanes]
        sums = sums + torch.stack(
            [torch.stack([x.new_full((len(x),), x.shape[1]), x.sum(1), x.square().sum(1)]) for x in rows]
        )
    count, total, squares = summed(sums).unbind(1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)


def corrected_norm(
    running_mean: Tensor, running_var: Tensor, eps: float, mean: Tensor, variance: Tensor, lane: int
) -> tuple[Tensor, Tensor]:
    """A BatchNorm's running mean and variance that give ``lane`` the outputs of lane 0, in mean and variance; see the
    module's text.

    Args:
        mean, variance: of the inputs ``(lanes, channels)``.
    """
    alive = (variance[0] > 0) & (variance[lane] > 0)  # a channel that never changes has no spread to compare
    square = torch.where(alive, variance[lane] / variance[0].where(alive, torch.ones_like(variance[0])), 1.0)
    new_mean = mean[lane] + square.sqrt() * (running_mean - mean[0])
    new_var = (square * (running_var + eps) - eps).clamp_min(0)
    return new_mean.to(running_mean), new_var.to(running_var)
