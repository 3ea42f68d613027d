"""The student under its teacher's classifier: what is trained, what is kept, and that the product is like any other."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.distill import SimKD, Terms, TrainConfig
from kdq.distill.layers import averaged_maps
from kdq.distill.progress import TrainingProgress
from kdq.models import (
    CifarMobileNetV2,
    CifarResNet,
    CifarShuffleNetV1,
    CifarShuffleNetV2,
    CifarVGG,
    WhitenedNet,
    WideResNet,
    resnet18,
)
from kdq.stages.cell import Cell
from kdq.stages.pipeline import run
from kdq.stages.train import float_model, planned
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from tests.distill.small import QUIET, images_and_labels, in_two_processes, network

IMAGES, LABELS = images_and_labels()


def foreign(seed: int, planes: int, size: int = 1) -> Any:
    """Somebody else's, with maps of another size."""
    torch.manual_seed(seed)
    maps = nn.Conv2d(1, planes, 3, stride=size), nn.BatchNorm2d(planes), nn.ReLU()
    return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, 4))


def fitted(module: SimKD, folder: Path) -> L.Trainer:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 16)
    trainer = L.Trainer(**QUIET, max_epochs=2, default_root_dir=folder)
    trainer.fit(module, loader, loader)
    return trainer


def test_the_loss_and_the_product_against_their_definitions() -> None:
    """In float64; the student's maps of 14 x 14 are averaged to the teacher's 7 x 7."""
    student, teacher = foreign(1, 3).double(), foreign(2, 6, size=2).double()
    module = SimKD(student, teacher=teacher, num_classes=4, weight=2.0).connect(IMAGES[:2].double()).double().eval()
    terms, logits = module.losses(IMAGES.double(), LABELS, TrainingProgress())
    product = module.student.network
    maps = student[:3].eval()(IMAGES.double())
    projected, theirs = product.get_submodule("2.projector")(maps), teacher[:3](IMAGES.double())
    averaged = projected.detach().numpy().reshape(48, 6, 7, 2, 7, 2).mean((3, 5))
    expected = np.mean([(a - b) ** 2 for a, b in zip(averaged.ravel(), theirs.numpy().ravel(), strict=True)])
    assert terms["features"].item() == pytest.approx(2 * expected, rel=1e-9)
    assert terms["ce"].item() == 0
    weight, bias = (value.detach().numpy() for value in teacher[5].parameters())
    by_hand = projected.detach().numpy().mean((2, 3)) @ weight.T + bias
    np.testing.assert_allclose(logits.detach().numpy(), by_hand, rtol=1e-9)
    assert "2.projector.0.weight" not in student.state_dict()  # what was given is as it was


def test_maps_like_the_teacher_s_give_the_teacher_s_logits() -> None:
    teacher = network(2, width=0.5)
    module = SimKD(network(1), teacher=teacher, num_classes=4).connect(IMAGES[:2]).eval()
    (maps,) = module.layers["teacher"]
    seen = {}
    teacher.get_submodule(maps).register_forward_hook(lambda _, args, output: seen.update(maps=output))
    expected = teacher(IMAGES)
    product: Any = module.student.network
    product.layer3.register_forward_hook(lambda _, args, output: seen["maps"])
    torch.testing.assert_close(product(IMAGES), expected)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_classifier_stays_the_teacher_s(ema: float | None, tmp_path: Path) -> None:
    """While all else is trained, resumed, loaded, quantized, packed and loaded again as any network is."""
    teacher, config = network(2, width=0.5), TrainConfig(ema=ema, weight_decay=0.1)
    module = SimKD(network(1), teacher=teacher, num_classes=4, config=config, kd=1.0)
    trainer = fitted(module, tmp_path)
    start = SimKD(network(1), teacher=teacher, num_classes=4).connect(IMAGES[:2]).student.network.state_dict()
    for each in (module.student.network, module.eval_network):
        for name, value in each.state_dict().items():
            same = torch.equal(value, start[name])
            assert same == name.startswith("fc"), name
    assert torch.equal(start["fc.weight"], teacher.fc.weight)
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    loaded = SimKD.load_from_checkpoint(path)
    assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))
    with pytest.raises(KdqError, match=r"student=SimKD.product"):
        SimKD.load_from_checkpoint(path, student=network(1))
    again = SimKD.load_from_checkpoint(path, teacher=teacher)
    fitted(again, tmp_path / "again")
    assert torch.equal(again.eval_network.fc.weight, teacher.fc.weight)  # type: ignore[union-attr]
    quantized, _ = kdq.quantize(module.eval_network, [IMAGES], bits=4)
    size = kdq.save(quantized, tmp_path / "model.kdq")
    small, _ = kdq.quantize(network(1), [IMAGES], bits=4)
    assert size > kdq.save(small, tmp_path / "small.kdq")
    assert torch.equal(kdq.load(tmp_path / "model.kdq")(IMAGES), quantized(IMAGES))


