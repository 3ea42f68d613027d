"""The networks beside CIFAR ResNets on which the distillation literature compares methods, for images of 32x32 pixels.

Their state dicts have the names and shapes of the code of CRD (Tian et al. 2020) and mdistiller (Zhao et al. 2022), so
that checkpoints published with either load as they are; ``kdq_stages`` names the layers that these compare. Input
``(batch, in_channels, height, width)``, output logits ``(batch, num_classes)``.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import channel_shuffle

from kdq.models.networks import initialize, says_what_it_is
from kdq.utils.errors import KdqError


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` (Zagoruyko & Komodakis 2016, arXiv 1605.07146): three stages of ``(depth - 4) / 6``
    blocks that normalise before they convolve. WRN-40-2 has 2.26 M parameters with a hundred classes.

    >>> sum(p.numel() for p in WideResNet(16, num_classes=100, width=2).parameters())
    703284
    """

    kdq_stages = ("block1", "block2", "block3")

    @says_what_it_is
    def __init__(self, depth: int, num_classes: int, in_channels: int = 3, width: int = 1) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise KdqError(f"depth={depth} is not a wide ResNet: use 6n + 4, such as 16, 28 or 40")
        if width < 1:
            raise KdqError(f"width={width} must be a whole number from 1 up")
        planes, blocks = [16, *(width * channels for channels in (16, 32, 64))], (depth - 4) // 6
        self.conv1 = _conv(in_channels, planes[0])
        self.block1, self.block2, self.block3 = (
            nn.Sequential(OrderedDict(layer=_stage(_WideBlock, into, out, stride, blocks)))
            for into, out, stride in zip(planes, planes[1:], (1, 2, 2), strict=False)
        )
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(planes[3], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(_pooled(self.relu(self.bn1(x))))


class _WideBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), _conv(in_planes, planes, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), _conv(planes, planes)
        self.convShortcut = None if in_planes == planes else _conv(in_planes, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


#: Convolutions of each block of a VGG, by depth.
VGG = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class CifarVGG(nn.Module):
    """VGG-``depth`` with BatchNorm (Simonyan & Zisserman 2015, arXiv 1409.1556) and one linear layer: five blocks of
    3x3 convolutions. VGG-8 has 3.97 M parameters with a hundred classes, VGG-13 9.46 M.

    >>> CifarVGG(8, num_classes=100)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 100])
    """

    kdq_stages = ("block1", "block2", "block3", "block4")

    @says_what_it_is
    def __init__(self, depth: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in VGG:
            raise KdqError(f"depth={depth} is not a VGG: use one of {', '.join(map(str, VGG))}")
        planes = [in_channels, 64, 128, 256, 512, 512]
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            nn.Sequential(*(layer for n in range(count) for layer in _conv_norm(out if n else into, out, bias=True)))
            for count, into, out in zip(VGG[depth], planes, planes[1:], strict=False)
        )
        self.classifier = nn.Linear(planes[-1], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[2] >= 64  # such images are halved once more
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        x = self.block3(x)
        return self.classifier(_pooled(self.block4(F.max_pool2d(x, 2) if large else x)))


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) with fewer strides. At width 0.5, the literature's, it has
    0.81 M parameters with a hundred classes.

    >>> CifarMobileNetV2(num_classes=100)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 100])
    """

    #: Expansion, channels, blocks and stride of each stage.
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    kdq_stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")

    @says_what_it_is
    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 0.5) -> None:
        super().__init__()
        if width < 1 / 16:
            raise KdqError(f"width={width} must be at least 0.0625")
        planes = int(32 * width)
        self.conv1 = nn.Sequential(*_conv_norm(in_channels, planes, stride=2))
        self.blocks = nn.ModuleList()
        for expansion, channels, count, stride in self.STAGES:
            out = int(channels * width)
            self.blocks.append(_stage(partial(_Inverted, expansion=expansion), planes, out, stride, count))
            planes = out
        last = max(1280, int(1280 * width))
        self.conv2 = nn.Sequential(*_conv_norm(planes, last, size=1))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(_pooled(self.conv2(x)))


class _Inverted(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual, wide = stride == 1 and in_planes == planes, in_planes * expansion
        self.conv = nn.Sequential(
            *_conv_norm(in_planes, wide, size=1),
            *_conv_norm(wide, wide, stride=stride, groups=wide),
            *_conv_norm(wide, planes, size=1)[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarShuffleNetV1(nn.Module):
    """ShuffleNetV1 with three groups (Zhang et al. 2018, arXiv 1707.01083) and no stride before its first stage: 0.95 M
    parameters with a hundred classes.

    >>> CifarShuffleNetV1(num_classes=100)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 100])
    """

    kdq_stages = ("layer1", "layer2", "layer3")

    @says_what_it_is
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, 24, 1), nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            _stage(_ShuffleV1, into, out, 2, count) for into, out, count in ((24, 240, 4), (240, 480, 8), (480, 960, 4))
        )
        self.linear = nn.Linear(960, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(_pooled(x))


class _ShuffleV1(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        own = planes - in_planes if stride == 2 else planes  # beside the averaged input
        middle, self.stride, self.groups = own // 4, stride, 1 if in_planes == 24 else 3
        self.conv1, self.bn1 = _conv(in_planes, middle, 1, groups=self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = _conv(middle, middle, stride=stride, groups=middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = _conv(middle, own, 1, groups=3), nn.BatchNorm2d(own)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return self.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x)


class CifarShuffleNetV2(nn.Module):
    """ShuffleNetV2 (Ma et al. 2018, arXiv 1807.11164) with no stride before its first stage: 1.36 M parameters with a
    hundred classes.

    >>> CifarShuffleNetV2(num_classes=100)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 100])
    """

    kdq_stages = ("layer1", "layer2", "layer3")

    @says_what_it_is
    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, 24, 1), nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_ShuffleDown(into, out), *(_ShuffleV2(out) for _ in range(count)))
            for into, out, count in ((24, 116, 3), (116, 232, 7), (232, 464, 3))
        )
        self.conv2, self.bn2, self.relu = _conv(464, 1024, 1), nn.BatchNorm2d(1024), nn.ReLU()
        self.linear = nn.Linear(1024, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(_pooled(self.relu(self.bn2(self.conv2(x)))))


class _ShuffleV2(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        half = planes // 2
        self.conv1, self.bn1 = _conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return channel_shuffle(torch.cat([kept, F.relu(self.bn3(self.conv3(out)))], 1), 2)


class _ShuffleDown(nn.Module):
    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        half = planes // 2
        self.conv1, self.bn1 = _conv(in_planes, in_planes, stride=2, groups=in_planes), nn.BatchNorm2d(in_planes)
        self.conv2, self.bn2 = _conv(in_planes, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(in_planes, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, stride=2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return channel_shuffle(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1), 2)


def _stage(block: Callable[[int, int, int], nn.Module], into: int, out: int, stride: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(block(out if n else into, out, 1 if n else stride) for n in range(count)))


def _conv(into: int, out: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=bias)


def _conv_norm(
    into: int, out: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> Sequence[nn.Module]:
    return _conv(into, out, size, stride, groups, bias), nn.BatchNorm2d(out), nn.ReLU(inplace=True)


def _pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)
