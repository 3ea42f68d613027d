"""How the layers of a network are quantized: every option of it, in one object that passes whole from the config to the
solver."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdq.quant.activations import RANGES
from kdq.quant.calibrate.correction import CORRECTIONS
from kdq.quant.packing.weights import FLOAT_DTYPES
from kdq.quant.solvers.alphabet import Alphabet, check_bits
from kdq.quant.solvers.alphabets import ALPHABETS, AlphabetChoice, per_layer, rescale
from kdq.quant.solvers.gpfq import gpfq
from kdq.quant.solvers.gptq import gptq
from kdq.quant.solvers.held_out import RIDGES, HeldOut, output_error, trusted
from kdq.quant.solvers.qronos import qronos
from kdq.quant.solvers.refine import refine
from kdq.quant.solvers.rtn import rtn
from kdq.quant.solvers.spfq import spfq
from kdq.utils.checks import check_types, nearest, one_of, within
from kdq.utils.errors import KdqError

#: ``(weight, gram, cross, alphabet) -> quantized weight``; see :func:`kdq.quant.solvers.gpfq.gpfq` for the shapes.
Solver = Callable[[Tensor, Tensor, Tensor, Alphabet], Tensor]
SOLVERS: dict[str, Solver] = {"rtn": rtn, "gpfq": gpfq, "spfq": spfq, "gptq": gptq, "qronos": qronos}
MOST_INPUT_BITS = 8


@dataclass(frozen=True)
class Preset:
    """What a name of a solver stands for: the function, and the options that go with it unless they are given.

    >>> PRESETS["best"].order
    'gram'
    """

    solver: Solver
    order: str = "natural"
    scale: str = "weight"
    refine: int = 0
    ridge: float = 0.0
    held_out: bool = False


#: ``best``, what is most accurate at low widths, and the published solvers as their papers have them.
PRESETS = {"best": Preset(qronos, order="gram", scale="gram", refine=3, ridge=0.1, held_out=True)}
PRESETS |= {name: Preset(solver) for name, solver in SOLVERS.items()}


@dataclass(frozen=True)
class QuantConfig:
    """What is done with every layer, whatever its width.

        >>> QuantConfig(solver="gpfq", order="gram").alphabet
        'uniform'

    Attributes:
        solver: one of :data:`PRESETS`, or a function ``(weight, gram, cross, alphabet) -> quantized weight``.
        alphabet: one of :data:`kdq.quant.solvers.alphabets.ALPHABETS`, or a function ``(weight, bits) -> Alphabet``.
        per_channel: a scale for every output channel, or one for the layer.
        scale: the scales have the least error of the ``"weight"``, or weighted with the ``"gram"`` matrix of the
            inputs; None: as the preset has it.
        order: columns are solved in the weight's ``"natural"`` order, or by falling diagonal of the ``"gram"`` matrix;
            None: as the preset has it.
        refine: sweeps of :func:`kdq.quant.solvers.refine.refine` after the solver; None: as the preset has it.
        ridge: how much a layer's weights are held to their float values, see :func:`held`, as a share of its inputs'
            mean energy; None: as the preset has it.
        held_out: a layer's solution is judged on about a quarter of the calibration images, which are held out, see
            :mod:`kdq.quant.solvers.held_out`; None: as the preset has it.
        first_last_bits: width of the first and the last layer that run, whatever the others have; with ``act_bits``
            their inputs have as many, up to 8, where that is more.
        keep_float: names of layers, parameters and modules (for all that is inside them) whose weights stay float, and
            patterns of such names: ``["fc", "*.in_proj"]``.
        float_dtype: what is not quantized (biases, BatchNorm, ``keep_float``) is rounded to ``"bf16"`` or ``"fp16"``,
            to be stored in 16 bits; None leaves it in float32.
        act_bits: the inputs of every quantized layer are rounded too, one scale per tensor, so layers that run more
            than once are refused; None leaves them float.
        act_range: ``"mse"``, ``"percentile"`` or ``"percentile_99.9"``, see
            :meth:`kdq.quant.activations.Histogram.quantizer`.
        correct: after each layer, the means of biased channels are put right (``"bias"``), or the means and variances
            of BatchNorms too (``"batchnorm"``), see :mod:`kdq.quant.calibrate.correction`; None leaves both.
        moments: what sums the moments of a layer's inputs, called with ``(layer, symmetric)``; None is
            :class:`kdq.quant.calibrate.moments.Moments`.
    """

    solver: str | Solver = "best"
    alphabet: str | AlphabetChoice = "uniform"
    per_channel: bool = True
    scale: str | None = None
    order: str | None = None
    refine: int | None = None
    ridge: float | None = None
    held_out: bool | None = None
    first_last_bits: int | None = None
    keep_float: tuple[str, ...] = ()
    float_dtype: str | None = None
    act_bits: int | None = None
    act_range: str = "mse"
    correct: str | None = None
    moments: Callable[[nn.Module, bool], Any] | None = None

    def __post_init__(self) -> None:
        """Raises KdqError for an unknown choice, and for choices that exclude each other."""
        check_types(self, "")
        _named(PRESETS, self.solver, "solver")
        _named(ALPHABETS, self.alphabet, "alphabet")
        one_of("order", self.order, ("natural", "gram", None))
        one_of("scale", self.scale, ("weight", "gram", None))
        one_of("act_range", self.act_range, RANGES)
        one_of("correct", self.correct, CORRECTIONS)
        one_of("float_dtype", self.float_dtype, (*FLOAT_DTYPES, None))
        within("refine", self.refine or 0, 0)
        within("ridge", self.ridge or 0, 0)
        if self.refine and not self.per_channel:
            raise KdqError("refine fits a scale to every output channel: use per_channel=true, or refine=0")
        if self.scale == "gram" and not self.per_channel:
            raise KdqError("scale=gram fits a scale to every output channel: use per_channel=true, or scale=weight")
        if self.first_last_bits is not None:
            check_bits(self.first_last_bits, "first_last_bits")
        if self.act_bits is not None:
            within("act_bits", self.act_bits, 2, MOST_INPUT_BITS)
        names: Any = self.keep_float
        if not isinstance(names, Collection) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise KdqError(f"keep_float={names!r}: give a list of names, [{names}]")
        object.__setattr__(self, "keep_float", tuple(names))
        if self.moments is not None and not callable(self.moments):
            raise KdqError(f"moments={self.moments!r} is no function: leave it None (null), or give a _target_")

    @property
    def covers(self) -> bool:
        """Whether the alphabet's range is known to grow to that of the weights as its levels do."""
        return self.alphabet in ("uniform", "symmetric", "asymmetric")

    def input_bits(self, end: bool) -> int | None:
        """The bits of a layer's inputs, of the first or the last one at an ``end``; None: they stay float."""
        if self.act_bits is None or self.first_last_bits is None or not end:
            return self.act_bits
        return max(self.act_bits, min(self.first_last_bits, MOST_INPUT_BITS))

    @property
    def preset(self) -> Preset:
        """The solver with its options: those given, else those that its name stands for."""
        named = _named(PRESETS, self.solver, "solver")
        preset = named if isinstance(named, Preset) else Preset(named)
        if not self.per_channel:  # the two that fit a scale to every channel were not asked for
            preset = replace(preset, scale="weight", refine=0)
        given = {name: getattr(self, name) for name in ("order", "scale", "refine", "ridge", "held_out")}
        return replace(preset, **{name: value for name, value in given.items() if value is not None})

    def solve(
        self, weight: Tensor, gram: Tensor, cross: Tensor, bits: int, held_out: HeldOut | None = None
    ) -> tuple[Tensor, Alphabet]:
        """Quantize ``weight`` ``(groups, N, d)`` given ``gram`` and ``cross`` ``(groups, d, d)``.

        Args:
            held_out: of the images on which the solution is judged, which ``gram`` and ``cross`` hold, too: layers
                with few patches are fitted to the others alone, and rounded where the solver does worse on these.
                From 8 bits up nobody judges.

        Returns:
            Values ``(groups, N, d)`` and the alphabet they are of.
        """
        ridge, alphabet = self.preset.ridge, self._alphabet(weight, bits)
        if held_out is None or bits >= 8:
            return self._solve(weight, gram, cross, alphabet, ridge)
        seen = gram - held_out.gram, cross - held_out.cross
        share = trusted(weight, *held(*seen, ridge), held_out)
        if not held_out.few:
            return self._solve(weight, *_shrunk(gram, cross, share), alphabet, ridge)
        tried = [self._solve(weight, *_shrunk(*seen, share), alphabet, ridge * factor) for factor in RIDGES]
        tried.append((alphabet.nearest(weight), alphabet))
        errors = [float(output_error(weight, values, held_out)) for values, _ in tried]
        return tried[errors.index(min(errors))]

    def _alphabet(self, weight: Tensor, bits: int) -> Alphabet:
        choice = _named(ALPHABETS, self.alphabet, "alphabet")
        alphabet = (choice if self.per_channel else per_layer(choice))(weight, bits)
        if not _fits(alphabet, shape := (*weight.shape[:-1], 1)):
            raise KdqError(f"the alphabet must be an Alphabet with positive scales and finite zeros of shape {shape}")
        return cast(Alphabet, alphabet)

    def _solve(
        self, weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet, ridge: float
    ) -> tuple[Tensor, Alphabet]:
        preset = self.preset
        fine = alphabet.levels >= 2**8  # the scale is exact to the last code already
        if ridge:
            gram, cross = held(gram, cross, ridge)
        if preset.scale == "gram" and not fine:
            alphabet = rescale(weight, gram, alphabet)
        order = torch.arange(weight.shape[-1], device=weight.device)
        if preset.order == "gram":
            order = gram.diagonal(dim1=-2, dim2=-1).sum(0).argsort(descending=True, stable=True)
            weight, gram, cross = weight[..., order], *(m[:, order][:, :, order] for m in (gram, cross))
        values = preset.solver(weight, gram, cross, alphabet)
        if not isinstance(values, Tensor) or values.shape != weight.shape or not values.isfinite().all():
            raise KdqError(f"the solver must give finite values in the weight's shape {tuple(weight.shape)}")
        away = (alphabet.nearest(values) - values).abs_()
        if (away > 0.01 * alphabet.scale + 1e-5 * values.abs()).any():
            raise KdqError("the solver must give values of its alphabet: end it with alphabet.nearest(values)")
        if preset.refine and not fine:
            values, alphabet = refine(weight, gram, cross, values, alphabet, preset.refine)
        return values[..., torch.argsort(order)], alphabet


