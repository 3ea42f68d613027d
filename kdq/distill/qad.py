"""Distilling into the quantized network: training after quantization that keeps every layer's alphabet.

Quantization-aware distillation trains the rounded network on what its float original, or a better teacher, says of each
image, and needs no labels (Mishra & Marr 2018, arXiv 1711.05852; NVIDIA 2026, arXiv 2601.20088). Quantization-aware
training on labels is its control. See :mod:`kdq.quant.fake` for the rounding and its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam, Optimizer

from kdq.distill.checkpoint import Network, built, described
from kdq.distill.config import TrainConfig
from kdq.distill.cross_entropy import CrossEntropy
from kdq.distill.cutmix import cutmix, draw
from kdq.distill.learner import Learner
from kdq.distill.losses import distillation_kl, one_hot, soft_cross_entropy
from kdq.distill.mixup import mix
from kdq.distill.module import DistillationModule
from kdq.distill.options import choice, number, switch
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.quant.fake import fake_quantized, layout, quantized, rounded_weights, roundings, with_layout
from kdq.utils.errors import KdqError

#: What Adam moves a rounded weight by in a step, in levels of its layer, over the learning rate; all else it moves by
#: the rate itself, a scale by that share of it. Finer alphabets take finer steps so.
LEVELS_RATE = 10
#: What a training into a quantized network needs. Chosen, as BatchNorm's mode and the temperature were, on held-out
#: training images of CIFAR-10: ResNet-20, 2 bits, one epoch; a rate of 0.003 undid more than it won.
TUNING = TrainConfig(lr=1e-3, weight_decay=0.0, schedule="cosine", warmup=0.1)


class IntoQuantized(DistillationModule):
    """What :class:`QAD` and :class:`QAT` share: a student whose weights are rounded when they run.

    Args:
        student: what :func:`kdq.quantize` or :func:`kdq.load` gave; it is not modified.
        args, options: of :class:`~kdq.distill.module.DistillationModule`, or of the method's other base.
        config: of the training; what a mapping does not say is as in :data:`TUNING`. Its optimizer is Adam, with
            ``momentum`` as the first beta, and rates as :data:`LEVELS_RATE` says.
    """

    group = "tune"
    keeps = "last"  # the schedule's end gains more than a choice among epochs that validation hardly tells apart
    #: BatchNorm normalises with each batch's own statistics and goes on averaging them, or stays as it is.
    batchnorm: str = choice("train", "frozen")
    #: The scales of the alphabets are trained, too, without weight decay.
    learn_scales: bool = switch(True)

    def __init__(
        self, student: Network, *args: Any, config: TrainConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        config = replace(TUNING, **config) if isinstance(config, Mapping) else config or TUNING
        super().__init__(_trainable(student), *args, config=config, **options)
        for rounding in roundings(self.student.network):
            rounding.scale.requires_grad_(self.learn_scales)
        self.train()  # kdq.quantize gives a network in eval mode, and a Trainer leaves it there

    def quantized(self) -> nn.Module:
        """The network as it is now, with its codes: what :func:`kdq.save` takes. It computes what :meth:`forward` does,
        bit for bit."""
        return quantized(self.eval_network)

    def train(self, mode: bool = True) -> IntoQuantized:
        super().train(mode)
        if self.batchnorm == "frozen":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def optimizer(self, learner: Learner, fused: bool) -> Optimizer:
        """Adam: the gradients of a network's codes, scales and BatchNorms are of sizes too different for one rate.

        Rounded weights and scales move by shares of their layer's scale. Scales are not decayed, which would shrink
        their layer's range whatever the gradients say.
        """
        config = self.config
        groups: list[dict[str, Any]] = []
        for rounding in roundings(learner.network):
            lr = config.lr * float(rounding.scale.detach().mean())
            groups.append({"params": [rounding.scale], "weight_decay": 0.0, "lr": lr})
        for weight, rounding in rounded_weights(learner.network):
            lr = config.lr * LEVELS_RATE * float(rounding.scale.detach().mean())
            groups.append({"params": [weight], "lr": lr})
        ours = {id(parameter) for group in groups for parameter in group["params"]}
        others = [parameter for parameter in learner.network.parameters() if id(parameter) not in ours]
        betas = (config.momentum, 0.999)
        return Adam([{"params": others}, *groups], config.lr, betas, weight_decay=config.weight_decay, fused=fused)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        network = self.student.network
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["student"] = {
            "network": described(network),
            "layout": layout(network),
            "float_dtype": getattr(network, "kdq_float_dtype", None),
        }


class QAD(IntoQuantized, TeacherStudent):
    """``alpha T^2 KL(teacher || student) + (1 - alpha) CE``, the student's weights rounded to their alphabets.

    The teacher is the float network itself, or another one.

    >>> import kdq, torch
    >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> student, report = kdq.quantize(network, torch.randn(64, 8).split(16), bits=2)
    >>> module = QAD(student, teacher=network, num_classes=3)  # then: trainer.fit(module, train_loader, val_loader)
    >>> images = torch.randn(5, 8)
    >>> torch.equal(module.quantized()(images), student(images))  # kdq.save(module.quantized(), "model.kdq")
    True
    """

    alpha: float = number(1.0, high=1)  # the teacher's share of the loss; with 1 labels change nothing
    cutmix: bool = switch()  # a rectangle of each training image is another's: few images say more of the teacher so

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        if self.cutmix and self.training:
            images, share = cutmix(images, draw(len(images), self.seed, progress))
            labels = mix(one_hot(labels, self.num_classes).float(), share)
        logits = self.student(images)
        kl = distillation_kl(*self.comparable(logits, self.teacher(images)), self.temperature)
        terms = {"kl": self.alpha * kl}
        if self.alpha < 1:
            terms["ce"] = (1 - self.alpha) * soft_cross_entropy(logits, labels, self.config.label_smoothing)
        return terms, logits


class QAT(IntoQuantized, CrossEntropy):
    """``CE(z_s, y)``, the student's weights rounded to their alphabets: the control of :class:`QAD`.

    >>> import kdq, torch
    >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> student, report = kdq.quantize(network, torch.randn(64, 8).split(16), bits=2)
    >>> QAT(student, num_classes=3, learn_scales=False).batchnorm
    'train'
    """


def _trainable(student: Any) -> nn.Module:
    """A network with roundings: of a quantized one, of one that has them already, or of a checkpoint's description."""
    if isinstance(student, Mapping):
        if not isinstance(student["network"], Mapping):
            raise KdqError(
                "the checkpoint names no network that kdq builds by itself: give load_from_checkpoint(path, "
                "student=network), with what kdq.quantize or kdq.load gave"
            )
        network = with_layout(built(student["network"], "student"), student["layout"])
        network.kdq_float_dtype = student.get("float_dtype")  # type: ignore[assignment]
        return network
    return fake_quantized(student) if isinstance(student, nn.Module) and not layout(student) else student
