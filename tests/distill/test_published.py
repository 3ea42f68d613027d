"""The faults of the published students' training, each against kdq's own method and against formulas."""

import math

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.distill import TrainConfig
from kdq.distill.losses import decoupled_kl, distillation_kl, soft_cross_entropy, standardized
from kdq.distill.progress import TrainingProgress
from kdq.distill.published import HALF_COSINES, PublishedDKD, PublishedVKD, rising, unnormalized_terms
from kdq.utils.errors import KdqError


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 3, 2, 2), torch.randint(4, (16,))


def total(module: PublishedVKD | PublishedDKD, batch: tuple[Tensor, Tensor]) -> float:
    terms, _ = module.losses(*batch, TrainingProgress())
    return float(sum(terms.values()))


def logits(module: PublishedVKD | PublishedDKD, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return module.student(batch[0]), module.teacher(batch[0])


def test_vkd_maximises_the_cross_entropy_until_that_is_mended(batch: tuple[Tensor, Tensor]) -> None:
    for mended, alpha in (("none", 2.0), ("rising_rate", 2.0), ("negative_ce", 0.9), ("all", 0.9)):
        module = PublishedVKD(network(), network(), num_classes=4, mended=mended)
        student, teacher = logits(module, batch)
        expected = (1 - alpha) * soft_cross_entropy(student, batch[1]) + alpha * distillation_kl(student, teacher)
        assert total(module, batch) == pytest.approx(expected.item(), rel=1e-5)


def test_its_logits_are_standardized_and_its_labels_smoothed_where_that_is_asked(batch: tuple[Tensor, Tensor]) -> None:
    config = TrainConfig(label_smoothing=0.1)
    module = PublishedVKD(network(), network(), num_classes=4, standardize=True, config=config)
    student, teacher = logits(module, batch)
    kl = distillation_kl(standardized(student), standardized(teacher))
    expected = 2 * kl - soft_cross_entropy(student, batch[1], 0.1)
    assert total(module, batch) == pytest.approx(expected.item(), rel=1e-5)


def test_dkd_has_no_cross_entropy_and_terms_of_its_own_until_they_are_mended(batch: tuple[Tensor, Tensor]) -> None:
    for mended in ("none", "no_ce", "unnormalized", "all"):
        module = PublishedDKD(network(), network(), num_classes=4, mended=mended)
        student, teacher = logits(module, batch)
        parts = decoupled_kl if mended in ("unnormalized", "all") else unnormalized_terms
        tckd, nckd = parts(student, teacher, batch[1], 4.0)
        expected = tckd + 4 * nckd
        if mended in ("no_ce", "all"):
            expected = expected + soft_cross_entropy(student, batch[1])
        assert total(module, batch) == pytest.approx(expected.item(), rel=1e-5)


def test_the_unnormalized_terms_are_together_the_kl_and_one_has_no_bound() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(16, 5).double(), torch.randn(16, 5).double(), torch.randint(5, (16,))
    tckd, nckd = unnormalized_terms(student, teacher, labels, 3.0)
    p, q = ((x / 3).exp() / (x / 3).exp().sum(1, keepdim=True) for x in (student, teacher))
    each, rows = q * (q / p).log(), torch.arange(16)
    torch.testing.assert_close(tckd, each[rows, labels].mean())
    torch.testing.assert_close(tckd + nckd, each.sum(1).mean())
    sure = 50 * torch.nn.functional.one_hot(labels, 5).double()
    assert unnormalized_terms(sure, teacher, labels, 1.0)[0] < 0 <= decoupled_kl(sure, teacher, labels, 1.0)[0]


def test_the_rate_rises_again_five_times() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = rising(optimizer, 200), []
    for _ in range(200):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    period = 2 * 200 // HALF_COSINES
    expected = [0.5 * (1 + math.cos(2 * math.pi * step / period)) for step in range(200)]
    assert rates == pytest.approx(expected)
    assert sum(rate == pytest.approx(1.0) for rate in rates) == 5


@pytest.mark.parametrize("mended", ["none", "teacher_trains", "rising_rate"])
def test_a_training_has_the_faults_that_are_not_mended(batch: tuple[Tensor, Tensor], mended: str) -> None:
    torch.manual_seed(1)
    teacher = network()
    config = TrainConfig(lr=0.01, schedule="cosine", warmup=0.0)
    module = PublishedVKD(network(), teacher, num_classes=4, mended=mended, config=config)
    loader = DataLoader(TensorDataset(*batch), 4)
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, loader, loader)
    assert teacher.training == (mended != "teacher_trains")
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert (rate == pytest.approx(0.01)) == (mended != "rising_rate")  # ten halves of a cosine end where they began


def test_a_fault_that_a_method_does_not_have_is_refused() -> None:
    with pytest.raises(KdqError, match="negative_ce"):
        PublishedVKD(network(), network(), num_classes=4, mended="no_ce")
