"""What failed: one small file below ``failed/`` for each missing row or model, gone once it is made.

    failed/<name>-<key>.json    {"name", "key", "cause", "log", "overrides", "time"}

``key`` is the row's ``config_hash`` or the model's store key, so the record of a cell is found again whatever sweep it
is next a part of.
"""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from kdq.utils.errors import StoppedTrialError
from kdq.utils.files import parse_json, regular, write_text
from kdq.utils.messages import describe


@dataclass(frozen=True)
class Failure:
    """One thing that was not made."""

    name: str  # of the cell or the model, for people
    key: str  # of the row or the model
    cause: str  # one line
    log: str  # the file to read next; empty when there is none
    overrides: list[str]  # what composes the cell again
    time: str = field(default_factory=lambda: datetime.now().isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Job:
    """The job that makes things: what the record of its failure says about it."""

    log: str = ""
    overrides: tuple[str, ...] = ()


@contextmanager
def recorded(output: Path, made: Mapping[str, str], job: Job) -> Iterator[None]:
    """Record what of ``made`` (key to name) the block fails to make, and forget earlier failures when it makes it, or
    when a search has stopped it."""
    try:
        yield
    except StoppedTrialError:
        forget(output, made)
        raise
    except Exception as error:
        for key, name in made.items():
            record(output, Failure(name, key, describe(error), job.log, list(job.overrides)))
        raise
    forget(output, made)


def record(output: Path, failure: Failure) -> None:
    """Write ``failure`` below ``output``, in place of an earlier one of the same key."""
    write_text(output / "failed" / f"{failure.name}-{failure.key}.json", json.dumps(asdict(failure), indent=1) + "\n")


def forget(output: Path, keys: Container[str]) -> None:
    """Remove what was recorded for ``keys``: they have been made, or will be tried again."""
    for path in (output / "failed").glob("[!.]*.json"):
        if path.stem.rpartition("-")[2] in keys:
            path.unlink(missing_ok=True)


def read_failures(output: Path) -> dict[str, Failure]:
    """What is recorded below ``output``, by key; a file that cannot be read counts as none."""
    failures = {}
    for path in sorted((output / "failed").glob("[!.]*.json")):
        try:
            failure = Failure(**parse_json(regular(path).read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
        if all(isinstance(value, list if name == "overrides" else str) for name, value in asdict(failure).items()):
            failures[failure.key] = failure
    return failures