def test_the_networks_of_the_literature_take_each_other_s_classifiers() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    networks = [
        *(CifarResNet(8, 4, width=2), WideResNet(10, 4), CifarVGG(8, 4), CifarMobileNetV2(4, width=0.25)),
        *(CifarShuffleNetV1(4), CifarShuffleNetV2(4), resnet18(4)),
        torchvision.models.mobilenet_v3_small(num_classes=4).features,
    ]
    networks[-1] = nn.Sequential(networks[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(576, 4))
    for teacher, student in zip(networks, [*networks[1:], networks[0]], strict=True):
        product = SimKD.product(student.eval(), teacher.eval(), images).eval()
        maps, shape, classifier = averaged_maps(product, images)
        names: Any = product.kdq_reused
        assert names == {"maps": maps, "classifier": classifier}
        assert shape[0] == averaged_maps(teacher, images)[1][0]
        assert product(images).shape == (2, 4)
        assert product.get_submodule(maps)[1].sizes[1] == shape[0]  # type: ignore[index]


def test_what_it_cannot_take() -> None:
    images = torch.randn(2, 1, 24, 24)
    with pytest.raises(KdqError, match="WhitenedNet's classifier takes no means of a layer's maps"):
        SimKD.product(network(1), WhitenedNet(4, in_channels=1, width=0.25), images)
    with pytest.raises(KdqError, match="it has no student_layers"):
        SimKD(network(1), teacher=network(2), num_classes=4, student_layers=["layer3"])
    with pytest.raises(KdqError, match=r"method.terms.simkd='simkd' is unknown"):
        Terms(network(1), teacher=network(2), num_classes=4, terms={"simkd": {}})


def _trained(rank: int, folder: str) -> None:
    module = SimKD(network(1), teacher=network(2, width=0.5), num_classes=4, config=TrainConfig(ema=0.5))
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 16)
    trainer = L.Trainer(**QUIET, max_epochs=2, devices=2, strategy="ddp", enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    torch.save(dict(module.eval_network.state_dict()), f"{folder}/{rank}.pt")


def test_two_processes_end_with_one_product(tmp_path: Path) -> None:
    in_two_processes(_trained, str(tmp_path))
    state, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert "layer3.projector.0.weight" in state
    assert all(torch.equal(state[name], tensor) for name, tensor in other.items() if isinstance(tensor, Tensor))


SMALL = [
    *("model@teacher=tiny", "model@student=tiny", "student.net.width=0.125", "data.train_limit=128"),
    *("teacher.recipe.epochs=1", "student.recipe.epochs=1", "student.recipe.batch_size=32", "trainer=cpu"),
    *("logger=none", "quant.calibration_images=16", "trainer.precision=32-true", "method=simkd", "quant.bits=4"),
]


def test_the_command_counts_stores_tunes_and_deploys_the_whole_product(tmp_path: Path) -> None:
    tuned = [*SMALL, "tune=qad", "tune.recipe.epochs=1", "quant.keep_float=[layer3.projector.0]", "deploy=onnx"]
    for overrides in (SMALL, tuned):
        cfg = compose([*overrides, f"paths.output_dir={tmp_path}"])
        (row,) = run(cfg)
        entry = float_model(Cell(cfg))
        network = Cell(cfg).network("student", entry)
        state = network.state_dict()
        assert {"layer3.maps.0.conv1.weight", "layer3.projector.0.weight", "fc.bias"} <= state.keys()
        teacher = Cell(cfg).network(
            "teacher", Cell(cfg).store.get(planned(Cell(cfg)).needs[0].spec, "digits-baseline-tiny-s0")
        )  # type: ignore[arg-type]
        assert torch.equal(state["fc.weight"], teacher.state_dict()["fc.weight"])
        assert row.params == sum(p.numel() for p in network.parameters())
        assert (row.arch, row.size_bytes) == ("tiny", (tmp_path / row.artifact).stat().st_size)
        loaded = kdq.load(tmp_path / row.artifact)
        kept = any("tune" in override for override in overrides)
        assert ("layer3.projector.0" not in loaded.quantized_weights) == kept  # type: ignore[operator]
        assert len(loaded.quantized_weights) == 13 - kept  # type: ignore[arg-type]
