"""ASANet's affinities between neighbouring pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastuda.ops import _backends
from fastuda.ops._autograd import GradientInForward
from fastuda.ops._checks import (
    check_choice,
    check_float,
    check_integer,
    check_rank,
    nothing,
    without_autocast,
)
from fastuda.ops._reference import full
from fastuda.ops._schema import operator, statistic

EPS_AFFINITY = 1e-4
"""Lower clamp of the four probabilities in ASANet's affinity (authors' utils.py)."""

OFFSETS = {
    4: ((-1, 0), (0, -1), (0, 1), (1, 0)),
    8: ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
}
"""Neighbours as (rows, columns), in raster order."""


def neighbours_of(p: Tensor, neighbours: int, distance: int) -> list[Tensor]:
    """For each direction d, a map like ``p`` whose pixel i holds the d-th neighbour of i. Outside the image
    the border is repeated."""
    height, width = p.shape[-2:]
    padded = nnf.pad(p, (distance,) * 4, mode="replicate")
    return [
        padded[..., (1 + y) * distance :, (1 + x) * distance :][..., :height, :width]
        for y, x in OFFSETS[neighbours]
    ]


def reference(p: Tensor, neighbours: int, distance: int, kind: str) -> Tensor:
    """``[B, D K, H, W]`` Bernoulli-KL affinities, channel ``direction * K + class``, or ``[B, D, H, W]``
    inner products."""
    p = full(p)
    around = neighbours_of(p, neighbours, distance)
    if kind == "product":
        return torch.stack([(p * other).sum(1) for other in around], 1)
    one, zero = p.clamp(EPS_AFFINITY, 1), (1 - p).clamp(EPS_AFFINITY, 1)
    maps = []
    for other in around:
        joint = p * other
        both, not_both = joint.clamp(EPS_AFFINITY, 1), (1 - joint).clamp(EPS_AFFINITY, 1)
        maps.append(both * (both / one).log() + not_both * (not_both / zero).log())
    return torch.cat(maps, 1)


def cleaning_reference(logits: Tensor, neighbours: int) -> Tensor:
    """``mean (1 - sum_c p_ic p_jc)`` over pixels and neighbours."""
    return 1 - reference(full(logits).softmax(1), neighbours, 1, "product").mean()


@operator
def local_affinity_fwd(p: Tensor, neighbours: int, distance: int, product: bool) -> Tensor:
    b, k, h, w = p.shape
    if p.device.type == "cpu" and not product:
        return statistic(p, b, h, w, neighbours * k).permute(0, 3, 1, 2)
    return statistic(p, b, neighbours if product else neighbours * k, h, w)


@operator
def local_affinity_bwd(grad: Tensor, p: Tensor, neighbours: int, distance: int, product: bool) -> Tensor:
    return p.new_empty(p.shape)


@operator
def affinity_cleaning_loss_fwd(p: Tensor, neighbours: int, gradient: bool) -> tuple[Tensor, Tensor]:
    return statistic(p), statistic(p, *(p.shape if gradient else (0,)))


SHARED = "neighbours come from shared memory, which triton cannot index"
_backends.register("local_affinity", triton=True, cuda=SHARED)
_backends.register("affinity_cleaning_loss", triton=True, cuda=SHARED)


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

    ``kl``: ``KL(Bern(q) || Bern(p_i))`` with ``q = p_i p_j`` per class and neighbour j. The four quantities
    ``q, 1 - q, p_i, 1 - p_i`` are clamped separately to [1e-4, 1]; a clamped value passes no gradient.
    ``product``: ``sum_c p_ic p_jc``. Outside the image the border is repeated.

    Source: Zhou et al., Affinity Space Adaptation, TIP 2020.

    Args:
        p: class probabilities [B, K, H, W].
        neighbours: 8 or 4, in raster order.
        distance: pixels to the neighbour, at least 1.
        kind: ``kl`` (strategy 2, ASA) or ``product`` (strategy 1, ASC).
        backend: ``auto``, or a name from ``fastuda.ops.backends("local_affinity")``.

    Returns:
        [B, neighbours K, H, W], channel ``direction K + class``, on a CPU channels-last, as convolutions
        read it; for ``product`` [B, neighbours, H, W]. float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype or choice does not fit, or the named backend cannot run.
    """
    check_float("p", p)
    check_rank("p", p, "B, K, H, W")
    check_choice("kind", kind, ("kl", "product"))
    _check_neighbours(neighbours)
    check_integer("distance", distance, 1)
    distance = min(distance, max(p.shape[2:]))  # everything farther away is the border
    name = _backends.select("local_affinity", p, backend=backend)
    with without_autocast(p):
        if name != "reference":
            return _Affinity.apply(p, (neighbours, distance, kind == "product"), name)
        return reference(p, neighbours, distance, kind)


def affinity_cleaning_loss(logits: Tensor, *, neighbours: int = 8, backend: str = "auto") -> Tensor:
    """``mean over pixels and neighbours of 1 - sum_c p_ic p_jc`` with ``p = softmax(logits)``.

    It is 0 where neighbours are the same one-hot vector, and for a batch without images.

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
        return cleaning_reference(logits, neighbours)
