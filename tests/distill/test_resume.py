"""Methods with parts of their own: trained, killed and resumed, read back, and damaged."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from kdq.distill import BYOT, CRD, VID, ReviewKD, SimKD, Terms, TrainConfig
from kdq.utils.errors import KdqError
from tests.distill.small import QUIET, Indexed, network

TERMS = {"at": {"weight": 500.0}, "vid": {"kd": 0.5}, "ctkd": {"alpha": 0.7, "warmup": 0.0}, "crd": {"dim": 6}}
KINDS: dict[Any, dict[str, Any]] = {
    VID: {},
    ReviewKD: {"weight": 0.1},
    BYOT: {},
    SimKD: {"kd": 1.0},
    CRD: {"dim": 6, "negatives": 20},
    Terms: {"terms": TERMS},
}


class Stop(L.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("kind", KINDS)
def test_trained_resumed_and_read_back(kind: Any, tmp_path: Path) -> None:
    loader, images = DataLoader(Indexed(), 16), Indexed().images
    teacher = {"teacher": network(2, width=0.5)} if "teacher" in kind.takes else {}

    def made() -> Any:
        return kind(network(1), **teacher, num_classes=4, config=TrainConfig(lr=0.01, ema=0.5), **KINDS[kind])

    def trained(epochs: int, **fit: Any) -> Any:
        module = made()
        trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=Stop(epochs), default_root_dir=tmp_path)
        trainer.fit(module, loader, loader, **fit)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole, _, resumed = trained(3), trained(1), trained(3, ckpt_path=tmp_path / "1.ckpt")
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert {id(p) for p in whole.parameters() if p.requires_grad} <= set(
        map(id, whole.trained_parameters(whole.student))
    )
    assert kind is SimKD or set(whole.eval_network.state_dict()) == set(network(1).state_dict())
    assert not any("methods" in name and "network" in name for name in whole.state_dict())
    if kind is not Terms:
        for name, value in made().connect(images[:2]).projectors.named_parameters():
            assert not torch.equal(value, whole.projectors.get_parameter(name)), name
    # Without a teacher, to be evaluated; and with one, to train on.
    assert torch.equal(kind.load_from_checkpoint(tmp_path / "3.ckpt").eval()(images), whole.eval()(images))
    again = kind.load_from_checkpoint(tmp_path / "3.ckpt", **teacher)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False).fit(again, loader, loader)
    if kind in (BYOT, VID, ReviewKD, CRD):
        damaged = torch.load(tmp_path / "3.ckpt", weights_only=True)
        shapes = damaged["layers"].get("student", damaged["layers"])
        shapes[list(shapes)[-1]][0] = 10**9
        torch.save(damaged, tmp_path / "damaged.ckpt")
        with pytest.raises(KdqError, match="the checkpoint does not fit: projectors"):
            kind.load_from_checkpoint(tmp_path / "damaged.ckpt")
