"""Mutual learning: what flows between the students, how much of it when, and which of them is the product."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.distill.config import TrainConfig
from kdq.distill.dml import DML
from kdq.distill.losses import distillation_kl
from kdq.models import CifarResNet, WideResNet
from kdq.utils.errors import KdqError


def sides(module: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both students' losses."""
    images, labels = batch
    torch.manual_seed(7)
    mine, theirs = module.student(images), module.peer(images)
    return tuple(
        torch.stack(list(module.terms(own, [other], labels, 0.5).values())).sum()
        for own, other in ((mine, theirs), (theirs, mine))
    )


def test_each_side_is_the_mutual_loss(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    module = make(DML)
    found = sides(module, batch)
    torch.manual_seed(7)
    mine, theirs = module.student(batch[0]), module.peer(batch[0])
    for loss, own, other in zip(found, (mine, theirs), (theirs, mine), strict=True):
        expected = F.cross_entropy(own, batch[1]) + 0.5 * distillation_kl(own, other, 1.0)
        torch.testing.assert_close(loss, expected)


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
        loss = torch.stack(list(module.terms(mine, [peer], batch[1], 1.0).values())).sum()
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
    with pytest.raises(KdqError, match="the student and the peer of dml start from equal weights"):
        make(DML, peer=module.student.network).setup("fit")
    with pytest.raises(KdqError, match="the peer and the peer2 of dml start from equal weights"):
        make(DML, peer=module.peer.network, peer2=module.peer.network).setup("fit")


def test_one_scale_cannot_serve_two_optimizers(make: Callable[..., Any]) -> None:
    module = make(DML)
    module.trainer = L.Trainer(logger=False, accelerator="cpu")
    module.trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(KdqError, match="does not go with several learners"):
        module.setup("fit")


def test_what_is_no_peer_is_refused(make: Callable[..., Any]) -> None:
    for wrong in ({"peers": make(DML).peer.network}, {"peer_weight": 0.5}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            make(DML, **wrong)
    with pytest.raises(KdqError, match="peer2=3 is no network"):
        make(DML, peer2=3)


def test_a_student_learns_from_the_mean_of_its_peers(make: Callable[..., Any]) -> None:
    """Against the paper's sum over the other students (equation 9), in float64."""
    generator = torch.Generator().manual_seed(3)
    mine, *theirs = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    def log_p(z: Tensor) -> Any:
        x = z.numpy() / 2.0
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    expected = sum((np.exp(log_p(z)) * (log_p(z) - log_p(mine))).sum() / 6 for z in theirs) * 4.0 / 3
    terms = make(DML, temperature=2.0).terms(mine, theirs, labels, 0.7)
    assert terms["kl"].item() == pytest.approx(0.7 * expected, rel=1e-12)
    assert terms["ce"].item() == pytest.approx(torch.nn.functional.cross_entropy(mine, labels).item(), rel=1e-12)


def test_every_portion_is_stepped_and_averaged(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    """An epoch of three batches, two a step, has two steps; the average follows each."""
    module = make(DML, {"accumulate": 2, "ema": 0.9})
    flags = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **flags)
    trainer.fit(module, DataLoader(TensorDataset(*batch), len(batch[0]) // 3))
    assert [learner.average.updates for learner in module.learners.values()] == [4, 4]


def test_its_schedule_ends_with_its_last_step(make: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> None:
    """Two epochs of three batches, two a step: four steps of each optimizer. By value, too, gradients are clipped."""
    module = make(DML, {"accumulate": 2, "schedule": "cosine", "clip_grad": 1.0})
    flags = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    loader = DataLoader(TensorDataset(*batch), len(batch[0]) // 3)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", gradient_clip_algorithm="value", **flags)
    trainer.fit(module, loader)
    assert [scheduler.last_epoch for scheduler in module.lr_schedulers()] == [4, 4]
    assert [scheduler.get_last_lr()[0] for scheduler in module.lr_schedulers()] == pytest.approx([0.0, 0.0], abs=1e-9)
    module = make(DML, {"schedule": "cosine"})
    L.Trainer(max_steps=8, accelerator="cpu", **flags).fit(module, loader)  # of both together
    assert [scheduler.last_epoch for scheduler in module.lr_schedulers()] == [4, 4]
    assert [scheduler.get_last_lr()[0] for scheduler in module.lr_schedulers()] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert module.progress(0).epochs == 4 / 3


class Passed(DML):
    """A method of one's own that passes on what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`")
@pytest.mark.parametrize("kind", [DML, Passed])
def test_any_of_several_architectures_is_the_product(kind: type[DML], tmp_path: Path) -> None:
    def networks() -> dict[str, nn.Module]:
        torch.manual_seed(0)
        small = {"num_classes": 4, "in_channels": 1}
        kinds = CifarResNet(8, width=0.25, **small), WideResNet(10, **small), CifarResNet(14, width=0.5, **small)  # type: ignore[arg-type]
        return dict(zip(("student", "peer", "peer2"), kinds, strict=True))

    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for product in ("student", "peer", "peer2"):
        module = kind(**networks(), num_classes=4)
        labels = module.learners[product].network.eval()(images).argmax(1)  # it knows them all from the start
        loader = DataLoader(TensorDataset(images, labels), 16)
        frozen = TrainConfig(lr=0.0)
        module = kind(**networks(), num_classes=4, config=frozen)
        for learner in module.learners.values():
            learner.network.apply(lambda m: setattr(m, "momentum", 0.0) if isinstance(m, nn.BatchNorm2d) else None)
        flags: Any = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(**flags, max_epochs=1, logger=False, default_root_dir=tmp_path)
        trainer.fit(module, loader, loader)
        assert module.eval_network is module.learners[product].network
        loaded = kind.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
        assert list(loaded.learners) == ["student", "peer", "peer2"]
        assert torch.equal(loaded.eval()(images), module.eval()(images))
