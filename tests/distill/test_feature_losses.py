"""Every distance of features against loops over its definition in float64, and what it does not see."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdq.distill.feature_losses import (
    attention_loss,
    gaussian_loss,
    hierarchical_loss,
    hint_loss,
    margin_loss,
    pkt_loss,
    relation_losses,
    same_size,
    selectivity_loss,
    similarity_loss,
)

Array = np.ndarray[Any, Any]
LOSSES: dict[str, Callable[..., Any]] = {
    "hint": hint_loss,
    "margin": margin_loss,
    "hierarchical": hierarchical_loss,
    "attention": attention_loss,
    "similarity": similarity_loss,
    "distances": lambda s, t: relation_losses(s, t)[0],
    "angles": lambda s, t: relation_losses(s, t)[1],
    "pkt": pkt_loss,
    "gaussian": lambda s, t: gaussian_loss(s, t, torch.full((s.shape[1],), 0.75, dtype=s.dtype)),
    "selectivity": selectivity_loss,
}
N = 6


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    """A student's and a teacher's maps, float64."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, 5, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def definition(name: str, s: Array, t: Array) -> float:
    rows = range(N)
    if name == "hint":
        return float(np.mean([(a - b) ** 2 for a, b in zip(s.ravel(), t.ravel(), strict=True)]))
    if name == "margin":
        total = 0.0
        for mine, theirs in zip(s.transpose(1, 0, 2, 3), t.transpose(1, 0, 2, 3), strict=True):
            margin = np.mean([b for b in theirs.ravel() if b < 0])
            for a, b in zip(mine.ravel(), theirs.ravel(), strict=True):
                target = b if b > 0 else max(b, margin)
                total += 0.0 if a <= target <= 0 else (a - target) ** 2
        return float(total / N)
    if name == "hierarchical":
        levels = [np.mean((s - t) ** 2)]
        for size in (2, 1):  # fields of 2x2 and 4x4 pixels of the 4x4 maps
            a, b = (x.reshape(N, 5, size, 4 // size, size, 4 // size).mean((3, 5)) for x in (s, t))
            levels.append(np.mean((a - b) ** 2))
        return float(np.dot(levels, [1, 1 / 2, 1 / 4]) / 1.75)
    if name == "attention":
        attention = [[unit(sum(channel**2 for channel in image).ravel()) for image in x] for x in (s, t)]
        return float(np.mean((np.array(attention[0]) - np.array(attention[1])) ** 2))
    if name == "gaussian":
        return float(
            np.mean([((b - a) ** 2 / 0.75 + math.log(0.75)) / 2 for a, b in zip(s.ravel(), t.ravel(), strict=True)])
        )
    if name == "selectivity":
        values = []
        for mine, theirs in zip(s, t, strict=True):
            a, b = ([unit(channel.ravel()) for channel in x] for x in (mine, theirs))
            means = [np.mean([np.dot(x, y) ** 2 for x in u for y in v]) for u, v in ((a, a), (b, b), (a, b))]
            values.append(means[0] + means[1] - 2 * means[2])
        return float(np.mean(values))
    x, y = (features.reshape(N, -1) for features in (s, t))
    if name == "similarity":
        grams = [np.array([unit(np.array([np.dot(f[i], f[j]) for j in rows])) for i in rows]) for f in (x, y)]
        return float(np.sum((grams[0] - grams[1]) ** 2) / N**2)
    if name == "distances":
        d = [np.array([[np.linalg.norm(f[i] - f[j]) for j in rows] for i in rows]) for f in (x, y)]
        d = [matrix / (matrix.sum() / (N * (N - 1))) for matrix in d]
        return float(np.mean([huber(d[0][i, j] - d[1][i, j]) for i in rows for j in rows]))
    if name == "angles":

        def angle(f: Array, i: int, j: int, k: int) -> float:
            return 0.0 if j in (i, k) else float(np.dot(unit(f[i] - f[j]), unit(f[k] - f[j])))

        triples = [(i, j, k) for i in rows for j in rows for k in rows]
        return float(np.mean([huber(angle(x, *triple) - angle(y, *triple)) for triple in triples]))
    p, q = (np.array([[(np.dot(unit(f[i]), unit(f[j])) + 1) / 2 for j in rows] for i in rows]) for f in (y, x))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float(np.sum(p * np.log(p / q)) / N**2)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_against_its_definition(name: str, maps: tuple[Tensor, Tensor]) -> None:
    expected = definition(name, *(x.numpy() for x in maps))
    assert float(LOSSES[name](*maps)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences_and_reach_the_student_alone(name: str, maps: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x[:4, :2, :2].clone().requires_grad_() for x in maps)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student)
    LOSSES[name](student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"gaussian"}))
def test_an_equal_student_has_nothing_to_learn(name: str, maps: tuple[Tensor, Tensor]) -> None:
    student = maps[0].clone().requires_grad_()
    loss = LOSSES[name](student, maps[0])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-9, rtol=0)


def test_the_gaussian_is_best_at_the_teacher_and_at_the_variance_there_is(maps: tuple[Tensor, Tensor]) -> None:
    mean, teacher = maps
    variance = (teacher - mean).square().mean((0, 2, 3)).requires_grad_()
    gaussian_loss(mean, teacher, variance).backward()
    torch.testing.assert_close(variance.grad, torch.zeros_like(variance), atol=1e-12, rtol=0)
    assert gaussian_loss(teacher, teacher, variance) < gaussian_loss(mean, teacher, variance)


def test_what_losses_do_not_see(maps: tuple[Tensor, Tensor]) -> None:
    student, teacher = maps
    rotation = torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    turned = (student.flatten(1) @ rotation).view_as(student)
    close = {"rtol": 1e-6, "atol": 1e-9}
    for name, changed in {
        "attention": 3 * student.flip(1),
        "similarity": 3 * turned,
        "distances": 3 * turned + 5,
        "angles": 3 * turned + 5,
        "pkt": 3 * turned,
        "selectivity": 3 * student.flip(1),
    }.items():
        torch.testing.assert_close(LOSSES[name](changed, teacher), LOSSES[name](student, teacher), **close)


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_they_compute_in_float32(name: str, maps: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.bfloat16() for x in maps)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LOSSES[name](student.float(), teacher.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_rows_and_zeros_have_finite_values_and_gradients(name: str) -> None:
    for student in (torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)):
        student.requires_grad_()
        loss = LOSSES[name](student, torch.randn(4, 3, 2, 2))
        loss.backward()
        assert torch.isfinite(loss)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()


def test_up_to_one_negative_value_of_a_channel_is_its_own_margin(maps: tuple[Tensor, Tensor]) -> None:
    student, teacher = maps[0], maps[1].abs()
    teacher[2, 1, 0, 3] = -1.5  # the other channels have none
    counted = (student - teacher).square()
    counted[2, 1, 0, 3] = (student[2, 1, 0, 3] + 1.5).clamp(min=0).square()
    torch.testing.assert_close(margin_loss(student, teacher), counted.sum() / N)


def test_maps_meet_at_the_smaller_size() -> None:
    large, small = torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 6)
    expected = large.unflatten(2, (4, 2)).mean(3)
    for pair in (same_size(large, small), same_size(small, large)[::-1]):
        torch.testing.assert_close(pair[0], expected)
        assert pair[1] is small
