"""SePiCo's contrast of pixels with class prototypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends, reference_losses
from fastuda.ops._autograd import GradientInForward
from fastuda.ops._checks import check_choice, check_float, check_labels, check_rank
from fastuda.ops.class_statistics import ClassStatistics

_backends.register(
    "prototype_contrast",
    ("prototype_contrast_fwd", "prototype_contrast_bwd", "bank_contrast_fwd"),
    triton=True,
)


@dataclass(frozen=True)
class PrototypeBank:
    """The last local centroids of every class."""

    vectors: Tensor
    """[K, M, A]; rows past ``count`` are not read."""
    count: Tensor
    """[K] int64: how many of the M are filled."""


class _Sum(torch.autograd.Function):
    """ProtoCL or DistCL summed over the pixels. The softmax is kept; the backward reads the features once
    more, which costs less than to keep their gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, mean: Tensor, rest: tuple[Any, ...], name: str):
        forward = _backends.overload("prototype_contrast_fwd", name)
        total, share = forward(features, labels, mean, *rest)
        ctx.save_for_backward(features, labels, share, mean)
        ctx.rest, ctx.name = rest, name
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        backward = _backends.overload("prototype_contrast_bwd", ctx.name)
        return backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


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
    Gradients flow to the features only. Without a labelled pixel the loss is 0.

    Source: Xie et al., SePiCo, TPAMI 2022, eq. 7 to 14.

    Args:
        features: unit embeddings [N, A].
        labels: [N] integer classes.
        prototypes: statistics for ``proto`` and ``dist``, a bank for ``bank``.
        kind: ``dist``, ``proto`` or ``bank``.
        tau: divides the inner products.
        ignore_index: the label to leave out.
        backend: ``auto``, or a name from ``fastuda.ops.backends("prototype_contrast")``.

    Raises:
        ValueError, TypeError: shapes, dtypes or choices do not fit, or the named backend cannot run.
    """
    check_rank("features", features, "N, A")
    check_float("features", features)
    check_labels("labels", labels, (features.shape[0],))
    check_choice("kind", kind, ("dist", "proto", "bank"))
    if isinstance(prototypes, PrototypeBank) != (kind == "bank"):
        raise ValueError(f"kind {kind!r} does not go with a {type(prototypes).__name__}")
    width = (prototypes.vectors if isinstance(prototypes, PrototypeBank) else prototypes.mean).shape[-1]
    if width != features.shape[1]:
        raise ValueError(f"features are {tuple(features.shape)}, but the prototypes have width {width}")
    name = _backends.select("prototype_contrast", features, backend=backend)
    with torch.autocast(features.device.type, enabled=False):
        keep = labels != ignore_index
        if name != "reference":
            labels = labels.long()
            if isinstance(prototypes, PrototypeBank):
                bank = (labels, prototypes.vectors.detach(), prototypes.count, tau, ignore_index)
                total = GradientInForward.apply(features, bank, "bank_contrast_fwd", name)
            else:
                spread = prototypes.variance.detach() if kind == "dist" else None
                rest = (spread, tau, ignore_index)
                total = _Sum.apply(features, labels, prototypes.mean.detach(), rest, name)
            return total / keep.sum().clamp(min=1)
        q = features[keep].to(torch.promote_types(features.dtype, torch.float32))
        y = labels[keep].long()
        if isinstance(prototypes, PrototypeBank):
            vectors = prototypes.vectors.detach().to(q.dtype)
            return reference_losses.bank_contrast(q, y, vectors, prototypes.count, tau)
        mean = prototypes.mean.detach().to(q.dtype)
        variance = prototypes.variance.detach().to(q.dtype) if kind == "dist" else None
        return reference_losses.prototype_contrast(q, y, mean, variance, tau)
