"""What a stored file may name: networks of one table, with arguments that fit what the file holds."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import kdq
import kdq.quant.packing
from kdq.distill.checkpoint import built, described
from kdq.models import CifarResNet, resnet18
from kdq.models.build import build
from kdq.models.table import NumbersOnCpu, build_small, is_in_table, name_of, shape_of, stored_name, table
from kdq.quant.fake import fake_quantized
from kdq.utils.errors import KdqError

SMALL = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.25}
REUSED = {"_target_": "kdq.models.reused_classifier", "net": SMALL, "maps": "layer3", "classifier": "fc"}
REUSED |= {"channels": 16, "features": 8}


def _held(network: nn.Module) -> tuple[int, int]:
    state = network.state_dict()
    return len(state), sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    "net",
    [
        {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.25},
        {"_target_": "kdq.models.CifarResNet", "depth": 14, "num_classes": 10, "width": 2},
        {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "shortcut": "A"}
        | {"mean": [0.5], "std": [0.2], "data_mean": [-0.1], "data_std": [1]},
        {"_target_": "kdq.models.WhitenedNet", "num_classes": 10, "width": 0.25},
        {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "width": 4.0, "stem": 32},
        {"_target_": "kdq.models.WideResNet", "depth": 16, "num_classes": 3, "width": 2},
        {"_target_": "kdq.models.CifarVGG", "depth": 8, "num_classes": 3, "in_channels": 1},
        {"_target_": "kdq.models.CifarMobileNetV2", "num_classes": 3, "width": 0.25},
        {"_target_": "kdq.models.CifarShuffleNetV1", "num_classes": 3},
        {"_target_": "kdq.models.CifarShuffleNetV2", "num_classes": 3},
        {"_target_": "kdq.models.resnet18", "num_classes": 4, "in_channels": 1, "stem": "imagenet"},
        {"_target_": "torchvision.models.resnet18", "num_classes": 4},
        {"_target_": "torchvision.models.mobilenet_v2", "num_classes": 4, "width_mult": 0.25, "dropout": 0},
        {"_target_": "torchvision.models.regnet_y_400mf"},
        {
            "_target_": "kdq.models.reused_classifier",
            "maps": "layer3",
            "classifier": "fc",
            "channels": 64,
            "features": 24,
        }
        | {"net": {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3}},
        {"_target_": "kdq.models.torchvision_model", "name": "mobilenet_v2", "width_mult": 0.25, "num_classes": 4}
        | {"mean": [0.5] * 3, "std": [0.2] * 3, "data_mean": [0.4] * 3, "data_std": [0.3] * 3},
    ],
)
def test_every_network_that_a_config_builds_is_shaped_like_it(net: dict[str, Any]) -> None:
    made = build(net)
    shaped = shape_of(net, *_held(made))
    assert {name: value.shape for name, value in shaped.state_dict().items()} == {
        name: value.shape for name, value in made.state_dict().items()
    }
    assert all(parameter.device.type == "meta" for parameter in shaped.parameters())
    assert shaped.kdq_net == made.kdq_net == net
    assert _held(build_small(net)) == _held(made)


def test_classification_networks_of_torchvision_are_filled_by_a_state_dict_alone() -> None:
    listed = torchvision.models.list_models(module=torchvision.models)
    assert len(table()) == len(listed) + 12
    for name in listed[::5]:  # of every family
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"), NumbersOnCpu():
                network = torchvision.models.get_model(name, weights=None)
        held = [*network.parameters(), *network.buffers()]
        assert len(held) == len(network.state_dict())
        assert not [value for module in network.modules() for value in vars(module).values() if torch.is_tensor(value)]


def test_one_name_for_a_network_whatever_path_it_was_called_by() -> None:
    paths = ("kdq.models.CifarResNet", "kdq.models.networks.CifarResNet", "cifar_resnet")
    assert len({str(stored_name({"_target_": path, "depth": 20})) for path in paths}) == 1
    net = {"depth": 8, "num_classes": 3}
    held = _held(build({"_target_": paths[0], **net}))
    assert {type(shape_of({"_target_": path, **net}, *held)).__name__ for path in paths} == {"CifarResNet"}
    assert stored_name({"_target_": "mine.net"}) == {"_target_": "mine.net"}
    assert name_of(nn.Linear(3, 3)) is None


@pytest.mark.parametrize(
    "net",
    [
        *({"_target_": target} for target in ("os.system", "kdq.models.build.build", "torch.nn.Linear", None, 3, [])),
        *({"_target_": f"torchvision.models.{name}"} for name in ("get_model", "ResNet", "segmentation.fcn_resnet50")),
        *({"_target_": "torchvision.models.resnet18", "weights": weights} for weights in ("DEFAULT", "x", True, {})),
        {"_target_": "torchvision.models.resnet18", "norm_layer": "torch.nn.BatchNorm2d"},
        {"_target_": "kdq.models.resnet18", "num_classes": 4, "stem": "vgg"},
        {"_target_": "kdq.models.resnet18", "num_classes": {"_target_": "os.getpid"}},
        *({"_target_": "kdq.models.resnet18", "num_classes": n} for n in (True, -1, 0, 2.0, "4", None, math.nan)),
        *({"_target_": "kdq.models.WhitenedNet", "num_classes": 3, "width": w} for w in (-1, math.nan, math.inf, "1")),
        *(REUSED | {"net": net} for net in (REUSED, {"_target_": "os.getpid"}, "kdq.models.resnet18", None)),
        *(REUSED | {name: 3.5} for name in ("maps", "classifier", "channels", "features")),
        {"num_classes": 4},
        [],
        None,
    ],
)
def test_what_no_file_may_name(net: Any) -> None:
    assert not is_in_table(net)
    with pytest.raises(KdqError, match=r"network=\.\.\."):
        shape_of(net, 100, 10**9)


@pytest.mark.parametrize(
    "changes",
    [
        *({"depth": depth} for depth in (60000002, 104, 10**30, 9)),
        *({name: size} for name in ("num_classes", "in_channels") for size in (10**5, 10**9, 10**18, 10**400)),
        *({"width": width} for width in (1e3, 1e300, 10**400, 0)),
        {"classes": 3},
        {"num_classes": 4},
    ],
)
def test_what_is_not_what_the_file_holds(changes: dict[str, Any]) -> None:
    net = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.25}
    held = _held(build(net))
    with pytest.raises(KdqError, match="file"):
        shape_of({**net, **changes}, *held)


@pytest.mark.parametrize(
    "changes",
    [
        *({"features": features} for features in (9, 10**5, 10**400)),
        *({"channels": channels} for channels in (17, 10**9)),
        *({"maps": name} for name in ("layer9", "layer3.0.conv1.weight", "")),
        *({"classifier": name} for name in ("layer3", "__class__")),
        *({"net": SMALL | net} for net in ({"depth": 60000002}, {"width": 1e300}, {"num_classes": 10**9})),
    ],
)
def test_a_reused_classifier_is_no_way_around(changes: dict[str, Any]) -> None:
    held = _held(build(REUSED))
    with pytest.raises(KdqError, match="file"):
        shape_of({**REUSED, **changes}, *held)


@pytest.mark.parametrize("changes", [{"depth": 60000002}, {"num_classes": 10**9}, {"width": 1e3}, {"width": 511.0}])
def test_a_checkpoint_names_no_network_beyond_a_size(changes: dict[str, Any]) -> None:
    with pytest.raises(KdqError, match="file"):
        build_small({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, **changes})


def test_a_network_says_flat_arguments_of_itself() -> None:
    normalized: dict[str, Any] = {"mean": [0.5], "std": [0.2], "data_mean": [-0.1], "data_std": [1]}
    net = CifarResNet(8, 3, in_channels=1, **normalized).kdq_net
    assert net == {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, **normalized}
    assert is_in_table(net)  # type: ignore[arg-type]


class Flipped(CifarResNet):
    """Takes its channels the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def _edited() -> nn.Module:
    network = CifarResNet(8, num_classes=3)
    network.relu = nn.SiLU()
    return network


