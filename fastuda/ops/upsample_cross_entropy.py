"""Cross-entropy of bilinearly upsampled logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends, reference
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

_backends.register(
    "upsample_cross_entropy",
    ("upsample_cross_entropy_fwd",),
    triton=True,
    triton_limit=_backends.most_classes(128),
)


class _Sum(torch.autograd.Function):
    """The loss summed over the pixels, and the sum of the weights. The forward gathers the gradient at low
    resolution in the same pass over the pixels."""

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
    """The loss of every pixel; the backward is the sum's, weighted by the incoming gradient."""

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
            code their values are not looked at: others are left out.
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
    classes, pixels = (logits.shape[1],), (logits.shape[0], *labels.shape[-2:])
    if class_weight is not None:
        _check_weight("class_weight", class_weight, "K", classes, logits)
    if pixel_weight is not None:
        _check_weight("pixel_weight", pixel_weight, "B, H, W", pixels, logits)
    name = _backends.select("upsample_cross_entropy", logits, backend=backend)
    if soft:
        labels = labels.detach()
    else:
        labels = labels.long()
        check_classes("labels", labels, logits.shape[1], ignore_index)
    class_weight = None if class_weight is None else class_weight.detach()
    pixel_weight = None if pixel_weight is None else pixel_weight.detach()
    with without_autocast(logits):
        rest = (align_corners, temperature, ignore_index)
        if name == "reference":
            return reference.upsample_cross_entropy(
                logits, labels, *rest, class_weight, pixel_weight, label_smoothing, reduction
            )
        arguments = (class_weight, pixel_weight, *rest, label_smoothing)
        if reduction == "none":
            return _PerPixel.apply(logits, labels, arguments, name)
        total, norm = _Sum.apply(logits, labels, arguments, name)
        return total if reduction == "sum" else total / torch.where(norm > 0, norm, 1)
