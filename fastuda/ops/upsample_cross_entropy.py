"""Cross-entropy of bilinearly upsampled logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._checks import (
    check_beside,
    check_choice,
    check_classes,
    check_flag,
    check_float,
    check_integer,
    check_label_map,
    check_positive,
    check_rank,
    check_share,
    check_tensor,
    without_autocast,
)
from fastuda.ops._reference import upsample
from fastuda.ops._schema import operator, statistic


def reference(
    logits: Tensor,
    target: Tensor,
    align_corners: bool,
    temperature: float,
    ignore_index: int,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Cross-entropy of upsampled logits against hard ``[B, H, W]`` or soft ``[B, K, H, W]`` labels."""
    soft = target.is_floating_point()
    log_p = (upsample(logits, target.shape[-2:], align_corners) / temperature).log_softmax(1)
    classes = log_p.shape[1]
    weight = log_p.new_ones(classes) if class_weight is None else class_weight.to(log_p)
    if soft:
        q = target.to(log_p.dtype)
        valid = log_p.new_ones(log_p.shape[0], *log_p.shape[2:])
        norm = valid
    else:
        keep = (target != ignore_index) & (target >= 0) & (target < classes)
        q = nnf.one_hot(torch.where(keep, target, 0), classes).permute(0, 3, 1, 2).to(log_p.dtype)
        valid = keep.to(log_p.dtype)
        norm = valid * (q * weight[None, :, None, None]).sum(1)
    q = q * (1 - label_smoothing) + label_smoothing / classes
    q = q * weight[None, :, None, None]
    loss = -torch.where(q == 0, 0, q * log_p).sum(1) * valid  # a class without weight may be masked (-inf)
    if pixel_weight is not None:
        loss = loss * pixel_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = norm.sum()
    return loss.sum() / torch.where(total > 0, total, 1)


@operator
def upsample_cross_entropy_fwd(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    align_corners: bool,
    temperature: float,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = (logits.shape[0], *labels.shape[-2:]) if per_pixel else (0,)
    grad = statistic(logits, *(logits.shape if gradient else (0,)))
    return statistic(logits), statistic(logits), grad, statistic(logits, *size)


_backends.register(
    "upsample_cross_entropy",
    triton=True,
    cuda="59 instructions issued a pixel and class, triton 278",
    triton_limit=_backends.most_classes(128),
)


class _Sum(torch.autograd.Function):
    """The loss summed over the pixels, and the sum of the weights. The forward accumulates the gradient at
    low resolution in the same pass over the pixels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rest: tuple[Any, ...], name: str):
        forward = _backends.overload("upsample_cross_entropy_fwd", name)
        total, norm, grad, _ = forward(logits, labels, *rest, ctx.needs_input_grad[0], False)
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(norm)
        return total, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_norm: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype), None, None, None


class _PerPixel(torch.autograd.Function):
    """The loss of every pixel; the backward is that of the sum, weighted by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, arguments: tuple[Any, ...], name: str):
        class_weight, pixel_weight, *rest = arguments
        ctx.save_for_backward(logits, labels, class_weight, pixel_weight)
        ctx.rest, ctx.name = rest, name
        return _backends.overload("upsample_cross_entropy_fwd", name)(
            logits, labels, *arguments, False, True
        )[3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        logits, labels, class_weight, pixel_weight = ctx.saved_tensors
        weight = grad if pixel_weight is None else grad * pixel_weight
        forward = _backends.overload("upsample_cross_entropy_fwd", ctx.name)
        gradient = forward(logits, labels, class_weight, weight, *ctx.rest, True, False)[2]
        return gradient.to(logits.dtype), None, None, None


def _check_soft(labels: Tensor, logits: Tensor) -> None:
    check_float("soft labels", labels)
    if labels.dim() != 4 or labels.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"soft labels must be [B, K, H, W] with B, K = {tuple(logits.shape[:2])}, got"
            f" {tuple(labels.shape)} of {labels.dtype}: hard labels are integers [B, H, W], labels.long()"
        )
    check_rank("labels", labels, "B, K, H, W")
    check_beside("labels", labels, "logits", logits)


