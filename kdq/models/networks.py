"""The networks: torchvision's ResNets with either stem, and the small CIFAR ResNets of He et al.

Every builder takes ``num_classes`` and ``in_channels`` and uses the parameter names of the published
state dicts, so that weights trained elsewhere load by name. The ResNets also take the ``mean`` and ``std`` that their
weights were trained with, where these are not the data's: see :class:`Renormalize`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as tv

from kdq.utils.errors import KdqError

#: One value for each channel of an image.
Channels = Sequence[float] | None
#: The ``mean, std, data_mean, data_std`` of a network.
Normalization = tuple[Channels, Channels, Channels, Channels]


def says_what_it_is(builder: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``builder``, a function or the ``__init__`` of a class, note on every network what it is.

    ``network.kdq_net`` holds the name and the arguments, so that files and checkpoints can name the network instead of
    holding its code.
    """
    signature = inspect.signature(builder)
    name = builder.__qualname__.partition(".")[0]

    @functools.wraps(builder)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = builder(*args, **kwargs)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        network = bound.pop("self", result)
        network.kdq_net = {"_target_": f"kdq.models.{name}", **bound}
        return result

    return wrapper


def initialize(network: nn.Module) -> None:
    """Draw the weights of every convolution anew, as for ReLUs (He et al. 2015, arXiv 1502.01852); biases are zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Renormalize(nn.Module):
    """Images normalised with ``data_mean`` and ``data_std`` as if with ``mean`` and ``std``, all on the scale 0 to 1,
    one value a channel. A network that begins with it sees what its weights were trained on, whatever its student sees.
    It has no state: a published state dict fits as it is.

    >>> Renormalize(mean=[0.5], std=[0.5], data_mean=[0.0], data_std=[1.0])(torch.ones(1, 1, 1, 1)).item()
    1.0

    Raises:
        KdqError: one of the four is missing, not one value a channel, or not positive where it divides.
    """

    def __init__(
        self,
        mean: Channels = None,
        std: Channels = None,
        data_mean: Channels = None,
        data_std: Channels = None,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        given = {"mean": mean, "std": std, "data_mean": data_mean, "data_std": data_std}
        for name, values in given.items():
            if values is None or len(values) != in_channels or (name.endswith("std") and min(values) <= 0):
                raise KdqError(
                    f"net.{name}={values} must be {in_channels} numbers, one a channel: a network that is normalised "
                    f"in its own way needs all of {', '.join(given)}"
                )
        mean, std, data_mean, data_std = (values or () for values in given.values())
        self.scale = [ours / own for ours, own in zip(data_std, std, strict=True)]
        self.shift = [(ours - own) / by for ours, own, by in zip(data_mean, mean, std, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        planes = [plane * a + b for plane, a, b in zip(x.unbind(1), self.scale, self.shift, strict=True)]
        return torch.stack(planes, -1).permute(0, 3, 1, 2)  # channels-last, as images come


def _renormalize(in_channels: int, given: Normalization) -> Renormalize | None:
    """None where the network takes the images as the data normalises them."""
    return Renormalize(*given, in_channels) if any(values is not None for values in given) else None


class _ResNet(tv.ResNet):
    """torchvision's ResNet, with its own normalisation before it where it has one."""

    renormalize: Renormalize | None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.renormalize is None else self.renormalize(x))


def _resnet(
    depth: int, block: type[tv.BasicBlock | tv.Bottleneck], layers: list[int], millions: float
) -> Callable[..., nn.Module]:
    """What builds one of torchvision's ResNets. ``stem="cifar"`` keeps small images at full resolution: a 3x3
    convolution with stride 1 and no max-pooling, the shape in which CIFAR weights such as
    ``edadaltocg/resnet50_cifar10`` are published; ``stem="imagenet"`` is the original 7x7 stride 2."""

    def build(
        num_classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
        mean: Channels = None,
        std: Channels = None,
        data_mean: Channels = None,
        data_std: Channels = None,
    ) -> nn.Module:
        network = _ResNet(block, layers, num_classes=num_classes)
        network.renormalize = _renormalize(in_channels, (mean, std, data_mean, data_std))
        if stem == "cifar":
            network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        elif stem != "imagenet":
            raise KdqError(f"stem={stem!r} is unknown: use 'cifar' or 'imagenet'")
        elif in_channels != 3:
            network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        if stem == "cifar" or in_channels != 3:
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        return network

    build.__qualname__ = f"resnet{depth}"
    build.__doc__ = f"ResNet-{depth} (He et al. 2016, arXiv 1512.03385): {millions} M parameters with ten classes."
    return says_what_it_is(build)


resnet18 = _resnet(18, tv.BasicBlock, [2, 2, 2, 2], 11.17)
resnet34 = _resnet(34, tv.BasicBlock, [3, 4, 6, 3], 21.28)
resnet50 = _resnet(50, tv.Bottleneck, [3, 4, 6, 3], 23.52)


