"""What a stage tells about itself, and where that goes: all loggers of the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


@dataclass(frozen=True)
class RunInfo:
    """What the run of a stage is found by.

    Attributes:
        job_type: ``teacher``, ``distill``, ``tune``, ``quantize``, ``report`` or ``trial``.
        name: for people; names need not differ.
        group: the sweep.
        key: identifies what the stage makes. A stage that was killed and is run again has the same key and continues
            its run.
        config: flat values: every axis of the grid, and what else affects the result.
        tags: what runs are filtered by.
        inputs: the :func:`kdq.tracking.names.reference` of each model that the stage takes.
    """

    job_type: str
    name: str
    group: str
    key: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    inputs: Sequence[str] = ()


@dataclass(frozen=True)
class Artifact:
    """A model that a stage makes.

    Attributes:
        name, key: what it is called and the hash that tells it from others of that name.
        kind: ``float`` or ``quantized``.
        path: its file. It need not be there yet if ``content`` is given: what will be in it.
        facts: accuracies, sizes and the like.
    """

    name: str
    key: str
    kind: str
    path: Path
    facts: Mapping[str, Any]
    content: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Chart:
    """A table of a stage, and how it is drawn.

    Attributes:
        columns: their names: of ``lines`` the curve, x and y; of ``points`` x and y; of ``bars`` label and value.
        kind: ``table``, ``lines``, ``points`` or ``bars``.
        title: of what is drawn.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: str = "table"
    title: str = ""


class Log:
    """What one logger is told about a stage; this one keeps nothing.

    Attributes:
        logger: what a Lightning ``Trainer`` takes.
        folder: where a W&B run lies on disk, to be browsed or synchronised; empty for others.
    """

    logger: Logger
    folder = ""

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

    @property
    def loggers(self) -> list[Logger]:
        return [log.logger for log in self.logs]

    @property
    def folder(self) -> str:  # type: ignore[override]
        return next((log.folder for log in self.logs if log.folder), "")

    def metrics(self, values: Mapping[str, float]) -> None:
        for log in self.logs:
            log.metrics(values)

    def axis(self, x: str, curves: Sequence[str]) -> None:
        for log in self.logs:
            log.axis(x, curves)

    def summary(self, values: Mapping[str, Any]) -> None:
        for log in self.logs:
            log.summary(values)

    def show(self, chart: Chart) -> None:
        for log in self.logs:
            log.show(chart)

    def made(self, artifact: Artifact) -> None:
        for log in self.logs:
            log.made(artifact)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level: ``{"recipe": {"lr": 1}}`` becomes ``{"recipe/lr": 1}``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves
