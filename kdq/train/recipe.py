"""The ``recipe`` config of a role: how its network is optimised, how long, and on how many images a step."""

from dataclasses import dataclass, fields

from kdq.distill.config import TrainConfig
from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class Recipe(TrainConfig):
    """A :class:`~kdq.distill.config.TrainConfig` with what a Trainer and its loaders need beside.

    Attributes:
        epochs: of the training; ``trainer.max_epochs`` sets those of all trainings.
        batch_size: images an optimizer step, over all processes and portions together.
        accumulate: portions in which the images of a step are processed, one after the other, where they do not fit
            the memory together. Without BatchNorm the step is the same for any number, but for Mixup and for methods
            that relate the images of a batch to each other.
    """

    epochs: int = 30
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise KdqError(f"recipe.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulate:
            raise KdqError(f"recipe.accumulate={self.accumulate} must divide recipe.batch_size={self.batch_size}")

    def of_module(self) -> TrainConfig:
        """The part that the module in training needs."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(TrainConfig)})
