"""Both hops of the pixel cycle on the GPU."""

from __future__ import annotations

from torch import Tensor

from fastuda.kernels._common import on_device, prepare
from fastuda.kernels._search import search


def cycle_match_fwd(source: Tensor, target: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(forward_index, backward_index, forward_similarity, backward_similarity)``; the low-level op of the
    same name."""
    with on_device(source):
        forward, backward = search(prepare(source, similarity), prepare(target, similarity), None, similarity)
    return forward.index, backward.index, forward.similarity, backward.similarity
