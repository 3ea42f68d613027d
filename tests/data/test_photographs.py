"""Photographs: random crops against torchvision's, colours against a formula, and the centre that evaluation sees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import kdq.cli.app  # noqa: F401  the resolvers of conf/
from kdq.data.images import Images
from kdq.data.loader import TrainLoader
from kdq.data.photographs import GREY, RandAugment, ResizedCrop
from kdq.utils.config import compose, plain
from kdq.utils.errors import KdqError


def photographs(count: int = 5, side: int = 48) -> torch.Tensor:
    return torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_each_image_is_cropped_as_torchvision_would() -> None:
    images, crop = photographs(), ResizedCrop(size=20)
    draws = crop.draw(5, 48, 48, torch.Generator().manual_seed(1))
    assert {0.0, 1.0} == set(draws[:, 4].tolist())
    for image, found, (top, left, height, width, mirrored, *_) in zip(images, crop(images, draws), draws, strict=True):
        box = [int(side) for side in (top, left, height, width)]
        expected = tv.resized_crop(image.permute(2, 0, 1), *box, [20, 20], antialias=True)
        expected = tv.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(found, expected.permute(1, 2, 0))


def test_rectangles_lie_in_the_image_and_have_the_asked_areas_and_shapes() -> None:
    draws = ResizedCrop(scale=0.25).draw(20_000, 300, 200, torch.Generator().manual_seed(0))
    top, left, height, width = draws.T[:4]
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() == 300
    assert (left + width).max() == 200
    area, whole = height * width / 60_000, (height < 300) & (width < 200)
    assert 0.24 < area.min() < 0.26
    assert 0.74 < (width / height)[whole].min() < 0.76
    assert 1.32 < (width / height)[whole].max() < 1.35  # sides are whole
    assert draws[:, 4].mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(draws[:, 5:], torch.ones(20_000, 3))


def test_colours_are_brightened_then_contrasted_then_saturated() -> None:
    images, crop = photographs() // 4 + 96, ResizedCrop(size=48, scale=1, ratio=1, jitter=0.3)  # far from 0 and 255
    draws = crop.draw(5, 48, 48, torch.Generator().manual_seed(2))
    for image, found, (*_, mirrored, bright, contrast, saturation) in zip(
        images, crop(images, draws), draws.tolist(), strict=True
    ):
        pixels = image.double().numpy() * bright
        pixels = contrast * pixels + (1 - contrast) * (pixels @ GREY).mean()
        pixels = saturation * pixels + (1 - saturation) * (pixels @ GREY)[..., None]
        pixels = pixels[:, ::-1] if mirrored else pixels
        assert np.abs(found.numpy() - pixels).max() < 0.51


def test_randaugment_is_what_torchvision_makes_of_pillow_s_images() -> None:
    images, augment = photographs(60, 24), RandAugment(size=24, scale=1, ratio=1, ops=1, magnitude=12)
    images = tv.resize(images.permute(0, 3, 1, 2)[..., :6, :6], [24, 24]).permute(0, 2, 3, 1)  # smooth
    draws = augment.draw(60, 24, 24, torch.Generator().manual_seed(3))
    before = torch.random.get_rng_state()
    found = augment(images, draws)
    assert torch.equal(torch.random.get_rng_state(), before)  # a training's own draws do not move
    assert torch.equal(found[20:30], augment(images[20:30], draws[20:30]))
    cropped = ResizedCrop(size=24, scale=1, ratio=1)(images, draws[:, :8])
    assert (found != cropped).flatten(1).any(1).sum() > 40  # one of the 14 operations does nothing, others may
    operations = v2.RandAugment(1, 12)
    for image, made, seed in zip(cropped, found, draws[:, 8].long().tolist(), strict=True):
        torch.manual_seed(seed)
        expected = np.asarray(operations(Image.fromarray(image.numpy())), np.int64)
        assert np.median(np.abs(made.numpy() - expected)) <= 1


@pytest.mark.parametrize("options", [{"size": 0}, {"scale": 0}, {"ratio": 0.5}, {"jitter": 1}])
def test_impossible_crops_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(KdqError, match=r"data\.augment"):
        ResizedCrop(**options)  # type: ignore[arg-type]
    with pytest.raises(KdqError, match="magnitude from 0 to 30"):
        RandAugment(magnitude=31)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_sees_the_centre_as_published(tmp_path: Path, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "root" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                smooth = Image.fromarray(rng.integers(256, size=(6, 9, 3), dtype=np.uint8)).resize((90, 60))
                smooth.save(folder / f"{i}.png")
    asked = [f"data.root={tmp_path / 'root'}", f"paths.output_dir={tmp_path}", "data.image_size=40"]
    asked += ["data.augment.size=32", f"data.interpolation={interpolation}", "data.val_fraction=0.5"]
    config = compose(["data=photographs", *asked])
    images = Images(instantiate(config.data.source), plain(config.data))
    cpu = torch.device("cpu")
    inputs, _ = next(iter(images.evaluation("test", cpu)))
    said = {name: images.card()[name] for name in ("size", "resize", "interpolation")}
    assert said == {"size": [32, 32], "resize": 40, "interpolation": interpolation}
    steps = [v2.Resize(40, interpolation=v2.InterpolationMode(interpolation)), v2.CenterCrop(32), v2.ToImage()]
    published = v2.Compose(
        [*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.data.mean, config.data.std)]
    )
    file = tmp_path / "root" / "test" / "a" / "0.png"
    torch.testing.assert_close(inputs[0], published(Image.open(file)), atol=1e-4, rtol=1e-4)
    drawn = images.augment.draw(4, *images.source("train", cpu).size(torch.arange(4)), torch.Generator())
    assert images.augment(images.set.train_images[:4], drawn).shape == (4, 32, 32, 3)
    with pytest.raises(KdqError, match="size=41 is more than images of 40 x 40"):
        Images(
            images.set, plain(config.data) | {"augment": {"_target_": "kdq.data.photographs.ResizedCrop", "size": 41}}
        )


def test_sizes_are_those_of_the_teachers_weights(tmp_path: Path) -> None:
    teacher = ["model@teacher=torchvision", "teacher.name=swin_t", "teacher.weights=imagenet"]
    data = compose(["data=photographs", "data.root=x", *teacher]).data
    assert (data.image_size, data.augment.size, data.interpolation) == (232, 224, "bicubic")
    data = compose(["data=photographs", "data.root=x"]).data
    assert (data.image_size, data.augment.size, data.interpolation) == (256, 224, "bilinear")


def test_whole_photographs_are_cropped_from_all_of_them_and_evaluated_at_their_centres(tmp_path: Path) -> None:
    rng, shapes = np.random.default_rng(0), [(60, 90), (120, 60), (60, 60), (61, 75)]
    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder := tmp_path / "root" / part / name).mkdir(parents=True)
            for i, (height, width) in enumerate(shapes):
                smooth = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8)).resize((width, height))
                smooth.save(folder / f"{i}.png")
    asked = [f"data.root={tmp_path / 'root'}", f"paths.output_dir={tmp_path}", f"paths.data_dir={tmp_path}"]
    asked += ["data.image_size=40", "data.augment.size=32", "data.val_fraction=0.25", "data.train_limit=5"]
    cut, whole = (
        Images(instantiate(config.data.source), plain(config.data))
        for config in (compose(["data=photographs", *asked, *more]) for more in ([], ["data.source.whole=true"]))
    )
    cpu, (train, val) = torch.device("cpu"), (whole.split.train, whole.split.val)
    for part in ("val", "test"):
        pairs = zip(cut.evaluation(part, cpu), whole.evaluation(part, cpu), strict=True)
        assert all(torch.equal(mine, other) for pair in pairs for mine, other in zip(*pair, strict=True))
    assert torch.equal(cut.set.train_images[train], whole.set.train_images[train])
    assert cut.set.train_digest != whole.set.train_digest
    unused = set(range(8)) - {*train.tolist(), *val.tolist()}
    assert len(unused) == 1
    assert all(whole.set.train_images.sizes[row].tolist() == [0, 0] for row in unused)
    for row, image in zip(train.tolist(), whole.set.train_images.whole(train), strict=True):
        file = tmp_path / "root" / "train" / "ab"[row // 4] / f"{row % 4}.png"
        height, width = shapes[row % 4]
        scale = 40 / min(height, width)
        resized = Image.open(file).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        assert np.array_equal(image.numpy(), np.asarray(resized))

    loader = TrainLoader(
        whole.source("train", cpu), train, 5, preprocess=whole.preprocess, augment=(crop := ResizedCrop(32)), seed=1,
        epoch=lambda: 2, indexed=True,
    )  # fmt: skip
    ((inputs, labels, places),) = loader
    generator = torch.Generator().manual_seed(1_000_005)
    order = torch.randperm(5, generator=generator)
    assert torch.equal(order, places)
    drawn = crop.draw(5, *whole.set.train_images.sizes[train[order]].T, generator)
    for image, x, (top, left, height, width, mirrored, *_) in zip(
        whole.set.train_images.whole(train[order]), inputs, drawn.tolist(), strict=True
    ):
        box = [int(side) for side in (top, left, height, width)]
        assert top + height <= image.shape[0]
        assert left + width <= image.shape[1]
        expected = tv.resized_crop(image.permute(2, 0, 1), *box, [32, 32], antialias=True)
        expected = tv.horizontal_flip(expected) if mirrored else expected
        assert torch.allclose(x, whole.preprocess(expected.permute(1, 2, 0)[None])[0])
    assert torch.equal(labels, whole.set.train_labels[train[order]])
    with pytest.raises(KdqError, match="must be a ResizedCrop"):
        Images(whole.set, plain(compose(["data=photographs", *asked]).data) | {"augment": {"pad": 4}})
