"""Several methods at once: their own terms, from one pass; resumed, loaded, run by the command, and what is refused."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.distill import AT, CTKD, DKD, VID, VKD, FeatureMethod, TeacherStudent, Terms, TrainConfig
from kdq.distill.progress import TrainingProgress
from kdq.models import CifarResNet
from kdq.stages.cell import Cell
from kdq.stages.check import check_config
from kdq.stages.train import float_model, planned
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from tests.distill.small import QUIET, images_and_labels, network

ALL: dict[str, dict[str, Any]] = {
    "at": {"weight": 500.0},
    "vid": {"kd": 0.5},
    "dkd": {"beta": 3.0},
    "ctkd": {"alpha": 0.7, "warmup": 0.0},
    "soft": {"_target_": "kdq.distill.VKD", "alpha": 0.8, "weight": 2.5},
}
KINDS: dict[str, type[TeacherStudent]] = {"at": AT, "vid": VID, "dkd": DKD, "ctkd": CTKD, "soft": VKD}
MOMENT = TrainingProgress(epoch=1, epochs=2)


def make(kind: type[TeacherStudent] = Terms, **options: Any) -> Any:
    return kind(network(1), teacher=network(2, width=0.5), num_classes=4, **options)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return images_and_labels()


@pytest.fixture
def loader(batch: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch), 16)


def connected(module: Any, images: Tensor) -> Any:
    for each in [module, *getattr(module, "methods", nn.ModuleDict()).values()]:
        if isinstance(each, FeatureMethod):
            each.connect(images)
    return module


def test_terms_are_those_of_each_method_alone(batch: tuple[Tensor, Tensor]) -> None:
    module = connected(make(terms=ALL, ce=0.3, config=TrainConfig(label_smoothing=0.1)), batch[0])
    calls: list[str] = []
    for role, model in (("student", module.student.network), ("teacher", module.teacher.network)):
        model.register_forward_hook(lambda *_, role=role: calls.append(role))
    terms, logits = module.losses(*batch, MOMENT)
    assert calls == ["student", "teacher"]
    expected = {"ce": 0.3 * F.cross_entropy(logits, batch[1], label_smoothing=0.1)}
    for name, kind in KINDS.items():
        factor = 2.5 if name == "soft" else 1.0
        options = {
            key: value
            for key, value in ALL[name].items()
            if key not in ("_target_", *(["weight"] if factor > 1 else []))
        }
        alone, _ = connected(make(kind, **options), batch[0]).losses(*batch, MOMENT)
        expected |= {f"{name}_{term}": factor * value for term, value in alone.items() if term != "ce"}
    assert list(terms) == list(expected)
    torch.testing.assert_close(terms, expected)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "soft"])
def test_one_term_is_the_method(name: str, loader: DataLoader[Any]) -> None:
    """Trained side by side, with the cross-entropy's share that the method gives it."""
    alone = make(KINDS[name], **ALL[name])
    module = make(terms={name: ALL[name]}, ce=alone.ce_weight)
    for each in (alone, module):
        L.Trainer(**QUIET, max_epochs=2, enable_checkpointing=False).fit(each, loader)
    states = [each.student.network.state_dict() for each in (alone, module)]
    torch.testing.assert_close(states[0], states[1])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, r"method.terms needs a method, each of another name: \+method@method.terms.at=at"),
        ({"at": {}, "b": {"_target_": "kdq.distill.AT", "name": "at"}}, "each of another name"),
        ({"att": {}}, r"method.terms.att='att' is unknown: .* \(did you mean at\?\)"),
        ({"mixup": {}}, "method.terms.mixup='mixup' is unknown"),  # is more than terms
        ({"published_vkd": {}}, "method.terms.published_vkd='published_vkd' is unknown"),  # and so is this
        ({"os": {"_target_": "os.system"}}, "method.terms.os='os.system' is unknown"),
        ({"vkd": {"weight": -1.0}}, "method.terms.vkd.weight=-1.0 must be"),
    ],
)
def test_impossible_terms(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(KdqError, match=message):
        make(terms=terms)


def test_options_of_each_method_are_not_this_ones() -> None:
    with pytest.raises(KdqError, match=r"method.standardize is an option of each method: method.terms.NAME.standard"):
        make(terms={"vkd": {}}, standardize=True)


def composed(*overrides: str) -> Any:
    cfg = compose(["model@teacher=tiny", "model@student=tiny", "method=terms", *overrides])
    check_config(cfg)
    return cfg


def test_the_command_takes_methods_of_the_group(tmp_path: Path) -> None:
    overrides = [
        *("+method@method.terms.at=at", "method.terms.at.weight=500", "+method.terms.vkd.alpha=0.5"),
        *("student.net.width=0.125", "data.train_limit=128", "teacher.recipe.epochs=1", "student.recipe.epochs=1"),
        *("student.recipe.batch_size=32", "trainer=cpu", "logger=none", f"paths.output_dir={tmp_path}"),
    ]
    cell = Cell(composed(*overrides))
    assert planned(cell).spec["method"]["terms"]["at"]["weight"] == 500
    student = CifarResNet(8, num_classes=10, in_channels=1, width=0.125)
    assert set(float_model(cell).weights()) == set(student.state_dict())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+method.terms.at.wieght=3", "method.terms.at.wieght"),
        ("+method.terms.atl.weight=3", "method.terms.atl='atl' is unknown"),
        ("+method.terms.at=3", "method.terms.at=3 has options of its own"),
        ("method.terms=at", "method.terms=at must be methods by name"),
    ],
)
def test_what_nobody_reads_is_refused(override: str, message: str) -> None:
    with pytest.raises(KdqError, match=message):
        composed(override)
