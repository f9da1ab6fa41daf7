"""ASANet's affinities between neighbouring pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends, reference_losses
from fastuda.ops._autograd import GradientInForward
from fastuda.ops._checks import (
    check_choice,
    check_float,
    check_integer,
    check_rank,
    nothing,
    without_autocast,
)

_backends.register("local_affinity", ("local_affinity_fwd", "local_affinity_bwd"), triton=True)
_backends.register("affinity_cleaning_loss", ("affinity_cleaning_loss_fwd",), triton=True)


class _Affinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, settings: tuple[int, int, bool], name: str):
        ctx.save_for_backward(p)
        ctx.settings, ctx.name = settings, name
        return _backends.overload("local_affinity_fwd", name)(p, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (p,) = ctx.saved_tensors
        return _backends.overload("local_affinity_bwd", ctx.name)(grad, p, *ctx.settings), None, None


def _check_neighbours(neighbours: int) -> None:
    check_integer("neighbours", neighbours)
    if neighbours not in (4, 8):
        raise ValueError(f"neighbours must be 4 or 8, got {neighbours}")


def local_affinity(
    p: Tensor, *, neighbours: int = 8, distance: int = 1, kind: str = "kl", backend: str = "auto"
) -> Tensor:
    """How much a pixel and each of its neighbours agree on the class.

    ``kl``: ``KL(Bern(q) || Bern(p_i))`` with ``q = p_i p_j`` per class and neighbour j, the four quantities
    ``q, 1 - q, p_i, 1 - p_i`` clamped separately to [1e-4, 1] (no gradient through a clamped one).
    ``product``: ``sum_c p_ic p_jc``. Past the border the border is repeated.

    Source: Zhou et al., Affinity Space Adaptation, TIP 2020.

    Args:
        p: class probabilities [B, K, H, W].
        neighbours: 8 or 4, in raster order.
        distance: pixels to the neighbour, at least 1.
        kind: ``kl`` (strategy 2, ASA) or ``product`` (strategy 1, ASC).
        backend: ``auto``, or a name from ``fastuda.ops.backends("local_affinity")``.

    Returns:
        [B, neighbours K, H, W], channel ``direction K + class``; for ``product`` [B, neighbours, H, W].
        float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype or choice does not fit, or the named backend cannot run.
    """
    check_float("p", p)
    check_rank("p", p, "B, K, H, W")
    check_choice("kind", kind, ("kl", "product"))
    _check_neighbours(neighbours)
    check_integer("distance", distance, 1)
    distance = min(distance, max(p.shape[2:]))  # all that is farther is the border
    name = _backends.select("local_affinity", p, backend=backend)
    with without_autocast(p):
        if name != "reference":
            return _Affinity.apply(p, (neighbours, distance, kind == "product"), name)
        return reference_losses.local_affinity(p, neighbours, distance, kind)


def affinity_cleaning_loss(logits: Tensor, *, neighbours: int = 8, backend: str = "auto") -> Tensor:
    """``mean over pixels and neighbours of 1 - sum_c p_ic p_jc`` with ``p = softmax(logits)``.

    0 where neighbours are one and the same one-hot vector, and for a batch without images.

    Source: Zhou et al., TIP 2020, strategy 1 (ASC).

    Args:
        logits: [B, K, H, W].
        neighbours: 8 or 4.
        backend: ``auto``, or a name from ``fastuda.ops.backends("affinity_cleaning_loss")``.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype or choice does not fit, or the named backend cannot run.
    """
    check_float("logits", logits)
    check_rank("logits", logits, "B, K, H, W")
    _check_neighbours(neighbours)
    name = _backends.select("affinity_cleaning_loss", logits, backend=backend)
    if not len(logits):
        return nothing(logits)
    with without_autocast(logits):
        if name != "reference":
            p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
            pairs = neighbours * p.numel() // p.shape[1]
            return 1 - GradientInForward.apply(p, (neighbours,), "affinity_cleaning_loss_fwd", name) / pairs
        return reference_losses.affinity_cleaning(logits, neighbours)
