"""The training benchmark compares like with like."""

from typing import Any

import pytest
import torch
from torch import nn

from kdq.bench.loops import Step, random_images
from kdq.bench.train import gflops_per_image, roofline, trainings_of
from kdq.distill import CrossEntropy
from kdq.distill.dkd import DKD
from kdq.distill.dml import DML
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD

KINDS: dict[str, tuple[type[DistillationModule], dict[str, Any]]] = {
    "baseline": (CrossEntropy, {}),
    "vkd": (VKD, {"alpha": 0.9, "temperature": 4.0}),
    "dkd": (DKD, {"alpha": 1.0, "beta": 2.0, "temperature": 4.0, "warmup": 0.0}),
    "dml": (DML, {"weight": 1.0, "temperature": 1.0}),
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


@pytest.mark.parametrize("method", KINDS)
def test_the_loops_take_the_loss_that_kdq_takes(method: str) -> None:
    kind, options = KINDS[method]
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    others = {name: network(2) for name in kind.takes}
    module = kind(network(1), **others, num_classes=10, **options)
    if isinstance(module, DML):
        mine, theirs = module.student(images), module.peer(images)
        terms = [module.terms(*pair, labels, 1.0) for pair in ((mine, [theirs]), (theirs, [mine]))]
        expected = sum(sum(part.values()) for part in terms)
    else:
        expected = sum(module.losses(images, labels, TrainingProgress(step=1, steps=2))[0].values())
    loss, _ = Step(method, network(1), network(2), "32-true")(images, labels)
    torch.testing.assert_close(loss, torch.as_tensor(expected).detach())


def test_random_images_are_the_same_every_time() -> None:
    one, two = random_images(50), random_images(50)
    assert one.train_images.shape == (50, 32, 32, 3)
    assert one.train_digest == two.train_digest


def test_the_roofline_counts_three_passes_for_who_learns_and_one_for_who_teaches() -> None:
    """From the multiply-accumulates of He et al. 2016: 0.041 and 0.127 billion."""
    for method, passes in {
        "teacher": 3 * 0.127,
        "baseline": 3 * 0.041,
        "vkd": 3 * 0.041 + 0.127,
        "dml": 6 * 0.041,
    }.items():
        assert gflops_per_image(method, "resnet20", "resnet56") == pytest.approx(2 * passes, rel=0.02)
    measured = {"precision": "bf16-mixed", "loop": "plain", "method": "baseline", "images_per_second": 100.0}
    measured |= {"student": "resnet20", "teacher": "resnet56"}
    peaks = {"gflops_float32": 100.0, "gflops_bfloat16": 200.0}
    assert roofline(measured, peaks) == pytest.approx(0.246, rel=0.02)  # the plain loop computes in float32
    assert roofline({**measured, "loop": "bare"}, peaks) == pytest.approx(0.123, rel=0.02)


def test_methods_beyond_the_loops_are_measured_with_the_command_alone() -> None:
    cases = trainings_of("methods", ["vkd", "at"])
    assert [(case.method, case.loop) for case in cases] == [
        *(("vkd", loop) for loop in ("kdq", "bare", "plain")),
        ("at", "kdq"),
    ]
