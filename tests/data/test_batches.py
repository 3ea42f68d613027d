"""Split, augmentation and loaders, against loops over single images."""

import dataclasses

import pytest
import torch

from kdq.data.augment import Augment, Preprocess
from kdq.data.image_set import ImageSet
from kdq.data.images import Images
from kdq.data.loader import EvalLoader, TrainLoader
from kdq.data.sets import digits
from kdq.data.source import Resident, Streamed, source
from kdq.data.split import split
from kdq.utils.errors import KdqError
from tests.conftest import data_config


def test_split_parts_are_disjoint_complete_and_seeded() -> None:
    one, same, other = split(1000, 0.1, 0), split(1000, 0.1, 0), split(1000, 0.1, 1)
    assert sorted(torch.cat([one.train, one.val]).tolist()) == list(range(1000))
    assert len(one.val) == 100
    assert torch.equal(one.train, same.train)
    assert not torch.equal(one.val, other.val)


def test_calibration_images_are_training_images_and_nested_by_count() -> None:
    parts = split(1000, 0.1, 0, train_limit=200)
    few, many = parts.calibration(50, seed=3), parts.calibration(500, seed=3)
    assert set(many.tolist()) == set(parts.train.tolist())
    assert torch.equal(many[:50], few)
    assert not torch.equal(parts.calibration(50, seed=4), few)


@pytest.mark.parametrize(("fraction", "limit"), [(0.0, None), (1.0, None), (-0.5, None), (1e-9, None), (0.1, 0)])
def test_a_split_without_validation_or_training_is_refused(fraction: float, limit: int | None) -> None:
    with pytest.raises(KdqError, match=r"data\.(val_fraction|train_limit)="):
        split(1000, fraction, 0, limit)


@pytest.mark.parametrize(("side", "batch"), [(8, 70), (224, 64), (896, 4)])
def test_evaluation_batches_hold_fewer_images_the_larger_they_are(side: int, batch: int) -> None:
    labels = torch.arange(70) % 2
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(70, side, side, 1)
    images = Images(ImageSet(pixels, labels, pixels, labels, ("a", "b")), data_config(num_classes=2, mean=[0], std=[1]))
    loader = images.evaluation("test", torch.device("cpu"))
    assert len(next(iter(loader))[0]) == batch


def test_a_limited_test_set_has_images_of_every_class() -> None:
    """A folder of images is read class by class."""
    whole = digits()
    order = whole.test_labels.argsort(stable=True)
    by_class = dataclasses.replace(whole, test_images=whole.test_images[order], test_labels=whole.test_labels[order])
    for limit, count in ((50, 50), (10_000, len(order)), (None, len(order))):
        loader = Images(by_class, data_config(test_limit=limit)).evaluation("test", torch.device("cpu"))
        labels = torch.cat([labels for _, labels in loader])
        assert len(labels) == count
        assert (torch.bincount(labels) / count - 0.1).abs().max() < 0.05


@pytest.mark.parametrize(
    ("pad", "flip", "cutout", "fill"), [(2, True, 3, (9, 8, 7)), (0, True, 0, ()), (4, False, 0, ()), (0, False, 4, ())]
)
def test_augmentation_is_the_per_image_loop(pad: int, flip: bool, cutout: int, fill: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (40, 9, 7, 3), dtype=torch.uint8, generator=generator)
    augment = Augment(pad, flip, cutout, fill)
    draws = augment.draw(40, 9, 7, generator)
    result = augment(images, draws)
    for image, draw, found in zip(images, draws.tolist(), result, strict=True):
        top, left, mirrored, cut_row, cut_column = draw
        padded = torch.zeros(9 + 2 * pad, 7 + 2 * pad, 3, dtype=torch.uint8)
        padded[pad : pad + 9, pad : pad + 7] = image
        expected = padded[top : top + 9, left : left + 7].clone()
        if flip and mirrored:
            expected = expected.flip(1)
        if cutout:
            row, column = cut_row - cutout // 2, cut_column - cutout // 2
            expected[max(0, row) : row + cutout, max(0, column) : column + cutout] = torch.tensor(fill or (0, 0, 0))
        assert torch.equal(found, expected)
    assert len({tuple(draw) for draw in draws.tolist()}) > 20  # every image its own draw


