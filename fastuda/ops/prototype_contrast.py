"""SePiCo's contrast of pixels with class prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends, reference_losses
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
from fastuda.ops.class_statistics import ClassStatistics

_backends.register(
    "prototype_contrast",
    ("prototype_contrast_fwd", "prototype_contrast_bwd", "prototype_contrast_bank_fwd"),
    triton=True,
)


@dataclass(frozen=True)
class PrototypeBank:
    """The last local centroids of every class."""

    vectors: Tensor
    """[K, M, A]; rows past ``count`` are not read."""
    count: Tensor
    """[K] int64: how many of the M are filled, 0 to M."""


class _Sum(torch.autograd.Function):
    """ProtoCL or DistCL summed over the pixels. The softmax is kept; the backward reads the features once
    more, which costs less than to keep their gradient."""

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


def _check_bank(bank: PrototypeBank) -> None:
    vectors, count = bank.vectors, bank.count
    check_float("prototypes.vectors", vectors)
    check_rank("prototypes.vectors", vectors, "K, M, A")
    check_labels("prototypes.count", count, (vectors.shape[0],), "prototypes.vectors", vectors)
    check_counts("prototypes.count", count, vectors.shape[1])


def _check_statistics(statistics: ClassStatistics, names: tuple[str, ...]) -> None:
    for name in names:
        check_float(f"prototypes.{name}", getattr(statistics, name))
        check_rank(f"prototypes.{name}", getattr(statistics, name), "K, A")
    mean, variance = statistics.mean, statistics.variance
    if "variance" in names and variance.shape != mean.shape:
        raise ValueError(
            f"prototypes.variance must have the shape of prototypes.mean, {tuple(mean.shape)},"
            f" got {tuple(variance.shape)}"
        )
    if "variance" in names:
        check_beside("prototypes.variance", variance, "prototypes.mean", mean)


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
    """Pulls each pixel's embedding q to its class's prototype and away from the others'; mean over pixels.

    ``proto``: ``-z_y + log sum_k exp z_k`` with ``z_k = q mu_k / tau``.
    ``dist``: classes as normal distributions, ``z_k = q mu_k / tau + q^2 s_k / (2 tau^2)``, plus the own
    class's variance term: the bound of infinitely many samples.
    ``bank``: mean over the own bank's vectors b of ``-log(e^(q b / tau) / (e^(q b / tau) + sum_k n_k))``
    with ``n_k = exp(q mean(B_k) / tau)`` of the other classes.

    Logits are float32 at least: at the published tau of 100 the loss moves by less than one bfloat16 step.
    Gradients flow to the features only. Without a labelled pixel the loss is 0, and so is that of one bank.

    Source: Xie et al., SePiCo, TPAMI 2022, eq. 7 to 14.

    Args:
        features: unit embeddings [N, A].
        labels: [N] integer classes; all but ``ignore_index`` must be below K. On a GPU their values are not
            looked at: another makes the loss NaN.
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
    if isinstance(prototypes, PrototypeBank):
        _check_bank(prototypes)
        centres = prototypes.vectors
    else:
        _check_statistics(prototypes, ("mean", "variance") if kind == "dist" else ("mean",))
        centres = prototypes.mean
    classes, width = centres.shape[0], centres.shape[-1]
    if classes == 0 or width != features.shape[1]:
        raise ValueError(
            f"features are {tuple(features.shape)}, but the prototypes have width {width} and"
            f" {classes} classes: both need one width, and at least one class"
        )
    check_beside("prototypes", centres, "features", features)
    name = _backends.select("prototype_contrast", features, backend=backend)
    labels = labels.long()
    check_classes("labels", labels, classes, ignore_index)
    if kind == "bank" and classes == 1:  # no other class to tell apart
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
        # where labels are not read, one that is no class makes the loss NaN and reads nothing out of bounds
        q = torch.where(((y >= 0) & (y < classes))[:, None], q, math.nan)
        y = y.clamp(0, classes - 1)
        if isinstance(prototypes, PrototypeBank):
            vectors = prototypes.vectors.detach().to(q.dtype)
            return reference_losses.bank_contrast(q, y, vectors, prototypes.count, tau)
        mean = prototypes.mean.detach().to(q.dtype)
        variance = prototypes.variance.detach().to(q.dtype) if kind == "dist" else None
        return reference_losses.prototype_contrast(q, y, mean, variance, tau)
