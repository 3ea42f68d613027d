"""The published study's moments: of which patches, and how many of them."""

import pytest
import torch
from torch import nn

from kdq.quant.calibrate.moments import Moments
from kdq.quant.calibrate.sampled import SampledMoments
from tests.quant import literal


def test_all_patches_where_the_layer_meets_them_are_the_exact_moments() -> None:
    torch.manual_seed(0)
    layer, (x, y) = nn.Conv2d(4, 5, 3, padding=1), torch.randn(2, 6, 4, 9, 9)
    found, exact = SampledMoments(layer, False, share=1.0, apart=False), Moments(layer, False)
    for left, right in zip(x.split(2), y.split(2), strict=True):
        found.add(left, right)
        exact.add(left, right)
    torch.testing.assert_close(found.total(), exact.total(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("apart", "patches"), [(True, 9), (False, 81)])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_patches_a_kernel_apart_and_a_share_of_them(apart: bool, patches: int, share: float) -> None:
    """9 x 9 pixels hold nine 3 x 3 patches side by side; the rank of the sum tells how many were taken."""
    torch.manual_seed(0)
    x = torch.randn(1, 12, 9, 9)
    layer = nn.Conv2d(12, 5, 3, padding=0 if apart else 1)
    moments = SampledMoments(layer, True, share, apart)
    moments.add(x, x)
    taken = round(share * patches)
    assert torch.linalg.matrix_rank(moments.total()[0].double(), hermitian=True, rtol=1e-5) == taken
    if apart and share == 1:
        rows = literal.conv_patches(nn.Conv2d(12, 5, 3, stride=3), x.double())[0]
        torch.testing.assert_close(moments.total()[0].double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
