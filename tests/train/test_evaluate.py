"""Metrics of an evaluation against counting by hand."""

import signal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.train.evaluate import evaluate


class _Table(nn.Module):
    """Gives back its input as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x + 0 * self.norm(x)


def test_metrics_are_those_of_a_loop_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(203, 7, generator=generator)
    # Classes of very different sizes, which a mean over classes would not count as a mean over images.
    labels = torch.randint(0, 40, (203,), generator=generator).clamp_max(6)
    found = evaluate(_Table().train(), DataLoader(TensorDataset(logits, labels), 50), 7)
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    right = predicted == labels
    assert found["top1"] == pytest.approx(100 * right.double().mean().item(), abs=1e-4)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item(), abs=1e-4)
    nll = -probabilities.double().log().gather(1, labels[:, None]).mean()
    assert found["nll"] == pytest.approx(nll.item(), abs=1e-5)
    ece = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = abs(right[inside].double().mean() - confidence[inside].double().mean())
            ece += float(gap * inside.double().mean())
    assert found["ece"] == pytest.approx(100 * ece, abs=1e-3)


def test_batches_of_any_size_give_the_same_metrics() -> None:
    logits, labels = torch.randn(100, 7), torch.randint(0, 7, (100,))
    whole = evaluate(_Table(), DataLoader(TensorDataset(logits, labels), 100), 7)
    parts = evaluate(_Table(), DataLoader(TensorDataset(logits, labels), 33), 7)
    assert parts == pytest.approx(whole, abs=1e-4)


class _Interrupted(_Table):
    """Where Ctrl-C comes."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_ctrl_c_in_an_evaluation_is_a_keyboard_interrupt_and_the_next_one_too() -> None:
    heeds = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # not Lightning's SystemExit(1)
        evaluate(_Interrupted(), DataLoader(TensorDataset(torch.zeros(8, 7), torch.zeros(8, dtype=torch.long)), 4), 7)
    assert signal.getsignal(signal.SIGINT) is heeds
