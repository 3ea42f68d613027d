"""What a bit search measured, remembered on disk."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdq.quant.distributed import gathered, rank
from kdq.quant.solvers.alphabet import check_bits
from kdq.utils.errors import KdqError, one_line
from kdq.utils.files import parse_json, regular, write_text

Assignment = dict[str, int]
#: An assignment that can be a key: its layers by name.
Name = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Measure:
    """What ``evaluate`` finds: a smooth ``loss`` (lower is better) and the accuracy ``top1`` in percent."""

    loss: float
    top1: float


class Trace:
    """Remembers every evaluation, on disk if there is a path, so that a killed search goes on where it stopped.

    A search is a deterministic function of its evaluations: run again, it meets the remembered ones first. Where
    torch.distributed runs, the file is the first process's and all remember the same: a process that remembered more
    would leave the others alone with their sums.

    ``path`` is a JSON file, rewritten after every evaluation; ``key`` identifies everything that they depend on. A file
    of another key is begun ``anew``, or else refused.
    """

    def __init__(
        self, evaluate: Callable[[Assignment], Measure], path: Path | None = None, key: str = "", anew: bool = False
    ) -> None:
        self._evaluate, self.path, self.key = evaluate, path, key
        self.entries: dict[Name, Measure] = {}
        #: What was asked for since it was opened, remembered or not.
        self.asked: set[Name] = set()
        if path is not None:
            self._remember(path, anew)

    def __call__(self, assignment: Assignment) -> Measure:
        name = tuple(sorted(assignment.items()))
        self.asked.add(name)
        if name not in self.entries:
            measure = self._evaluate(dict(assignment))
            if not math.isfinite(measure.loss):
                raise KdqError(f"the loss became {measure.loss} during the bit search: check the float network")
            self.entries[name] = measure
            self._write()
        return self.entries[name]

    def _write(self) -> None:
        if self.path is None or rank() > 0:
            return
        rows = [{"bits": dict(name), "loss": m.loss, "top1": m.top1} for name, m in self.entries.items()]
        write_text(self.path, json.dumps({"key": self.key, "evaluations": rows}))

    def _remember(self, path: Path, anew: bool) -> None:
        found: dict[Name, Measure] | KdqError
        try:
            found = self._read(path, anew) if path.exists() else {}
        except KdqError as error:
            found = error
        first = gathered(found)[0]
        if isinstance(first, KdqError):
            raise first
        self.entries = first

    def _read(self, path: Path, anew: bool) -> dict[Name, Measure]:
        entries = {}
        try:
            stored = parse_json(regular(path).read_text())
            key = stored["key"]
            for row in stored["evaluations"]:
                name = tuple(sorted((layer, check_bits(bits)) for layer, bits in row["bits"].items()))
                measure = Measure(float(row["loss"]), float(row["top1"]))
                if not (math.isfinite(measure.loss) and 0 <= measure.top1 <= 100):
                    raise ValueError(f"{measure} is no measurement")
                entries[name] = measure
        except (KdqError, OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
            raise KdqError(
                f"the search trace {path} is damaged ({one_line(error)}): delete it to search anew"
            ) from error
        if key == self.key or anew:
            return entries if key == self.key else {}
        raise KdqError(
            f"the search trace {path} belongs to another model or setting: delete it, or search in another folder"
        )
