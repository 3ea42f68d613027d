"""Training into a quantized network, in a stranger's script."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.distill import QAD, QAT, TrainConfig
from kdq.quant.fake import rounded_weights
from kdq.utils.errors import KdqError
from tests.distill.test_standalone import QUIET, SILENT, foreign, loader, network

CONFIG = TrainConfig(lr=0.01, weight_decay=0.0, schedule="cosine")


def student(build: Any = network, bits: int = 2, **options: Any) -> nn.Module:
    return kdq.quantize(build(2), loader(), bits=bits, **options)[0]


def shuffled() -> DataLoader[Any]:
    images, labels = loader().dataset.tensors  # type: ignore[attr-defined]
    return DataLoader(TensorDataset(images, labels[torch.randperm(len(labels))]), 16)


def fitted(module: L.LightningModule, batches: Any = None, **flags: Any) -> Any:
    torch.manual_seed(0)
    L.Trainer(**{**SILENT, "max_epochs": 2, **flags}).fit(module, batches or loader(), loader(1))
    return module.eval()


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("kind", [QAD, QAT])
def test_the_whole_script(kind: Any, ema: float | None, tmp_path: Path) -> None:
    """Fit, test the best checkpoint, load it again without another word, and save what was tested."""
    others = {"teacher": network(2)} if kind is QAD else {}
    start = student(act_bits=8)
    module = kind(start, **others, num_classes=4, config=TrainConfig(lr=0.05, ema=ema))
    best = ModelCheckpoint(monitor="val/top1", mode="max")
    trainer = L.Trainer(**QUIET, max_epochs=2, logger=False, callbacks=[best], default_root_dir=tmp_path)
    trainer.fit(module, loader(), loader(1))
    (tested,) = trainer.test(module, loader(2), ckpt_path="best", verbose=False)
    loaded = kind.load_from_checkpoint(best.best_model_path).eval()
    assert L.Trainer(**SILENT).test(loaded, loader(2), verbose=False) == [tested]
    kdq.save(loaded.quantized(), tmp_path / "model.kdq")
    images = loader(2).dataset.tensors[0]  # type: ignore[attr-defined]
    packed = kdq.load(tmp_path / "model.kdq")
    assert torch.equal(packed(images), loaded(images))
    assert not torch.equal(packed(images), start(images))
    assert all(weight.levels == 4 for weight in packed.quantized_weights.values())


def test_without_labels_in_the_loss_labels_change_nothing() -> None:
    def logits(batches: Any, **options: Any) -> Any:
        module = QAD(student(), teacher=network(2), num_classes=4, config=CONFIG, **options)
        return fitted(module, batches)(loader(2).dataset.tensors[0])  # type: ignore[attr-defined]

    assert torch.equal(logits(loader()), logits(shuffled()))
    assert not torch.equal(logits(loader(), alpha=0.5), logits(shuffled(), alpha=0.5))


def test_frozen_batchnorm_and_scales_stay_as_they_are() -> None:
    def state(**options: Any) -> dict[str, Any]:
        return fitted(QAT(student(), num_classes=4, config=CONFIG, **options)).quantized().state_dict()

    before = student()
    frozen, free = state(batchnorm="frozen"), state()
    for name, value in before.state_dict().items():
        if "running" in name:
            assert torch.equal(frozen[name], value)
            assert not torch.equal(free[name], value)
    fixed = fitted(QAT(student(), num_classes=4, config=CONFIG, learn_scales=False)).quantized()
    for name, weight in before.quantized_weights.items():
        assert torch.equal(fixed.quantized_weights[name].scale, weight.scale)


def test_what_a_frozen_teacher_was_quantized_to_trains() -> None:
    """A second width of a network that teaches the first one already."""
    teacher, trained = network(2), []
    for bits in (2, 3):
        start, _ = kdq.quantize(teacher, loader(), bits=bits)
        module = QAD(start, teacher=teacher, num_classes=4)
        trained.append({name for name, value in module.named_parameters() if value.requires_grad})
    assert trained[0] == trained[1] == {name for name, _ in module.named_parameters()}
    assert not any(value.requires_grad for value in teacher.parameters())


def test_scales_are_not_decayed() -> None:
    """Where no gradient is, only decay moves: every weight, and no scale."""
    module = QAT(student(), num_classes=4, config=TrainConfig(weight_decay=0.1))
    pairs = rounded_weights(module.student.network)
    before = [(weight.detach().clone(), rounding.scale.detach().clone()) for weight, rounding in pairs]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.optimizer(module.student, fused=False).step()
    for (weight, rounding), (weight_before, scale_before) in zip(pairs, before, strict=True):
        assert torch.equal(rounding.scale, scale_before)
        assert not torch.equal(weight, weight_before)


def test_distillation_brings_the_rounded_network_nearer_to_its_teacher() -> None:
    images, teacher = loader(5).dataset.tensors[0], network(2).eval()  # type: ignore[attr-defined]
    config = TrainConfig(lr=0.01, weight_decay=0.0)
    start = student(solver="rtn", refine=0, scale="weight")  # far enough from its teacher
    module = QAD(start, teacher=teacher, num_classes=4, config=config)

    def distance(found: nn.Module) -> float:
        with torch.no_grad():
            return float((found(images).log_softmax(1) - teacher(images).log_softmax(1)).square().mean())

    before = distance(start)
    assert distance(fitted(module, max_epochs=10).quantized()) < 0.7 * before


def test_a_checkpoint_keeps_what_floats_are_rounded_to(tmp_path: Path) -> None:
    module, trainer = QAT(student(float_dtype="bf16"), num_classes=4, config=CONFIG), L.Trainer(**SILENT, max_epochs=1)
    trainer.fit(module, loader(), loader(1))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    made = [each.quantized() for each in (module, QAT.load_from_checkpoint(tmp_path / "x.ckpt"))]
    sizes = [kdq.save(network, tmp_path / "model.kdq") for network in made]
    assert sizes[0] == sizes[1]
    images = loader(2).dataset.tensors[0]  # type: ignore[attr-defined]
    assert torch.equal(made[0](images), made[1](images))


def test_a_foreign_network_is_given_again(tmp_path: Path) -> None:
    start = student(foreign)
    module = fitted(QAT(start, num_classes=4, config=CONFIG))
    path = tmp_path / "x.ckpt"
    trainer = L.Trainer(**SILENT, max_epochs=1)
    trainer.fit(module, loader(), loader(1))
    trainer.save_checkpoint(path)
    with pytest.raises(KdqError, match="student=network"):
        QAT.load_from_checkpoint(path)
    images = loader(2).dataset.tensors[0]  # type: ignore[attr-defined]
    loaded = QAT.load_from_checkpoint(path, student=student(foreign)).eval()
    assert torch.equal(loaded(images), module.eval()(images))


def test_a_float_student_is_refused() -> None:
    with pytest.raises(KdqError, match=r"give what kdq\.quantize"):
        QAT(network(1), num_classes=4)
    with pytest.raises(KdqError, match="train, frozen"):
        QAT(student(), num_classes=4, batchnorm="off")
