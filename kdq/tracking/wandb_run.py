"""The W&B run of one stage: offline unless asked otherwise, and never the reason that a training dies."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.paths import LogicalPath

from kdq.tracking.agent import AGENT
from kdq.tracking.names import run_id, valid_name
from kdq.tracking.patience import Patience
from kdq.tracking.resume import folder_id, next_step
from kdq.tracking.run import Artifact, Chart, Log, RunInfo, WandbConfig
from kdq.utils.errors import KdqError, message

log = logging.getLogger(__name__)
# W&B's own process, inherited from a parent, would keep the run of a killed child open, and the child that goes on
# with it out: every process starts its own.
os.environ.pop("WANDB_SERVICE", None)
# Its tracebacks are for its own files; what failed is told in one line.
logging.getLogger("wandb").propagate = False

#: Seconds that a process waits for W&B's server in all, and what it takes to write a run's end to the disk.
PATIENCE, WRITING = 26.0, 2.0
#: Job types whose curves are drawn over the trainer's steps.
TRAININGS = ("teacher", "distill", "tune")


class _Server:
    """What this process knows of W&B's server: its patience, and why it went on without."""

    def __init__(self) -> None:
        self.patience = Patience(PATIENCE)
        self.lost = ""


_server = _Server()


@contextmanager
def wandb_run(config: WandbConfig, runs: Path, about: RunInfo) -> Iterator[WandbLog]:
    """A run that is closed when the block ends: as failed if the block raises.

    Everything that it leaves lies below ``runs``, also what W&B would keep in the home folder until it is uploaded."""
    runs.mkdir(parents=True, exist_ok=True)
    kept = str((runs / "wandb-data").absolute())
    with _environment({"WANDB_DATA_DIR": kept, "WANDB_CACHE_DIR": kept}):
        run, first_step = _start(config, _mode(config.mode), runs, about)
        log = WandbLog(run, config.upload, first_step)
        exit_code = 1
        try:
            log.starts(about)
            yield log
            exit_code = 0
        finally:
            _finish(run, exit_code)


class WandbLog(Log):
    """Everything that a stage tells, in a W&B run. Where W&B fails, it is told once and the stage goes on."""

    def __init__(self, run: wandb.Run, upload: str, first_step: int | None = None) -> None:
        self.run, self.upload, self._lost, self._step = run, upload, False, first_step
        self.folder = "" if run.disabled else str(Path(run.dir).parent)
        self.logger = _Logger(self)

    def starts(self, about: RunInfo) -> None:
        """Say over what curves are drawn, and which models the stage takes."""
        if about.job_type in TRAININGS:
            # What WandbLogger does for runs of its own making. No other job type gets a pattern: it would clash with
            # the exact names of `axis`.
            self.axis("trainer/global_step", ["*"])
        for name in about.inputs if not self.run.offline and not self.run.disabled else ():
            # Models that were made offline are not there yet: `kdq-wandb link` adds them.
            with suppress(Exception):
                _server.patience.wait(partial(self.run.use_artifact, name))

    def metrics(self, values: Mapping[str, float]) -> None:
        self.guarded(self._row(values))

    def axis(self, x: str, curves: Iterable[str]) -> None:
        self.guarded(lambda: self.run.define_metric(x))
        for curve in curves:
            self.guarded(partial(self.run.define_metric, curve, step_metric=x, step_sync=True))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.guarded(lambda: self.run.summary.update(dict(values)))

    def show(self, chart: Chart) -> None:
        """A row with a table, about which W&B asks its server."""
        table = wandb.Table(columns=list(chart.columns), data=[list(row) for row in chart.rows])
        shown: Any = table
        if chart.kind == "lines":
            curve, x, y = chart.columns
            fields, strings = {"step": x, "lineKey": curve, "lineVal": y}, {"title": chart.title, "xname": x}
            shown = wandb.plot_table("wandb/lineseries/v0", table, fields, strings)
        elif chart.kind != "table":
            plot: Any = wandb.plot.scatter if chart.kind == "points" else wandb.plot.bar
            shown = plot(table, *chart.columns, chart.title)
        self._asking(self._row({chart.name: shown}))

    def made(self, model: Artifact) -> None:
        """Log ``model`` as an artifact: its file where ``logger.wandb.upload`` says so, else a reference to it."""
        self._asking(lambda: self.run.log_artifact(self._artifact(model), aliases=["latest", model.key]))

    def _artifact(self, model: Artifact) -> wandb.Artifact:
        facts = dict(model.facts) | {"kdq_key": model.key}
        artifact = wandb.Artifact(valid_name(model.name), f"{model.kind}-model", metadata=facts)
        if self.upload not in ("all", model.kind):
            content = model.path.read_bytes() if model.content is None else model.content()
            digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
            entry = ArtifactManifestEntry(
                path=LogicalPath(model.path.name), ref=model.path.absolute().as_uri(), digest=digest, size=len(content)
            )
            artifact.manifest.add_entry(entry)  # add_reference would want the file to be there already
        elif model.content is None:
            # Files in the store never change, so W&B needs no copies of its own.
            artifact.add_file(str(model.path), policy="immutable", skip_cache=True)
        else:
            with artifact.new_file(model.path.name, mode="wb") as file:
                file.write(model.content())
        return artifact

    def _row(self, values: Mapping[str, Any]) -> Callable[[], Any]:
        """What logs one row of the run's history."""
        step, self._step = self._step, None  # from the first one on, W&B counts
        return partial(self.run.log, dict(values), step=step, commit=True)

    def _asking(self, tell: Callable[[], Any]) -> None:
        """What may wait for the server."""
        online = not self.run.offline and not self.run.disabled
        self.guarded(partial(_server.patience.wait, tell) if online else tell)

    def guarded(self, tell: Callable[[], Any]) -> None:
        """W&B's own process may die, or its disk be full; a training of many hours must not end with it."""
        try:
            tell()
        except Exception as error:
            if not self._lost:
                log.warning("W&B did not take everything (%s); the run goes on", _reason(error))
            self._lost = True


