"""How one layer is quantized, given its moments: choose an alphabet, solve, refine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.alphabets import ALPHABETS, AlphabetChoice, per_layer, rescale
from kdq.quant.solvers.gpfq import gpfq
from kdq.quant.solvers.gptq import gptq
from kdq.quant.solvers.qronos import qronos
from kdq.quant.solvers.refine import refine
from kdq.quant.solvers.rtn import rtn
from kdq.quant.solvers.spfq import spfq
from kdq.utils.errors import KdqError

#: ``(weight, gram, cross, alphabet) -> quantized weight``; see :func:`kdq.quant.solvers.gpfq.gpfq` for the shapes.
Solver = Callable[[Tensor, Tensor, Tensor, Alphabet], Tensor]
SOLVERS: dict[str, Solver] = {"rtn": rtn, "gpfq": gpfq, "spfq": spfq, "gptq": gptq, "qronos": qronos}
#: Alphabets whose values reach the largest weights, where there are levels enough.
COVERING = ("uniform", "symmetric", "asymmetric")
ORDERS = ("natural", "gram")
SCALES = ("weight", "gram")


@dataclass(frozen=True)
class QuantConfig:
    """What is done with every layer.

    Attributes:
        solver: one of :data:`SOLVERS`, or a function like them.
        alphabet: one of :data:`kdq.quant.solvers.alphabets.ALPHABETS`, or a function ``(weight, bits) -> Alphabet``.
        per_channel: a scale for every output channel, or one for the layer.
        scale: the scales have the least error of the ``"weight"``, or weighted with the ``"gram"`` matrix of the
            inputs.
        order: columns are solved in the weight's ``"natural"`` order, or by falling diagonal of the ``"gram"`` matrix.
        refine: sweeps of :func:`kdq.quant.solvers.refine.refine` after the solver.
    """

    solver: str | Solver = "gpfq"
    alphabet: str | AlphabetChoice = "uniform"
    per_channel: bool = True
    scale: str = "weight"
    order: str = "natural"
    refine: int = 0

    def __post_init__(self) -> None:
        """Raises KdqError for an unknown choice."""
        _named(SOLVERS, self.solver, "solver")
        _named(ALPHABETS, self.alphabet, "alphabet")
        for value, known, what in ((self.order, ORDERS, "order"), (self.scale, SCALES, "scale")):
            if value not in known:
                raise KdqError(f"{what}={value!r} is unknown: use one of {', '.join(known)}")
        if isinstance(self.refine, bool) or not isinstance(self.refine, int) or self.refine < 0:
            raise KdqError(f"refine={self.refine!r} is not a number of sweeps: use 0 or more")
        if self.refine and not self.per_channel:
            raise KdqError("refine fits a scale to every output channel: use per_channel=true, or refine=0")
        if self.scale == "gram" and not self.per_channel:
            raise KdqError("scale=gram fits a scale to every output channel: use per_channel=true, or scale=weight")

    @property
    def covers(self) -> bool:
        """Whether the alphabet's range is known to grow to that of the weights as its levels do."""
        return self.alphabet in COVERING

    def solve(self, weight: Tensor, gram: Tensor, cross: Tensor, bits: int) -> tuple[Tensor, Alphabet]:
        """Quantize ``weight`` ``(groups, N, d)`` given ``gram`` and ``cross`` ``(groups, d, d)``.

        Returns:
            Values ``(groups, N, d)`` and the alphabet they are of.
        """
        solver, choice = _named(SOLVERS, self.solver, "solver"), _named(ALPHABETS, self.alphabet, "alphabet")
        alphabet: Alphabet = (choice if self.per_channel else per_layer(choice))(weight, bits)
        if self.scale == "gram" and alphabet.levels < 2**8:
            alphabet = rescale(weight, gram, alphabet)
        if self.order == "gram":
            order = gram.diagonal(dim1=-2, dim2=-1).sum(0).argsort(descending=True, stable=True)
            gram, cross = (matrix[:, order][:, :, order] for matrix in (gram, cross))
            values, alphabet = self._solve(solver, weight[..., order], gram, cross, alphabet)
            return values[..., torch.argsort(order)], alphabet
        return self._solve(solver, weight, gram, cross, alphabet)

    def _solve(
        self, solver: Solver, weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet
    ) -> tuple[Tensor, Alphabet]:
        values = solver(weight, gram, cross, alphabet)
        if self.refine and alphabet.levels < 2**8:  # beyond, the scale is already exact to the last code
            return refine(weight, gram, cross, values, alphabet, self.refine)
        return values, alphabet


def _named(known: Mapping[str, Any], value: Any, what: str) -> Any:
    if isinstance(value, str):
        if value not in known:
            raise KdqError(f"{what}={value!r} is unknown: use one of {', '.join(known)}, or pass a function")
        return known[value]
    if not callable(value):
        raise KdqError(f"{what}={value!r} is neither one of {', '.join(known)} nor a function")
    return value