def test_preprocess_is_the_formula_in_channels_last_memory() -> None:
    images = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8)
    found = Preprocess((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(images)
    plain = (images.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor(
        [0.2, 0.3, 0.4]
    )[:, None, None]
    torch.testing.assert_close(found, plain)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_measured_mean_and_std_are_those_of_the_training_pixels(images: Images) -> None:
    pixels = images.set.train_images[images.split.train].double() / 255
    assert images.preprocess.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-12)
    assert images.preprocess.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-9)


def _train_loader(images: Images, epoch: int, rank: int = 0, world_size: int = 1) -> TrainLoader:
    return TrainLoader(
        images.source("train", torch.device("cpu")),
        images.split.train,
        64,
        preprocess=images.preprocess,
        augment=images.augment,
        seed=5,
        epoch=lambda: epoch,
        rank=rank,
        world_size=world_size,
    )


def test_an_epoch_depends_on_seed_and_epoch_alone(images: Images) -> None:
    first, again, later = (list(_train_loader(images, epoch)) for epoch in (3, 3, 4))
    assert len(first) == len(images.split.train) // 64 == len(_train_loader(images, 3))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], later[0][0])


def test_two_processes_together_see_the_batches_of_one(images: Images) -> None:
    whole = _train_loader(images, 2)
    halves = [_train_loader(images, 2, rank, 2) for rank in range(2)]
    for (batch, labels), *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), batch)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_batches_say_which_images_they_hold(images: Images) -> None:
    told, halves = _train_loader(images, 2), [_train_loader(images, 2, rank, 2) for rank in range(2)]
    for loader in (told, *halves):
        loader.indexed = True
    labels, seen = images.set.train_labels[images.split.train], []
    for plain, batch, *parts in zip(_train_loader(images, 2), told, *halves, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, batch, strict=False))  # the same batches as without
        assert torch.equal(torch.cat([part[2] for part in parts]), batch[2])
        assert torch.equal(labels[batch[2]], batch[1])
        seen += batch[2].tolist()
    assert len(set(seen)) == len(seen) == len(images.split.train) // 64 * 64


def test_evaluation_meets_every_image_once_on_any_number_of_processes(images: Images) -> None:
    count = len(images.set.test_images)
    assert count % 3  # an odd one out, which padding samplers count twice
    tagged = torch.arange(count)
    seen: list[int] = []
    for rank in range(3):
        found = Resident(images.set.test_images, tagged, torch.device("cpu"))
        loader = EvalLoader(found, tagged, 50, preprocess=images.preprocess, rank=rank, world_size=3)
        parts = list(loader)
        assert len(parts) == len(loader)
        seen += torch.cat([labels for _, labels in parts]).tolist()
    assert sorted(seen) == list(range(count))


def test_images_that_do_not_fit_are_streamed(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a training and of an evaluation are the same, also when nobody wants the rest of them."""
    cpu = torch.device("cpu")
    resident = [list(_train_loader(images, 1, rank, 2)) for rank in range(2)], list(images.evaluation("val", cpu))
    size = images.set.train_images.nbytes
    for free, kind in ((2 * size, Resident), (2 * size - 1, Streamed)):
        monkeypatch.setattr("kdq.data.source.memory", lambda device, free=free: free)
        assert type(source(images.set.train_images, images.set.train_labels, cpu)) is kind
    few = Images(images.set, images.config)
    streamed = [list(_train_loader(few, 1, rank, 2)) for rank in range(2)], list(few.evaluation("val", cpu))
    assert type(few.source("train", cpu)) is Streamed
    for one, other in zip((*resident[0], resident[1]), (*streamed[0], streamed[1]), strict=True):
        for (pixels, labels), (same, too) in zip(one, other, strict=True):
            assert torch.equal(pixels, same)
            assert torch.equal(labels, too)
    first, _ = next(iter(_train_loader(few, 1, 0, 2)))
    assert torch.equal(first, resident[0][0][0][0])


def test_disagreeing_channels_and_classes_are_refused() -> None:
    with pytest.raises(KdqError, match=r"data.num_classes=7 but digits has 10"):
        Images(digits(), data_config(num_classes=7))
    with pytest.raises(KdqError, match=r"data.in_channels=3 but digits has 1"):
        Images(digits(), data_config(in_channels=3))
    with pytest.raises(KdqError, match="need 1 values"):
        Images(digits(), data_config(mean=[0.1, 0.2], std=[0.1, 0.2]))


def test_what_is_cut_out_is_what_normalisation_makes_zero() -> None:
    images = Images(digits(), data_config(augment={"pad": 0, "flip": False, "cutout": 4}))
    draws = torch.tensor([[0, 0, 0, 4, 4]])
    cut = images.preprocess(images.augment(images.set.train_images[:1], draws))[0, :, 2:6, 2:6]
    assert cut.abs().max() < 0.5 / 255 / images.preprocess.std[0] + 1e-6
    assert images.spec() != Images(digits(), data_config(augment={"pad": 0, "flip": False, "cutout": 0})).spec()
    with pytest.raises(KdqError, match=r"data.augment.pad=-1 must be 0 or more"):
        Images(digits(), data_config(augment={"pad": -1, "flip": False, "cutout": 0}))