class _Logger(WandbLogger):
    """The logger that Lightning gets: its metrics go through ``track``."""

    def __init__(self, track: WandbLog) -> None:
        super().__init__(experiment=track.run)
        self._track = track

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._track.metrics(metrics if step is None else {**metrics, "trainer/global_step": step})


def _start(config: WandbConfig, mode: str, runs: Path, about: RunInfo) -> tuple[wandb.Run, int | None]:
    """The run, and the step of its first row where W&B would not know it."""
    agent = AGENT if about.job_type == "trial" else {}
    offline = mode == "offline"
    name = agent.get("WANDB_RUN_ID") or run_id(about.job_type, about.key, folder_id(runs))
    first_step = next_step(runs, name) if offline else None
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=PATIENCE / 2,  # for its own words on what is wrong; what is left is for the end of the run
        disable_code=True,
        disable_git=True,  # the commit of kdq itself is in the config
        x_disable_stats=about.job_type not in TRAININGS,
        x_save_requirements=False,
        sweep_id=agent.get("WANDB_SWEEP_ID"),
        x_transaction_log_flush_interval=1.0,  # what a killed run loses; `wandb leet` shows the rest while it runs
    )
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", config.project) if agent else config.project,
        "entity": config.entity,
        "dir": str(runs),
        "id": name,
        "resume": "allow",
        "job_type": about.job_type,
        "name": about.name,
        "group": about.group,
        "tags": list(dict.fromkeys(tag[:64] for tag in about.tags if tag)),
        "config": {**about.config, "inputs": list(about.inputs)},
        "settings": settings,
    }
    start = partial(wandb.init, mode=mode, **options)  # type: ignore[arg-type]
    try:
        return _server.patience.wait(start) if mode == "online" else start(), first_step or None
    except Exception as error:
        if mode != "online":
            raise KdqError(f"W&B could not start ({_reason(error)}): set logger=csv or logger=none") from error
        _go_on_without(error)
        log.warning("W&B cannot be reached (%s): logging offline; `wandb sync` uploads it", _server.lost)
        return _start(config, "offline", runs, about)


def _finish(run: wandb.Run, exit_code: int) -> None:
    finish, online = partial(run.finish, exit_code=exit_code), not run.offline and not run.disabled
    try:
        _server.patience.wait(finish, at_least=WRITING) if online else finish()
    except Exception as error:
        _go_on_without(error)
        folder = Path(run.dir).parent
        again = f"wandb sync {'--include-online ' if online else ''}{folder}"
        log.warning("W&B could not upload all of %s (%s): run `%s`", run.name, _server.lost, again)


def _go_on_without(error: Exception) -> None:
    """End W&B's own process, which would keep the run open, and this one from ending; later runs are offline.

    What the process was told is on the disk: it writes once a second (see ``_start``).
    """
    _server.lost = _server.lost or _reason(error)
    with suppress(Exception):
        wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]  # there is no public way
    with suppress(Exception, SystemExit):  # it ends with the exit code of its process
        Patience(WRITING).wait(wandb.teardown)
    os.environ.pop("WANDB_SERVICE", None)


def _mode(asked: str) -> str:
    """What to ask W&B for: ``online`` only if that may work. One line says why it may not."""
    address = os.environ.get("WANDB_BASE_URL", "")
    if address and not re.match(r"https?://[^/\s]+", address):
        del os.environ["WANDB_BASE_URL"]  # W&B would not start with it, even offline
        _server.lost = f"WANDB_BASE_URL={address} is no address: it is like https://api.wandb.ai"
    elif asked != "online" or _server.lost:
        return "offline" if asked == "online" else asked
    else:
        try:
            wandb.setup(wandb.Settings(silent=True))
            if wandb.login(prompt=False, verify=False):
                return "online"
            _server.lost = "nobody is logged in: run `wandb login`"
        except Exception as error:
            _server.lost = _reason(error)
    if asked != "online":
        return asked
    log.warning("W&B cannot be reached (%s): logging offline; `wandb sync` uploads it", _server.lost)
    return "offline"


#: How W&B's client says what happened, and what that means to a user.
_REASONS = {
    r"\b401\b|API_KEY invalid|API key": "the API key is wrong: `wandb login` takes a new one",
    r"\b403\b": "this account may not write there: see logger.wandb.entity",
    r"\b404\b": "no W&B server is at that address: see WANDB_BASE_URL",
    r"invalid character|JSON": "what answers is no W&B server: see WANDB_BASE_URL",
    r"deadline|[Tt]imed? ?out|did not respond|does not answer": "the server does not answer",
}


def _reason(error: Exception) -> str:
    """One line that says which failure it was."""
    text = message(error)
    known = next((words for pattern, words in _REASONS.items() if re.search(pattern, text)), "")
    return f"{known}; {text[:120]}" if known and known not in text else known or f"{type(error).__name__}: {text[:200]}"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block, where the user has not set them: W&B has no settings for these."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
