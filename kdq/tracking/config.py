"""The node ``logger.wandb`` of the config."""

from dataclasses import dataclass

from kdq.utils.checks import one_of


@dataclass(frozen=True)
class WandbConfig:
    """The node ``logger.wandb``."""

    project: str = "kdq"
    entity: str | None = None
    mode: str = "offline"  # or online, disabled
    upload: str = "quantized"  # whose files artifacts carry: none, quantized or all

    def __post_init__(self) -> None:
        """Raises KdqError for a value that is none of the choices."""
        one_of("logger.wandb.mode", self.mode, ("online", "offline", "disabled"))
        one_of("logger.wandb.upload", self.upload, ("none", "quantized", "all"))
