"""Every loss against a formula written another way, finite differences, and the limits it must survive."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kdq.distill.logit_losses import (
    correlation_losses,
    designed_kl,
    level_losses,
    normalized_losses,
    refined_losses,
    transformed_kl,
)
from kdq.distill.losses import (
    decoupled_kl,
    distillation_kl,
    soft_cross_entropy,
    standardized,
)

CLASSES = 7
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "ce": lambda s, t, y: soft_cross_entropy(s, y),
    "ce_smoothed": lambda s, t, y: soft_cross_entropy(s, y, 0.1),
    "kl": lambda s, t, y: distillation_kl(s, t, 3.0),
    "kl_standardized": lambda s, t, y: distillation_kl(standardized(s), standardized(t), 2.0),
    "tckd": lambda s, t, y: decoupled_kl(s, t, y, 4.0)[0],
    "nckd": lambda s, t, y: decoupled_kl(s, t, y, 4.0)[1],
    "inter": lambda s, t, y: correlation_losses(s, t, 4.0)[0],
    "intra": lambda s, t, y: correlation_losses(s, t, 4.0)[1],
    "nkd_target": lambda s, t, y: normalized_losses(s, t, y)[0],
    "nkd_others": lambda s, t, y: normalized_losses(s, t, y, 2.0)[1],
    "level_instance": lambda s, t, y: level_losses(s, t, 3.0)[0],
    "level_batch": lambda s, t, y: level_losses(s, t, 3.0)[1],
    "level_classes": lambda s, t, y: level_losses(s, t, 3.0)[2],
    "ttm": lambda s, t, y: transformed_kl(s, t, 5.0),
    "wttm": lambda s, t, y: transformed_kl(s, t, 5.0, weighted=True),
    "scd": lambda s, t, y: refined_losses(s, t, y, 4.0)[0],
    "mcd": lambda s, t, y: refined_losses(s, t, y, 4.0)[1],
    "designed": lambda s, t, y: designed_kl(s, y),
}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits (float64) and labels of 16 samples."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(16, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(CLASSES, (16,), generator=generator)


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """From its definition, not through torch's log_softmax."""
    powers = (logits / temperature).exp()
    return powers / powers.sum(1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def test_cross_entropy_against_its_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, labels = batch
    p = softmax(student)
    expected = -p[torch.arange(16), labels].log().mean()
    torch.testing.assert_close(soft_cross_entropy(student, labels), expected)
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    torch.testing.assert_close(soft_cross_entropy(student, one_hot), expected)
    smoothed = 0.9 * one_hot + 0.1 / CLASSES
    torch.testing.assert_close(soft_cross_entropy(student, labels, 0.1), -(smoothed * p.log()).sum(1).mean())


def test_kl_against_its_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = batch
    expected = 16 * kl(softmax(teacher, 4.0), softmax(student, 4.0)).mean()
    torch.testing.assert_close(distillation_kl(student, teacher, 4.0), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_decomposes_the_kl(batch: tuple[Tensor, Tensor, Tensor], temperature: float) -> None:
    """T^2 KL = T^2 mean_i[TCKD_i + (1 - p_t,i) NCKD_i] exactly (equation 5 of the paper)."""
    student, teacher, labels = batch
    not_target = 1 - softmax(teacher, temperature).gather(1, labels[:, None])[:, 0]
    parts = [decoupled_kl(*(x[i : i + 1] for x in batch), temperature) for i in range(16)]
    total = sum(tckd + rest * nckd for rest, (tckd, nckd) in zip(not_target, parts, strict=True)) / 16
    torch.testing.assert_close(total, distillation_kl(student, teacher, temperature), rtol=1e-12, atol=1e-12)


def test_decoupled_terms_against_their_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = batch
    rows, target = torch.arange(16), torch.zeros(16, CLASSES, dtype=torch.bool)
    target[rows, labels] = True
    binary, others = [], []
    for logits in (teacher, student):
        p = softmax(logits, 4.0)
        binary.append(torch.stack([p[rows, labels], 1 - p[rows, labels]], dim=1))
        # Equation 3 of the paper: a softmax over the logits of the other classes alone.
        others.append(softmax(logits[~target].view(16, CLASSES - 1), 4.0))
    tckd, nckd = decoupled_kl(student, teacher, labels, 4.0)
    torch.testing.assert_close(tckd, 16 * kl(*binary).mean())
    torch.testing.assert_close(nckd, 16 * kl(*others).mean())


def test_correlations_against_numpy(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q = (softmax(logits, 4.0).numpy() for logits in batch[:2])
    inter = 16 * np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = 16 * np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    assert [float(part) for part in correlation_losses(*batch[:2], 4.0)] == pytest.approx([inter, intra])


def test_levels_against_loops(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q = (softmax(logits, 3.0).numpy() for logits in batch[:2])
    found = []
    for a, b in ((p, q), (p.T, q.T)):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(a))]
        found.append(sum((np.dot(a[i], a[j]) - np.dot(b[i], b[j])) ** 2 for i, j in pairs) / len(a))
    expected = [9 * float((q * np.log(q / p)).sum(1).mean()), *found]
    assert [float(part) for part in level_losses(*batch[:2], 3.0)] == pytest.approx(expected)


def test_nkd_against_its_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    target, others = [], []
    for s, t, y in zip(*batch, strict=True):
        target.append(-softmax(t[None])[0, y] * softmax(s[None])[0, y].log())
        rest = torch.arange(CLASSES) != y
        p, q = (softmax(logits[None, rest], 2.0)[0] for logits in (s, t))
        others.append(-4 * (q * p.log()).sum())
    found = normalized_losses(*batch, 2.0)
    torch.testing.assert_close(found, (torch.stack(target).mean(), torch.stack(others).mean()))


def test_ttm_against_powers_of_probabilities(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = batch
    powers = softmax(teacher) ** 0.2
    total = powers.sum(1)
    each = kl(powers / total[:, None], softmax(student))
    torch.testing.assert_close(transformed_kl(student, teacher, 5.0), each.mean())
    torch.testing.assert_close(transformed_kl(student, teacher, 5.0, weighted=True), (total * each).mean())
    torch.testing.assert_close(transformed_kl(student, teacher, 1.0), distillation_kl(student, teacher, 1.0))


def test_rld_against_its_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Sample by sample; where no class is below the true one there is nothing to mask in, and nothing to learn."""
    scd, mcd = [], []
    for s, t, y in zip(*batch, strict=True):
        p, q = (softmax(logits[None], 4.0)[0] for logits in (s, t))
        mine, theirs = torch.stack([p[y], 1 - p[y]]), torch.stack([q.max(), 1 - q.max()])
        scd.append(16 * kl(theirs[None], mine[None])[0])
        below = t < t[y]
        rest = [softmax(logits[None, below], 4.0) for logits in (t, s)]
        mcd.append(16 * kl(*rest)[0] if below.any() else torch.zeros((), dtype=torch.float64))
    assert any(float(part) == 0 for part in mcd)
    torch.testing.assert_close(refined_losses(*batch, 4.0), (torch.stack(scd).mean(), torch.stack(mcd).mean()))


def test_rld_of_a_teacher_that_is_right_decomposes_the_kl_as_dkd_does(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = batch
    right = teacher.argmax(1)
    torch.testing.assert_close(refined_losses(student, teacher, right), decoupled_kl(student, teacher, right))
    for low in (0.49, 0.1):  # where half of the smallest float, divided by it, is none
        assert all(part.isfinite() for part in refined_losses(student.float(), teacher.float(), right, low))


def test_tfkd_against_its_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, labels = batch
    u = torch.full_like(student, 0.1 / (CLASSES - 1))
    u[torch.arange(16), labels] = 0.9
    torch.testing.assert_close(designed_kl(student, labels, 0.9, 20.0), kl(softmax(u, 20.0), softmax(student)).mean())


def test_standardized_rows_have_mean_zero_and_deviation_one(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z = standardized(batch[0])
    torch.testing.assert_close(z.mean(1), torch.zeros(16, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(16, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(standardized(5 * batch[0] + 3), z, atol=1e-6, rtol=0)


def test_equal_logits_have_a_finite_gradient_when_standardized() -> None:
    logits = torch.zeros(2, CLASSES, requires_grad=True)
    standardized(logits).square().sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = batch
    loss = LOSSES[name]
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = (batch[0].requires_grad_(), batch[1].requires_grad_(), batch[2])
    LOSSES[name](student, teacher, labels).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_hot_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Logits of +-1e4, right and wrong, in every combination: a softmax of them is exactly one-hot."""
    hot = 1e4 * (2 * torch.eye(3, dtype=dtype) - 1)
    student, teacher = hot.repeat_interleave(3, 0).requires_grad_(), hot.repeat(3, 1)
    loss = LOSSES[name](student, teacher, torch.arange(9) % 3)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", ["kl", "kl_standardized", "inter", "intra", "mcd"])
def test_equal_logits_leave_nothing_to_learn(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student = batch[0].requires_grad_()
    loss = LOSSES[name](student, batch[0].detach(), batch[2])
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)


def test_low_precision_logits_are_compared_in_float32(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher = batch[0].bfloat16(), batch[1].bfloat16()
    torch.testing.assert_close(
        distillation_kl(student, teacher), distillation_kl(student.float(), teacher.float()), rtol=0, atol=0
    )
