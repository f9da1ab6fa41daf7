"""FADA's class-wise domain loss."""

from __future__ import annotations

from torch import Tensor

from fastuda.ops import _backends, reference_losses
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

_backends.register(
    "domain_cross_entropy",
    ("domain_cross_entropy_fwd",),
    triton=True,
    triton_limit=_backends.most_classes(128),
)


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
        encode: the half that ``a`` stands in: ``source`` or ``target``.
        size: both are upsampled bilinearly to this; ``None`` where they have one size already.
        temperature: positive; published 1.8.
        clip: largest entry of ``a``, in (0, 1]; published 0.9, and 1 clips nothing.
        hard_threshold: in [0, 1]; instead of soft labels the one-hot argmax where its probability reaches
            this, and nothing elsewhere (the paper's hard variant).
        align_corners: of the bilinear upsampling; published true.
        backend: ``auto``, or a name from ``fastuda.ops.backends("domain_cross_entropy")``.

    Returns:
        A scalar, float32 (float64 for float64 ``domain_logits``); its gradient goes to them alone.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit, or the named backend cannot run.
    """
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
    name = _backends.select("domain_cross_entropy", domain_logits, seg_logits, backend=backend)
    if not batch:
        return nothing(domain_logits)
    offset = 0 if encode == "source" else classes
    with without_autocast(domain_logits):
        if name == "reference":
            rest = (offset, size, temperature, clip, hard_threshold, align_corners)
            return reference_losses.domain_cross_entropy(domain_logits, seg_logits, *rest)
        height, width = domain_logits.shape[2:] if size is None else size
        how = (offset, height, width, align_corners, temperature, clip, hard_threshold)
        total = GradientInForward.apply(
            domain_logits, (seg_logits.detach(), *how), "domain_cross_entropy_fwd", name
        )
        return total / (batch * height * width)
