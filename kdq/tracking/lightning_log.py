"""Any of Lightning's loggers as the log of a stage: its metrics, its config, and the numbers of its tables."""

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from lightning.pytorch.loggers import Logger

from kdq.tracking.run import Chart, Log
from kdq.utils.errors import message

log = logging.getLogger(__name__)
#: What a Trainer or a stage calls on a logger.
_CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")


class LightningLog(Log):
    """A stage as a plain Lightning logger can show it."""

    def __init__(self, logger: Logger, name: str) -> None:
        self.logger, self._step = logger, 0
        told: list[str] = []
        for call in _CALLS:
            setattr(logger, call, _guarded(getattr(logger, call), name, told))

    def metrics(self, values: Mapping[str, float]) -> None:
        self.logger.log_metrics(_numbers(values), step=self._step)
        self._step += 1

    def show(self, chart: Chart) -> None:
        """The numbers of each row of a table, as one step of curves called after the columns."""
        for step, row in enumerate(chart.rows if chart.kind == "table" else ()):
            values = {f"{chart.name}/{column}": value for column, value in zip(chart.columns, row, strict=True)}
            self.logger.log_metrics(_numbers(values), step=step)


class Nowhere(Logger):
    """Takes everything and keeps nothing: for callbacks that refuse to do without a logger."""

    name, version = "nowhere", ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


def _guarded(call: Callable[..., Any], name: str, told: list[str]) -> Callable[..., Any]:
    """``call``, whose failures are told once for all calls that share ``told``: no training ends with its logger."""

    @wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not told:
                told.append(name)
                kind, cause = type(error).__name__, message(error)
                log.warning("logger.%s did not take everything (%s: %s); the run goes on", name, kind, cause)
            return None

    return guarded
