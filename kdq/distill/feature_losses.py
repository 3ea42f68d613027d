"""Distances between a student's and its teacher's features, as pure functions.

Maps are ``(batch, channels, height, width)``; where two have other heights and widths, the larger ones are averaged
down to the smaller ones. Embeddings are ``(batch, ...)`` and flattened. Every function returns a scalar, computes in
float32 (float64 stays float64) whatever autocast says, and sends no gradient to the teacher. Their scales are those
of the literature's code, so that its weights can be taken.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdq.distill.losses import in_float32


@in_float32
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two maps (FitNets: Romero et al. 2015, arXiv 1412.6550).

    >>> hint_loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 2, 2)).item()
    1.0
    """
    return F.mse_loss(*same_size(student, teacher.detach()))


@in_float32
def attention_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """The mean squared difference of attention maps, ``sum_c |A_c|^p`` with length one (Zagoruyko & Komodakis 2017,
    arXiv 1612.03928): what channels there are does not matter, nor their scale.

    >>> maps = torch.rand(2, 3, 4, 4)
    >>> round(attention_loss(maps, 5 * maps.repeat(1, 2, 1, 1)).item(), 6)
    0.0
    """
    pairs = same_size(student, teacher.detach())
    mine, theirs = (F.normalize(maps.abs().pow(p).mean(1).flatten(1)) for maps in pairs)
    return F.mse_loss(mine, theirs)


@in_float32
def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of the batch's similarities ``A A^T``, each row with length one (SP: Tung & Mori
    2019, arXiv 1907.09682): a rotation of the features does not matter.

    >>> similarity_loss(torch.eye(3), torch.eye(3).roll(1, dims=1)).item()
    0.0
    """
    mine, theirs = (F.normalize(features @ features.T) for features in _flat(student, teacher))
    return F.mse_loss(mine, theirs)


@in_float32
def relation_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Huber distances of a batch's relations (RKD: Park et al. 2019, arXiv 1904.05068): of all pairs' distances over
    their mean, and of the cosines of all triples' angles. Shifts, rotations and scales of the features do not matter.

    >>> points = torch.randn(5, 3)
    >>> [round(part.item(), 5) for part in relation_losses(points, 7 * points + 1)]
    [0.0, 0.0]
    """
    distances, angles = [], []
    for points in _flat(student, teacher):
        d = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        distances.append(d / (d.sum() / (d > 0).sum().clamp(min=1)).clamp(min=1e-12))
        edges = F.normalize(points[None] - points[:, None], dim=2)
        angles.append(edges @ edges.transpose(1, 2))
    return F.smooth_l1_loss(distances[0], distances[1]), F.smooth_l1_loss(angles[0], angles[1])


@in_float32
def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """``KL(teacher || student)`` of how probably a sample picks each other by cosine similarity, summed over the batch
    and divided by its square (PKT: Passalis & Tefas 2018, arXiv 1803.10837).

    >>> pkt_loss(torch.eye(4), torch.eye(4)).item()
    0.0
    """
    probabilities = []
    for features in _flat(student, teacher):
        unit = F.normalize(features)
        similarity = unit @ unit.T + 1  # in any unit
        probabilities.append(similarity / similarity.sum(1, keepdim=True))
    mine, theirs = probabilities
    return (theirs * ((theirs + eps) / (mine + eps)).log()).mean()


@in_float32
def gaussian_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """``((t - mean)^2 / variance + log variance) / 2`` on average: the teacher's negative log likelihood, apart from a
    constant, where a channel has one ``variance (channels,)`` (VID: Ahn et al. 2019, arXiv 1904.05835).

    >>> gaussian_loss(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2), torch.ones(2)).item()
    0.5
    """
    mean, teacher = same_size(mean, teacher.detach())
    variance = variance[:, None, None]
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


