"""Lineage, added once the runs are on the server: offline, W&B cannot say which artifact a run takes."""

from collections.abc import Callable

from wandb import Api


def link(api: Api, path: str, sweep: str | None, tell: Callable[[str], None]) -> int:
    """Make every run of the project ``path``, ``entity/project``, or of one sweep, take the models that its config
    names as ``inputs``; what is linked stays so. Returns how many models are not on the server.

    ``tell`` gets a line for every run that changes and for every model that is missing.
    """
    missing = 0
    for run in api.runs(path, filters={} if sweep is None else {"group": sweep}):
        wanted = run.config.get("inputs") or []
        used = {artifact.id for artifact in run.used_artifacts()} if wanted else set()
        for name in wanted:
            if not api.artifact_exists(f"{path}/{name}"):
                missing += 1
                tell(f"{run.name}: {name} is not on the server: `wandb sync` the folder of the run that made it")
                continue
            artifact = api.artifact(f"{path}/{name}")
            if artifact.id not in used:
                run.use_artifact(artifact)
                tell(f"{run.name} <- {name}")
    return missing
