"""Both hops of the pixel cycle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastuda.ops import _backends
from fastuda.ops._checks import check_choice, check_features, without_autocast
from fastuda.ops._reference import first_argmax, pair_similarity
from fastuda.ops._schema import index, operator, statistic

SIMILARITIES = ("cosine", "kl")


def reference(source: Tensor, target: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both hops: ``(forward_index [B, N], backward_index [B, M], forward_similarity,
    backward_similarity)``."""
    forward = pair_similarity(source, target, similarity)
    backward = pair_similarity(target, source, similarity)
    forward_index, backward_index = first_argmax(forward), first_argmax(backward)
    return (
        forward_index,
        backward_index,
        forward.gather(-1, forward_index[..., None])[..., 0],
        backward.gather(-1, backward_index[..., None])[..., 0],
    )


@operator
def cycle_match_fwd(source: Tensor, target: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, n, _), m = source.shape, target.shape[1]
    return index(source, b, n), index(source, b, m), statistic(source, b, n), statistic(source, b, m)


_backends.register("cycle_match", triton=True, library_channels=512)


class CycleMatch(NamedTuple):
    """What :func:`cycle_match` returns."""

    forward_index: Tensor
    """[B, N] int64: the most similar target pixel of every source pixel."""
    backward_index: Tensor
    """[B, M] int64: the most similar source pixel of every target pixel."""
    forward_similarity: Tensor
    """[B, N] float32 (float64 for float64 input)."""
    backward_similarity: Tensor
    """[B, M]."""


@torch.no_grad()
def cycle_match(
    source: Tensor, target: Tensor, *, similarity: str = "cosine", backend: str = "auto"
) -> CycleMatch:
    """Match every pixel of one image to its most similar pixel of the other, in both directions.

    ``forward_index[b, i] = argmax_j D(source_i, target_j)`` and ``backward_index[b, j] = argmax_i D(target_j,
    source_i)``, ties to the lowest index. ``D`` is the cosine, or ``-KL(query || key)`` of probabilities with
    1e-10 inside both logarithms. The cycle of source pixel ``i`` ends at
    ``backward_index[forward_index[i]]``. The op has no gradient. Only the reference stores the N x M
    similarity.

    Source: Kang et al., Pixel-Level Cycle Association, NeurIPS 2020, eq. 1 to 3 and 9.

    Args:
        source: [B, N, C] features (``cosine``) or probabilities (``kl``); float32, bfloat16, float16 or
            float64.
        target: [B, M, C] of the same dtype.
        similarity: ``cosine`` or ``kl``.
        backend: ``auto``, or a name from ``fastuda.ops.backends("cycle_match")``.

    Returns:
        :class:`CycleMatch`: both indices and both similarities.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or the named backend cannot run.
    """
    check_features(source, target)
    check_choice("similarity", similarity, SIMILARITIES)
    name = _backends.select("cycle_match", source, target, backend=backend)
    with without_autocast(source):
        if name == "reference" or not len(source):  # no kernel is launched for an empty batch
            return CycleMatch(*reference(source, target, similarity))
        return CycleMatch(*_backends.overload("cycle_match_fwd", name)(source, target, similarity))
