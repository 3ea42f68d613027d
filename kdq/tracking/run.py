"""What a stage tells about itself, and where that goes: all loggers of the config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from kdq.utils.checks import one_of


@dataclass(frozen=True)
class RunInfo:
    """What the run of a stage is found by. ``key`` identifies what it makes: a stage that was killed and is run again
    has the same one, and continues its run."""

    job_type: str  # teacher, distill, tune, quantize, report or trial
    name: str  # for people; names need not differ
    group: str  # the sweep
    key: str
    config: Mapping[str, Any] = field(default_factory=dict)  # flat: the axes, and what else affects the result
    tags: Sequence[str] = ()  # what runs are filtered by
    inputs: Sequence[str] = ()  # the kdq.tracking.names.reference of each model that the stage takes


@dataclass(frozen=True)
class Artifact:
    """A model that a stage makes."""

    name: str
    key: str  # tells it from others of that name
    kind: str  # float or quantized
    path: Path  # its file
    facts: Mapping[str, Any]  # accuracies, sizes and the like
    content: Callable[[], bytes] | None = None  # what will be in a file that is not there yet


@dataclass(frozen=True)
class Chart:
    """A table of a stage, and how it is drawn."""

    name: str
    columns: Sequence[str]  # of lines the curve, x and y; of points x and y; of bars label and value
    rows: Sequence[Sequence[Any]]
    kind: str = "table"  # or lines, points, bars
    title: str = ""


class Log:
    """What one logger is told about a stage; this one keeps nothing."""

    logger: Logger  # what a Lightning Trainer takes
    folder = ""  # where a W&B run lies on disk, to be browsed or synchronised; empty for others

    def metrics(self, values: Mapping[str, float]) -> None:
        """One point of each of these curves."""

    def axis(self, x: str, curves: Sequence[str]) -> None:
        """Draw ``curves`` over the metric ``x``. To be told before their first point."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values, for lists of runs."""

    def show(self, chart: Chart) -> None:
        """A table or a chart."""

    def made(self, artifact: Artifact) -> None:
        """The stage has made ``artifact``."""


class RunLogger(Log):
    """The log of one stage: tells all loggers of the config."""

    def __init__(self) -> None:
        self.logs: list[Log] = []
        for call in ("metrics", "axis", "summary", "show", "made"):
            setattr(self, call, partial(self._tell, call))

    def _tell(self, call: str, *said: Any) -> None:
        for log in self.logs:
            getattr(log, call)(*said)

    @property
    def loggers(self) -> list[Logger]:
        return [log.logger for log in self.logs]

    @property
    def folder(self) -> str:  # type: ignore[override]
        return next((log.folder for log in self.logs if log.folder), "")


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


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level: ``{"recipe": {"lr": 1}}`` becomes ``{"recipe/lr": 1}``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves
