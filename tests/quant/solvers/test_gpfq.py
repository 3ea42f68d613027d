"""The G/H form against the published recursion, code for code."""

import pytest
import torch
from torch import Tensor

from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.alphabets import symmetric as uniform
from kdq.quant.solvers.gpfq import gpfq
from tests.quant import literal


def problem(columns: int, rows: int = 6, images: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(columns)
    X = torch.relu(torch.randn(images, columns) + 0.3)
    return torch.randn(rows, columns), X, (X + 0.1 * torch.randn_like(X)).relu()


def solve(W: Tensor, X: Tensor, Xq: Tensor, alphabet: Alphabet) -> Tensor:
    return alphabet.encode(gpfq(W, Xq.T @ Xq, Xq.T @ X, alphabet))


def expected(W: Tensor, X: Tensor, Xq: Tensor, alphabet: Alphabet) -> Tensor:
    values = literal.alphabet_values(alphabet.scale, alphabet.zero, alphabet.levels)
    return alphabet.encode(literal.gpfq(W, X, Xq, values).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 27, 150])
def test_same_codes_as_the_recursion(bits: int, columns: int) -> None:
    W, X, Xq = problem(columns)
    alphabet = uniform(W, bits)
    assert torch.equal(solve(W, X, Xq, alphabet), expected(W, X, Xq, alphabet))


def test_a_dead_input_column_gets_the_level_nearest_zero() -> None:
    W, X, Xq = problem(30)
    Xq[:, [0, 7, 29]] = 0
    X[:, 29] = 0
    alphabet = uniform(W, 3)
    found = gpfq(W, Xq.T @ Xq, Xq.T @ X, alphabet)
    assert torch.equal(alphabet.encode(found), expected(W, X, Xq, alphabet))
    assert (found[:, [0, 7, 29]] == 0).all()


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_codes_do_not_depend_on_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, X, Xq = problem(130)
    alphabet = uniform(W, 4)
    expected = solve(W, X, Xq, alphabet)
    monkeypatch.setattr("kdq.quant.solvers.columns.BLOCK", block)
    assert torch.equal(solve(W, X, Xq, alphabet), expected)


def test_leading_dimensions_are_independent_problems() -> None:
    problems = [problem(20), problem(20, images=90)]
    W, G, H = (torch.stack(parts) for parts in zip(*((W, Q.T @ Q, Q.T @ X) for W, X, Q in problems), strict=True))
    alphabet = uniform(W, 3)
    together = gpfq(W, G, H, alphabet)
    for index in range(2):
        alone = gpfq(W[index], G[index], H[index], uniform(W[index], 3))
        assert torch.equal(together[index], alone)


def test_less_error_than_rounding() -> None:
    W, X, Xq = problem(100)
    alphabet = uniform(W, 3)

    def error(Q: Tensor) -> Tensor:
        return (X @ W.T - Xq @ Q.T).square().sum()

    assert error(gpfq(W, Xq.T @ Xq, Xq.T @ X, alphabet)) < 0.8 * error(alphabet.nearest(W))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.mark.parametrize("device", DEVICES)
def test_sums_in_another_order_change_codes_at_ties_only(device: str) -> None:
    """What tells devices apart is the order in which they add: here the images in another order, and on a GPU its own.
    A row's first code that differs must have come from a value half-way between two levels; what follows it makes up
    for another error and may differ at will."""
    W, X, Xq = problem(144, rows=4000, images=3000)
    X, Xq = X + 8, Xq + 8  # columns that agree in most of their length lose digits: ties come up
    alphabet, other = uniform(W, 4), torch.randperm(3000)
    one = solve(W, X, Xq, alphabet)
    Xd, Xqd = X[other].to(device), Xq[other].to(device)
    moved = Alphabet(alphabet.scale.to(device), alphabet.zero.to(device), alphabet.levels)
    two = moved.encode(gpfq(W.to(device), Xqd.T @ Xqd, Xqd.T @ Xd, moved)).cpu()
    values, G, H = one.double() - alphabet.zero, Xq.double().T @ Xq.double(), Xq.double().T @ X.double()
    differ = (one != two).any(1)
    assert 0 < differ.sum() < 40  # of 4 000 rows
    for row in differ.nonzero().flatten().tolist():
        t = int((one[row] != two[row]).nonzero()[0])
        before = W[row, : t + 1].double() @ H[t, : t + 1] / alphabet.scale[row] - values[row, :t] @ G[t, :t]
        value = float(before / G[t, t])
        assert abs(abs(value - round(value)) - 0.5) < 1e-3, (row, t, value)
