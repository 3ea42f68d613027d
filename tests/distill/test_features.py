"""Methods that compare features: which layers, what projectors are and are not part of, and whole trainings."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.distill import AT, OFD, PKT, RKD, SP, CrossEntropy, FeatureMethod, FitNets, ReviewKD
from kdq.distill.feature_losses import attention_loss, hierarchical_loss, margin_loss, pkt_loss, similarity_loss
from kdq.distill.layers import found_layers, watched
from kdq.distill.losses import distillation_kl
from kdq.distill.progress import TrainingProgress
from kdq.models import CifarResNet, CifarShuffleNetV1, CifarVGG, WideResNet, resnet18
from kdq.stages.cell import Cell
from kdq.stages.pipeline import run
from kdq.stages.train import float_model, planned
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from tests.distill.small import QUIET, images_and_labels, network

METHODS = (
    *("fitnets", "at", "sp", "rkd", "pkt", "nst", "vid", "reviewkd", "crd", "ofd"),
    *("dist", "nkd", "ttm", "rld", "mlkd", "tfkd", "byot", "ctkd"),
)


def make(kind: type[FeatureMethod], **options: Any) -> Any:
    return kind(network(1), teacher=network(2, width=0.5), num_classes=4, **options)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return images_and_labels()


@pytest.fixture
def loader(batch: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch), 16)


@pytest.mark.parametrize(
    ("name", "stages", "embedding"),
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"], "fc"),
        ("mobilenet_v2", [f"features.{n}" for n in (1, 3, 6, 13)] + ["features"], "classifier.1"),
        ("efficientnet_b0", [f"features.{n}" for n in (1, 2, 3, 5)] + ["features"], "classifier.1"),
        ("shufflenet_v2_x0_5", ["conv1", "maxpool", "stage2", "stage3", "conv5"], "fc"),
    ],
)
def test_layers_of_torchvision_s_networks(name: str, stages: list[str], embedding: str) -> None:
    model, images = torchvision.models.get_model(name).eval(), torch.zeros(1, 3, 96, 96)
    assert found_layers(model, images, "stages") == stages
    assert found_layers(model, images, "embedding") == [f"{embedding}:input"]


def test_the_last_stages_of_networks_with_more_and_fewer() -> None:
    teacher = resnet18(4, in_channels=1)
    for kind, mine, theirs in (
        (AT, ["layer1", "layer2", "layer3"], ["layer2", "layer3", "layer4"]),
        (FitNets, ["layer2"], ["layer3"]),
        (SP, ["layer3"], ["layer4"]),
        (RKD, ["fc:input"], ["fc:input"]),
    ):
        layers = kind(network(1), teacher=teacher, num_classes=4).connect(torch.zeros(2, 1, 32, 32)).layers
        assert {role: list(names) for role, names in layers.items()} == {"student": mine, "teacher": theirs}


def test_stages_that_a_network_names_itself() -> None:
    layers = AT(CifarVGG(8, 4), teacher=WideResNet(10, 4), num_classes=4).connect(torch.zeros(2, 3, 16, 16)).layers
    assert list(layers["student"]) == ["block2", "block3", "block4"]
    assert list(layers["teacher"]) == ["block1", "block2", "block3"]


def test_what_is_watched_is_the_network_s_own(batch: tuple[Tensor, Tensor]) -> None:
    model = network(1)
    with watched(model, ["layer3", "fc:input"]) as features:
        logits = model(batch[0])
    assert torch.equal(F.linear(features["fc:input"], model.fc.weight, model.fc.bias), logits)  # type: ignore[union-attr, arg-type]
    assert torch.equal(features["layer3"].mean((2, 3)), features["fc:input"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "loss", "layers"),
    [
        (AT, attention_loss, ["layer1", "layer2", "layer3"]),
        (SP, similarity_loss, ["layer3"]),
        (PKT, pkt_loss, ["avgpool"]),
    ],
)
def test_the_terms_of_a_method(kind: Any, loss: Any, layers: list[str], batch: tuple[Tensor, Tensor]) -> None:
    """Weights, labels, and the KL beside it, from the networks' own layers."""
    module = make(kind, weight=3.0, kd=0.5).connect(batch[0])
    terms, logits = module.losses(*batch, TrainingProgress())
    features = []
    for model in (module.student.network, module.teacher.network):
        x, seen = F.relu(model.bn1(model.conv1(batch[0]))), {}
        for name in ("layer1", "layer2", "layer3", "avgpool"):
            seen[name] = x = getattr(model, name)(x)
        features.append(seen)
    expected = 3 * sum(loss(features[0][name], features[1][name]) for name in layers)
    torch.testing.assert_close(terms["features"], expected)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, batch[1]))
    torch.testing.assert_close(terms["kl"], 0.5 * distillation_kl(logits, module.teacher(batch[0]), 4.0))
    assert set(make(kind).connect(batch[0]).losses(*batch, TrainingProgress())[0]) == {"ce", "features"}


