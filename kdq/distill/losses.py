"""Distillation losses as pure functions of logits.

Shapes: logits ``(batch, classes)``, ``target`` int64 ``(batch,)`` or class probabilities ``(batch, classes)``; every
loss returns a scalar, the mean over the batch. All of them compute in float32 whatever dtype comes in (float64 stays
float64) and start from ``log_softmax``, so that logits of +-1e4 stay finite.

Gradients flow to the student's logits only: a teacher's or a peer's are detached here.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def soft_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against class indices or against probabilities, ``-sum_c y_c log p_c``.

    >>> soft_cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == torch.tensor(4.0).log().item()
    True
    """
    return F.cross_entropy(_at_least_float32(logits), target, label_smoothing=label_smoothing)


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """``T^2 KL(softmax(z_t / T) || softmax(z_s / T))`` (Hinton et al. 2015, arXiv 1503.02531, section 2.1).

    The factor ``T^2`` keeps the gradient's size independent of the temperature.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> distillation_kl(logits, logits).item()  # equal predictions
    0.0
    """
    log_p_s = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=1)
    log_p_t = F.log_softmax(_at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def standardized(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Every row's z-score, ``(z - mean) / std`` over the classes (Sun et al. 2024, arXiv 2403.01427).

    A KL between standardized logits asks the student for the teacher's relations between the classes and leaves it its
    own scale. It keeps the loss insensitive to how confident the teacher is, so it wants a larger weight.

    >>> standardized(torch.tensor([[0.0, 1.0, 2.0]]))
    tensor([[-1.,  0.,  1.]])
    """
    logits = _at_least_float32(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    # Not std(), whose gradient is undefined where all logits of a row are equal.
    return centred / (centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1) + eps**2).sqrt()


def decoupled_kl(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, the two halves of the distillation KL (Zhao et al. 2022, arXiv 2203.08679), each times ``T^2``.

    With ``p`` the tempered probability of the target class, TCKD is the KL between the binary distributions
    ``(p, 1 - p)``, and NCKD the KL between the distributions over the other classes, renormalised to one. Per sample

        ``KL = TCKD_i + (1 - p_t,i) NCKD_i``.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> [part.item() for part in decoupled_kl(logits, logits, torch.tensor([2]))]
    [0.0, 0.0]
    """
    # No indexing by masks: the shape of what it gives would have to be waited for.
    is_target = one_hot(target, student_logits.shape[1])
    binary, others = [], []
    for logits in (student_logits, teacher_logits.detach()):
        log_p = F.log_softmax(_at_least_float32(logits) / temperature, dim=1)
        binary.append(binary_log_probabilities(log_p, is_target))
        others.append((log_p - binary[-1][:, 1:]).masked_fill(is_target, 0.0))  # alike in both: adds nothing
    tckd, nckd = (F.kl_div(p, q, reduction="none", log_target=True).sum(1).mean() for p, q in (binary, others))
    return temperature**2 * tckd, temperature**2 * nckd


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Which class ``(batch, classes)`` is the target's; no shape has to be waited for.

    >>> one_hot(torch.tensor([1]), 3)
    tensor([[False,  True, False]])
    """
    return torch.arange(classes, device=target.device) == target[:, None]


def binary_log_probabilities(log_p: Tensor, is_target: Tensor) -> Tensor:
    """``(log p, log(1 - p))`` of the one class a row that ``is_target`` marks, without cancellation: ``(batch, 2)``.

    >>> binary_log_probabilities(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[True, False]])).exp()
    tensor([[0.2500, 0.7500]])
    """
    log_target = log_p.masked_fill(~is_target, -torch.inf).logsumexp(1)
    return torch.stack([log_target, log_p.masked_fill(is_target, -torch.inf).logsumexp(1)], dim=1)


def in_float32(loss: Function) -> Function:
    """Makes ``loss`` take its floating tensors in float32 (float64 stays) and compute its products so under autocast.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     in_float32(torch.matmul)(torch.ones(2, 2).bfloat16(), torch.ones(2, 2)).dtype
    torch.float32
    """

    @functools.wraps(loss)
    def wrapper(*args: Any, **options: Any) -> Any:
        tensors = [_at_least_float32(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        with torch.autocast(args[0].device.type, enabled=False):
            return loss(*tensors, **options)

    return wrapper  # type: ignore[return-value]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
