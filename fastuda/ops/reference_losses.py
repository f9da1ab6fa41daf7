"""Plain torch formulations of the methods' losses and statistics: the text to read, and the oracle."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastuda.ops.reference import full, upsample

EPS_AFFINITY = 1e-4
"""Lower clamp of the four probabilities in ASANet's affinity (authors' utils.py)."""

OFFSETS = {
    4: ((-1, 0), (0, -1), (0, 1), (1, 0)),
    8: ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
}
"""Neighbours as (rows, columns), in raster order."""


def neighbours_of(p: Tensor, neighbours: int, distance: int) -> list[Tensor]:
    """Maps like ``p`` whose pixel i holds the d-th neighbour of i; past the border, the border itself."""
    height, width = p.shape[-2:]
    padded = nnf.pad(p, (distance,) * 4, mode="replicate")
    return [
        padded[..., (1 + y) * distance :, (1 + x) * distance :][..., :height, :width]
        for y, x in OFFSETS[neighbours]
    ]


def local_affinity(p: Tensor, neighbours: int, distance: int, kind: str) -> Tensor:
    """``[B, D K, H, W]`` Bernoulli-KL affinities, channel ``direction * K + class``; or [B, D, H, W] inner
    products."""
    p = full(p)
    around = neighbours_of(p, neighbours, distance)
    if kind == "product":
        return torch.stack([(p * other).sum(1) for other in around], 1)
    one, zero = p.clamp(EPS_AFFINITY, 1), (1 - p).clamp(EPS_AFFINITY, 1)
    maps = []
    for other in around:
        joint = p * other
        both, not_both = joint.clamp(EPS_AFFINITY, 1), (1 - joint).clamp(EPS_AFFINITY, 1)
        maps.append(both * (both / one).log() + not_both * (not_both / zero).log())
    return torch.cat(maps, 1)


def affinity_cleaning(logits: Tensor, neighbours: int) -> Tensor:
    """``mean (1 - sum_c p_ic p_jc)`` over pixels and neighbours."""
    return 1 - local_affinity(full(logits).softmax(1), neighbours, 1, "product").mean()


def domain_cross_entropy(
    domain_logits: Tensor,
    seg_logits: Tensor,
    offset: int,
    size: tuple[int, int] | None,
    temperature: float,
    clip: float,
    hard_threshold: float | None,
    align_corners: bool,
) -> Tensor:
    """``mean over pixels of -sum_c a_c log softmax_2K(d)[offset + c]``, the other half being zero."""
    d = full(domain_logits)
    z = seg_logits.detach().to(d.dtype)
    if size is not None:
        d, z = upsample(d, size, align_corners), upsample(z, size, align_corners)
    classes = z.shape[1]
    if hard_threshold is None:
        encoding = (z / temperature).softmax(1).clamp(max=clip)
    else:
        best, index = (z / temperature).softmax(1).max(1)
        encoding = nnf.one_hot(index, classes).movedim(-1, 1) * (best >= hard_threshold)[:, None]
    half = d[:, offset : offset + classes] - d.logsumexp(1, keepdim=True)
    return -(encoding * half).sum(1).mean()


def class_statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, ...]:
    """``(count [K], mean [K, A], biased variance [K, A])`` of every class, the variance about its mean."""
    x = full(features)
    keep = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    index = torch.where(keep, labels, num_classes)
    member = nnf.one_hot(index, num_classes + 1)[:, :num_classes].to(x.dtype).T
    count = member.sum(1)
    share = 1 / count.clamp(min=1)[:, None]
    mean = (member @ x) * share
    centred = x - mean[index.clamp(max=num_classes - 1)]
    return count, mean, (member @ centred.square()) * share


def prototype_contrast(
    q: Tensor, labels: Tensor, mean: Tensor, variance: Tensor | None, tau: float
) -> Tensor:
    """ProtoCL, or DistCL where a variance is given: cross-entropy of ``q mu / tau (+ q^2 s / (2 tau^2))``
    as one product of width 2 A, plus the variance term of the own class."""
    if not len(labels):
        return q.sum() * 0
    if variance is None:
        return nnf.cross_entropy(q @ (mean / tau).T, labels)
    spread = variance / (2 * tau**2)
    logits = torch.cat([q, q.square()], 1) @ torch.cat([mean / tau, spread], 1).T
    own = (q.square() * spread[labels]).sum(1)
    return nnf.cross_entropy(logits, labels) + own.mean()


def bank_contrast(q: Tensor, labels: Tensor, bank: Tensor, count: Tensor, tau: float) -> Tensor:
    """BankCL: every vector of the own class's bank against the mean similarity to each other bank."""
    if not len(labels):
        return q.sum() * 0
    count = count.clamp(0, bank.shape[1])
    filled = torch.arange(bank.shape[1], device=bank.device) < count[:, None]
    centre = (bank * filled[..., None]).sum(1) / count.clamp(min=1)[:, None]
    others = q @ (centre / tau).T
    others = others.masked_fill(nnf.one_hot(labels, len(bank)).bool(), -math.inf).logsumexp(1)
    total = q.new_zeros(())
    for c in range(len(bank)):
        rows = labels == c
        positive = q[rows] @ (bank[c] / tau).T
        term = torch.logaddexp(positive, others[rows, None]) - positive
        total = total + (term * filled[c]).sum() / count[c].clamp(min=1)
    return total / len(labels)


def smooth_max_pool(logits: Tensor, k: float) -> Tensor:
    """``log(mean_hw exp(k z)) / k``."""
    z = full(logits).flatten(2) * k
    return (z.logsumexp(2) - math.log(z.shape[2])) / k


def category_pool(features: Tensor, logits: Tensor) -> Tensor:
    """``[B, K, C]``: the mean of the features under each class's soft-max over the pixels."""
    features = full(features)
    return logits.to(features.dtype).softmax(1).transpose(1, 2) @ features
