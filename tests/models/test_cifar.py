"""The networks of the distillation literature: the state dicts of its published checkpoints, and kdq's own uses."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

import kdq
from kdq.models import CifarMobileNetV2, CifarResNet, CifarShuffleNetV1, CifarShuffleNetV2, CifarVGG, WideResNet
from kdq.models.build import build
from kdq.models.weights import load_weights
from kdq.utils.config import compose, plain
from kdq.utils.errors import KdqError

#: Parameters with a hundred classes, and the digest of the lines ``name shape`` of the state dict, as the code of CRD
#: (HobbitLong/RepDistiller at b84f547) and mdistiller (megvii-research/mdistiller at a08d46f) builds them.
PUBLISHED = {
    "resnet8x4": (1_233_540, "b2ead61a142ef3af"),
    "resnet32x4": (7_433_860, "99154b2aea1aeb59"),
    "resnet110": (1_736_564, "9ca5a9542fb3a343"),
    "wrn_16_1": (180_916, "b4de1d786e12f08a"),
    "wrn_16_2": (703_284, "2266f04469bf5dd9"),
    "wrn_40_1": (569_780, "01abc5646d8c075c"),
    "wrn_40_2": (2_255_156, "595ec0db20d1ca1c"),
    "vgg8": (3_965_028, "7f85b8479109415f"),
    "vgg13": (9_462_180, "5778ceb5832ef6a7"),
    "mobilenet_v2": (812_836, "54501c9a7e317631"),
    "shufflenet_v1": (949_258, "1282e767b3e9c6cd"),
    "shufflenet_v2": (1_355_528, "9b7750ae03289b13"),
}


def configured(name: str) -> nn.Module:
    cfg = compose(["data=cifar100", f"model@student={name}"])
    return build(plain(cfg.student.net))


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dicts_are_those_of_published_checkpoints(name: str) -> None:
    network = configured(name)
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert (sum(p.numel() for p in network.parameters()), digest) == PUBLISHED[name]


def test_a_published_checkpoint_loads(tmp_path: Path) -> None:
    """In the form of CRD's code, with what stands beside the weights, and in that of a network trained in parallel."""
    network, other = WideResNet(16, num_classes=100), WideResNet(16, num_classes=100)
    state = network.state_dict()
    for saved in (
        {"epoch": 240, "model": state, "best_acc": torch.tensor(73.26)},
        {"model": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"param_groups": []}},
    ):
        torch.save(saved, tmp_path / "ckpt_epoch_240.pth")
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        load_weights(other, tmp_path / "ckpt_epoch_240.pth")
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(network.eval()(images), other.eval()(images))


@pytest.mark.parametrize(
    "network",
    [
        WideResNet(10, 5, in_channels=1),
        CifarMobileNetV2(5, in_channels=1, width=0.125),
        CifarShuffleNetV1(5, in_channels=1),
        CifarShuffleNetV2(5, in_channels=1),
    ],
    ids=lambda network: type(network).__name__,
)
def test_they_are_quantized_packed_and_loaded_without_an_option(network: nn.Module, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 16, 16, generator=generator)
    quantized, report = kdq.quantize(network.eval(), [images], bits=4, solver="rtn")
    assert len(report.layers) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules())
    kdq.save(quantized, tmp_path / "model.kdq")
    assert torch.equal(kdq.load(tmp_path / "model.kdq").eval()(images), quantized(images))


def test_large_images_are_halved_once_more_by_vgg() -> None:
    seen: list[int] = []
    network = CifarVGG(8, 5)
    network.block4.register_forward_hook(lambda *args: seen.append(args[1][0].shape[2]))
    for size in (32, 64):
        network(torch.zeros(1, 3, size, size))
    assert seen == [4, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WideResNet(17, 5), "depth=17 is not a wide ResNet: use 6n \\+ 4"),
        (lambda: WideResNet(16, 5, width=0), "width=0 must be a whole number from 1 up"),
        (lambda: CifarVGG(9, 5), "depth=9 is not a VGG: use one of 8, 11, 13, 16, 19"),
        (lambda: CifarMobileNetV2(5, width=0.01), "width=0.01 must be at least 0.0625"),
        (lambda: CifarResNet(8, 5, stem=0), "stem=0 must be positive"),
    ],
)
def test_impossible_networks(make: object, message: str) -> None:
    with pytest.raises(KdqError, match=message):
        make()  # type: ignore[operator]
