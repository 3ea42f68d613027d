"""A network in training: itself, the moving average of its weights, and how well it does."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


class Learner(nn.Module):
    """``network`` with its metrics and, when ``ema`` is given, its :class:`MovingAverage`.

    Calling it calls ``network``; what is validated and kept is :attr:`eval_network`.
    """

    def __init__(self, network: nn.Module, num_classes: int, ema: float | None = None) -> None:
        super().__init__()
        self.network = compiled_in_place(network)
        self.average = None if ema is None else MovingAverage(self.network, ema)
        # Validating its arguments would make the host wait for the device at every step.
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_loss = MeanMetric(nan_strategy="disable")  # a NaN is to be seen, not left out

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        return self.network(images)

    @property
    def eval_network(self) -> nn.Module:
        """The network that the training is for: the average where there is one."""
        return self.network if self.average is None else self.average.network

    def stepped(self) -> None:
        """To be called after every optimizer step."""
        if self.average is not None:
            self.average.update(self.network)


class MovingAverage(nn.Module):
    """An exponential moving average of a network's weights and BatchNorm statistics (Polyak & Juditsky 1992).

    After ``n`` updates the decay is ``min(decay, (1 + n) / (10 + n))``: a short training is not dragged towards its
    random start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.updates = 0  # no buffer: that would move to the device, and be waited for at every step
        self.exact: list[Tensor] = []  # float32, of a network in 16 bits, which are too few for small steps

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        states = (each.state_dict(keep_vars=True).values() for each in (self.network, network))
        pairs = {id(mine): (mine, theirs) for mine, theirs in zip(*states, strict=True)}.values()  # tied weights once
        moving = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        averages, values = [mine for mine, _ in moving], [theirs for _, theirs in moving]
        if all(mine.itemsize >= 4 for mine in averages):
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            self.exact = [x.to(averages[0].device, torch.float32) for x in self.exact or averages]
            torch._foreach_lerp_(self.exact, [theirs.float() for theirs in values], 1 - decay)
            torch._foreach_copy_(averages, self.exact)
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)

    def get_extra_state(self) -> Any:
        updates = torch.tensor(self.updates)
        return {"updates": updates, "exact": self.exact} if self.exact else updates

    def set_extra_state(self, state: Any) -> None:
        state = state if isinstance(state, dict) else {"updates": state, "exact": []}
        self.updates, self.exact = int(state["updates"]), [x.clone() for x in state["exact"]]

    def train(self, mode: bool = True) -> Self:
        """It only ever predicts: it stays in eval mode."""
        return super().train(False)


def compiled_in_place(network: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, still compiled: its weights keep the names they have without the wrapper."""
    plain = getattr(network, "_orig_mod", None)
    if plain is None:
        return network
    plain._compiled_call_impl = network.dynamo_ctx(plain._call_impl)  # type: ignore[operator]  # as Module.compile does
    return plain


def classification_metrics(num_classes: int) -> MetricCollection:
    """``top1``, ``top5`` (of fewer classes: all of them) and ``ece``, the expected calibration error with 15 bins.

    They are shares, and are updated with probabilities ``(batch, classes)`` and labels ``(batch,)``.
    """
    return MetricCollection(
        {
            # "micro" counts images; torchmetrics' default averages over classes.
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15),
        }
    )
