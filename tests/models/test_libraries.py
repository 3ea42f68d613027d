"""Networks of torchvision's and timm's by name, from files in the formats that they are published in."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import DenseNet121_Weights, Inception_V3_Weights, ResNet50_Weights

import kdq
from kdq.models import libraries
from kdq.models.build import build
from kdq.models.libraries import preprocessing, torchvision_model, weights_of
from kdq.models.weights import load_weights
from kdq.utils.errors import KdqError

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(images)


def test_each_network_sees_its_own_normalisation() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    data = {"data_mean": [0.4, 0.5, 0.6], "data_std": [0.3, 0.2, 0.1]}
    given = (pixels - torch.tensor(data["data_mean"])[:, None, None]) / torch.tensor(data["data_std"])[:, None, None]
    network = torchvision_model("squeezenet1_1", 5, IMAGENET_MEAN, IMAGENET_STD, **data)
    assert isinstance(network, nn.Sequential)
    torch.testing.assert_close(logits(network, given), logits(network.network, (pixels - mean) / std))
    same = torchvision_model("squeezenet1_1", 5, IMAGENET_MEAN, IMAGENET_STD, IMAGENET_MEAN, IMAGENET_STD)
    assert type(same) is torchvision.models.SqueezeNet


@pytest.mark.parametrize(
    ("name", "wrapped", "old"),
    [
        ("densenet121", True, (r"(denselayer\d+)\.(norm|conv)([12])\.", r"\1.\2.\3.")),
        ("vit_b_32", False, (r"\.mlp\.(0|3)\.", lambda found: f".mlp.linear_{1 + int(found[1]) // 3}.")),
        ("squeezenet1_1", True, ("^", "module.")),
    ],
)
def test_published_files_are_read_by_their_older_names(
    name: str, wrapped: bool, old: tuple[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    source = torchvision_model(name, num_classes=7)
    torch.save({re.sub(*old, key): value for key, value in source.state_dict().items()}, tmp_path / "old.pth")
    data = {"mean": [0.5] * 3, "std": [0.5] * 3, "data_mean": [0.0] * 3, "data_std": [1.0] * 3} if wrapped else {}
    target = torchvision_model(name, num_classes=7, **data)
    load_weights(target, tmp_path / "old.pth")
    images = torch.randn(2, 3, 224, 224) if name == "vit_b_32" else torch.randn(2, 3, 64, 64)
    seen = 2 * images - 1 if wrapped else images
    torch.testing.assert_close(logits(target, images), logits(source, seen), atol=1e-4, rtol=1e-4)
    other = torchvision_model(name, num_classes=4, **data)
    with pytest.raises(KdqError, match="number of classes"):
        load_weights(other, tmp_path / "old.pth")
    load_weights(other, tmp_path / "old.pth", new_head=True)
    assert "classifier of 7 classes makes way for a new one of 4" in caplog.text
    ours, theirs = list(other.state_dict().values()), list(source.state_dict().values())
    assert sum(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) == 2


def test_inception_sees_what_torchvision_shows_it(tmp_path: Path) -> None:
    """torchvision's builder of weights rescales ImageNet's normalisation inside of the network."""
    torch.manual_seed(0)
    theirs = torchvision.models.inception_v3(init_weights=False, transform_input=True)
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    want = preprocessing("kdq.models.torchvision_model", "Inception_V3", "imagenet")
    assert want is not None
    assert (want.size, want.shorter, want.interpolation) == (299, 342, "bilinear")
    ours = torchvision_model("Inception_V3", 1000, want.mean, want.std, IMAGENET_MEAN, IMAGENET_STD, init_weights=False)
    load_weights(ours, tmp_path / "file.pth")
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(logits(ours, images), logits(theirs, images), atol=1e-4, rtol=1e-4)


def test_weights_are_found_where_torchvision_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for weights in (ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2):
        (folder / weights.url.rpartition("/")[2]).write_bytes(weights.name.encode())
    net = {"_target_": "kdq.models.torchvision_model", "name": "resnet50"}
    for source, name in {"imagenet": "V2", "IMAGENET1K_V1": "V1", "IMAGENET1K_V2": "V2"}.items():
        path = weights_of(source, net)
        assert path is not None
        assert path.read_bytes().decode().endswith(name)
    with pytest.raises(KdqError, match="no weights file at IMAGENET1K_V3"):
        weights_of("IMAGENET1K_V3", net)
    assert weights_of("imagenet", {"_target_": "kdq.models.resnet18"}) is None
    for kind, size, shorter in (
        (DenseNet121_Weights, 224, 256),
        (ResNet50_Weights, 224, 232),
        (Inception_V3_Weights, 299, 342),
    ):
        name = kind.__name__.removesuffix("_Weights").lower()
        found = preprocessing("kdq.models.torchvision_model", name, "imagenet")
        assert found is not None
        assert (found.size, found.shorter) == (size, shorter)
    assert preprocessing("kdq.models.torchvision_model", "resnet50", None) is None
    assert preprocessing("kdq.models.resnet50", "resnet50", "imagenet") is None


@pytest.mark.parametrize(
    "ask",
    [
        torchvision_model,
        lambda name: preprocessing("kdq.models.torchvision_model", name, "imagenet"),
        lambda name: weights_of("imagenet", {"_target_": "kdq.models.torchvision_model", "name": name}),
    ],
)
def test_what_torchvision_does_not_have(ask: Callable[[str], Any]) -> None:
    with pytest.raises(KdqError, match="torchvision has no network 'resnet51'"):
        ask("resnet51")


def test_a_packed_file_of_a_network_by_name_reads_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = {"_target_": "kdq.models.torchvision_model", "name": "squeezenet1_1", "num_classes": 3}
    net |= {"mean": [0.5] * 3, "std": [0.5] * 3, "data_mean": [0.4] * 3, "data_std": [0.2] * 3}
    images = torch.randn(8, 3, 64, 64)
    made, _ = kdq.quantize(build(net).eval(), [images], bits=4)
    kdq.save(made, tmp_path / "network.kdq")
    assert torch.equal(logits(kdq.load(tmp_path / "network.kdq"), images), logits(made, images))


def test_without_timm_its_networks_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(KdqError, match="needs timm: pip install timm"):
        libraries.timm_model("vit_tiny_patch16_224")


def test_a_network_of_timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name, data = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"data_mean": [0.0] * 3, "data_std": [1.0] * 3}
    source = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "file.bin")
    monkeypatch.setattr(libraries, "locate", lambda source: SimpleNamespace(source=source))
    net = {"_target_": "kdq.models.timm_model", "name": name}
    assert weights_of("imagenet", net).source == "hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # type: ignore
    want = preprocessing(net["_target_"], name, "imagenet")
    assert want is not None
    assert (want.size, want.shorter, want.interpolation, want.mean) == (224, 249, "bicubic", (0.5, 0.5, 0.5))
    network = build({**net, "num_classes": 1000, "in_channels": 3, "mean": want.mean, "std": want.std, **data})
    load_weights(network, tmp_path / "file.bin")
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(logits(network, images), logits(source, 2 * images - 1), atol=1e-4, rtol=1e-4)
    with pytest.raises(KdqError, match="timm has no network 'vit_none'"):
        build({**net, "name": "vit_none"})
    with pytest.raises(KdqError, match="timm publishes no weights"):
        preprocessing(net["_target_"], "vit_tiny_patch16_224.nobody", "imagenet")
