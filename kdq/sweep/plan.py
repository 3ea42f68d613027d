"""From the cells of a grid to jobs in waves.

    wave 1          models that need no other: teachers, baselines, DML's students
    wave 2 ...      models that need those: distilled students; then, with ``tune``, each width's tuned model
    last wave       rows: every missing width of one model in one job

Keys come from :func:`kdq.stages.pipeline.wanted_by`, which the jobs themselves use: what a wave leaves in the store is
what the next one finds there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from kdq.stages.cell import Cell
from kdq.stages.check import referred
from kdq.stages.pipeline import Wanted, wanted_by
from kdq.stages.train import Model
from kdq.sweep.cost import model_work, row_work
from kdq.utils.errors import KdqError
from kdq.utils.messages import describe

Overrides = tuple[str, ...]
#: From the overrides of a cell to its config.
Compose = Callable[[Overrides], DictConfig]

_BITS = "quant.bits="


@dataclass(frozen=True)
class Job:
    """One job of a wave."""

    name: str  # says the model or the cell
    kind: str  # teacher, student, tuned or rows
    what: str  # says more
    overrides: Overrides  # what composes the config that makes it
    makes: dict[str, str]  # what will be there afterwards, a model or rows: key to name
    needs: frozenset[str]  # keys of the models that other jobs make before
    work: float  # multiply-accumulate operations, roughly
    columns: Mapping[str, Any] = field(default_factory=dict)  # optional ones of its rows, and what some will say


@dataclass
class Plan:
    """What a sweep does."""

    output: Path  # has the store and the rows
    cells: Sequence[Overrides]  # of each cell of the grid
    waves: list[list[Job]] = field(default_factory=list)  # jobs that may run at once, in order
    rows: set[str] = field(default_factory=set)  # asked for, there or not: their keys
    models_there: int = 0  # how many models of missing rows are in the store
    speed: float = 0.0  # operations a second of the trainings of those; 0 where there is none
    impossible: list[tuple[Overrides, str]] = field(default_factory=list)  # cells that cannot be planned, and why

    @property
    def jobs(self) -> list[Job]:
        return [job for wave in self.waves for job in wave]

    @property
    def work(self) -> float:
        return sum(job.work for job in self.jobs)


def make_plan(cells: Sequence[Overrides], compose: Compose, output: Path) -> Plan:
    """The jobs that make what is missing of ``cells``.

    Raises:
        hydra.errors.HydraException: the overrides of a cell do not fit the config; nothing should be launched then.
    """
    plan, models, jobs = Plan(output, cells), _Models(), list[Job]()
    deployments: dict[str, Mapping[str, Any]] = {}  # of each row: the columns that the first cell of it asks for
    for group in _by_bits(cells):
        for overrides, wanted in _planned(group, compose, plan):
            cell, keys, columns = wanted.cell, wanted.keys, wanted.columns
            if any(deployments.setdefault(key, columns) != columns for key in keys.values()):
                cause = "another cell deploys the same row otherwise, and a row has one deployment: run deploy=... in "
                plan.impossible.append((overrides, f"{cause}a command of its own"))
                continue
            lacking = wanted.missing(wanted.known())
            missing = {name: key for name, key in lacking.items() if key not in plan.rows}  # cells may mean one row
            plan.rows.update(keys.values())
            if not missing:
                continue
            try:
                lasts = [wanted.tuned[name] for name in missing] if wanted.tuned else [wanted.model]
                needs = frozenset().union(*(models.missing(cell, each, overrides) for each in lasts))
            except KdqError as error:  # a damaged model takes only its own rows with it
                plan.impossible.append((overrides, describe(error)))
                plan.rows.difference_update(missing.values())
                continue
            makes = {key: f"{cell.name}-b{name}" for name, key in missing.items()}
            what = f"{len(missing)} row{'s' * (len(missing) > 1)} at {' '.join(missing)} bits"
            jobs.append(Job(cell.name, "rows", what, overrides, makes, needs, row_work(cell, len(missing)), columns))
    plan.waves = [wave for wave in (*models.waves(), jobs) if wave]
    plan.models_there, plan.speed = len(models.there), models.speed()
    return plan


def _by_bits(cells: Sequence[Overrides]) -> list[list[Overrides]]:
    """The cells, those together that differ in nothing but their bits."""
    groups: dict[Overrides, list[Overrides]] = {}
    for cell in cells:
        groups.setdefault(tuple(o for o in cell if not o.startswith(_BITS)), []).append(cell)
    return list(groups.values())


def _planned(group: list[Overrides], compose: Compose, plan: Plan) -> Iterator[tuple[Overrides, Wanted]]:
    """What the cells of a group ask for: as one cell with a list of bits, where that means the same, else one by one.
    What cannot be planned is noted in ``plan``."""
    configs = {}
    if len(group) > 1:
        parser = OverridesParser.create()
        values = [parser.parse_override(o).value() for cell in group for o in cell if o.startswith(_BITS)]
        bits = [width for value in values for width in (value if isinstance(value, list) else [value])]
        together = (*(o for o in group[0] if not o.startswith(_BITS)), f"{_BITS}{bits}".replace(" ", ""))
        # A wrong width must not take the others with it.
        if all(isinstance(width, int) and 2 <= width <= 32 for width in bits):
            configs[together] = compose(together)
            if not configs[together].quant.get("search") and not {"quant.bits", ".bits"} & referred(configs[together]):
                group = [together]
    for overrides in group:
        try:
            cell = Cell(configs.get(overrides) or compose(overrides))
            if cell.output != plan.output:
                raise KdqError("a sweep writes into one folder: give paths.output_dir one value, and run another sweep")
            yield overrides, wanted_by(cell)
        except HydraException:
            raise
        except Exception as error:
            plan.impossible.append((overrides, describe(error)))


class _Models:
    """The distinct models that rows need."""

    def __init__(self) -> None:
        self.there: dict[str, tuple[float, float]] = {}  # work and seconds
        self._jobs: dict[str, tuple[int, Job]] = {}  # wave and job

    def missing(self, cell: Cell, model: Model, overrides: Overrides) -> frozenset[str]:
        """The keys of what must be made for ``model`` to be there, itself included; a job is noted for each."""
        if model.key in self.there:
            return frozenset()
        if model.key in self._jobs:
            return self._jobs[model.key][1].needs | {model.key}
        if cell.store.path(model.spec, model.slug).is_dir():
            entry = cell.store.get(model.spec, model.slug)
            seconds = float(entry.metrics.get("train_seconds", 0.0)) if entry else 0.0
            self.there[model.key] = (model_work(cell, model), seconds)
            return frozenset()
        needs = frozenset[str]().union(*(self.missing(cell, needed, overrides) for needed in model.needs))
        wave = 1 + max((self._jobs[key][0] for key in needs), default=0)
        how = f"{model.training.recipe['epochs']} epochs" if model.training else "read from a file"
        makes, work = {model.key: model.name}, model_work(cell, model)
        self._jobs[model.key] = (
            wave,
            Job(model.name, model.role, f"{model.role}, {how}", overrides, makes, needs, work),
        )
        return needs | {model.key}

    def waves(self) -> list[list[Job]]:
        count = max((wave for wave, _ in self._jobs.values()), default=0)
        return [[job for wave, job in self._jobs.values() if wave == number] for number in range(1, count + 1)]

    def speed(self) -> float:
        timed = [(work, seconds) for work, seconds in self.there.values() if work and seconds]
        return sum(work for work, _ in timed) / sum(seconds for _, seconds in timed) if timed else 0.0
