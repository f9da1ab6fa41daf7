"""The confusion matrix of bilinearly upsampled scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.ops import _backends, reference
from fastuda.ops._checks import check_float, check_labels, check_rank

_backends.register("upsample_confusion", ("upsample_confusion_fwd",), triton=True)


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
    check_rank("x", x, "B, K, h, w")
    check_float("x", x)
    check_labels("labels", labels, (x.shape[0], *labels.shape[-2:]))
    if x.shape[1] > 255:
        raise ValueError(f"at most 255 classes fit the uint8 label map, got {x.shape[1]}")
    name = _backends.select("upsample_confusion", x, backend=backend)
    with torch.autocast(x.device.type, enabled=False):
        if name == "reference":
            matrix, predicted = reference.upsample_confusion(x, labels, align_corners, ignore_index)
        else:
            forward = _backends.overload("upsample_confusion_fwd", name)
            try:
                matrix, predicted = forward(x, labels, align_corners, ignore_index)
            except RuntimeError as error:  # all that the stable interface of the CUDA kernels can raise
                if "labels hold classes outside" not in str(error):
                    raise
                raise ValueError(f"labels hold classes outside 0..{x.shape[1] - 1}") from error
    return (matrix, predicted) if return_labels else matrix
