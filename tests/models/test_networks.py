"""Architectures against published parameter counts and names."""

from __future__ import annotations

import pytest
import torch
import torchvision

from kdq.models import CifarResNet, WhitenedNet, resnet18, resnet34, resnet50
from kdq.models.build import build, build_trusted
from kdq.utils.errors import KdqError


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        # The published study's teacher and student on CIFAR-100 (its reference numbers).
        (lambda: resnet50(100), 23_705_252),
        (lambda: resnet18(100), 11_220_132),
        (lambda: resnet34(10), 21_282_122),
        # torchvision's own counts for ImageNet.
        (lambda: resnet18(1000, stem="imagenet"), 11_689_512),
        (lambda: resnet50(1000, stem="imagenet"), 25_557_032),
        # He et al. 2016, table 6: 0.27, 0.46, 0.66 and 0.85 M, plus the two 1x1 shortcuts (2 752 with BatchNorm).
        (lambda: WhitenedNet(10), 1_972_792),  # Jordan 2024: "1.97 million"
        (lambda: CifarResNet(20, 10), 272_474),
        (lambda: CifarResNet(32, 10), 466_906),
        (lambda: CifarResNet(44, 10), 661_338),
        (lambda: CifarResNet(56, 10), 855_770),
    ],
)
def test_parameter_counts(network: object, parameters: int) -> None:
    assert sum(p.numel() for p in network().parameters()) == parameters  # type: ignore[operator]


def test_names_are_torchvisions_so_that_published_state_dicts_load() -> None:
    assert list(resnet50(10).state_dict()) == list(torchvision.models.resnet50(num_classes=10).state_dict())
    names = set(CifarResNet(20, 10).state_dict())
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer3.2.bn2.bias"} <= names


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("classes", [2, 37])
def test_any_channels_and_classes(in_channels: int, classes: int) -> None:
    image = torch.randn(2, in_channels, 32, 32)
    for network in (
        CifarResNet(8, classes, in_channels, width=0.5),
        resnet18(classes, in_channels),
        resnet18(classes, in_channels, stem="imagenet"),
    ):
        assert network.eval()(image).shape == (2, classes)


def test_the_cifar_stem_keeps_full_resolution() -> None:
    network, sizes = resnet18(10), []
    network.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))  # type: ignore
    network(torch.randn(2, 3, 32, 32))
    assert sizes == [32]


def test_width_multiplies_the_channels() -> None:
    assert CifarResNet(20, 10, width=2).fc.in_features == 128


@pytest.mark.parametrize(
    "net",
    [
        {"_target_": "kdq.models.CifarResNet", "depth": 19, "num_classes": 10},
        {"_target_": "kdq.models.CifarResNet", "depth": 20, "num_classes": 10, "width": 0},
        {"_target_": "kdq.models.resnet18", "num_classes": 10, "stem": "vgg"},
        {"_target_": "kdq.models.resnet18", "classes": 10},
        {"_target_": "kdq.models.missing"},
        {"_target_": "no_such_module.Network"},
        {"_target_": "os.getcwd"},
        {},
    ],
)
def test_a_wrong_recipe_is_refused(net: dict[str, object]) -> None:
    with pytest.raises(KdqError):
        build(net)


def test_a_recipe_read_from_a_file_builds_only_architectures() -> None:
    net = {"_target_": "torchvision.models.resnet18", "num_classes": 4}
    assert build_trusted(net).kdq_net == net
    for target in (
        "os.system",
        "kdq.models._resnet",
        "kdq.models.import_module",
        "builtins.eval",
        "kdq.models.nn.Linear",
    ):
        with pytest.raises(KdqError):
            build_trusted({"_target_": target})


def test_the_first_layer_of_a_whitened_network_whitens() -> None:
    """On images whose neighbours are alike, its filters' outputs are uncorrelated and have one energy."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32).cumsum(2).cumsum(3) / 10
    network = WhitenedNet(10)
    network.see(images)
    outputs = network.whiten(images).transpose(0, 1).flatten(1)
    filters = len(outputs) // 2
    torch.testing.assert_close(outputs[filters:], -outputs[:filters])
    second = outputs[:filters] @ outputs[:filters].T / outputs.shape[1]
    assert (second - torch.diag(second.diag())).abs().max() < 1e-4
    assert (second.diag()[:6] - 1).abs().max() < 0.02  # the main directions; faint ones are left fainter
    assert not network.whiten.weight.requires_grad


def test_the_convolutions_of_a_whitened_network_start_as_identities() -> None:
    network, x = WhitenedNet(10), torch.randn(2, 24, 9, 9)
    first, second = network.blocks[0][0], network.blocks[0][4]
    torch.testing.assert_close(first(x)[:, :24], x)
    torch.testing.assert_close(second(y := torch.randn(2, 64, 5, 5)), y)
