"""ImageNet weights put into networks of another stem, other channels and other classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torchvision.models import ResNet18_Weights, Weights, resnet18

from kdq.models.build import build
from kdq.models.pretrained import load_imagenet
from kdq.utils.errors import KdqError


def net(**changes: Any) -> dict[str, Any]:
    return {"_target_": "kdq.models.resnet18", "num_classes": 7, "in_channels": 3, "stem": "cifar"} | changes


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    """A file in torchvision's format, where one that was fetched lies."""
    torch.manual_seed(1)
    state = resnet18().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place_weights(tmp_path, ResNet18_Weights.DEFAULT, state)
    return state


def place_weights(home: Path, weights: Weights, state: Mapping[str, torch.Tensor]) -> None:
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / weights.url.rpartition("/")[2])


def test_the_cifar_stem_takes_the_centre_of_the_kernel(published: dict[str, torch.Tensor]) -> None:
    network = build(net())
    head = network.fc.weight.clone()
    load_imagenet(network, net())
    state = network.state_dict()
    assert torch.equal(state["conv1.weight"], published["conv1.weight"][:, :, 2:5, 2:5])
    assert torch.equal(state["layer3.1.conv2.weight"], published["layer3.1.conv2.weight"])
    assert torch.equal(state["fc.weight"], head)


def test_a_grey_image_is_answered_as_the_same_image_in_rgb(published: dict[str, torch.Tensor]) -> None:
    grey, colour = net(in_channels=1, stem="imagenet"), net(stem="imagenet")
    networks = [build(grey), build(colour)]
    for network, config in zip(networks, (grey, colour), strict=True):
        load_imagenet(network, config)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(networks[0].conv1(image), networks[1].conv1(image.expand(-1, 3, -1, -1)))


def test_offline_names_the_file_and_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(self: Any, **_: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", refuse)
    with pytest.raises(
        KdqError, match=r"weights ResNet18_.*V1 \(no network\?\): put resnet18-.*\.pth into .*checkpoints"
    ):
        load_imagenet(build(net()), net())


def test_architectures_without_published_weights() -> None:
    config = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 10}
    with pytest.raises(KdqError, match="no ImageNet weights for CifarResNet: they exist for resnet18, resnet34"):
        load_imagenet(build(config), config)