def _fits(alphabet: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(alphabet, Alphabet) or not isinstance(alphabet.levels, int) or alphabet.levels < 2:
        return False
    scale, zero = alphabet.scale, alphabet.zero
    known = isinstance(scale, Tensor) and isinstance(zero, Tensor) and scale.shape == zero.shape == shape
    return known and bool((scale > 0).all() and scale.isfinite().all() and zero.isfinite().all())


def _shrunk(gram: Tensor, cross: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of inputs that differ by a ``share`` of what they do."""
    return gram, gram + share * (cross - gram)


def held(gram: Tensor, cross: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``G`` and ``C`` with ``lambda I`` added, lambda being ``ridge`` times the mean of G's diagonal.

    A layer's error gets the term ``lambda ||W - Q||^2`` with it: where the calibration images say little, as of a
    layer with more inputs than there are images, weights stay near their float values. Qronos' projection becomes
    ``W + W (C' - G) (G + lambda I)^-1``, which is W, and not zero, where they say nothing.

    >>> G, C = held(torch.eye(2), torch.zeros(2, 2), 0.5)
    >>> G
    tensor([[1.5000, 0.0000],
            [0.0000, 1.5000]])
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    extra = torch.diag_embed(ridge * diagonal.mean(-1, keepdim=True).expand_as(diagonal))
    return gram + extra, cross + extra


#: Names of the options.
OPTIONS = tuple(field.name for field in fields(QuantConfig))


def configured(config: QuantConfig | None, options: Mapping[str, Any], others: Collection[str] = ()) -> QuantConfig:
    """``config``, or the default one, with ``options`` in place of its own; where one is unknown, the complaint names
    the ``others`` that the caller takes, too."""
    if config is not None and not isinstance(config, QuantConfig):
        raise KdqError(f"config={config!r} is no QuantConfig: options have names, such as solver={config!r}")
    known = (*others, *OPTIONS)
    for name in options:
        if name not in known:
            raise KdqError(f"unknown option {name}{nearest(name, known)}: {', '.join(known)}")
    return replace(config or QuantConfig(), **options)


def _named(known: Mapping[str, Any], value: Any, what: str) -> Any:
    if isinstance(value, str):
        if value not in known:
            raise KdqError(f"{what}={value!r} is unknown: use one of {', '.join(known)}, or pass a function")
        return known[value]
    if not callable(value):
        raise KdqError(f"{what}={value!r} is neither one of {', '.join(known)} nor a function")
    return value
