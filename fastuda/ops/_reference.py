"""Functions that the references share. The file of every op has its reference: the op in plain torch with
autograd. It shows what the op computes, and every fused implementation is tested against it.

Shapes: features are pixel-major, ``[B, N, C]``. Half-precision inputs are computed in float32; float64 stays
float64. References store every matrix: they are for reading, for tests, and for machines where nothing
faster runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

EPS_KL = 1e-10
EPS_STD = 1e-10
EPS_NORM = 1e-12


def full(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one. A row of zeros has no direction: it stays zero and gets no gradient.

    (``torch.nn.functional.normalize`` divides the gradient of such a row by 1e-12, which makes training
    diverge.)
    """
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm <= EPS_NORM, 0, x / norm.clamp(min=EPS_NORM))


def pair_similarity(query: Tensor, key: Tensor, similarity: str) -> Tensor:
    """``[B, N, M]`` similarity of every query to every key: the cosine, or ``-KL(query || key)`` of
    probabilities."""
    query, key = full(query), full(key)
    if similarity == "cosine":
        return unit(query) @ unit(key).transpose(1, 2)
    entropy = (query * (query + EPS_KL).log()).sum(-1, keepdim=True)
    return query @ (key + EPS_KL).log().transpose(1, 2) - entropy


def row_temperature(sim: Tensor, contrast: bool = True) -> Tensor:
    """``[..., 1]`` per-row temperature: the detached unbiased standard deviation + 1e-10.

    It is 1 without ``contrast``, and where the deviation is only rounding: otherwise rounding would decide
    the softmax of equal values."""
    # an exported graph is the same for every size; in it the deviation of a single value is NaN
    single = not torch.compiler.is_exporting() and (sim.shape[-1] < 2 or not sim.numel())
    if not contrast or single:
        return torch.ones_like(sim[..., :1])
    deviation, mean = torch.std_mean(sim.detach(), -1, keepdim=True)
    rounding = 8 * torch.finfo(sim.dtype).eps * mean.abs().clamp(min=1)
    return torch.where(deviation > rounding, deviation + EPS_STD, 1)


def first_argmax(sim: Tensor) -> Tensor:
    """Row argmax with ties to the lowest index (torch's own argmax does not define ties)."""
    index = torch.arange(sim.shape[-1], device=sim.device)
    best = sim.detach() == sim.detach().amax(-1, keepdim=True)
    # a row of NaN has no maximum: any valid index will do, because the loss becomes NaN anyway
    return torch.where(best, index, sim.shape[-1] - 1).amin(-1)


def upsample(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear upsampling to ``size``, at least in float32."""
    x = full(x)
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    x = x.clamp(min=-1.5e38)  # a masked class is -inf, and -inf times a weight of 0 is NaN
    return nnf.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
