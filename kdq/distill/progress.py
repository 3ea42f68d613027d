"""Where in its training a batch is: what schedules and random draws may depend on."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TrainingProgress:
    """Batch ``step`` (from 0) of ``steps`` in epoch ``epoch`` (from 0) of ``epochs``, on process ``rank`` of
    ``world_size``.

    A method that takes its randomness and its schedules from here alone resumes exactly after a crash, and draws the
    same on every process. ``indices`` are the places of the batch's images in the training set, int64 ``(batch,)``,
    where the loader gives them.
    """

    epoch: int = 0
    step: int = 0
    epochs: float = 1
    steps: float = 1
    rank: int = 0
    world_size: int = 1
    indices: Tensor | None = None

    @property
    def share(self) -> float:
        """The share of the training that is done, 0 to just below 1; 0 in one without an end."""
        return min(1.0, (self.epoch + self.step / self.steps) / self.epochs)

    def ramp(self, warmup: float) -> float:
        """A weight that rises linearly from 0 to 1 over the first ``warmup`` of the training.

        >>> TrainingProgress(epoch=1, epochs=10).ramp(warmup=0.2)
        0.5
        """
        return min(1.0, self.share / warmup) if warmup > 0 else 1.0

    def random(self, seed: int) -> np.random.Generator:
        """A generator of this batch's own."""
        return np.random.default_rng((seed, self.epoch, self.step))
