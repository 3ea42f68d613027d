"""Architectures against published parameter counts and names."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import kdq
from kdq.models import CifarResNet, WhitenedNet, resnet18, resnet34, resnet50
from kdq.models.build import build
from kdq.models.weights import load_weights
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
        {"_target_": "kdq.models.CifarResNet", "depth": 20, "num_classes": 10, "shortcut": "C"},
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


class _Published(nn.Module):
    """The ResNet-20 of ``akamaster/pytorch_resnet_cifar10``, written down from the paper: option-A shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for stage, (before, planes) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            blocks = nn.ModuleList()
            for block in range(3):
                inputs, stride = (before, 1 + (stage > 1)) if block == 0 else (planes, 1)
                one = nn.Module()
                one.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
                one.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
                one.bn1, one.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
                blocks.append(one)
            setattr(self, f"layer{stage}", blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for block in (*self.layer1, *self.layer2, *self.layer3):
            y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
            if y.shape != x.shape:
                zeros = torch.zeros_like(y[:, : y.shape[1] // 4])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).relu()
        return self.linear(x.mean((2, 3)))


def _published(path: Path) -> _Published:
    """With random weights and statistics, saved as its authors save them."""
    torch.manual_seed(0)
    network = _Published().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"best_prec1": 91.7, "state_dict": state}, path)
    return network


OWN = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
DATA = {"data_mean": [0.4914, 0.4822, 0.4465], "data_std": [0.2470, 0.2435, 0.2616]}
NET = {"_target_": "kdq.models.CifarResNet", "depth": 20, "num_classes": 10, "shortcut": "A"}


def test_published_weights_with_their_own_normalisation_give_the_published_logits(tmp_path: Path) -> None:
    theirs, ours = _published(tmp_path / "w.th"), build({**NET, **OWN, **DATA}).eval()
    load_weights(ours, tmp_path / "w.th")
    pixels, (mean, std), (data_mean, data_std) = torch.rand(4, 3, 32, 32), OWN.values(), DATA.values()
    seen = [
        (pixels - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]
        for m, s in ((mean, std), (data_mean, data_std))
    ]
    torch.testing.assert_close(ours(seen[1]), theirs(seen[0]), rtol=1e-4, atol=1e-5)
    assert (ours(seen[0]) - theirs(seen[0])).abs().max() > 1e-3  # the test can tell
    # Its state dict is that of the network without it; a torchvision ResNet does the same.
    assert list(ours.state_dict()) == list(build(NET).state_dict())
    plain, carrying = (resnet18(10, **more).eval() for more in ({}, {**OWN, **DATA}))
    carrying.load_state_dict(plain.state_dict())
    torch.testing.assert_close(carrying(seen[1]), plain(seen[0]), rtol=1e-4, atol=1e-5)


def test_a_network_with_its_own_normalisation_quantizes_packs_and_exports(tmp_path: Path) -> None:
    network = build({**NET, "depth": 8, **OWN, **DATA}).eval()
    images = torch.randn(16, 3, 16, 16)
    quantized = kdq.quantize(network, [images], bits=4).network
    kdq.save(quantized, tmp_path / "n.safetensors")
    torch.testing.assert_close(kdq.load(tmp_path / "n.safetensors")(images), quantized(images))
    exported = torch.export.export(network, (images,)).module()
    torch.testing.assert_close(exported(images), network(images))


@pytest.mark.parametrize("wrong", [OWN, {**OWN, **DATA, "std": [1.0, 0.0, 1.0]}, {**OWN, **DATA, "mean": [0.5]}])
def test_half_a_normalisation_is_refused(wrong: dict[str, list[float]]) -> None:
    with pytest.raises(KdqError, match="normalised"):
        build({**NET, **wrong})


def test_num_classes_goes_to_what_takes_it() -> None:
    assert build({"_target_": "torch.nn.Identity", "num_classes": 10}).kdq_net["num_classes"] == 10  # takes anything
    network = build({"_target_": "torch.nn.Flatten", "num_classes": 10, "start_dim": 2})
    assert network.kdq_net == {"_target_": "torch.nn.Flatten", "start_dim": 2}
    with pytest.raises(KdqError, match="does not take"):
        build({"_target_": "torch.nn.Flatten", "classes": 10})


def configured(net: dict[str, int], num_classes: int = 3) -> nn.Module:
    """A network of one's own that takes its settings in one argument, by the name that also holds networks."""
    return nn.Linear(net["width"], num_classes)


def test_an_argument_called_net_is_a_network_only_if_it_says_which() -> None:
    network = build({"_target_": f"{__name__}.configured", "net": {"width": 4}, "num_classes": 3})
    assert network.weight.shape == (3, 4)
    assert network.kdq_net == {"_target_": f"{__name__}.configured", "net": {"width": 4}, "num_classes": 3}
