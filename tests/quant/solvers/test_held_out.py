"""Judging a solution on held-out images, against brute force on the images themselves."""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdq
from kdq.quant.calibrate.chunks import in_chunks
from kdq.quant.calibrate.layer import patches
from kdq.quant.calibrate.moments import Moments, PartedMoments
from kdq.quant.config import QuantConfig, held
from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.alphabets import uniform
from kdq.quant.solvers.held_out import FEW, PARTS, HeldOut, output_error, trusted
from kdq.quant.solvers.qronos import project


def inputs(rows: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of the float network, and of the quantized one."""
    made = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, 20, generator=made)
    return X, X + noise * torch.randn(X.shape, generator=made)


def moments(X: Tensor, Xq: Tensor) -> tuple[Tensor, Tensor]:
    return (Xq.T @ Xq)[None], (Xq.T @ X)[None]


def test_the_trusted_share_is_the_best_on_held_out_images() -> None:
    W = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(1))
    Y, Yq = inputs(500, 0.5, seed=2)
    shares = []
    for rows in (24, 60, 2000):
        G, C = moments(*inputs(rows, 0.5))
        shares.append(trusted(W, G, C, HeldOut(*moments(Y, Yq), 500)).item())
        assert trusted(W / 256, G, C, HeldOut(*moments(Y, Yq), 500)).item() == pytest.approx(shares[-1])
        D = project(W, G, C) - W
        errors = [(Y @ W[0].T - Yq @ (W + gamma * D)[0].T).square().sum() for gamma in torch.linspace(0, 1, 1001)]
        assert shares[-1] == pytest.approx(int(torch.stack(errors).argmin()) / 1000, abs=1e-3)
    assert shares == sorted(shares)  # few rows are fitted, many are known


def test_nothing_is_trusted_that_does_not_hold_elsewhere() -> None:
    W = torch.randn(1, 6, 20)
    X, Xq = inputs(30, 0.5)
    Y, _ = inputs(500, 0.0, seed=2)
    G, C = moments(X, Xq)
    assert trusted(W, G, C, HeldOut(*moments(Y, Y + 0 * Y), 500)) == 1  # equal inputs: there is nothing to judge
    assert trusted(W, G, G, HeldOut(*moments(Y, 2 * Y), 500)) == 0  # there is nothing to trust
    opposite = moments(2 * Y, Y)[1]  # asks for less where the others ask for more
    assert trusted(W, G, 2 * G, HeldOut(moments(Y, Y)[0], opposite - 1.5 * moments(Y, Y)[0], 500)) == 0


def test_moments_shrunk_by_a_share_have_that_share_of_the_correction() -> None:
    W = torch.randn(1, 6, 20)
    G, C = held(*moments(*inputs(300, 0.3)), 0.1)
    full, part = project(W, G, C), project(W, G, G + 0.3 * (C - G))
    assert torch.allclose(part, W + 0.3 * (full - W), atol=1e-5)


def test_a_layer_with_few_patches_is_rounded_where_that_is_better() -> None:
    def zeros(weight: Tensor, gram: Tensor, cross: Tensor, alphabet: Alphabet) -> Tensor:
        return alphabet.nearest(torch.zeros_like(weight))

    W, (X, Xq) = torch.randn(1, 6, 20), inputs(100, 0.1)
    G, C = moments(X, Xq)
    enough = FEW * 20 // PARTS  # of 20 columns, a part of all patches
    few = HeldOut(*moments(X[96:], Xq[96:]), enough - 1)
    config = QuantConfig(solver=zeros)
    values, alphabet = config.solve(W, G, C, 4, few)
    assert torch.equal(values, uniform(W, 4).nearest(W))
    assert torch.equal(alphabet.nearest(values), values)
    many = few._replace(patches=enough)
    assert torch.equal(config.solve(W, G, C, 4, many)[0], config.solve(W, G, C, 4)[0])


def test_the_output_error_is_that_of_the_outputs() -> None:
    W, Q, (X, Xq) = torch.randn(1, 6, 20), torch.randn(1, 6, 20), inputs(100, 0.1)
    error = output_error(W, Q, HeldOut(*moments(X, Xq), 100)) + (X @ W[0].T).square().sum()
    assert error.item() == pytest.approx((X @ W[0].T - Xq @ Q[0].T).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (9, 5, 6)),
        (nn.Conv2d(6, 4, 3, padding=1), (9, 6, 7, 5)),
        (nn.Conv2d(6, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=3, padding="valid"), (9, 6, 9, 8)),
        (nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), (9, 6, 7, 5)),
        (nn.Conv1d(6, 4, 4, padding="same"), (9, 6, 7)),
    ],
)
def test_held_out_moments_are_kept_apart(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, xq = torch.randn(shape), torch.randn(shape)
    parted, whole, last = PartedMoments(Moments, layer, False, True), Moments(layer, False), Moments(layer, False)
    for images, held_out in ((slice(7), False), (slice(7, 9), True)):
        parted.add(xq[images], x[images], held_out)
    whole.add(xq, x)
    last.add(xq[7:], x[7:])
    total = parted.total()
    assert torch.allclose(total.all, whole.total(), atol=1e-3)
    assert total.held_out is not None
    assert torch.equal(total.held_out, last.total())
    assert total.patches == patches(layer, x[7:]).shape[1]


def test_held_out_patches_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same images have twice as many."""
    parted = PartedMoments(Moments, nn.Linear(6, 4), False, True)
    for held_out in (False, True):
        parted.add(torch.randn(9, 6), torch.randn(9, 6), held_out)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda value: value.mul_(2))
    assert parted.total().patches == 18


def test_few_images_make_as_many_chunks_as_are_asked_for() -> None:
    def chunks(images: int, parts: int) -> list[int]:
        made = list(in_chunks(torch.arange(images).float().split(7), torch.device("cpu"), parts))
        assert torch.equal(torch.cat([x[:count] for x, count in made]), torch.arange(images).float())
        assert len({len(x) for x, _ in made}) == 1
        return [count for _, count in made]

    assert chunks(48, 4) == [12] * 4
    assert chunks(5, 4) == [1] * 5
    assert chunks(130, 4) == [32] * 4 + [2]
    assert chunks(300, 4) == [64] * 4 + [44]
    assert chunks(130, 1) == [64, 64, 2]
    assert chunks(3, 4) == [1] * 3


@pytest.mark.parametrize("images", [4, 12, 40])
def test_the_default_is_no_worse_than_rounding_on_other_images(images: int) -> None:
    """Networks wider than there are images: without held-out ones it was, by up to half (median of six: 1.1)."""
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        mixing = torch.randn(96, 96) / 10
        x, others = torch.randn(images, 96) @ mixing, torch.randn(512, 96) @ mixing

        def error(model: nn.Module = model, x: Tensor = x, others: Tensor = others, **options: Any) -> float:
            network, _ = kdq.quantize(model, [x], bits=4, **options)
            with torch.no_grad():
                return (network(others) - model(others)).square().mean().item()

        rounded = error(solver="rtn")
        for held_out, found in ratios.items():
            found.append(error(held_out=held_out) / rounded)
    assert statistics.mean(ratios[True]) < min(1, statistics.mean(ratios[False]))
    assert max(ratios[True]) < 1.1
