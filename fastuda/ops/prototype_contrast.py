"""SePiCo's contrastive loss between pixels and class prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._autograd import GradientInForward
from fastuda.ops._checks import (
    check_beside,
    check_choice,
    check_classes,
    check_counts,
    check_float,
    check_integer,
    check_labels,
    check_positive,
    check_rank,
    nothing,
    without_autocast,
)
from fastuda.ops._schema import operator, statistic
from fastuda.ops.class_statistics import ClassStatistics


def reference(q: Tensor, labels: Tensor, mean: Tensor, variance: Tensor | None, tau: float) -> Tensor:
    """ProtoCL, or DistCL if a variance is given: cross-entropy of ``q mu / tau (+ q^2 s / (2 tau^2))``
    as one product of width 2 A, plus the variance term of the pixel's own class."""
    if not len(labels):
        return q.sum() * 0
    if variance is None:
        return nnf.cross_entropy(q @ (mean / tau).T, labels)
    spread = variance / (2 * tau**2)
    logits = torch.cat([q, q.square()], 1) @ torch.cat([mean / tau, spread], 1).T
    own = (q.square() * spread[labels]).sum(1)
    return nnf.cross_entropy(logits, labels) + own.mean()


def bank_reference(q: Tensor, labels: Tensor, bank: Tensor, count: Tensor, tau: float) -> Tensor:
    """BankCL: every vector of the pixel's own bank against the mean similarity to each other bank."""
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