class CifarResNet(nn.Module):
    """The ResNet of He et al. (2016, section 4.2) for 32x32 images: three stages of ``(depth - 2) / 6`` basic
    blocks with 16, 32 and 64 channels times ``width``, after a first convolution to ``stem`` channels, as many as the
    first stage where it is None. The literature's ResNet-32x4 is ``depth=32, width=4, stem=32``.

    Where a stage changes shape the ``shortcut`` is a 1x1 convolution (their option ``"B"``), as in the networks of the
    distillation literature, or every second pixel with channels of zeros on either side (``"A"``), as in the original
    and in the state dicts of ``akamaster/pytorch_resnet_cifar10``.

    Input ``(batch, in_channels, height, width)``, output logits ``(batch, num_classes)``.
    """

    @says_what_it_is
    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        shortcut: str = "B",
        mean: Channels = None,
        std: Channels = None,
        data_mean: Channels = None,
        data_std: Channels = None,
        stem: int | None = None,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise KdqError(f"shortcut={shortcut!r} is unknown: use 'A' (zeros) or 'B' (a 1x1 convolution)")
        if depth < 8 or (depth - 2) % 6:
            raise KdqError(f"depth={depth} is not a CIFAR ResNet: use 6n + 2, such as 20, 32, 44 or 56")
        if width <= 0 or (stem is not None and stem < 1):
            raise KdqError(f"width={width} and stem={stem} must be positive")
        planes = [max(1, round(width * channels)) for channels in (16, 32, 64)]
        stem = planes[0] if stem is None else stem
        self.renormalize = _renormalize(in_channels, (mean, std, data_mean, data_std))
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        stage = partial(_stage, blocks=blocks, shortcut=shortcut)
        self.layer1 = stage(stem, planes[0], stride=1)
        self.layer2 = stage(planes[0], planes[1], stride=2)
        self.layer3 = stage(planes[1], planes[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes[2], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.renormalize is not None:
            x = self.renormalize(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ZeroPadded(nn.Module):
    """The shortcut without parameters: every ``stride``-th pixel, and ``channels`` of zeros, half before, half after.

    >>> ZeroPadded(channels=2, stride=2)(torch.ones(1, 4, 8, 8)).shape
    torch.Size([1, 6, 4, 4])
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.channels - before))


def _stage(in_planes: int, planes: int, stride: int, blocks: int, shortcut: str) -> nn.Sequential:
    downsample: nn.Module | None = None
    if shortcut == "A" and (stride != 1 or in_planes != planes):
        downsample = ZeroPadded(planes - in_planes, stride)
    elif stride != 1 or in_planes != planes:
        downsample = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    first = tv.BasicBlock(in_planes, planes, stride, downsample)
    return nn.Sequential(first, *(tv.BasicBlock(planes, planes) for _ in range(blocks - 1)))


class WhitenedNet(nn.Module):
    """A network that learns CIFAR in few epochs, after Jordan (2024, arXiv 2404.00498): a first layer that whitens 2x2
    patches of the training images and is not trained, then three blocks of two convolutions, max-pooling, BatchNorm
    without scales, and GELU. Convolutions start as identities on their first channels.

    Input ``(batch, in_channels, height, width)`` of at least 24 pixels, output logits ``(batch, num_classes)``.
    1.97 M parameters at width 1 with ten classes.
    """

    @says_what_it_is
    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        planes = [round(width * channels) for channels in (64, 256, 256)]
        filters = 8 * in_channels
        self.whiten = nn.Conv2d(in_channels, filters, 2)
        self.blocks = nn.Sequential(*map(_block, [filters, *planes[:2]], planes))
        self.fc = nn.Linear(planes[2], num_classes, bias=False)
        self.whiten.weight.requires_grad_(False)

    def see(self, images: Tensor) -> None:
        """Make the first layer's outputs uncorrelated, with equal energy, on the normalised ``images``: its filters are
        the principal directions of their patches over the square root of the energy there, and these negated."""
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1).double()
        energy, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        # Directions hardly met would be little but noise, made loud.
        filters = (directions / (energy + 5e-4).sqrt()).T.flip(0)
        with torch.no_grad():
            self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))
            assert self.whiten.bias is not None
            self.whiten.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(x)))
        return self.fc(x.amax((2, 3))) / 9  # small logits at the start


def _block(in_planes: int, planes: int) -> nn.Sequential:
    first, second = (nn.Conv2d(i, planes, 3, padding=1, bias=False) for i in (in_planes, planes))
    norms = [nn.BatchNorm2d(planes, momentum=0.4) for _ in range(2)]  # few steps: statistics of the last ones
    for conv, norm in zip((first, second), norms, strict=True):
        nn.init.dirac_(conv.weight[: conv.in_channels])
        norm.weight.requires_grad_(False)
    return nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())
