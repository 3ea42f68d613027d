"""Each solver against what its paper says it minimises, computed the slow way."""

import pytest
import torch
from torch import Tensor

import kdq
from kdq import KdqError
from kdq.quant.config import SOLVERS, QuantConfig, held
from kdq.quant.solvers.alphabet import Alphabet
from kdq.quant.solvers.alphabets import ALPHABETS, paper, rescale, ternary, uniform
from kdq.quant.solvers.gpfq import gpfq
from kdq.quant.solvers.gptq import DAMPING, gptq
from kdq.quant.solvers.qronos import RIDGE, project, qronos
from kdq.quant.solvers.refine import refine, refit
from kdq.quant.solvers.rtn import rtn
from kdq.quant.solvers.spfq import spfq


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mixing = torch.randn(40, 40) / 6 + torch.eye(40)
    X = torch.relu(torch.randn(300, 40) @ mixing + 0.5)
    return torch.randn(8, 40), X, (X + 0.2 * torch.randn_like(X)).relu()


def error(W: Tensor, X: Tensor, Xq: Tensor, Q: Tensor) -> Tensor:
    """Per neuron."""
    return (X @ W.T - Xq @ Q.T).square().sum(0)


def on_alphabet(values: Tensor, alphabet: Alphabet) -> bool:
    return torch.allclose(alphabet.nearest(values), values, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_stays_on_the_alphabet_and_most_beat_rounding(
    problem: tuple[Tensor, Tensor, Tensor], name: str, bits: int
) -> None:
    W, X, Xq = problem
    alphabet = uniform(W, bits)
    Q = SOLVERS[name](W, Xq.T @ Xq, Xq.T @ X, alphabet)
    assert on_alphabet(Q, alphabet)
    if name in ("gpfq", "qronos"):
        assert error(W, X, Xq, Q).sum() < error(W, X, Xq, rtn(W, X, X, alphabet)).sum()


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"spfq"}))  # whose draws are of all groups
def test_groups_are_independent_problems(problem: tuple[Tensor, Tensor, Tensor], name: str) -> None:
    W, X, Xq = problem
    parts = [(W, Xq.T @ Xq, Xq.T @ X), (W.flip(0), 1e3 * X.T @ X, 1e3 * X.T @ X)]
    weight, gram, cross = (torch.stack(each) for each in zip(*parts, strict=True))
    together = SOLVERS[name](weight, gram, cross, uniform(weight, 3))
    for index, (w, G, C) in enumerate(parts):
        assert torch.equal(together[index], SOLVERS[name](w, G, C, uniform(w, 3)))


