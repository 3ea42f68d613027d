"""G and H against unfolded patches, and against what several processes sum up."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdq
from kdq.quant.calibrate.moments import Moments
from tests.quant import literal


def unfolded(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(literal.conv_patches(layer, x.double()), literal.conv_patches(layer, y.double()), strict=True)
    return torch.stack([a.T @ b for a, b in pairs])


axis = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@example([(1, 1, 2, 1, 1)], 1, "zeros")  # every output position lies on padding
@given(st.lists(axis, min_size=1, max_size=2), st.sampled_from([1, 2, 4]), st.sampled_from(["zeros", "replicate"]))
def test_any_convolution(axes: list[tuple[int, ...]], groups: int, mode: str) -> None:
    size, kernel, stride, dilation, padding = zip(*axes, strict=True)
    if any(s + 2 * p < d * (k - 1) + 1 for s, k, _, d, p in axes):
        return  # no output at all
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d)[len(axes) - 1]
    layer = kind(4, 4, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    x, y = torch.randn(2, 3, 4, *size).double()
    for symmetric, left in ((True, x), (False, y)):
        moments = Moments(layer, symmetric)
        moments.add(left, x)
        moments.add(left[:1], x[:1])
        expected = unfolded(layer, left, x) + unfolded(layer, left[:1], x[:1])
        assert torch.allclose(moments.total(), expected, atol=1e-9)


def test_float32_sums_are_as_good_as_float32() -> None:
    layer, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(64, 16, 16, 16).relu()
    moments = Moments(layer, symmetric=True)
    moments.add(x, x)
    exact = unfolded(layer.double(), x, x)
    assert (moments.total() - exact).abs().max() < 1e-5 * exact.max()


def test_a_channel_that_fires_at_the_border_only_leaves_dead_columns_exactly_zero() -> None:
    layer, x = nn.Conv2d(2, 2, 3, padding=1), torch.randn(9, 2, 5, 5)
    x[:, 0, :-1] = 0  # the last row alone is seen: never by the taps of the first row of the kernel
    moments = Moments(layer, symmetric=True)
    moments.add(x, x)
    dead = moments.total()[0].view(2, 3, 3, 18)[0, 0]
    assert (dead == 0).all()


CASES: dict[str, dict[str, Any]] = {"weights": {}, "activations": {"act_bits": 6}, "corrected": {"correct": "bias"}}


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model, images = torch.load(f"{folder}/case.pt", weights_only=False)
    results = {}
    for case, options in CASES.items():
        quantized, report = kdq.quantize(model, [images[rank::world]], bits=3, solver="gpfq", refine=1, **options)
        results[case] = (
            {name: weight.codes for name, weight in quantized.quantized_weights.items()},
            [layer.error for layer in report.layers],
            {name: value for name, value in quantized.state_dict().items() if name.endswith("bias")},
        )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_the_codes_of_one(tmp_path: Path) -> None:
    """Each process sees half of the images; sums over processes differ from one process' in their last bits only, so
    that codes could differ at ties alone, of which this case has none."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    images = torch.randn(120, 3, 8, 8)
    torch.save((model, images), tmp_path / "case.pt")
    mp.spawn(_worker, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case, options in CASES.items():
        alone, report = kdq.quantize(model, [images], bits=3, solver="gpfq", refine=1, **options)
        for codes, errors, biases in (first[case], second[case]):
            for name, weight in alone.quantized_weights.items():
                assert torch.equal(codes[name], weight.codes), (case, name)
            assert errors == pytest.approx([layer.error for layer in report.layers], rel=1e-4)
            for name, bias in biases.items():
                assert torch.allclose(bias, alone.state_dict()[name], atol=1e-6), (case, name)
