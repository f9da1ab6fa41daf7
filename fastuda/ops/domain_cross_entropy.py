"""FADA's class-wise domain loss."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from fastuda.ops import _backends
from fastuda.ops._autograd import GradientInForward
from fastuda.ops._checks import (
    check_beside,
    check_choice,
    check_flag,
    check_float,
    check_positive,
    check_rank,
    check_share,
    check_size,
    nothing,
    without_autocast,
)
from fastuda.ops._reference import full, upsample
from fastuda.ops._schema import operator, statistic


def reference(
    domain_logits: Tensor,
    seg_logits: Tensor,
    offset: int,
    size: tuple[int, int] | None,
    temperature: float,
    clip: float,
    hard_threshold: float | None,
    align_corners: bool,
) -> Tensor:
    """``mean over pixels of -sum_c a_c log softmax_2K(d)[offset + c]``; the label's other half is zero."""
    d = full(domain_logits)
    z = seg_logits.detach().to(d.dtype)
    if size is not None:
        d, z = upsample(d, size, align_corners), upsample(z, size, align_corners)
    classes = z.shape[1]
    if hard_threshold is None:
        encoding = (z / temperature).softmax(1).clamp(max=clip)
    else:
        best, index = (z / temperature).softmax(1).max(1)
        encoding = nnf.one_hot(index, classes).movedim(-1, 1) * (best >= hard_threshold)[:, None]
    half = d[:, offset : offset + classes] - d.logsumexp(1, keepdim=True)
    return -(encoding * half).sum(1).mean()


@operator
def domain_cross_entropy_fwd(
    domain_logits: Tensor,
    seg_logits: Tensor,
    offset: int,
    height: int,
    width: int,
    align_corners: bool,
    temperature: float,
    clip: float,
    hard_threshold: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    return statistic(domain_logits), statistic(domain_logits, *(domain_logits.shape if gradient else (0,)))


_backends.register(
    "domain_cross_entropy",
    triton=True,
    cuda="0.09 ms at 512 x 1024, triton 1 to 1.5 ms",
    triton_limit=_backends.most_classes(128),
)


def _prepare(
    domain_logits: Tensor,
    seg_logits: Tensor,
    encode: str,
    size: tuple[int, int] | None,
    temperature: float,
    clip: float,
    hard_threshold: float | None,
    align_corners: bool,
) -> tuple[int, tuple[int, int] | None]:
    """First channel of the encoded half, and the size as a tuple; raise where an argument does not fit."""
    for name, x in (("domain_logits", domain_logits), ("seg_logits", seg_logits)):
        check_float(name, x)
        check_rank(name, x, "B, K, h, w")
    check_beside("seg_logits", seg_logits, "domain_logits", domain_logits)
    check_choice("encode", encode, ("source", "target"))
    batch, classes = seg_logits.shape[:2]
    if tuple(domain_logits.shape[:2]) != (batch, 2 * classes):
        raise ValueError(
            f"domain_logits must be [{batch}, {2 * classes}, h, w] for seg_logits"
            f" {tuple(seg_logits.shape)}, got {tuple(domain_logits.shape)}"
        )
    if size is None and domain_logits.shape[2:] != seg_logits.shape[2:]:
        raise ValueError(
            f"domain_logits {tuple(domain_logits.shape)} and seg_logits {tuple(seg_logits.shape)} differ in"
            " resolution: give size"
        )
    size = None if size is None else check_size("size", size)
    check_positive("temperature", temperature)
    check_share("clip", clip, zero=False)
    if hard_threshold is not None:
        check_share("hard_threshold", hard_threshold)
    check_flag("align_corners", align_corners)
    return 0 if encode == "source" else classes, size


def domain_cross_entropy(
    domain_logits: Tensor,
    seg_logits: Tensor,
    *,
    encode: str,
    size: tuple[int, int] | None = None,
    temperature: float = 1.8,
    clip: float = 0.9,
    hard_threshold: float | None = None,
    align_corners: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``mean over pixels of -sum_c q_c log softmax(d)_c`` over 2 K channels, ``q`` the domain encoding.

    ``a = min(softmax(z / temperature), clip)``, without gradient and not renormalised; ``q = [a; 0]`` for
    ``source`` and ``[0; a]`` for ``target``. A batch without images gives 0.

    Source: Wang et al., Classes Matter, ECCV 2020, eq. 6 to 8.

    Args:
        domain_logits: discriminator logits d [B, 2K, h, w].
        seg_logits: segmentation logits z [B, K, h', w'], constants.
        encode: the half of the label that holds ``a``: ``source`` or ``target``.
        size: both logits are upsampled bilinearly to this; ``None`` if they already have the same size.
        temperature: positive; published 1.8.
        clip: largest entry of ``a``, in (0, 1]; published 0.9; 1 disables clipping.
        hard_threshold: in [0, 1]; replaces the soft labels by the one-hot argmax where its probability
            reaches this threshold, and by 0 elsewhere (the paper's hard variant).
        align_corners: of the bilinear upsampling; published true.
        backend: ``auto``, or a name from ``fastuda.ops.backends("domain_cross_entropy")``.

    Returns:
        A scalar, float32 (float64 for float64 ``domain_logits``). Gradients flow to ``domain_logits`` only.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit, or the named backend cannot run.
    """
    offset, size = _prepare(
        domain_logits, seg_logits, encode, size, temperature, clip, hard_threshold, align_corners
    )
    name = _backends.select("domain_cross_entropy", domain_logits, seg_logits, backend=backend)
    if not len(domain_logits):
        return nothing(domain_logits)
    rest = (temperature, clip, hard_threshold)
    with without_autocast(domain_logits):
        if name == "reference":
            return reference(domain_logits, seg_logits, offset, size, *rest, align_corners)
        height, width = size or domain_logits.shape[2:]
        given = (seg_logits.detach(), offset, height, width, align_corners, *rest)
        total = GradientInForward.apply(domain_logits, given, "domain_cross_entropy_fwd", name)
        return total / (len(domain_logits) * height * width)
