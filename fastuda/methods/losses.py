"""Cross-entropies that the methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fastuda.ops as F
from fastuda.models.segmentor import Segmentor
from fastuda.system.distributed import joint_mean


def pixel_mean_ce(
    logits: Tensor,
    labels: Tensor,
    align: bool,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy summed over the labelled pixels and divided by the number of all pixels, as
    mmsegmentation's mean."""
    total = F.upsample_cross_entropy(
        logits,
        labels,
        align_corners=align,
        class_weight=class_weight,
        pixel_weight=weight,
        reduction="sum",
    )
    return total / labels.numel()


def valid_mean_ce(model: Segmentor, output: Any, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy of the labelled pixels of all processes; with HRDA, that of its detail as well
    (:func:`with_detail`).

    Args:
        model: the segmentor, which says how logits are upsampled.
        output: its output.
        labels: [B, H, W].
        temperature: of the logits; FADA's 1.8.
    """

    def mean(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        ce = F.upsample_cross_entropy(
            logits, labels, align_corners=model.align_corners, temperature=temperature
        )
        return joint_mean(ce, (labels != 255).sum())

    return with_detail(output, labels, mean)


def with_detail(
    output: Any,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    weight: Tensor | None = None,
) -> Tensor:
    """``loss(logits, labels, weight)`` of a segmentor's output. With HRDA in training, ``(1 - d) loss + d
    loss(detail)``, where the detail has the labels and weights of its crop and d is its share.

    Args:
        output: with ``logits`` [B, K, h, w] and ``detail``, a :class:`~fastuda.models.segmentor.Detail` or
            None.
        labels: [B, H, W].
        loss: a loss of logits [B, K, h, w], labels [B, H, W] and weights of pixels [B, H, W] or None.
        weight: [B, H, W].
    """
    whole = loss(output.logits, labels, weight)
    if output.detail is None:
        return whole
    top, bottom, left, right = output.detail.box

    def cut(x: Tensor) -> Tensor:
        return x[:, top:bottom, left:right].contiguous()

    part = loss(output.detail.logits, cut(labels), None if weight is None else cut(weight))
    return (1 - output.detail.weight) * whole + output.detail.weight * part
