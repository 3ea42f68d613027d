"""More distances between a student's and its teacher's logits, as pure functions in the way of
:mod:`kdq.distill.losses`: logits ``(batch, classes)``, ``target`` int64 ``(batch,)``, a scalar each, no gradient to the
teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq.distill.losses import binary_log_probabilities, distillation_kl, in_float32, one_hot


@in_float32
def correlation_losses(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor]:
    """``T^2 (1 - r)`` with Pearson's r between tempered probabilities (DIST: Huang et al. 2022, arXiv 2205.10536): on
    average over the samples, of their classes, and over the classes, of their samples.

    >>> logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    >>> [round(part.item(), 5) for part in correlation_losses(logits, logits)]
    [0.0, 0.0]
    """
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher.detach()))
    inter, intra = (
        1 - F.cosine_similarity(p - p.mean(dim, keepdim=True), q - q.mean(dim, keepdim=True), dim).mean()
        for dim in (1, 0)
    )
    return temperature**2 * inter, temperature**2 * intra


@in_float32
def level_losses(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Three levels of tempered probabilities P ``(batch, classes)`` (MLKD: Jin et al. 2023, CVPR): ``T^2 KL`` of each
    instance, ``|P P^T - Q Q^T|^2 / batch`` of how alike instances are, ``|P^T P - Q^T Q|^2 / classes`` of how alike
    classes are.

    >>> logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    >>> [part.item() for part in level_losses(logits, logits)]
    [0.0, 0.0, 0.0]
    """
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher.detach()))
    instances, classes = (((a @ a.T - b @ b.T).square().sum() / len(a)) for a, b in ((p, q), (p.T, q.T)))
    return distillation_kl(student, teacher, temperature), instances, classes


@in_float32
def normalized_losses(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Of NKD (Yang et al. 2023, arXiv 2303.13005): ``-q_y log p_y``, the cross-entropy weighted with how sure the
    teacher is of the target, and ``T^2`` times the cross-entropy between the distributions over the other classes,
    tempered and renormalised to one.

    >>> target, others = normalized_losses(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))
    >>> [round(part.item(), 4) for part in (target, others)]  # log(3) / 3 and log(2)
    [0.3662, 0.6931]
    """
    teacher, is_target = teacher.detach(), one_hot(target, student.shape[1])
    log_p, q = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    sure = -(q * log_p).masked_fill(~is_target, 0).sum(1).mean()
    mine, theirs = ((logits / temperature).masked_fill(is_target, -torch.inf) for logits in (student, teacher))
    log_others = F.log_softmax(mine, dim=1).masked_fill(is_target, 0)
    return sure, -(temperature**2) * (F.softmax(theirs, dim=1) * log_others).sum(1).mean()


@in_float32
def transformed_kl(student: Tensor, teacher: Tensor, temperature: float = 10.0, weighted: bool = False) -> Tensor:
    """``KL(q || softmax(student))`` with the teacher's probabilities to the power ``1 / T``, renormalised to one, as q
    (TTM: Zheng & Yang 2024, arXiv 2402.11148): a temperature for the teacher alone. ``weighted`` counts each sample by
    the powers' sum, large where the teacher is smooth (WTTM).

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> round(transformed_kl(logits, 10 * logits).item(), 6)  # the power undoes the teacher's scale
    0.0
    """
    log_q = F.log_softmax(teacher.detach(), dim=1) / temperature
    total = log_q.logsumexp(1, keepdim=True)
    kl = F.kl_div(F.log_softmax(student, dim=1), log_q - total, reduction="none", log_target=True).sum(1)
    return (kl * total[:, 0].exp()).mean() if weighted else kl.mean()


@in_float32
def refined_losses(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor]:
    """SCD and MCD, each with ``T^2`` (RLD: Sun et al. 2024, arXiv 2408.07703). SCD is the KL between the teacher's
    confidence, in the class that it finds likeliest, and the student's in the true one. MCD is the KL over the classes
    that the teacher ranks below the true one, so that it never teaches a wrong class above it.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> [part.item() for part in refined_losses(logits, logits, torch.tensor([2]))]  # right, and equal
    [0.0, 0.0]
    """
    teacher, classes = teacher.detach(), student.shape[1]
    pairs = ((student, target), (teacher, teacher.argmax(1)))
    mine, theirs = (
        binary_log_probabilities(F.log_softmax(logits / temperature, dim=1), one_hot(chosen, classes))
        for logits, chosen in pairs
    )
    scd = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    above = teacher >= teacher.gather(1, target[:, None])
    least = torch.finfo(teacher.dtype).min / 2 * min(1.0, temperature)  # finite when divided by the temperature
    below = [logits.masked_fill(above, least) for logits in (student, teacher)]
    return temperature**2 * scd, distillation_kl(below[0], below[1], temperature)


@in_float32
def designed_kl(student: Tensor, target: Tensor, correct: float = 0.99, temperature: float = 20.0) -> Tensor:
    """``KL(q || softmax(student))`` with ``q = softmax(u / T)``, u ``correct`` for the target and the rest shared by
    the others: the teacher of Tf-KD, which is none (Yuan et al. 2020, arXiv 1909.11723).

    >>> designed_kl(torch.zeros(1, 4), torch.tensor([1]), correct=0.25).item()  # a flat teacher, a flat student
    0.0
    """
    classes = student.shape[1]
    u = torch.where(one_hot(target, classes), correct, (1 - correct) / (classes - 1)).to(student.dtype)
    log_p, log_q = F.log_softmax(student, dim=1), F.log_softmax(u / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
