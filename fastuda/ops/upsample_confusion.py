"""The confusion matrix of bilinearly upsampled scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.ops import _backends
from fastuda.ops._checks import (
    check_flag,
    check_float,
    check_integer,
    check_label_map,
    check_rank,
    stray_labels,
    without_autocast,
)
from fastuda.ops._reference import first_argmax, upsample
from fastuda.ops._schema import index, operator


def reference(x: Tensor, labels: Tensor, align_corners: bool, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``([K, K] int64 confusion, rows = truth; [B, H, W] uint8 predicted labels)``, ties to the lowest
    class."""
    classes = x.shape[1]
    predicted = first_argmax(upsample(x, labels.shape[-2:], align_corners).movedim(1, -1))
    keep = labels != ignore_index
    index = labels[keep].long() * classes + predicted[keep]
    matrix = torch.bincount(index, minlength=classes * classes).reshape(classes, classes)
    return matrix, predicted.to(torch.uint8)


@operator
def upsample_confusion_fwd(
    scores: Tensor, labels: Tensor, align_corners: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    classes = scores.shape[1]
    return index(scores, classes, classes), labels.new_empty(labels.shape, dtype=torch.uint8)


_backends.register(
    "upsample_confusion",
    triton=True,
    cuda="a block counts many columns of outputs before it adds to the matrix, triton 64 outputs",
)


@torch.no_grad()
def upsample_confusion(
    x: Tensor,
    labels: Tensor,
    *,
    align_corners: bool = False,
    ignore_index: int = 255,
    return_labels: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Confusion matrix of ``argmax(interpolate(x, size of the labels))``, ties to the lowest class.

    Args:
        x: logits or probabilities [B, K, h, w], K <= 255; float32, bfloat16, float16 or float64.
        labels: [B, H, W] integer classes; all but ``ignore_index`` must be below K.
        align_corners: of the bilinear upsampling.
        ignore_index: the label to leave out.
        return_labels: also return the predicted classes, [B, H, W] uint8.
        backend: ``auto``, or a name from ``fastuda.ops.backends("upsample_confusion")``.

    Returns:
        [K, K] int64, rows = truth, columns = prediction.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, a label is out of range, or the named backend
            cannot run.
    """
    check_float("x", x)
    check_rank("x", x, "B, K, h, w")
    check_label_map("labels", labels, "x", x)
    check_flag("align_corners", align_corners)
    check_integer("ignore_index", ignore_index)
    check_flag("return_labels", return_labels)
    if x.shape[1] > 255:
        raise ValueError(f"x has shape {tuple(x.shape)}: at most 255 classes fit the uint8 label map")
    name = _backends.select("upsample_confusion", x, backend=backend)
    with without_autocast(x):
        if name == "reference":
            message = stray_labels("labels", labels, x.shape[1], ignore_index)
            if message:
                raise ValueError(message)
            matrix, predicted = reference(x, labels.long(), align_corners, ignore_index)
        else:
            forward = _backends.overload("upsample_confusion_fwd", name)
            try:
                matrix, predicted = forward(x, labels, align_corners, ignore_index)
            except (ValueError, RuntimeError) as error:  # the stable ABI of CUDA raises RuntimeError
                if "labels hold classes outside" not in str(error):
                    raise
                raise ValueError(stray_labels("labels", labels, x.shape[1], ignore_index)) from error
    return (matrix, predicted) if return_labels else matrix
