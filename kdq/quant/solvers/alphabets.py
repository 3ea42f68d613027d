"""Ways to choose a layer's alphabet: which levels, and the scale they are spaced by.

At 2 bits the place of zero matters as much as the solver. With zero among four levels, one side has two and the other
one; with zero half-way between the middle two they are even, but no weight can vanish. Which is better depends on the
channel, so :func:`uniform` tries all three for each. (A half-integer zero is no trouble to integer arithmetic: half the
scale turns the levels into odd integers.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet, check_bits

#: ``(weight (..., rows, columns), bits) -> Alphabet`` with a scale per row.
AlphabetChoice = Callable[[Tensor, int], Alphabet]
#: Scales tried for each row: from the full range down to a twentieth of it.
_CANDIDATES = 48


def uniform(weight: Tensor, bits: int) -> Alphabet:
    """Exactly ``2^bits`` evenly spaced values per output channel, with the scale and the place of zero (on one of the
    two middle levels, or half-way between) that round the channel's weights with the least squared error.

    Clipping the few largest weights pays at low widths: at 2 bits the best range of a Gaussian channel is about two
    standard deviations. Above 7 bits zero is a level and nothing is clipped.

    >>> uniform(torch.randn(16, 100), bits=3).levels
    8

    Args:
        weight: ``(..., rows, columns)``.
        bits: 2 to 32.
    """
    half = 2 ** (check_bits(bits) - 1)
    return _search(weight, 2**bits, [half] if bits >= 8 else [half, half - 1, half - 0.5])


def symmetric(weight: Tensor, bits: int) -> Alphabet:
    """The two's complement integers ``-2^(bits-1) .. 2^(bits-1) - 1`` times a scale per output channel.

    >>> symmetric(torch.randn(16, 100), bits=3).zero[0].item()  # the code of zero
    4.0
    """
    return _search(weight, 2**bits, [2 ** (check_bits(bits) - 1)])


def asymmetric(weight: Tensor, bits: int) -> Alphabet:
    """``2^bits`` values from the smallest to the largest weight of an output channel or a share of that range, zero
    among them at any place.

    >>> alphabet = asymmetric(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2)
    >>> alphabet.decode(torch.arange(4)[None])
    tensor([[0., 1., 2., 3.]])
    """
    levels = 2 ** check_bits(bits)
    low, high = weight.amin(-1, keepdim=True).clamp_max(0), weight.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (levels - 1)).clamp_min(torch.finfo(weight.dtype).tiny * levels)
    # In float64: above 24 bits a zero point is not exact in float32.
    zero = torch.round(-low.double() / scale).to(torch.float64 if bits > 24 else weight.dtype)
    return _shrink(weight, scale, zero, levels)


def ternary(weight: Tensor, bits: int = 2) -> Alphabet:
    """``-s, 0, s`` with a scale per output channel: three levels, stored in 2 bits whatever ``bits`` says.

    >>> ternary(torch.randn(16, 100)).levels
    3
    """
    return _search(weight, 3, [1])


def paper(weight: Tensor, bits: int, scalar: float = 1.16, quantile: float = 1.0) -> Alphabet:
    """The published study's alphabet: ``2^bits + 1`` values, ``-K .. K`` for ``K = 2^(bits-1)``, which take ``bits +
    1`` bits to store. One scale for the whole layer: its largest value is ``scalar`` times the mean over neurons of the
    ``quantile`` of their absolute weights (Zhang, Zhou & Saab 2023, arXiv 2201.11113).

    >>> alphabet = paper(torch.randn(16, 100), bits=2)
    >>> alphabet.levels, alphabet.bits
    (5, 3)
    """
    K = 2 ** (check_bits(bits) - 1)
    sizes = weight.abs().sort(-1).values
    radius = scalar * sizes[..., round(quantile * (sizes.shape[-1] - 1))].mean()
    scale = (radius / K).clamp_min(torch.finfo(weight.dtype).tiny * K).expand_as(weight[..., :1])
    return Alphabet(scale, torch.full_like(scale, float(K)), 2 * K + 1)


def per_layer(choice: AlphabetChoice) -> AlphabetChoice:
    """The same levels with one scale and zero for all output channels of a layer.

    >>> per_layer(uniform)(torch.randn(1, 16, 100), 4).scale.unique().numel()
    1
    """

    def chosen(weight: Tensor, bits: int) -> Alphabet:
        one = choice(weight.reshape(1, 1, -1), bits)
        shape = weight[..., :1].shape
        return Alphabet(one.scale.expand(shape), one.zero.expand(shape), one.levels)

    return chosen


ALPHABETS: dict[str, AlphabetChoice] = {
    "uniform": uniform,
    "symmetric": symmetric,
    "asymmetric": asymmetric,
    "ternary": ternary,
    "paper": paper,
}


def rescale(weight: Tensor, gram: Tensor, alphabet: Alphabet) -> Alphabet:
    """The alphabet with the scales that round ``weight`` ``(..., N, d)`` with the least error of the layer's outputs,
    ``sum (W - Q) G (W - Q)'`` for ``gram = G`` ``(..., d, d)``, tried from half to 1.4 times the given
    ones."""

    def error(candidate: Alphabet) -> Tensor:
        wrong = candidate.nearest(weight) - weight
        return ((wrong @ gram) * wrong).sum(-1, keepdim=True)

    factors = [2 ** (step / 8) for step in range(-8, 5)]
    return _best([Alphabet(alphabet.scale * f, alphabet.zero, alphabet.levels) for f in factors], error)


def _search(weight: Tensor, levels: int, zeros: Sequence[float]) -> Alphabet:
    """The least squared error over the places of zero and the scales below the one whose range holds every weight."""
    high, low = weight.amax(-1, keepdim=True), weight.amin(-1, keepdim=True)
    found = []
    for zero in zeros:
        full = torch.maximum(high / (levels - 1 - zero), -low / zero).clamp_min(torch.finfo(weight.dtype).tiny * levels)
        found.append(_shrink(weight, full, torch.full_like(full, float(zero)), levels))
    return _best(found, _squared_error(weight))


def _shrink(weight: Tensor, full: Tensor, zero: Tensor, levels: int) -> Alphabet:
    if levels >= 2**8:  # the step is so fine that clipping never pays
        return Alphabet(full, zero, levels)
    shares = [1 - 0.95 * step / _CANDIDATES for step in range(_CANDIDATES)]
    return _best([Alphabet(full * share, zero, levels) for share in shares], _squared_error(weight))


def _squared_error(weight: Tensor) -> Callable[[Alphabet], Tensor]:
    return lambda alphabet: (alphabet.nearest(weight) - weight).square().sum(-1, keepdim=True)


def _best(candidates: Sequence[Alphabet], error: Callable[[Alphabet], Tensor]) -> Alphabet:
    """Row by row the candidate of least error."""
    best, *others = candidates
    least = error(best) if others else torch.empty(0)
    for candidate in others:
        tried = error(candidate)
        better = tried < least
        least = torch.where(better, tried, least)
        scale = torch.where(better, candidate.scale, best.scale)
        best = Alphabet(scale, torch.where(better, candidate.zero, best.zero), best.levels)
    return best
