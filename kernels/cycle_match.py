"""Both hops of the pixel cycle on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.kernels._common import on_device, prepare
from fastuda.kernels._search import search


def cycle_match_fwd(
    source: Tensor, target: Tensor, similarity: str, library: bool = False
) -> tuple[Tensor, ...]:
    """``(forward_index, backward_index, forward_similarity, backward_similarity)``; the low-level op of the
    same name. ``library``: use panels that the library multiplies, not tiles."""
    if library and len(source) > 1:  # the panels hold one image at a time
        images = zip(source.split(1), target.split(1), strict=True)
        results = [cycle_match_fwd(s, t, similarity, library) for s, t in images]
        return tuple(torch.cat(each) for each in zip(*results, strict=True))
    with on_device(source):
        s, t = prepare(source, similarity), prepare(target, similarity)
        forward, backward = search(s, t, None, similarity, library)
    return forward.index, backward.index, forward.similarity, backward.similarity
