"""What a bit search is asked for."""

from dataclasses import dataclass, fields

from kdq.quant.bitsearch.search import CONTEXTS, check_reachable
from kdq.quant.bitsearch.sensitivity import METHODS
from kdq.quant.solvers.alphabet import check_bits
from kdq.utils.checks import check_types, one_of, within
from kdq.utils.errors import KdqError

#: What a step of the search may count as saved.
COSTS = ("weight_bits", "bytes", "bops")


@dataclass(frozen=True)
class SearchConfig:
    """Which widths a search chooses from, within which budget, and how.

        >>> SearchConfig(avg_bits=3).candidates
        (2, 3, 4, 5, 6, 7, 8)

    Attributes:
        avg_bits: most bits per weight on average, those of layers left float included.
        size_bytes: largest packed file.
        max_drop: most points of validation accuracy that the stitched network may lose, before the chosen assignment is
            quantized anew. At least one of these three is given; all given ones hold.
        candidates: the widths a layer may have, at least two.
        cost: what a step is priced by: ``weight_bits``, packed ``bytes``, or ``bops`` (bits times multiply-adds).
        method: ``greedy``, or ``exact`` or ``sensitivity_once`` on the table of single changes.
        context: where ``greedy`` measures prices, one of :data:`kdq.quant.bitsearch.search.CONTEXTS`.
        validation_images: how many choose, of all processes together.
    """

    avg_bits: float | None = None
    size_bytes: int | None = None
    max_drop: float | None = None
    candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    cost: str = "weight_bits"
    method: str = "greedy"
    context: str = "widest"
    validation_images: int = 1024

    def __post_init__(self) -> None:
        """Raises KdqError for an unknown choice, no budget, or one that the candidates cannot meet."""
        check_types(self, "")
        one_of("cost", self.cost, COSTS)
        one_of("method", self.method, ("greedy", *METHODS))
        one_of("context", self.context, CONTEXTS)
        for name in ("cost", "context"):
            if self.method != "greedy" and getattr(self, name) != getattr(SearchConfig, name):
                raise KdqError(
                    f"{name}={getattr(self, name)} prices the steps of method=greedy; {self.method} has none"
                )
        candidates = self.candidates if isinstance(self.candidates, (tuple, list)) else (self.candidates,)
        widths = sorted({check_bits(width, "candidates") for width in candidates})
        if len(widths) < 2:
            raise KdqError(f"the bit search needs at least two candidate widths, not {widths}")
        object.__setattr__(self, "candidates", tuple(widths))
        if self.avg_bits is None and self.size_bytes is None and self.max_drop is None:
            raise KdqError("the bit search has no budget: give avg_bits, size_bytes or max_drop")
        for name, least in (("avg_bits", 0), ("size_bytes", 1), ("max_drop", 0), ("validation_images", 1)):
            if (value := getattr(self, name)) is not None:
                within(name, value, least)
        if self.avg_bits is not None:
            check_reachable({"of a weight": {widths[0]: widths[0]}}, self.avg_bits)


#: Names of the options.
SEARCH_OPTIONS = tuple(field.name for field in fields(SearchConfig))