@pytest.mark.parametrize("inplace", [True, False])
def test_ofd_compares_what_the_last_relus_take(inplace: bool, batch: tuple[Tensor, Tensor]) -> None:
    """Whether they overwrite it, as torchvision's do, or not."""
    module = make(OFD, weight=1.0)
    for part in (*module.student.network.modules(), *module.teacher.network.modules()):
        if isinstance(part, nn.ReLU):
            part.inplace = inplace
    module.connect(batch[0]).eval()
    assert list(module.layers["teacher"]) == [f"layer{n}.0.relu:input" for n in (1, 2, 3)]
    features = []
    for model in (module.student.network, module.teacher.network):
        x, seen = F.relu(model.bn1(model.conv1(batch[0]))), []
        for (block,) in (model.layer1, model.layer2, model.layer3):
            shortcut = x if block.downsample is None else block.downsample(x)
            seen.append(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + shortcut)
            x = F.relu(seen[-1])
        features.append(seen)
    triples = list(zip(module.projectors, *features, strict=True))
    assert all(float(theirs.detach().min()) < 0 for _, _, theirs in triples)
    expected = sum(margin_loss(p(mine), theirs) / 2 ** (2 - n) for n, (p, mine, theirs) in enumerate(triples))
    found, logits = module.losses(*batch, TrainingProgress())
    torch.testing.assert_close(found["features"], expected)
    assert torch.equal(logits, module.student.network(batch[0]))


def test_the_stages_before_their_relus() -> None:
    images = torch.zeros(2, 3, 64, 64)
    for model, layers in (
        (torchvision.models.resnet18(), ["relu", *(f"layer{n}.1.relu" for n in (1, 2, 3, 4))]),
        (CifarVGG(8, 4), [f"block{n}.2" for n in (1, 2, 3, 4)]),
        (CifarShuffleNetV1(4), ["layer1.3.relu", "layer2.7.relu", "layer3.3.relu"]),
    ):
        assert found_layers(model.eval(), images, "unactivated") == [f"{name}:input" for name in layers]
    assert found_layers(WideResNet(10, 4), images, "unactivated") == ["block1", "block2", "block3"]


