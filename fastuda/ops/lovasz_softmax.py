"""The Lovasz-Softmax loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.ops import _backends
from fastuda.ops._autograd import GradientInForward
from fastuda.ops._checks import (
    check_classes,
    check_flag,
    check_float,
    check_integer,
    check_label_map,
    check_labels,
    check_rank,
    nothing,
    without_autocast,
)
from fastuda.ops._reference import full, upsample
from fastuda.ops._schema import operator


def lovasz_gradient(sorted_truth: Tensor) -> Tensor:
    """Gradient of the Lovasz extension of the Jaccard loss, for errors in descending order (Berman et al.
    2018, alg. 1)."""
    total = sorted_truth.sum()
    intersection = total - sorted_truth.cumsum(0)
    union = total + (1 - sorted_truth).cumsum(0)
    jaccard = 1 - intersection / union
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def reference(probabilities: Tensor, labels: Tensor, ignore_index: int, per_image: bool) -> Tensor:
    """Lovasz-Softmax, averaged over the classes that are present (and over images, with ``per_image``)."""
    if per_image:
        losses = [
            reference(p[None], y[None], ignore_index, False)
            for p, y in zip(probabilities, labels, strict=True)
        ]
        return torch.stack(losses).mean()
    keep = (labels != ignore_index) & (labels >= 0) & (labels < probabilities.shape[1])
    p, y = full(probabilities).movedim(1, -1)[keep], labels[keep]
    losses = []
    for c in range(p.shape[1]):
        truth = (y == c).to(p.dtype)
        if not truth.any():
            continue
        error, order = (truth - p[:, c]).abs().sort(descending=True)
        losses.append(error @ lovasz_gradient(truth[order]))
    return torch.stack(losses).mean() if losses else p.sum() * 0


@operator
def lovasz_softmax_fwd(
    x: Tensor, labels: Tensor, from_logits: bool, align_corners: bool, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    size = x.shape if gradient else (0,)
    return x.new_empty((), dtype=torch.float32), x.new_empty(size, dtype=torch.float32)


# the kernels sort in float32, so the reference computes float64
_backends.register(
    "lovasz_softmax", dtypes=_backends.FLOATS, triton=True, cpu_limit=_backends.most_classes(254)
)


def lovasz_softmax(
    x: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    per_image: bool = False,
    from_logits: bool = False,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The Lovasz extension of the Jaccard loss, averaged over the classes that are present.

    For each class ``c`` with a labelled pixel, the errors ``m_i = |[y_i = c] - p_ic|`` in descending order
    are multiplied by the discrete gradient of ``1 - intersection / union`` along that order. Without a valid
    pixel the loss is 0.

    Source: Berman et al., The Lovasz-Softmax loss, CVPR 2018, eq. 11 and algorithm 1.

    Args:
        x: probabilities [B, K, H, W]. With ``from_logits``, logits [B, K, h, w]: the op upsamples them
            bilinearly to the size of the labels and applies softmax.
        labels: [B, H, W] integer classes; all but ``ignore_index`` must be below K. On a GPU and in compiled
            code the values are not checked: pixels with other labels are left out.
        ignore_index: the label to leave out.
        per_image: average the loss of single images instead of pooling the batch.
        from_logits: ``x`` are logits at any resolution.
        align_corners: of the bilinear upsampling.
        backend: ``auto``, or a name from ``fastuda.ops.backends("lovasz_softmax")``.

    Returns:
        A scalar, float32 (float64 for float64, which the reference computes).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or labels do not fit, or the named backend cannot run.
    """
    check_float("x", x)
    check_rank("x", x, "B, K, H, W")
    for flag, value in (
        ("per_image", per_image),
        ("from_logits", from_logits),
        ("align_corners", align_corners),
    ):
        check_flag(flag, value)
    check_integer("ignore_index", ignore_index)
    if from_logits:
        check_label_map("labels", labels, "x", x)
    else:
        check_labels("labels", labels, (x.shape[0], *x.shape[2:]), "x", x)
    name = _backends.select("lovasz_softmax", x, backend=backend)
    labels = labels.long()
    check_classes("labels", labels, x.shape[1], ignore_index)
    if not len(x):
        return nothing(x)
    with without_autocast(x):
        if name != "reference":
            settings = (from_logits, align_corners, ignore_index)
            images = range(len(x)) if per_image else ()
            parts = [(x[i : i + 1], labels[i : i + 1]) for i in images] or [(x, labels)]
            losses = [
                GradientInForward.apply(image, (truth, *settings), "lovasz_softmax_fwd", name)
                for image, truth in parts
            ]
            return torch.stack(losses).mean()
        if from_logits:
            x = upsample(x, labels.shape[1:], align_corners).softmax(1)
        return reference(x, labels, ignore_index, per_image)