def test_gptq_against_its_recursion_with_explicit_inverses(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """After each rounding, least squares for all later weights (optimal brain surgeon, Hassibi & Stork 1993)."""
    W, _, Xq = problem
    alphabet, G = uniform(W, 3), (Xq.T @ Xq).double()
    G += DAMPING * G.diagonal().mean() * torch.eye(40)
    left, expected = W.double().clone(), torch.zeros_like(W).double()
    for t in range(40):
        q = alphabet.nearest(left[:, t : t + 1].float()).double()
        expected[:, t : t + 1] = q
        wrong = left[:, t : t + 1] - q
        left[:, t + 1 :] += wrong @ torch.linalg.solve(G[t + 1 :, t + 1 :], G[t + 1 :, t : t + 1]).T
    found = gptq(W, Xq.T @ Xq, torch.zeros(40, 40), alphabet)
    assert torch.equal(alphabet.encode(found), alphabet.encode(expected.float()))


@pytest.mark.parametrize("name", ["gptq", "qronos"])
def test_inputs_of_zeros_leave_rounding_and_those_of_no_number_are_refused(
    problem: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    W, X, _ = problem
    weight, gram = torch.stack([W, W]), torch.stack([X.T @ X, torch.zeros(40, 40)])
    alphabet = uniform(weight, 3)
    assert torch.equal(SOLVERS[name](weight, gram, gram, alphabet)[1], alphabet.nearest(weight)[1])
    gram[1] = torch.nan
    with pytest.raises(KdqError, match="not finite"):
        SOLVERS[name](weight, gram, gram, alphabet)


def test_qronos_projects_to_the_least_squares_weight(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, Xq = problem
    V = project(W, Xq.T @ Xq, Xq.T @ X)
    assert torch.allclose(V, torch.linalg.lstsq(Xq, X @ W.T).solution.T, atol=1e-3)
    G = Xq.T @ Xq
    assert torch.equal(project(W, G, G), W)
    alphabet = uniform(W, 3)
    assert torch.equal(qronos(W, G, G, alphabet), gptq(W, G, G, alphabet))  # nothing to correct when X~ = X


def test_what_no_image_says_leaves_the_weights_as_they_are() -> None:
    """Fewer images than inputs: nothing moves in the directions that none of them has."""
    torch.manual_seed(2)
    X = torch.randn(12, 40).double()
    W, Xq = torch.randn(8, 40).double(), X + 0.1 * torch.randn(12, 40)
    V = project(W, Xq.T @ Xq, Xq.T @ X)
    unseen = torch.eye(40) - torch.linalg.pinv(Xq) @ Xq
    assert torch.allclose(V @ unseen, W @ unseen)
    assert torch.allclose(Xq @ V.T, X @ W.T, atol=1e-3)


def test_the_projection_is_ridge_regression_towards_the_weight(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Explicit inverses, for groups of their own sizes: many images, fewer than inputs, and inputs of zeros."""
    W, X, Xq = (part.double() for part in problem)
    pairs = [(X, Xq), (30 * X[:12], 30 * Xq[:12]), (0 * X, 0 * Xq)]
    G, C = (torch.stack(each) for each in zip(*((b.T @ b, b.T @ a) for a, b in pairs), strict=True))
    V = project(W.expand(3, -1, -1), G, C)
    for v, g, c in zip(V[:2], G, C, strict=False):
        strength = RIDGE * max(row.abs().sum() for row in g)
        expected = W + W @ (c.T - g) @ torch.linalg.inv(g + strength * torch.eye(40))
        torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(V[2], W)
    G[1, 3, 3] = torch.nan
    with pytest.raises(KdqError, match="not finite"):
        project(W.expand(3, -1, -1), G, C)


def test_a_ridge_is_images_that_are_the_same_in_both_networks(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    _, X, Xq = problem
    G, C = held(Xq.T @ Xq, Xq.T @ X, 0.3)
    root = (0.3 * Xq.square().sum(0).mean()).sqrt() * torch.eye(40)
    X, Xq = torch.cat([X, root]), torch.cat([Xq, root])
    assert torch.allclose(G, Xq.T @ Xq, atol=1e-3)
    assert torch.allclose(C, Xq.T @ X, atol=1e-3)


def test_spfq_rounds_without_bias_and_repeats_itself(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    W = torch.full((1, 1), 0.3)
    alphabet = Alphabet(torch.ones(1, 1), torch.full((1, 1), 2.0), 4)
    draws = torch.stack([spfq(W, torch.ones(1, 1), torch.ones(1, 1), alphabet, seed) for seed in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert draws.mean().item() == pytest.approx(0.3, abs=0.04)  # four standard deviations
    W, X, Xq = problem
    assert torch.equal(*(spfq(W, Xq.T @ Xq, Xq.T @ X, uniform(W, 2), 5) for _ in range(2)))


@pytest.mark.parametrize("start", ["rtn", "gpfq", "qronos"])
def test_refinement_never_increases_the_error(problem: tuple[Tensor, Tensor, Tensor], start: str) -> None:
    W, X, Xq = problem
    G, H, alphabet = Xq.T @ Xq, Xq.T @ X, uniform(W, 2)
    Q, before = SOLVERS[start](W, G, H, alphabet), torch.full((8,), torch.inf)
    for _ in range(4):
        after = error(W, X, Xq, Q)
        assert (after <= before * (1 + 1e-5)).all()
        assert on_alphabet(Q, alphabet)
        before = after
        Q, alphabet = refine(W, G, H, Q, alphabet)
    assert after.sum() < error(W, X, Xq, SOLVERS[start](W, G, H, uniform(W, 2))).sum()


def test_groups_are_refined_apart(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, Xq = problem
    weight, gram, cross = torch.stack([W, W.flip(0)]), torch.stack([Xq.T @ Xq, X.T @ X]), torch.stack([Xq.T @ X] * 2)
    start = uniform(weight, 2)
    values, alphabet = refine(weight, gram, cross, start.nearest(weight), start)
    for index, parts in enumerate(zip(weight, gram, cross, strict=True)):
        own = uniform(parts[0], 2)
        alone, fitted = refine(*parts, own.nearest(parts[0]), own)
        assert torch.equal(alphabet.scale[index], fitted.scale)
        assert torch.equal(values[index], alone)


def test_a_refined_weight_is_a_minimum_in_every_coordinate_and_its_scale_of_all_scales() -> None:
    torch.manual_seed(1)
    X = torch.randn(60, 12)
    W, G = 0.1 * torch.randn(3, 12), X.T @ X
    alphabet = uniform(W, 2)
    Q, alphabet = refine(W, G, G, gpfq(W, G, G, alphabet), alphabet, sweeps=50)
    best = error(W, X, X, Q)
    codes = alphabet.encode(Q)
    for t in range(12):
        for code in range(4):
            other = codes.clone()
            other[:, t] = code
            assert (error(W, X, X, alphabet.decode(other)) >= best * (1 - 1e-5)).all()
    for factor in (0.99, 1.01):
        assert (error(W, X, X, Q * factor) >= best).all()


def test_refit_keeps_the_scale_of_a_row_of_zeros() -> None:
    alphabet = Alphabet(torch.ones(2, 1), torch.full((2, 1), 2.0), 4)
    Q, refitted = refit(torch.ones(2, 3), torch.eye(3), torch.tensor([[0.0, 0, 0], [1, 1, 1]]), alphabet)
    assert refitted.scale.flatten().tolist() == [1.0, 1.0]
    assert Q[0].abs().max() == 0
    assert refit(-torch.ones(2, 3), torch.eye(3), torch.ones(2, 3), alphabet)[1].scale.flatten().tolist() == [1.0, 1.0]


def test_alphabets_have_the_levels_they_say() -> None:
    weight = torch.randn(1, 5, 400)
    for name, choice in ALPHABETS.items():
        for bits in (2, 3, 8):
            alphabet = choice(weight, bits)
            expected = {"ternary": 3, "paper": 2**bits + 1}.get(name, 2**bits)
            codes = alphabet.encode(torch.linspace(-9, 9, 9001).expand(1, 5, -1))
            assert all(len(row.unique()) == expected == alphabet.levels for row in codes[0])
    assert ternary(weight).bits == 2
    assert paper(weight, 2).bits == 3
    for quantile in (0.9, 0.987, 0.996):
        sizes = weight.abs().quantile(quantile, -1, interpolation="nearest")
        radius = 2 * paper(weight, 2, 1.5, quantile).scale
        torch.testing.assert_close(radius, (1.5 * sizes.mean()).expand_as(radius))
    assert (
        QuantConfig(per_channel=False)
        .solve(weight, torch.eye(400)[None], torch.eye(400)[None], 3)[1]
        .scale.unique()
        .numel()
        == 1
    )


def test_the_place_of_zero_pays_at_two_bits() -> None:
    weight = torch.randn(1, 20, 500)
    errors = [
        (ALPHABETS[name](weight, 2).nearest(weight) - weight).square().sum(-1) for name in ("uniform", "symmetric")
    ]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()


def test_rescaling_lowers_the_error_of_the_outputs(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, _ = problem
    start = uniform(W, 2)
    better = rescale(W, X.T @ X, start)
    assert (error(W, X, X, better.nearest(W)) <= error(W, X, X, start.nearest(W)) * (1 + 1e-5)).all()
    assert error(W, X, X, better.nearest(W)).sum() < error(W, X, X, start.nearest(W)).sum()


def test_rescaling_is_near_the_best_of_all_scales_from_half_to_1_4_times(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Its scales lie 9 % apart: a fine grid over the same range has at most a tenth less error."""
    W, X, _ = problem
    for factor in (1.0, 1.7):  # where the best scale lies at another place
        start = uniform(W, 2)
        start = Alphabet(start.scale * factor, start.zero, start.levels)
        fine = [Alphabet(start.scale * f, start.zero, start.levels) for f in torch.linspace(0.5, 1.414, 200).tolist()]
        least = torch.stack([error(W, X, X, alphabet.nearest(W)) for alphabet in fine]).amin(0)
        found = error(W, X, X, rescale(W, X.T @ X, start).nearest(W))
        assert found.sum() < 1.1 * least.sum()


def test_the_order_of_columns_is_undone(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, Xq = problem
    G, H = (Xq.T @ Xq)[None], (Xq.T @ X)[None]
    values, _ = QuantConfig(solver="gpfq", order="gram").solve(W[None], G, H, 3)
    order = G[0].diagonal().argsort(descending=True)
    expected = gpfq(W[:, order], G[0][order][:, order], H[0][order][:, order], uniform(W, 3))
    assert torch.equal(values[0][:, order], expected)
    plain, _ = QuantConfig(solver="rtn").solve(W[None], G, H, 3)
    assert torch.equal(QuantConfig(solver="rtn", order="gram").solve(W[None], G, H, 3)[0], plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "magic"}, "rtn, gpfq"),
        ({"order": "up"}, "natural"),
        ({"scale": "big"}, "gram"),
        ({"refine": -1}, "refine=-1"),
        ({"refine": 1, "per_channel": False}, "per_channel"),
        ({"act_bits": 9}, "from 2 to 8"),
        ({"act_bits": 4, "act_range": "all"}, "percentile"),
        ({"first_last_bits": 40}, "2 to 32"),
    ],
)
def test_unknown_choices_are_named(relu_net: torch.nn.Module, options: dict, message: str) -> None:
    with pytest.raises(KdqError, match=message):
        kdq.quantize(relu_net, [torch.randn(4, 3, 9, 9)], **options)
