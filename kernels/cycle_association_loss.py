"""The association's forward: hops, temperatures and log-sum-exps in one pass over tiles."""

from __future__ import annotations

from torch import Tensor

from fastuda.kernels import _temperature
from fastuda.kernels._common import on_device, prepare
from fastuda.kernels._search import search


def association_fwd(source: Tensor, target: Tensor, similarity: str, contrast: bool) -> tuple[Tensor, ...]:
    """Indices, similarities, temperatures and log-sum-exps of both hops; the low-level op of the same
    name."""
    with on_device(source):
        s, t = prepare(source, similarity), prepare(target, similarity)
        if contrast:
            temperatures = _temperature.pair_temperatures(s, t, similarity)
        else:
            temperatures = _temperature.ones(s), _temperature.ones(t)
        forward, backward = search(s, t, temperatures, similarity)
        return (
            forward.index,
            backward.index,
            forward.similarity,
            backward.similarity,
            *temperatures,
            forward.lse(temperatures[0]),
            backward.lse(temperatures[1]),
        )
