"""The methods with a teacher, as losses on one batch: what they equal in their limits, and what they leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.distill import CTKD, DIST, MLKD, NKD, RLD, TTM, CrossEntropy, TfKD
from kdq.distill.dkd import DKD
from kdq.distill.dml import DML
from kdq.distill.learner import MovingAverage
from kdq.distill.logit_losses import (
    correlation_losses,
    designed_kl,
    level_losses,
    normalized_losses,
    refined_losses,
    transformed_kl,
)
from kdq.distill.losses import decoupled_kl, distillation_kl, standardized
from kdq.distill.mixup import Mixup, mix
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD
from kdq.utils.errors import KdqError

Gradients = Callable[..., dict[str, Tensor]]
TAUGHT: dict[type[DistillationModule], dict[str, Any]] = {
    VKD: {"alpha": 0.9, "temperature": 4.0},
    Mixup: {"alpha": 0.9, "temperature": 4.0},
    DKD: {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 0.5},
    DIST: {"beta": 2.0, "gamma": 3.0, "temperature": 4.0},
    NKD: {"gamma": 1.5, "temperature": 2.0},
    TTM: {"weight": 4.0, "temperature": 5.0, "weighted": True},
    RLD: {"alpha": 2.0, "beta": 8.0, "temperature": 4.0, "warmup": 0.5},
    MLKD: {"alpha": 0.7, "temperature": 2.0},
}
#: The terms of those that are no more than a loss each, from logits and labels, when their warm-up is over.
TERMS: dict[type[DistillationModule], Callable[..., Any]] = {
    VKD: lambda s, t, y: 0.9 * distillation_kl(s, t, 4.0),
    DKD: lambda s, t, y: sum(w * part for w, part in zip((1, 8), decoupled_kl(s, t, y, 4.0), strict=True)),
    DIST: lambda s, t, y: sum(w * part for w, part in zip((2, 3), correlation_losses(s, t, 4.0), strict=True)),
    NKD: lambda s, t, y: sum(w * part for w, part in zip((1, 1.5), normalized_losses(s, t, y, 2.0), strict=True)),
    TTM: lambda s, t, y: 4 * transformed_kl(s, t, 5.0, weighted=True),
    RLD: lambda s, t, y: sum(w * part for w, part in zip((2, 8), refined_losses(s, t, y, 4.0), strict=True)),
    MLKD: lambda s, t, y: 0.7 * sum(sum(level_losses(s, t, at)) for at in (1.0, 1.5, 2.0, 2.5, 3.0)),
}


def total(module: DistillationModule, batch: tuple[Tensor, Tensor], moment: TrainingProgress | None = None) -> Tensor:
    torch.manual_seed(7)
    terms, _ = module.losses(*batch, moment or TrainingProgress())
    return torch.stack(list(terms.values())).sum()


def logits(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return module.student(images), module.teacher(images)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("method", TERMS)
def test_methods_of_logits_are_cross_entropy_and_their_terms(
    make: Callable[..., Any], batch: tuple[Tensor, Tensor], method: type[DistillationModule], standardize: bool
) -> None:
    """``standardize`` composes with each: the cross-entropy keeps the raw logits, the terms see z-scores."""
    module = make(method, standardize=standardize, **TAUGHT[method])
    student, teacher = logits(module, batch[0])
    compared = (standardized(student), standardized(teacher)) if standardize else (student, teacher)
    expected = {VKD: 0.1, MLKD: 0.3}.get(method, 1) * F.cross_entropy(student, batch[1])  # type: ignore[call-overload]
    expected += TERMS[method](*compared, batch[1])
    torch.testing.assert_close(total(module, batch, TrainingProgress(epoch=1, epochs=2)), expected)
    if "warmup" in TAUGHT[method]:
        torch.testing.assert_close(total(module, batch), F.cross_entropy(student, batch[1]))


def test_ctkd_is_vkd_whose_temperature_moves_against_the_student(
    make: Callable[..., Any], batch: tuple[Tensor, Tensor], gradients: Gradients
) -> None:
    vkd = make(VKD, alpha=0.9, temperature=5.0)
    module = make(CTKD, alpha=0.9, temperature=5.0, low=1.0, high=21.0, warmup=0.5)
    torch.testing.assert_close(total(module, batch), total(vkd, batch))
    x = torch.tensor(0.2).logit().requires_grad_()
    expected = distillation_kl(*logits(module, batch[0]), 1 + 20 * x.sigmoid())
    (slope,) = torch.autograd.grad(0.9 * expected, x)
    for epoch, weight in ((0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0)):
        moment = TrainingProgress(epoch=epoch, epochs=4)
        found = gradients(module, moment)
        torch.testing.assert_close(found.pop("raw"), -weight * slope)
        torch.testing.assert_close(found, gradients(vkd, moment))
    assert any(p is module.raw for p in module.trained_parameters(module.student))
    with pytest.raises(KdqError, match=r"temperature=30.0 must lie between method.low=1.0 and method.high=21.0"):
        make(CTKD, temperature=30.0)


def test_tfkd_has_no_teacher(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    module = make(TfKD, alpha=0.3)
    torch.manual_seed(7)
    student = module.student(batch[0])
    expected = 0.7 * F.cross_entropy(student, batch[1]) + 0.3 * designed_kl(student, batch[1])
    torch.testing.assert_close(total(module, batch), expected)


def test_vkd_without_its_teacher_is_the_baseline(make: Callable[..., Any], gradients: Gradients) -> None:
    moment = TrainingProgress(epoch=1, epochs=2)
    taught, alone = make(VKD, alpha=0.0, temperature=4.0), make(CrossEntropy)
    torch.testing.assert_close(gradients(taught, moment), gradients(alone, moment), rtol=0, atol=0)


def test_a_trainer_may_go_on_beyond_the_recipe(make: Callable[..., Any]) -> None:
    assert TrainingProgress(epoch=1, epochs=2, step=1, steps=4).share == 0.625
    assert TrainingProgress(epoch=3, epochs=1).share == 1
    assert make(DML, schedule="kl_first").weight_at(TrainingProgress(epoch=3, epochs=1).share) == 0  # not below


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0)])
def test_dkd_warms_up(make: Callable[..., Any], batch: tuple[Tensor, Tensor], progress: float, weight: float) -> None:
    module = make(DKD, **TAUGHT[DKD])
    moment = TrainingProgress(epoch=int(progress * 4), epochs=4)
    student, teacher = logits(module, batch[0])
    tckd, nckd = decoupled_kl(student, teacher, batch[1], 4.0)
    expected = F.cross_entropy(student, batch[1]) + weight * (tckd + 8 * nckd)
    torch.testing.assert_close(total(module, batch, moment), expected)


def test_mixup_with_lambda_one_is_vkd(
    make: Callable[..., Any], gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = TrainingProgress(epoch=1, epochs=2, step=3, steps=9)
    vkd = gradients(make(VKD, **TAUGHT[VKD]), moment)
    torch.testing.assert_close(gradients(make(Mixup, mixup_alpha=0.0, **TAUGHT[Mixup]), moment), vkd)
    monkeypatch.setattr(Mixup, "draw", lambda self, count, moment: torch.ones(count))
    torch.testing.assert_close(gradients(make(Mixup, **TAUGHT[Mixup]), moment), vkd)


def test_mixup_shows_both_networks_one_mixture(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    """The loss, written out for the pairs (0, 1), (2, 3), ... and one lambda."""
    module, moment = make(Mixup, **TAUGHT[Mixup]), TrainingProgress(step=5, steps=9)
    seen: list[Tensor] = []
    for network in (module.student.network, module.teacher.network):
        network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = total(module, batch, moment)
    images, labels = batch
    lam = float(moment.random(module.seed).beta(1.0, 1.0, 1)[0])
    partner = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])
    torch.testing.assert_close(seen[0], lam * images + (1 - lam) * images[partner])
    assert torch.equal(seen[0], seen[1])
    student, teacher = logits(module, seen[0])
    ce = lam * F.cross_entropy(student, labels) + (1 - lam) * F.cross_entropy(student, labels[partner])
    torch.testing.assert_close(found, 0.1 * ce + 0.9 * distillation_kl(student, teacher, 4.0))


def test_mixup_draws_by_moment_alone(make: Callable[..., Any]) -> None:
    module = make(Mixup, **TAUGHT[Mixup])
    moment = TrainingProgress(epoch=3, step=4, steps=9)
    assert torch.equal(module.draw(6, moment), module.draw(6, moment))
    assert len(module.draw(6, moment).unique()) == 1
    others = [TrainingProgress(epoch=3, step=5, steps=9), TrainingProgress(epoch=4, step=4, steps=9)]
    assert all(not torch.equal(module.draw(6, moment), module.draw(6, other)) for other in others)


def test_mixup_per_sample_is_the_same_over_two_processes(
    make: Callable[..., Any], batch: tuple[Tensor, Tensor]
) -> None:
    module = make(Mixup, per_sample=True, **TAUGHT[Mixup])
    whole = module.draw(12, TrainingProgress(step=1, steps=9))
    assert len(whole.unique()) == 12
    halves = [module.draw(6, TrainingProgress(step=1, steps=9, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)
    mixed = [mix(part, lam) for part, lam in zip(batch[0].split(6), halves, strict=True)]
    assert torch.equal(torch.cat(mixed), mix(batch[0], whole))


def test_mix_of_an_odd_number() -> None:
    torch.testing.assert_close(
        mix(torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 0.25)), torch.tensor([1.75, 1.25, 1.75])
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Mixup, {"mixup_alpha": -1.0}, "mixup_alpha=-1.0 must be a number of at least 0"),
        (VKD, {"alpha": 1.5}, "alpha=1.5 must be a number from 0 to 1"),
        (VKD, {"alpha": "half"}, "alpha='half' must be a number"),
        (VKD, {"temperature": 0.0}, "temperature=0.0 must be a number of at least 0.01"),
        (DKD, {"beta": -2.0}, "beta=-2.0"),
        (DKD, {"warmup": float("nan")}, "warmup=nan must be a number from 0 to 1"),
    ],
)
def test_impossible_options(
    make: Callable[..., Any], kind: type[DistillationModule], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(KdqError, match=message):
        make(kind, **{**TAUGHT[kind], **changes})


@pytest.mark.parametrize("method", [CrossEntropy, *TAUGHT])
def test_label_smoothing_reaches_every_method(
    make: Callable[..., Any], batch: tuple[Tensor, Tensor], method: type[DistillationModule]
) -> None:
    options = TAUGHT.get(method, {})
    plain, smooth = make(method, **options), make(method, recipe={"label_smoothing": 0.2}, **options)
    torch.manual_seed(7)
    plain_ce = plain.losses(*batch, TrainingProgress())[0]["ce"]
    torch.manual_seed(7)
    assert smooth.losses(*batch, TrainingProgress())[0]["ce"] != plain_ce


@pytest.mark.parametrize("method", TAUGHT)
def test_the_teacher_is_out_of_sight(
    make: Callable[..., Any], batch: tuple[Tensor, Tensor], method: type[DistillationModule]
) -> None:
    module = make(method, **TAUGHT[method])
    teacher = module.teacher.network
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    module.train()
    total(module, batch).backward()
    assert not any(part.training for part in teacher.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    mine = {id(p) for p in module.parameters()}
    assert not any(id(p) in mine for p in teacher.parameters())
    assert set(module.state_dict()) == set(make(CrossEntropy).state_dict())


def test_moving_average_against_its_formula() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = MovingAverage(network, decay=0.5)
    expected = {name: tensor.double() for name, tensor in network.state_dict().items()}
    for step in range(12):
        for parameter in network.parameters():
            parameter.data.normal_()
        network(torch.randn(5, 3))
        average.update(network)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    state = average.network.state_dict()
    assert int(state["1.num_batches_tracked"]) == 12
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(state[name].double(), expected[name])
    assert not average.train().training
    assert not any(p.requires_grad for p in average.parameters())
