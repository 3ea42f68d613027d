"""How any network here is optimised: SGD with Nesterov momentum under a learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdq.utils.checks import check_types, one_of, within
from kdq.utils.errors import KdqError

SCHEDULES = ("one_cycle", "cosine", "multistep", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """The part of a training that is the same for every method; how long it lasts is the Trainer's.

    >>> TrainConfig(lr=0.05, schedule="one_cycle").factor(0.1)
    0.525

    Attributes:
        lr: the peak learning rate.
        schedule: ``one_cycle`` (linear up over ``warmup`` of all steps, linear down to zero: Smith & Topin 2017),
            ``cosine`` (half a cosine after the same warm-up), ``multistep`` (times 0.1 at 5/8, 6/8 and 7/8 of the
            training, the step recipe of the CIFAR distillation literature) or ``constant``.
        clip_grad: largest gradient norm, or None. A Trainer's ``gradient_clip_val`` does the same.
        accumulate: batches whose gradients make one step. A Trainer's ``accumulate_grad_batches`` does the same.
        ema: decay of a moving average of the weights, such as 0.999, or None. With one it is the average that is
            validated and kept.

    Raises:
        KdqError: a value is of another type, or out of range.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    accumulate: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "recipe.")
        one_of("recipe.schedule", self.schedule, SCHEDULES)
        for name, high in {"lr": math.inf, "weight_decay": math.inf, "clip_grad": math.inf, "warmup": 1}.items():
            within(f"recipe.{name}", getattr(self, name) or 0, 0, high)
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise KdqError(f"recipe.{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.accumulate < 1:
            raise KdqError(f"recipe.accumulate={self.accumulate} must be at least 1")

    def optimizer(self, parameters: Iterable[Parameter], fused: bool = True) -> SGD:
        """The optimizer of one network; ``fused`` where nothing clips its gradients under autocast."""
        return SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0, fused=fused
        )

    def scheduler(self, optimizer: Optimizer, total_steps: float) -> LambdaLR:
        """To be stepped after every optimizer step."""
        return LambdaLR(optimizer, lambda step: self.factor(step / max(1, total_steps)))

    def factor(self, progress: float) -> float:
        """The learning rate over its peak at ``progress`` (0 to 1) of the training."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "multistep":
            return 0.1 ** sum(progress >= milestone for milestone in (5 / 8, 6 / 8, 7 / 8))
        if progress < self.warmup:
            return 0.05 + 0.95 * progress / self.warmup
        left = (1 - progress) / (1 - self.warmup) if self.warmup < 1 else 0.0
        return max(0.0, left) if self.schedule == "one_cycle" else 0.5 * (1 - math.cos(math.pi * max(0.0, left)))
