"""PLCA's association loss: InfoNCE along the consistent cycles, with a temperature per row."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._checks import (
    check_choice,
    check_features,
    check_flag,
    check_integer,
    check_labels,
    without_autocast,
)
from fastuda.ops._reference import first_argmax, pair_similarity, row_temperature
from fastuda.ops._schema import index, operator, statistic
from fastuda.ops.cycle_match import SIMILARITIES


def reference(
    source: Tensor, target: Tensor, labels: Tensor, similarity: str, contrast: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, matched [B, N] bool, forward_index, end_index)``: minus the mean log-probability of the
    consistent cycles."""
    forward = pair_similarity(source, target, similarity)
    backward = pair_similarity(target, source, similarity)
    forward_index, backward_index = first_argmax(forward), first_argmax(backward)
    end_index = backward_index.gather(1, forward_index)
    matched = (labels != ignore_index) & (labels.gather(1, end_index) == labels)

    forward_log = (forward / row_temperature(forward, contrast)).log_softmax(-1)
    backward_log = (backward / row_temperature(backward, contrast)).log_softmax(-1)
    hop_one = forward_log.gather(-1, forward_index[..., None])[..., 0]
    hop_two = backward_log.gather(-1, backward_index[..., None])[..., 0].gather(1, forward_index)
    loss = -((hop_one + hop_two) * matched).sum() / matched.sum().clamp(min=1)
    return loss, matched, forward_index, end_index