def test_reviewkd_mixes_from_the_deepest_level_on(batch: tuple[Tensor, Tensor]) -> None:
    """Written out for two levels of one size, with an attention that takes everything of both."""
    layers = ["layer2", "layer3"]
    module = make(ReviewKD, student_layers=layers, teacher_layers=layers, warmup=0.5).connect(batch[0]).eval()
    shallow, deep = module.projectors
    assert deep.attention is None
    nn.init.zeros_(shallow.attention[0].weight)
    nn.init.constant_(shallow.attention[0].bias, 50.0)
    mine, theirs = ([torch.randn(2, channels, 4, 4) for channels in width] for width in ((8, 16), (16, 32)))
    mine[1], theirs[1] = mine[1][..., :2, :2], theirs[1][..., :2, :2]
    reduced = deep.reduce(mine[1])
    both = shallow.reduce(mine[0]) + reduced.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = hierarchical_loss(deep.expand(reduced), theirs[1]) + hierarchical_loss(shallow.expand(both), theirs[0])
    torch.testing.assert_close(module.between(mine, theirs, TrainingProgress()), expected)
    terms = [module.losses(*batch, TrainingProgress(epoch=epoch, epochs=4))[0]["features"] for epoch in (0, 1, 2, 3)]
    torch.testing.assert_close(torch.stack(terms), terms[3] * torch.tensor([0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_compiled_networks_are_refused(role: str, loader: DataLoader[Any]) -> None:
    networks = {"student": network(1), "teacher": network(2)}
    networks[role] = torch.compile(networks[role], backend="eager")  # type: ignore[assignment]
    module = AT(networks["student"], teacher=networks["teacher"], num_classes=4, teacher_layers=["layer2"])
    with pytest.raises(KdqError, match=r"AT looks inside of its networks.* trainer.compile=false"):
        L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(module, loader)


def test_a_projector_is_there_only_where_channels_differ(batch: tuple[Tensor, Tensor]) -> None:
    module = make(FitNets).connect(batch[0])
    assert [tuple(p.shape) for p in module.projectors[0].parameters()] == [(16, 8, 1, 1), (16,), (16,)]
    alike = FitNets(network(1), teacher=network(1), num_classes=4, student_layers=["layer3"], teacher_layers=["layer3"])
    alike.connect(batch[0])
    assert not list(alike.projectors.parameters())
    alike.eval()  # the student's BatchNorm as the teacher's
    assert float(alike.losses(*batch, TrainingProgress())[0]["features"].detach()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_layers": ["layer33"]}, r"the student has no layer 'layer33' \(did you mean layer3\?\)"),
        ({"teacher_layers": ["head:input"]}, "method.teacher_layers: the teacher has no layer 'head:input'"),
        ({"student_layers": ["layer1", "layer2"], "teacher_layers": ["layer2"]}, "must be as many"),
        ({"student_layers": ["layer1"]}, "must be as many"),
        ({"student_layers": ["fc"], "teacher_layers": ["layer2"]}, r"but the student's layer fc gives \(2, 4\)"),
        ({"student_layers": ["layer1.0.bn2"], "teacher_layers": ["layer1"]}, "is changed in place by what follows"),
        ({"weight": -1.0}, "method.weight=-1.0"),
        ({"kd": "much"}, "method.kd='much'"),
    ],
)
def test_impossible_layers_and_weights(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KdqError, match=message):
        make(AT, **options).connect(torch.zeros(2, 1, 16, 16))


def test_a_network_without_maps_says_what_to_give() -> None:
    with pytest.raises(KdqError, match="no stages of maps found in Linear: name student_layers and teacher_layers"):
        AT(nn.Linear(8, 4), teacher=network(1), num_classes=4).connect(torch.zeros(2, 1, 16, 8))


def test_a_look_at_the_data_changes_no_draw(loader: DataLoader[Any]) -> None:
    """With a weight of zero it is cross-entropy, draw for draw."""
    states = []
    for kind in (AT, CrossEntropy):
        module: Any = make(AT, weight=0.0) if kind is AT else CrossEntropy(network(1), num_classes=4)
        torch.manual_seed(5)
        shuffled = DataLoader(loader.dataset, 16, shuffle=True)
        L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(module, shuffled)
        states.append(module.student.network.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


SMALL = [
    *("model@teacher=tiny", "model@student=tiny", "student.net.width=0.125", "data.train_limit=128"),
    *("teacher.recipe.epochs=1", "student.recipe.epochs=1", "student.recipe.batch_size=32", "trainer=cpu"),
    *("logger=none", "quant.calibration_images=16", "trainer.precision=32-true"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.mark.parametrize("method", METHODS)
def test_the_command_trains_and_stores_the_student_alone(method: str, output: Path) -> None:
    cfg = compose([*SMALL, f"method={method}", "quant.bits=4", f"paths.output_dir={output}"])
    student = CifarResNet(8, num_classes=10, in_channels=1, width=0.125)
    assert set(float_model(Cell(cfg)).weights()) == set(student.state_dict())
    assert "projector" not in str(planned(Cell(cfg)).spec)
    if method == "vid":
        (row,) = run(cfg)
        assert row.params == sum(p.numel() for p in student.parameters())
        assert b"projector" not in (output / row.artifact).read_bytes()
