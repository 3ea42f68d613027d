import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdq import KdqError
from kdq.quant.solvers.alphabet import Alphabet, check_bits
from kdq.quant.solvers.alphabets import symmetric as uniform
from kdq.quant.solvers.alphabets import uniform as any_zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
def test_uniform_has_exactly_2_to_the_b_levels(bits: int) -> None:
    alphabet = uniform(torch.randn(1, 3, 50), bits)
    wide = torch.linspace(-50, 50, 200_001).expand(1, 3, -1)
    for row in alphabet.nearest(wide)[0]:
        assert len(row.unique()) == 2**bits
    assert alphabet.bits == bits
    codes = alphabet.encode(wide)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_nearest_is_the_nearest_of_all_values(bits: int) -> None:
    weight = torch.randn(1, 4, 30)
    alphabet = uniform(weight, bits)
    values = alphabet.decode(torch.arange(2**bits).expand(1, 4, -1))
    found = (alphabet.nearest(weight) - weight).abs()
    assert torch.allclose(found, (values[..., None, :] - weight[..., None]).abs().amin(-1), atol=1e-6)


@given(st.integers(2, 32), st.integers(0, 2**31))
def test_codes_round_trip(bits: int, seed: int) -> None:
    weight = torch.randn(1, 3, 17, generator=torch.Generator().manual_seed(seed))
    alphabet = uniform(weight, bits)
    rounded = alphabet.nearest(weight)
    codes = alphabet.encode(weight)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    assert torch.equal(alphabet.decode(codes), rounded)
    assert torch.equal(alphabet.encode(rounded), codes)


def test_the_scale_has_less_squared_error_than_the_full_range() -> None:
    weight = torch.randn(1, 20, 300)
    for bits in (2, 3, 4):
        half = 2 ** (bits - 1)
        full = torch.maximum(weight.amax(-1, keepdim=True) / (half - 1), -weight.amin(-1, keepdim=True) / half)
        naive = Alphabet(full, torch.full_like(full, float(half)), 2**bits)
        errors = [(a.nearest(weight) - weight).square().sum(-1) for a in (uniform(weight, bits), naive)]
        assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_an_all_zero_channel_stays_finite(bits: int) -> None:
    rounded = uniform(torch.zeros(1, 2, 9), bits).nearest(torch.zeros(1, 2, 9))
    assert rounded.isfinite().all()
    assert rounded.abs().max() < 1e-30


def test_32_bits_are_the_weight_within_rounding() -> None:
    weight = torch.randn(1, 8, 100)
    assert torch.allclose(uniform(weight, 32).nearest(weight), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 33, 4.0, True, "4", None])
def test_bits_out_of_range_are_refused(bits: object) -> None:
    with pytest.raises(KdqError, match="2 to 32"):
        check_bits(bits)


@pytest.mark.parametrize("bits", [8, 9, 12])
def test_above_seven_bits_zero_is_a_level_and_nothing_is_clipped(bits: int) -> None:
    weight = torch.cat([torch.linspace(-1, 1, 20_000), torch.tensor([-3.0, 3.0])])[None]  # clipping these would pay
    for alphabet in (any_zero(weight, bits), uniform(weight, bits)):
        assert alphabet.nearest(torch.zeros(1, 1)).item() == 0
        assert (alphabet.nearest(weight) - weight).abs().max() <= alphabet.scale.item() / 2 * 1.001