def _check_weight(name: str, weight: Tensor, letters: str, shape: tuple[int, ...], logits: Tensor) -> None:
    check_tensor(name, weight)
    if weight.is_complex():
        raise TypeError(f"{name} must be real, got {weight.dtype}")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, [{letters}], got {tuple(weight.shape)}")
    check_beside(name, weight, "logits", logits)


def _prepare(
    logits: Tensor,
    labels: Tensor,
    align_corners: bool,
    temperature: float,
    ignore_index: int,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Labels, class and pixel weights as constants; raise if an argument does not fit."""
    check_float("logits", logits)
    check_rank("logits", logits, "B, K, h, w")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_flag("align_corners", align_corners)
    check_positive("temperature", temperature)
    check_integer("ignore_index", ignore_index)
    check_share("label_smoothing", label_smoothing)
    check_tensor("labels", labels)
    soft = labels.is_floating_point()
    if soft:
        _check_soft(labels, logits)
    else:
        check_label_map("labels", labels, "logits", logits)
    if class_weight is not None:
        _check_weight("class_weight", class_weight, "K", (logits.shape[1],), logits)
        class_weight = class_weight.detach()
    if pixel_weight is not None:
        _check_weight("pixel_weight", pixel_weight, "B, H, W", (len(logits), *labels.shape[-2:]), logits)
        pixel_weight = pixel_weight.detach()
    if soft:
        return labels.detach(), class_weight, pixel_weight
    labels = labels.long()
    check_classes("labels", labels, logits.shape[1], ignore_index)
    return labels, class_weight, pixel_weight


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    align_corners: bool = False,
    temperature: float = 1.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """``cross_entropy(interpolate(logits, size of the labels) / temperature, labels)``.

    As in torch: hard labels with ``reduction="mean"`` divide by the sum of the valid pixels' class weights,
    soft labels by the number of pixels; label smoothing mixes ``1/K`` into the target. ``pixel_weight``
    multiplies each pixel's loss and leaves the divisor as it is. Without a valid pixel the mean is 0, not
    NaN. Gradients flow to the logits only.

    Args:
        logits: [B, K, h, w], at any resolution; float32, bfloat16, float16 or float64.
        labels: [B, H, W] integer classes, or [B, K, H, W] soft labels (floating point, constant: no gradient
            flows to them). All hard labels but ``ignore_index`` must be below K. On a GPU and in compiled
            code the values are not checked: pixels with other labels are left out.
        align_corners: of the bilinear upsampling.
        temperature: positive, divides the upsampled logits.
        ignore_index: the hard label to leave out.
        class_weight: [K], constant.
        pixel_weight: [B, H, W], constant.
        label_smoothing: in [0, 1].
        reduction: ``mean``, ``sum`` or ``none``.
        backend: ``auto``, or a name from ``fastuda.ops.backends("upsample_cross_entropy")``.

    Returns:
        A scalar, or [B, H, W] for ``none``; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit, or the named backend cannot run.
    """
    rest = (align_corners, temperature, ignore_index)
    labels, class_weight, pixel_weight = _prepare(
        logits, labels, *rest, class_weight, pixel_weight, label_smoothing, reduction
    )
    name = _backends.select("upsample_cross_entropy", logits, backend=backend)
    with without_autocast(logits):
        if name == "reference":
            return reference(logits, labels, *rest, class_weight, pixel_weight, label_smoothing, reduction)
        arguments = (class_weight, pixel_weight, *rest, label_smoothing)
        if reduction == "none":
            return _PerPixel.apply(logits, labels, arguments, name)
        total, norm = _Sum.apply(logits, labels, arguments, name)
        return total if reduction == "sum" else total / torch.where(norm > 0, norm, 1)