def _with_eps() -> nn.Module:
    network = CifarResNet(8, num_classes=3)
    network.bn1.eps = 1e-3
    return network


@pytest.mark.parametrize("make", [lambda: Flipped(8, num_classes=3), _edited, _with_eps])
def test_a_network_that_was_made_another_does_not_come_back_as_the_old_one(make: Any, tmp_path: Path) -> None:
    network, images = make(), torch.randn(4, 3, 8, 8)
    quantized, _ = kdq.quantize(network, [images], bits=8, solver="rtn")
    kdq.save(quantized, tmp_path / "network.kdq")
    with pytest.raises(KdqError, match="does not say its architecture"):
        kdq.load(tmp_path / "network.kdq")
    assert torch.equal(kdq.load(tmp_path / "network.kdq", network=network)(images), quantized(images))
    with pytest.raises(KdqError, match="student=network"):
        built(described(network), "student")


def test_what_training_adds_leaves_a_network_its_name(tmp_path: Path) -> None:
    network = CifarResNet(8, num_classes=3)
    named = name_of(network)
    assert named == {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3}
    network.relu.inplace = False
    quantized, _ = kdq.quantize(network, [torch.randn(4, 3, 8, 8)], bits=4, act_bits=8, solver="rtn")
    kdq.save(quantized, tmp_path / "network.kdq")
    packed = kdq.load(tmp_path / "network.kdq", decode="layer")
    assert name_of(fake_quantized(quantized)) == name_of(packed) == named
    assert name_of(nn.SyncBatchNorm.convert_sync_batchnorm(network)) == named


def test_to_ask_a_network_for_its_name_draws_no_random_numbers() -> None:
    for network in (CifarResNet(8, num_classes=3), resnet18(num_classes=3), build(REUSED)):
        before = torch.get_rng_state()
        assert name_of(network) is not None
        assert torch.equal(torch.get_rng_state(), before)


def test_the_page_of_the_format_names_every_network_of_kdq() -> None:
    page = (Path(kdq.quant.packing.__path__[0]) / "FORMAT.md").read_text()
    own = [entry.target for entry in table().values() if entry.target.startswith("kdq.models.")]
    assert [target for target in own if f"`{target.removeprefix('kdq.models.')}`" not in page] == []
