"""Images with a rectangle of another's pixels."""

import pytest
import torch

import kdq
from kdq.distill import QAD
from kdq.distill.cutmix import cutmix, draw
from kdq.distill.losses import distillation_kl
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError
from tests.distill.test_standalone import loader, network


def test_a_box_has_the_neighbours_pixels_and_the_rest_its_own() -> None:
    """Against boxes of whole pixels, cut out one by one."""
    torch.manual_seed(0)
    images = torch.randn(5, 3, 8, 12)
    expected, boxes = images.clone(), []
    for image, other in enumerate((1, 0, 3, 2, 0)):
        side = (image % 3 + 1) / 4  # of the image: more pixels across than down
        top, left = 1, 2
        down, across = (top + 4 * side) / 8, (left + 6 * side) / 12
        bottom, right = int(top + 8 * side), int(left + 12 * side)
        expected[image, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        boxes.append([down, across, side])
    mixed, share = cutmix(images, torch.tensor(boxes))
    assert torch.equal(mixed, expected)
    torch.testing.assert_close(share, (expected == images).all(1).float().mean((1, 2)))


def test_what_has_no_pixels_is_refused() -> None:
    with pytest.raises(KdqError, match=r"cutmix is of images \(n, channels, height, width\), not of \(4, 8\)"):
        cutmix(torch.zeros(4, 8), torch.zeros(4, 3))


def test_areas_are_drawn_evenly_and_over_two_processes_as_by_one() -> None:
    whole = draw(4000, 0, TrainingProgress(step=1, steps=9))
    areas = whole[:, 2].square().sort().values
    assert (areas - torch.linspace(0, 1, 4000)).abs().max() < 0.04  # Kolmogorov and Smirnov: 0.03 in one of a thousand
    halves = [draw(2000, 0, TrainingProgress(step=1, steps=9, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(draw(4000, 0, TrainingProgress(step=2, steps=9)), whole)


def test_what_is_trained_on_is_mixed_and_what_is_judged_is_not() -> None:
    student, _ = kdq.quantize(network(2), loader(), bits=2)
    module = QAD(student, teacher=network(2), num_classes=4, cutmix=True, alpha=0.5)
    images, labels = next(iter(loader()))
    moment = TrainingProgress(step=3, steps=9)
    plain = QAD(student, teacher=network(2), num_classes=4, alpha=0.5).eval()
    assert module.eval().losses(images, labels, moment)[0] == plain.losses(images, labels, moment)[0]
    module.train()
    mixed, share = cutmix(images, draw(len(images), module.seed, moment))
    terms, logits = module.losses(images, labels, moment)
    torch.testing.assert_close(terms["kl"], 0.5 * distillation_kl(logits, module.teacher(mixed)))
    other = labels.view(-1, 2).flip(1).flatten()  # of an even batch
    losses = -logits.log_softmax(1)
    rows = torch.arange(len(labels))
    expected = share * losses[rows, labels] + (1 - share) * losses[rows, other]
    torch.testing.assert_close(terms["ce"], 0.5 * expected.mean())
