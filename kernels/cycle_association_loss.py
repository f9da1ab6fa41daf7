"""The association: hops, temperatures and log-sum-exps in one pass over tiles; gradients in row panels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastuda.kernels import _temperature
from fastuda.kernels._association_gradient import Hop, cosine, divergence
from fastuda.kernels._common import on_device, prepare
from fastuda.kernels._search import search


def cycle_association_loss_fwd(
    source: Tensor, target: Tensor, similarity: str, contrast: bool, library: bool = False
) -> tuple[Tensor, ...]:
    """Indices, similarities, temperatures and log-sum-exps of both hops; the low-level op of the same
    name. ``library``: use panels that the library multiplies, not tiles."""
    if library and len(source) > 1:  # the panels hold one image at a time
        images = zip(source.split(1), target.split(1), strict=True)
        results = [cycle_association_loss_fwd(s, t, similarity, contrast, library) for s, t in images]
        return tuple(torch.cat(each) for each in zip(*results, strict=True))
    with on_device(source):
        s, t = prepare(source, similarity), prepare(target, similarity)
        if contrast:
            temperatures = _temperature.pair_temperatures(s, t, similarity, library)
        else:
            temperatures = _temperature.ones(s), _temperature.ones(t)
        forward, backward = search(s, t, temperatures, similarity, library)
        return (
            forward.index,
            backward.index,
            forward.similarity,
            backward.similarity,
            *temperatures,
            forward.lse(temperatures[0]),
            backward.lse(temperatures[1]),
        )


def cycle_association_loss_bwd(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor,
    target_weight: Tensor,
    forward_index: Tensor,
    backward_index: Tensor,
    source_temperature: Tensor,
    target_temperature: Tensor,
    source_lse: Tensor,
    target_lse: Tensor,
    similarity: str,
    library: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum_i w_i (lse_i - s_i / t_i)`` over both hops; the low-level op of the same name."""
    # With one key the softmax is constant.
    source_weight = source_weight * (target.shape[1] > 1)
    target_weight = target_weight * (source.shape[1] > 1)
    forward = Hop(source_weight, forward_index, source_temperature, source_lse)
    backward = Hop(target_weight, backward_index, target_temperature, target_lse)
    gradient = cosine if similarity == "cosine" else divergence
    with on_device(source):
        return gradient(source.contiguous(), target.contiguous(), forward, backward, library)
