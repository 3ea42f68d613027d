"""A plan as people read it."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from kdq.records.failures import Failure
from kdq.records.rows import ROW_FORMAT, read_rows
from kdq.report.tables import unbound
from kdq.sweep.plan import Plan


def print_plan(console: Console, plan: Plan) -> None:
    """Waves, jobs, what is there already, and the rough cost."""
    if plan.jobs:
        text = Table(title=f"{len(plan.jobs)} jobs in {len(plan.waves)} waves; jobs of one wave may run at once")
        for column in ("wave", "job", "makes"):
            text.add_column(column)
        text.add_column("cost", justify="right")
        for number, wave in enumerate(plan.waves, 1):
            for job in wave:
                text.add_row(str(number), job.name, job.what, cost(job.work, plan.speed))
            text.add_section()
        console = unbound(console, text)
        console.print(text)
    for line in summary(plan):
        console.print(line, soft_wrap=True, highlight=False)


def summary(plan: Plan) -> list[str]:
    """What is there and what will be made, in a few lines."""
    trainings = sum(job.kind != "rows" for job in plan.jobs)
    missing = {key: name for job in plan.jobs if job.kind == "rows" for key, name in job.makes.items()}
    lines = [f"rows:     {len(plan.rows)} asked for, {len(plan.rows) - len(missing)} there, {len(missing)} to make"]
    rows, names = plan.output / "rows", set(missing.values())
    alike = {key for name, _, key in (path.stem.rpartition("-") for path in rows.glob("*.json")) if name in names}
    if older := [row for row in read_rows(rows, alike) if row.row_format < ROW_FORMAT]:
        lines.append(f"again:    {len(older)} of them, which an older kdq made: its rows are read, but not found again")
    if missing:
        lines.append(
            f"models:   {trainings + plan.models_there} distinct, {plan.models_there} there, {trainings} to make"
        )
        roughly = "roughly: multiply-accumulates of all forward and backward passes"
        basis = "one job after the other, at the speed of the models that are there" if plan.speed else roughly
        lines.append(f"cost:     {cost(plan.work, plan.speed)}, {basis}")
    lines += [f"impossible: {' '.join(overrides)}: {cause}" for overrides, cause in plan.impossible]
    return lines


def cost(work: float, speed: float) -> str:
    """``1.2 PMAC``, with the seconds that it takes at ``speed``, where that is known."""
    if not work:
        return "?"
    scaled, unit = work / 1e9, "GMAC"
    for larger in ("TMAC", "PMAC", "EMAC"):
        if scaled >= 999.5:  # three digits would say 1e+03
            scaled, unit = scaled / 1000, larger
    text = f"{scaled:.3g} {unit}"
    return f"{text}, {duration(work / speed)}" if speed else text


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3.2 h`` or ``4.1 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def failure_lines(plan: Plan, failures: Sequence[Failure]) -> list[str]:
    """One line for each job that failed, and one for what could not be made because of it."""
    rows = [job for job in plan.jobs if job.kind == "rows"]
    cells = [job.overrides for job in rows] + [overrides for overrides, _ in plan.impossible]
    common = set(cells[0]).intersection(*cells[1:]) if len(cells) > 1 else set()
    by_key = {failure.key: failure for failure in failures}
    lines, lost = [], list[str]()
    for job in plan.jobs:
        failed = [by_key[key] for key in job.makes if key in by_key]
        if failed and job.needs & by_key.keys():
            lost.append(job.name)
            continue
        users = [user for user in rows if user is job or job.makes.keys() & user.needs]
        which = [o for o in job.overrides if o not in common and all(o in user.overrides for user in users)]
        for cause, log in dict.fromkeys((failure.cause, failure.log) for failure in failed):
            lines.append(f"failed: {' '.join([job.name, *which])}: {cause}" + (f"; log: {log}" if log else ""))
    for overrides, cause in plan.impossible:
        lines.append(f"failed: {' '.join(o for o in overrides if o not in common)}: {cause}")
    if lost:
        lines.append(f"not made, because they need what failed: {', '.join(dict.fromkeys(lost))}")
    return lines
