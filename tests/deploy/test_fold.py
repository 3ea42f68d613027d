"""INT8 codes against the folded weights they stand for."""

import pytest
import torch
from torch import Tensor

from kdq.deploy.fold import int8_weight
from kdq.quant.packing.packed import QuantizedWeight
from kdq.quant.solvers.alphabets import ALPHABETS


def _coded(weight: Tensor, alphabet: str, bits: int) -> QuantizedWeight:
    found = ALPHABETS[alphabet](weight.flatten(1)[None], bits)
    codes = found.encode(weight.flatten(1)[None])[0].view(weight.shape)
    return QuantizedWeight.of(codes, found.scale.flatten(), found.zero.flatten(), found.levels)


@pytest.mark.parametrize("alphabet", ["uniform", "symmetric", "asymmetric", "ternary"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_levels_of_up_to_seven_bits_survive(alphabet: str, bits: int) -> None:
    coded = _coded(torch.randn(8, 4, 3, 3), alphabet, bits)
    factor, bias = torch.randn(8).double(), torch.randn(8)
    factor[0] = 0
    wanted = coded.decode() * factor.float().view(-1, 1, 1, 1)
    int8 = int8_weight(wanted, coded, factor, bias, input_scale=0.02)
    assert int8.codes.dtype == torch.int8
    assert bool((int8.scale > 0).all())
    assert int8.exact[1:].all()
    rebuilt = int8.codes.double().flatten(1) * int8.scale.double()[:, None]
    torch.testing.assert_close(rebuilt.float(), wanted.flatten(1), rtol=1e-6, atol=1e-9)
    assert all(len(row.unique()) <= coded.levels for row in int8.codes.flatten(1))


def test_what_does_not_fit_is_rounded_to_the_nearest_of_255_levels() -> None:
    weight, factor = torch.randn(8, 40), torch.tensor([-1.0, 1, -1, 1, -1, 1, -1, 1]).double()
    for coded in (None, _coded(weight, "uniform", 8), _coded(weight, "uniform", 12)):
        values = weight if coded is None else coded.decode()
        wanted = values * factor.float()[:, None]
        int8 = int8_weight(wanted, coded, factor, None, input_scale=1.0)
        error = (int8.codes * int8.scale[:, None] - wanted).abs()
        assert bool((error <= int8.scale[:, None] * 0.5001).all())
        assert (int8.scale <= 2 * wanted.abs().amax(1) / 127).all()
        if coded is not None and coded.bits == 8:
            assert int8.exact[factor > 0].all()
            assert error[int8.exact].max() < 1e-6
        else:
            assert not int8.exact.any()


def test_a_bias_of_a_channel_without_weights_fits_int32() -> None:
    weight, bias = torch.zeros(2, 4), torch.tensor([5.0, 0.0])
    int8 = int8_weight(weight, None, None, bias, input_scale=0.01)
    codes = bias.double() / (int8.scale.double() * 0.01)
    assert bool((codes.abs() < 2**31).all())
    assert codes[0] > 2**20  # and keeps its precision
    coded = QuantizedWeight.of(torch.ones(2, 4, dtype=torch.int64), torch.full((2,), 1e-12), torch.ones(2), 3)
    int8 = int8_weight(coded.decode(), coded, None, bias, input_scale=0.01)
    assert int8.exact.tolist() == [False, True]
    assert bias[0] / (int8.scale[0] * 0.01) < 2**31