@operator
def cycle_association_loss_fwd(
    source: Tensor, target: Tensor, similarity: str, contrast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_source, by_target = source.shape[:2], target.shape[:2]
    indices = index(source, *by_source), index(source, *by_target)
    s, t = partial(statistic, source, *by_source), partial(statistic, source, *by_target)
    return *indices, s(), t(), s(), t(), s(), t()


@operator
def cycle_association_loss_bwd(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor,
    target_weight: Tensor,
    forward_index: Tensor,
    backward_index: Tensor,
    source_temperature: Tensor,
    target_temperature: Tensor,
    source_lse: Tensor,
    target_lse: Tensor,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    return source.new_empty(source.shape), target.new_empty(target.shape)


_backends.register("cycle_association_loss", triton=True, library_channels=512)


class CycleStats(NamedTuple):
    """Statistics of the cycles. They are tensors, so that the caller decides when to wait for the device."""

    matched: Tensor
    """Scalar: source pixels whose cycle ends in their own class."""
    valid: Tensor
    """Scalar: labelled source pixels."""
    covered: Tensor
    """Scalar: distinct target pixels that some source pixel is matched to."""
    forward_index: Tensor
    """[B, N] int64: the target pixel of the first hop."""
    end_index: Tensor
    """[B, N] int64: the source pixel where the cycle ends."""


class _Association(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        target: Tensor,
        labels: Tensor,
        similarity: str,
        contrast: bool,
        ignore_index: int,
        name: str,
    ):
        fwd = _backends.overload("cycle_association_loss_fwd", name)
        (
            forward_index,
            backward_index,
            forward_similarity,
            backward_similarity,
            source_temperature,
            target_temperature,
            source_lse,
            target_lse,
        ) = fwd(source, target, similarity, contrast)
        end_index = backward_index.gather(1, forward_index)
        matched = (labels != ignore_index) & (labels.gather(1, end_index) == labels)

        source_weight = matched.to(source_lse.dtype) / matched.sum().clamp(min=1)
        target_weight = torch.zeros_like(target_lse).scatter_add_(1, forward_index, source_weight)
        source_nll = source_lse - forward_similarity / source_temperature
        target_nll = target_lse - backward_similarity / target_temperature
        loss = (source_weight * source_nll).sum() + (target_weight * target_nll).sum()

        ctx.save_for_backward(
            source,
            target,
            source_weight,
            target_weight,
            forward_index,
            backward_index,
            source_temperature,
            target_temperature,
            source_lse,
            target_lse,
        )
        ctx.similarity, ctx.name = similarity, name
        ctx.mark_non_differentiable(matched, forward_index, end_index)
        return loss, matched, forward_index, end_index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any):
        source, target, source_weight, target_weight, *residuals = ctx.saved_tensors
        bwd = _backends.overload("cycle_association_loss_bwd", ctx.name)
        grad_source, grad_target = bwd(
            source, target, source_weight * grad, target_weight * grad, *residuals, ctx.similarity
        )
        needs_source, needs_target = ctx.needs_input_grad[:2]
        return (
            grad_source if needs_source else None,
            grad_target if needs_target else None,
            *[None] * 5,
        )


def cycle_association_loss(
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    similarity: str = "cosine",
    contrast: bool = True,
    ignore_index: int = 255,
    backend: str = "auto",
) -> tuple[Tensor, CycleStats]:
    """Pull together the pixels along the cycles that end in the class where they began.

    With ``j = argmax_j D(source_i, target_j)`` and ``e = argmax_i' D(target_j, source_i')``, the cycle of
    ``i`` is consistent when ``labels[i] != ignore_index`` and ``labels[e] == labels[i]``. Over the set ``M``
    of consistent pixels of the whole batch

        loss = -1/|M| sum_{i in M} [ log softmax_j(D(source_i, .) / t_i)[j] + log softmax_i'(D(target_j, .) /
        u_j)[e] ]

    With ``contrast=True``, ``t_i`` and ``u_j`` are the detached unbiased standard deviations of the rows plus
    1e-10 (contrast normalisation, which is a temperature per row since softmax is invariant to the mean).
    Otherwise they are 1. The temperature is also 1 for a row of one pixel, and for a row whose deviation is
    only rounding (at most 8 eps times the larger of its mean and 1): the softmax of such a row is uniform.
    Gradients flow to both sides; indices are constants. An empty ``M`` gives 0 with zero gradients. The
    second hop searches all source pixels, ignored ones included.

    A feature of zeros has no direction: its similarities are 0 and it gets no gradient (the authors' code
    divides its gradient by 1e-12).

    Source: Kang et al., Pixel-Level Cycle Association, NeurIPS 2020, eq. 4 to 6, 9 and 10.

    Args:
        source: [B, N, C] features (``cosine``) or probabilities (``kl``); float32, bfloat16, float16 or
            float64.
        target: [B, M, C] of the same dtype; image ``b`` is matched with source image ``b`` only.
        labels: [B, N] integer classes of the source pixels. They are only compared, so any integer is valid.
        similarity: ``cosine``, or ``kl`` for ``-KL(query || key)``.
        contrast: use the standard deviations of the rows as temperatures.
        ignore_index: pixels with this label start no cycle.
        backend: ``auto``, or a name from ``fastuda.ops.backends("cycle_association_loss")``.

    Returns:
        The scalar loss (float32; float64 for float64 input), and :class:`CycleStats`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit, or the named backend cannot run.
    """
    check_features(source, target)
    check_labels("labels", labels, tuple(source.shape[:2]), "source", source)
    check_choice("similarity", similarity, SIMILARITIES)
    check_flag("contrast", contrast)
    check_integer("ignore_index", ignore_index)
    name = _backends.select("cycle_association_loss", source, target, backend=backend)
    labels = labels.long()
    with without_autocast(source):
        if name == "reference" or not len(source):  # no kernel is launched for an empty batch
            loss, matched, forward_index, end_index = reference(
                source, target, labels, similarity, contrast, ignore_index
            )
        else:
            loss, matched, forward_index, end_index = _Association.apply(
                source, target, labels, similarity, contrast, ignore_index, name
            )
    hit = labels.new_zeros(target.shape[:2]).scatter_(1, forward_index, 1)
    valid = (labels != ignore_index).sum()
    return loss, CycleStats(matched.sum(), valid, hit.sum(), forward_index, end_index)
