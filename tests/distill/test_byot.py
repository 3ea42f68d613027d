"""BYOT: its loss against the definition in float64, what its exits are no part of, and trainings that resume."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.distill import BYOT, TrainConfig
from kdq.distill.progress import TrainingProgress
from kdq.models import CifarResNet
from kdq.utils.errors import KdqError

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False}


def make(**options: Any) -> BYOT:
    torch.manual_seed(1)
    return BYOT(CifarResNet(8, num_classes=4, in_channels=1, width=0.25), num_classes=4, **options)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 1, 16, 16, generator=generator), torch.randint(4, (24,), generator=generator)


def test_the_terms_are_their_definition(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    module = make(alpha=0.2, weight=0.5, temperature=2.0).connect(images[:2]).double()
    terms, logits = module.losses(images.double(), labels, TrainingProgress())
    net: Any = module.student.network
    x = net.relu(net.bn1(net.conv1(images.double())))
    maps = [x := stage(x) for stage in (net.layer1, net.layer2, net.layer3)]
    z = logits.detach().numpy()
    expected = {"ce": -log_softmax(z, 1)[range(24), labels].mean(), "exits": 0.0, "kl": 0.0, "features": 0.0}
    for leave, stage in zip(module.projectors, maps, strict=False):
        own = leave.maps(stage).detach().numpy().mean((2, 3))  # type: ignore[operator, union-attr]
        weight, bias = (p.detach().numpy() for p in leave.classifier.parameters())  # type: ignore[union-attr]
        guess = own @ weight.T + bias
        p = softmax(z / 2, 1)
        expected["exits"] += -0.8 * log_softmax(guess, 1)[range(24), labels].mean()
        expected["kl"] += 0.2 * 4 * (p * (np.log(p) - log_softmax(guess / 2, 1))).sum(1).mean()
        expected["features"] += 0.5 * ((own - maps[-1].detach().numpy().mean((2, 3))) ** 2).sum(1).mean()
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_what_the_exits_learn_from_is_a_constant(batch: tuple[Tensor, Tensor]) -> None:
    """The last stage has its gradient from the labels alone, the first one from the exits, too."""
    module = make().connect(batch[0][:2])
    terms, _ = module.losses(*batch, TrainingProgress())
    net: Any = module.student.network
    taught = terms["exits"] + terms["kl"] + terms["features"]
    *last, first = torch.autograd.grad(
        taught, [net.fc.weight, *net.layer3.parameters(), net.conv1.weight], allow_unused=True
    )
    assert all(slope is None for slope in last)
    assert first.abs().sum() > 0


def test_trained_resumed_and_read_back(batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*batch), 8)

    def trained(epochs: int, name: str, **fit: Any) -> BYOT:
        module = make(config=TrainConfig(lr=0.05, schedule="constant"))
        trainer = L.Trainer(**QUIET, max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(module, loader, loader, **fit)
        trainer.save_checkpoint(tmp_path / name)
        return module

    trained(1, "half.ckpt")
    whole, resumed = trained(2, "whole.ckpt"), trained(2, "resumed.ckpt", ckpt_path=tmp_path / "half.ckpt")
    start = make().connect(batch[0][:2])
    moved = zip(whole.projectors.parameters(), start.projectors.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    loaded = BYOT.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert torch.equal(loaded.projectors[0].classifier.weight, whole.projectors[0].classifier.weight)  # type: ignore[arg-type, union-attr]
    assert loaded.eval_network.state_dict().keys() == CifarResNet(8, 4).state_dict().keys()
    damaged = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    damaged["layers"]["layer3"] = [10**9, 4, 4]
    torch.save(damaged, tmp_path / "damaged.ckpt")
    with pytest.raises(KdqError, match="the checkpoint does not fit: projectors"):
        BYOT.load_from_checkpoint(tmp_path / "damaged.ckpt")


def test_a_network_of_one_stage_is_refused() -> None:
    one = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    with pytest.raises(KdqError, match="BYOT needs two stages"):
        BYOT(one, num_classes=4).connect(torch.zeros(2, 1, 8, 8))
