"""How any network here is optimised: SGD with Nesterov momentum under a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from kdq.utils.errors import KdqError

SCHEDULES = ("one_cycle", "cosine", "multistep", "constant")


def within(option: str, value: float, low: float, high: float = math.inf) -> float:
    """``value``, a number from ``low`` to ``high``.

    Raises:
        KdqError: it is not; ``option`` is its name for people.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise KdqError(f"{option}={value!r} must be a number {allowed}")
    return value


@dataclass(frozen=True)
class TrainConfig:
    """The part of a training that is the same for every method.

    Attributes:
        batch_size: images an optimizer step, over all processes and portions together.
        accumulate: portions in which the images of a step are processed, one after the other, where they do not fit
            the memory together. Without BatchNorm and Mixup the step is the same for any number.
        lr: the peak learning rate.
        schedule: ``one_cycle`` (linear up over ``warmup`` of all steps, linear down to zero: Smith & Topin 2017),
            ``cosine`` (half a cosine after the same warm-up), ``multistep`` (times 0.1 at 5/8, 6/8 and 7/8 of the
            training, the step recipe of the CIFAR distillation literature) or ``constant``.
        clip_grad: largest gradient norm, or None.
        ema: decay of a moving average of the weights, such as 0.999, or None. With one it is the average that is
            validated and kept.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    accumulate: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type).removesuffix(" | None")
            allowed = {"int": (int,), "float": (int, float), "str": (str,)}[kind]
            null = value is None and str(field.type).endswith("None")
            if not null and (isinstance(value, bool) or not isinstance(value, allowed)):
                raise KdqError(
                    f"recipe.{field.name}={value!r} must be {'a number' if kind != 'str' else 'a name'}"
                    f"{' without decimals' if kind == 'int' else ''}"
                )
        if self.schedule not in SCHEDULES:
            raise KdqError(f"recipe.schedule={self.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise KdqError(f"recipe.{name}={getattr(self, name)} must be at least 1")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise KdqError(f"recipe.accumulate={self.accumulate} must divide recipe.batch_size={self.batch_size}")
        for name, high in {"lr": math.inf, "weight_decay": math.inf, "clip_grad": math.inf, "warmup": 1}.items():
            within(f"recipe.{name}", getattr(self, name) or 0, 0, high)
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise KdqError(f"recipe.{name}={getattr(self, name)} must be at least 0 and less than 1")

    def optimizer(self, parameters: Iterable[Parameter]) -> SGD:
        return SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
            fused=self.clip_grad is None,  # Lightning cannot clip the gradients of a fused optimizer
        )

    def scheduler(self, optimizer: SGD, total_steps: int) -> LambdaLR:
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
