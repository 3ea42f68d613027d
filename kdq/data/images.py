"""A data set with its split, normalisation and augmentation: what every stage takes its images from."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from kdq.data.augment import Augment, Augmentation, Preprocess
from kdq.data.decoded import Photographs
from kdq.data.image_set import ImageSet
from kdq.data.loader import EvalLoader
from kdq.data.source import Source, source
from kdq.data.split import Split, split
from kdq.utils.calls import imported
from kdq.utils.errors import KdqError

#: Images in one evaluation batch, and pixels of them where they are large: enough to keep a device busy, and so few
#: that a mobile network's widest activations, 100 bytes a pixel, have 0.3 GB.
EVAL_BATCH, EVAL_PIXELS = 500, 64 * 224 * 224


class Images:
    """An :class:`ImageSet` with its seeded split, its normalisation and its augmentation.

    Args:
        images: the data.
        config: the ``data`` config: ``name, num_classes, in_channels, mean, std, val_fraction, split_seed,
            train_limit, test_limit, augment``. ``mean`` and ``std`` null: measured on the training images.
    """

    def __init__(self, images: ImageSet, config: Mapping[str, Any]) -> None:
        self.set, self.config = images, config
        if len(images.classes) != config["num_classes"]:
            raise KdqError(f"data.num_classes={config['num_classes']} but {config['name']} has {len(images.classes)}")
        _, self.height, self.width, channels = images.train_images.shape
        if channels != config["in_channels"]:
            raise KdqError(f"data.in_channels={config['in_channels']} but {config['name']} has {channels}")
        if config["test_limit"] is not None and config["test_limit"] < 1:
            raise KdqError(f"data.test_limit={config['test_limit']} must be at least 1")
        self.split = split(
            len(images.train_images), config["val_fraction"], config["split_seed"], config["train_limit"]
        )
        self.preprocess = self._preprocess()
        self.augment = self._augment(dict(config["augment"]))
        if isinstance(images.train_images, Photographs) and isinstance(self.augment, Augment):
            raise KdqError("these are whole images, of several shapes: data.augment must be a ResizedCrop")
        if crop := getattr(self.augment, "size", None):
            if crop > min(self.height, self.width):
                raise KdqError(f"data.augment.size={crop} is more than images of {self.height} x {self.width} have")
            self.preprocess, self.height, self.width = replace(self.preprocess, crop=crop), crop, crop
        self._sources: dict[tuple[str, torch.device], Source] = {}

    def _augment(self, options: dict[str, Any]) -> Augmentation:
        """:class:`~kdq.data.augment.Augment`, or what ``_target_`` names; one with a ``size`` is of networks that
        see so many pixels: in evaluation, those of the centre."""
        if target := options.pop("_target_", None):
            made: Augmentation = imported("data.augment", target)(**options)
            return made
        return Augment(**options, fill=tuple(round(255 * mean) for mean in self.preprocess.mean))

    def _preprocess(self) -> Preprocess:
        mean, std = self.config["mean"], self.config["std"]
        if (mean is None) != (std is None):
            raise KdqError("data.mean and data.std belong together: give both, or neither to have them measured")
        if mean is None or std is None:
            mean, std = _channel_moments(self.set.train_images, self.split.train)
        if not len(mean) == len(std) == self.config["in_channels"]:
            raise KdqError(f"data.mean and data.std need {self.config['in_channels']} values, one per channel")
        if min(std) <= 0:
            raise KdqError(f"data.std={list(std)} must be above zero")
        return Preprocess(tuple(mean), tuple(std))

    def spec(self) -> dict[str, Any]:
        """What of the data a trained model depends on: part of its store key. The test images are not."""
        keys = ("val_fraction", "split_seed", "train_limit", "augment")
        measured = {"mean": list(self.preprocess.mean), "std": list(self.preprocess.std)}
        augment = self.augment
        filled = {"fill": list(augment.fill)} if isinstance(augment, Augment) and augment.cutout else {}
        return {key: self.config[key] for key in keys} | measured | filled | {"train": self.set.train_digest}

    def card(self) -> dict[str, Any]:
        """What a network's user must do to an image, as packed files and exported models say it: scale its pixels to
        0..1, then normalise with ``mean`` and ``std``; ``size`` is the images' height and width. Where it is cut from
        the centre of larger ones, or these are not scaled bilinearly, ``resize`` is what their shorter side is scaled
        to, and ``interpolation`` how."""
        card = {"mean": list(self.preprocess.mean), "std": list(self.preprocess.std), "size": [self.height, self.width]}
        scaled = self.config.get("image_size", self.height), self.config.get("interpolation", "bilinear")
        return card if scaled == (self.height, "bilinear") else card | {"resize": scaled[0], "interpolation": scaled[1]}

    def source(self, part: str, device: torch.device) -> Source:
        """The raw images and labels of ``"train"`` or ``"test"`` for ``device``; copied there once if they fit."""
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one
        if (part, device) not in self._sources:
            whole = self.set
            train, test = (whole.train_images, whole.train_labels), (whole.test_images, whole.test_labels)
            self._sources[part, device] = source(*(train if part == "train" else test), device)
        return self._sources[part, device]

    def evaluation(self, part: str, device: torch.device, rank: int = 0, world_size: int = 1) -> EvalLoader:
        """The ``"val"`` or ``"test"`` images in order."""
        if part == "val":
            found, indices = self.source("train", device), self.split.val
        else:
            found, limit, there = self.source("test", device), self.config["test_limit"], len(self.set.test_labels)
            count = there if limit is None else min(limit, there)
            # Evenly spaced, for a folder's images lie class by class.
            indices = torch.arange(count) * there // max(count, 1)
        return self._loader(found, indices, rank, world_size)

    def _loader(self, found: Source, indices: Tensor, rank: int, world_size: int) -> EvalLoader:
        batch = max(1, min(EVAL_BATCH, EVAL_PIXELS // (self.height * self.width)))
        return EvalLoader(found, indices, batch, preprocess=self.preprocess, rank=rank, world_size=world_size)

    def calibrating(self, count: int, seed: int) -> Self:
        """The same with nothing but the ``count`` calibration images to train on. Each is drawn several times an epoch,
        so that it is as long as one of all training images."""
        found, whole = copy.copy(self), self.split.train
        own = self.split.calibration(count, seed)
        found.split = Split(own.repeat(-(-len(whole) // len(own)))[: len(whole)], self.split.val)
        return found

    def calibration(
        self, count: int, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> EvalLoader:
        """``count`` training images without augmentation, for the quantizer."""
        indices, found = self.split.calibration(count, seed), self.source("train", device)
        return self._loader(found, indices, rank, world_size)


def _channel_moments(images: Tensor | Photographs, indices: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the uint8 images ``(n, h, w, c)`` at ``indices``, on the scale 0 to 1,
    from histograms: exact, and without a copy of images that lie in a file."""
    counts = torch.zeros(images.shape[-1], 256, dtype=torch.int64)
    for some in indices.sort().values.split(1024):
        for count, channel in zip(counts, images[some].unbind(-1), strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append(max(((share * (values - mean) ** 2).sum() ** 0.5).item(), 1e-3))
    return means, stds
