"""Mutual learning on one batch: what flows between the two students, and how much of it when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from kdq.distill.dml import DML
from kdq.distill.losses import mutual_loss
from kdq.utils.errors import KdqError


def sides(module: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both students' losses."""
    images, labels = batch
    torch.manual_seed(7)
    mine, theirs = module.student(images), module.peer(images)
    return tuple(
        torch.stack(list(module.terms(*pair, labels, 0.5).values())).sum() for pair in ((mine, theirs), (theirs, mine))
    )


def test_each_side_is_the_mutual_loss(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    module = make(DML)
    found = sides(module, batch)
    torch.manual_seed(7)
    mine, theirs = module.student(batch[0]), module.peer(batch[0])
    torch.testing.assert_close(found[0], mutual_loss(mine, theirs, batch[1], 0.5))
    torch.testing.assert_close(found[1], mutual_loss(theirs, mine, batch[1], 0.5))


def test_no_gradient_crosses_to_the_peer(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    module = make(DML)
    first, second = sides(module, batch)
    for loss, own, other in ((first, module.student, module.peer), (second, module.peer, module.student)):
        assert all(g is not None for g in torch.autograd.grad(loss, list(own.parameters()), retain_graph=True))
        crossed = torch.autograd.grad(loss, list(other.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is None for g in crossed)


def test_the_peer_counts_by_its_probabilities_alone(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    """Other logits with the same softmax change neither the loss nor its gradient."""
    module = make(DML)
    mine = torch.randn(12, 5, requires_grad=True)
    theirs = torch.randn(12, 5)
    results = []
    for peer in (theirs, theirs + torch.randn(12, 1)):
        loss = torch.stack(list(module.terms(mine, peer, batch[1], 1.0).values())).sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, mine)))
    torch.testing.assert_close(results[0], results[1])


def test_one_summed_backward_gives_each_its_own_gradient(
    make: Callable[..., Any], batch: tuple[Tensor, Tensor]
) -> None:
    module = make(DML)
    first, second = sides(module, batch)
    own = [
        torch.autograd.grad(loss, list(learner.parameters()), retain_graph=True)
        for loss, learner in ((first, module.student), (second, module.peer))
    ]
    (first + second).backward()
    for learner, expected in zip((module.student, module.peer), own, strict=True):
        torch.testing.assert_close([p.grad for p in learner.parameters()], list(expected))


def test_schedules(make: Callable[..., Any]) -> None:
    constant, kl_first = make(DML, weight=0.5), make(DML, weight=0.5, schedule="kl_first")
    assert [constant.weight_at(p) for p in (0.0, 0.5, 1.0)] == [0.5, 0.5, 0.5]
    assert [kl_first.weight_at(p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]
    with pytest.raises(KdqError, match="constant, kl_first"):
        make(DML, schedule="linear")


def test_equal_students_are_refused(make: Callable[..., Any]) -> None:
    module = make(DML)
    with pytest.raises(KdqError, match="equal weights"):
        make(DML, peer=module.student.network).setup("fit")


def test_one_scale_cannot_serve_two_optimizers(make: Callable[..., Any]) -> None:
    module = make(DML)
    module.trainer = L.Trainer(logger=False, accelerator="cpu")
    module.trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(KdqError, match="does not go with two learners"):
        module.setup("fit")