@operator
def prototype_contrast_fwd(
    features: Tensor, labels: Tensor, mean: Tensor, variance: Tensor | None, tau: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return statistic(features), statistic(features, features.shape[0], mean.shape[0])


@operator
def prototype_contrast_bwd(
    grad: Tensor,
    features: Tensor,
    labels: Tensor,
    share: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    tau: float,
    ignore_index: int,
) -> Tensor:
    return features.new_empty(features.shape)


@operator
def prototype_contrast_bank_fwd(
    features: Tensor,
    labels: Tensor,
    vectors: Tensor,
    count: Tensor,
    tau: float,
    ignore_index: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    return statistic(features), statistic(features, *(features.shape if gradient else (0,)))


_backends.register("prototype_contrast", triton=True)


@dataclass(frozen=True)
class PrototypeBank:
    """The last local centroids of every class."""

    vectors: Tensor
    """[K, M, A]; rows from ``count`` on are not read."""
    count: Tensor
    """[K] int64: the number of filled rows, 0 to M."""


class _Sum(torch.autograd.Function):
    """ProtoCL or DistCL summed over the pixels. The forward keeps the softmax; the backward reads the
    features once more, which costs less than keeping their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        mean: Tensor,
        variance: Tensor | None,
        rest: tuple[float, int],
        name: str,
    ):
        forward = _backends.overload("prototype_contrast_fwd", name)
        total, share = forward(features, labels, mean, variance, *rest)
        ctx.save_for_backward(features, labels, share, mean, variance)
        ctx.rest, ctx.name = rest, name
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        backward = _backends.overload("prototype_contrast_bwd", ctx.name)
        return backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 5


def _prepare(
    features: Tensor,
    labels: Tensor,
    prototypes: ClassStatistics | PrototypeBank,
    kind: str,
    tau: float,
    ignore_index: int,
) -> int:
    """The number of classes; raise where an argument does not fit."""
    check_float("features", features)
    check_rank("features", features, "N, A")
    check_labels("labels", labels, (features.shape[0],), "features", features)
    check_choice("kind", kind, ("dist", "proto", "bank"))
    check_positive("tau", tau)
    check_integer("ignore_index", ignore_index)
    if not isinstance(prototypes, ClassStatistics | PrototypeBank):
        raise TypeError(
            f"prototypes must be ClassStatistics or a PrototypeBank, got {type(prototypes).__name__}"
        )
    if isinstance(prototypes, PrototypeBank) != (kind == "bank"):
        raise ValueError(
            f"prototypes must be {'a PrototypeBank' if kind == 'bank' else 'ClassStatistics'} for kind"
            f" {kind!r}, which does not go with a {type(prototypes).__name__}"
        )
    fields = {"bank": ("vectors",), "dist": ("mean", "variance"), "proto": ("mean",)}[kind]
    for field in fields:
        check_float(f"prototypes.{field}", getattr(prototypes, field))
        check_rank(f"prototypes.{field}", getattr(prototypes, field), "K, M, A" if kind == "bank" else "K, A")
    centres = getattr(prototypes, fields[0])
    if isinstance(prototypes, PrototypeBank):
        check_labels("prototypes.count", prototypes.count, centres.shape[:1], "prototypes.vectors", centres)
        check_counts("prototypes.count", prototypes.count, centres.shape[1])
    elif kind == "dist":
        if prototypes.variance.shape != centres.shape:
            raise ValueError(
                f"prototypes.variance must have the shape of prototypes.mean, {tuple(centres.shape)},"
                f" got {tuple(prototypes.variance.shape)}"
            )
        check_beside("prototypes.variance", prototypes.variance, "prototypes.mean", centres)
    classes, width = centres.shape[0], centres.shape[-1]
    if classes == 0 or width != features.shape[1]:
        raise ValueError(
            f"features are {tuple(features.shape)}, but the prototypes have width {width} and"
            f" {classes} classes: both need one width, and at least one class"
        )
    check_beside("prototypes", centres, "features", features)
    return classes


def prototype_contrast(
    features: Tensor,
    labels: Tensor,
    prototypes: ClassStatistics | PrototypeBank,
    *,
    kind: str = "dist",
    tau: float = 100.0,
    ignore_index: int = 255,
    backend: str = "auto",
) -> Tensor:
    """Pull each pixel's embedding q to the prototype of its class and away from the others; mean over pixels.

    ``proto``: ``-z_y + log sum_k exp z_k`` with ``z_k = q mu_k / tau``.
    ``dist``: classes as normal distributions, ``z_k = q mu_k / tau + q^2 s_k / (2 tau^2)``, plus the variance
    term of the pixel's class: the bound for infinitely many samples.
    ``bank``: mean over the vectors b in the bank of the pixel's class of
    ``-log(e^(q b / tau) / (e^(q b / tau) + sum_k n_k))`` with ``n_k = exp(q mean(B_k) / tau)`` of the other
    classes.

    Logits are at least float32: at the published tau of 100 the loss changes by less than one bfloat16 step.
    Gradients flow to the features only. The loss is 0 without a labelled pixel, and for a single bank.

    Source: Xie et al., SePiCo, TPAMI 2022, eq. 7 to 14.

    Args:
        features: unit embeddings [N, A].
        labels: [N] integer classes; all but ``ignore_index`` must be below K. On a GPU the values are not
            checked: any other label makes the loss NaN.
        prototypes: statistics for ``proto`` and ``dist``, a bank for ``bank``; constants.
        kind: ``dist``, ``proto`` or ``bank``.
        tau: positive, divides the inner products.
        ignore_index: the label to leave out.
        backend: ``auto``, or a name from ``fastuda.ops.backends("prototype_contrast")``.

    Returns:
        A scalar, float32 (float64 for float64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit, or the named backend cannot run.
    """
    classes = _prepare(features, labels, prototypes, kind, tau, ignore_index)
    name = _backends.select("prototype_contrast", features, backend=backend)
    labels = labels.long()
    check_classes("labels", labels, classes, ignore_index)
    if kind == "bank" and classes == 1:  # there is no other class to contrast with
        return nothing(features)
    with without_autocast(features):
        keep = labels != ignore_index
        if name != "reference":
            if isinstance(prototypes, PrototypeBank):
                bank = (labels, prototypes.vectors.detach(), prototypes.count, tau, ignore_index)
                total = GradientInForward.apply(features, bank, "prototype_contrast_bank_fwd", name)
            else:
                spread = prototypes.variance.detach() if kind == "dist" else None
                mean, rest = prototypes.mean.detach(), (tau, ignore_index)
                total = _Sum.apply(features, labels, mean, spread, rest, name)
            return total / keep.sum().clamp(min=1)
        q = features[keep].to(torch.promote_types(features.dtype, torch.float32))
        y = labels[keep]
        # if labels were not checked, one out of range makes the loss NaN and reads nothing out of bounds
        q = torch.where(((y >= 0) & (y < classes))[:, None], q, math.nan)
        y = y.clamp(0, classes - 1)
        if isinstance(prototypes, PrototypeBank):
            vectors = prototypes.vectors.detach().to(q.dtype)
            return bank_reference(q, y, vectors, prototypes.count, tau)
        mean = prototypes.mean.detach().to(q.dtype)
        variance = prototypes.variance.detach().to(q.dtype) if kind == "dist" else None
        return reference(q, y, mean, variance, tau)