@in_float32
def selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared maximum mean discrepancy, with the kernel ``<x, y>^2``, between the channels of two maps, each a
    pattern of length one (NST: Huang & Wang 2017, arXiv 1707.01219): their order and their number do not matter.

    >>> maps = torch.rand(2, 3, 4, 4)
    >>> round(abs(selectivity_loss(maps, maps.flip(1))).item(), 5)
    0.0
    """
    mine, theirs = (F.normalize(maps.flatten(2), dim=2) for maps in same_size(student, teacher.detach()))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(1, 2)).square().mean()

    return kernel(theirs, theirs) + kernel(mine, mine) - 2 * kernel(mine, theirs)


@in_float32
def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two maps of one size, together with those of their averages over 4x4, 2x2 and 1x1
    fields, as far as these are coarser: each half the weight of the one before, all weights 1 in sum (ReviewKD: Chen et
    al. 2021, arXiv 2104.09044).

    >>> hierarchical_loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8)).item()
    1.0
    """
    teacher, weights, distances = teacher.detach(), [1.0], [F.mse_loss(student, teacher.detach())]
    for fields in (size for size in (4, 2, 1) if size < student.shape[2]):
        mine, theirs = (F.adaptive_avg_pool2d(maps, fields) for maps in (student, teacher))
        distances.append(F.mse_loss(mine, theirs))
        weights.append(weights[-1] / 2)
    return torch.stack([weight * part for weight, part in zip(weights, distances, strict=True)]).sum() / sum(weights)


@in_float32
def margin_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of two maps before their ReLUs, summed and divided by the batch, where a channel of the
    teacher's reaches down to its ``margin``, the mean of its negative values in the batch, and a student that is below
    a negative value is not drawn up to it (OFD: Heo et al. 2019, arXiv 1904.01866).

    >>> teacher = torch.tensor([-1.0, -3.0, 1.0]).view(1, 1, 1, 3)  # the margin is -2
    >>> margin_loss(torch.tensor([-5.0, -1.0, 0.0]).view(1, 1, 1, 3), teacher).item()  # 0 + 1 + 1
    2.0
    """
    student, teacher = same_size(student, teacher.detach())
    margin = teacher.clamp(max=0).sum((0, 2, 3)) / (teacher < 0).sum((0, 2, 3)).clamp(min=1)
    target = torch.maximum(teacher, margin[:, None, None])
    counted = (student > target) | (target > 0)
    return (counted * (student - target).square()).sum() / len(student)


@in_float32
def contrast_scores(anchors: Tensor, positives: Tensor, negatives: Tensor, tau: float = 0.07) -> Tensor:
    """``<a, b> / tau`` of anchors ``(batch, dim)`` with their own positives ``(batch, dim)``, then with all negatives
    ``(count, dim)``: ``(batch, 1 + count)``; no gradient but to the anchors.

    >>> contrast_scores(torch.eye(2), torch.eye(2), torch.ones(1, 2), tau=0.5)
    tensor([[2., 2.],
            [2., 2.]])
    """
    own = (anchors * positives.detach()).sum(1, keepdim=True)
    return torch.cat([own, anchors @ negatives.detach().T], dim=1) / tau


@in_float32
def contrast_loss(scores: Tensor, log_norm: Tensor, images: int) -> Tensor:
    """``-log h(positive) - sum_negatives log(1 - h)`` on average, with ``h = p / (p + count / images)`` and
    ``p = exp(score - log_norm)``: noise-contrastive estimation against ``count`` of ``images``, drawn evenly (CRD: Tian
    et al. 2020, arXiv 1910.10699). Scores are :func:`contrast_scores`.

    >>> round(contrast_loss(torch.zeros(1, 2), torch.tensor(4.0).log(), images=4).item(), 4)  # two coins
    1.3863
    """
    logits = scores - log_norm - math.log((scores.shape[1] - 1) / images)
    return -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)).mean()


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller one's height and width.

    >>> [tuple(maps.shape) for maps in same_size(torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4))]
    [(1, 2, 4, 4), (1, 3, 4, 4)]
    """
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    a, b = (maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (a, b))
    return a, b


def _flat(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.flatten(1), teacher.detach().flatten(1)
