"""What upsampling kernels share: where every output lies between the sources, and the stretched rows."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Stretch(NamedTuple):
    """One axis of a bilinear upsampling, as torch's ``interpolate``."""

    first: Tensor
    """[outputs] int32: the source before every output."""
    share: Tensor
    """[outputs] float32: the weight of the source after it."""
    start: Tensor
    """[sources + 1] int32: outputs ``start[i]`` to ``start[i + 1]`` have ``first == i``."""


@lru_cache(maxsize=256)
def stretch(sources: int, outputs: int, align_corners: bool, device: torch.device) -> Stretch:
    """The tables of one axis; kept, since a training step asks for the same ones every time."""
    place = torch.arange(outputs, dtype=torch.float64)
    if align_corners:
        place = place * ((sources - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        place = ((place + 0.5) * (sources / outputs) - 0.5).clamp(min=0)
    first = place.long().clamp(max=sources - 1)
    start = torch.searchsorted(first, torch.arange(sources + 1))
    tables = first.int(), (place - first).float(), start.int()
    return Stretch(*(table.to(device) for table in tables))


def padded_classes(classes: int) -> int:
    """Classes of a tile: a power of two that the tile product takes."""
    return max(16, triton.next_power_of_2(classes))


@triton.jit
def stretched_rows(image, plane, r, h, w, first, share, k, mask):
    """Source rows ``r`` and the next, stretched to the outputs: two tiles [classes, outputs] in float32.

    ``image`` points to the classes' first plane; ``k`` is int64 [classes], ``first`` and ``share`` [outputs].
    """
    second = tl.minimum(first + 1, w - 1)
    upper = image + k[:, None] * plane + tl.cast(r, tl.int64) * w
    lower = image + k[:, None] * plane + tl.cast(tl.minimum(r + 1, h - 1), tl.int64) * w
    a = tl.load(upper + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(upper + second[None, :], mask=mask, other=0.0).to(tl.float32)
    top = a + share[None, :] * (b - a)
    a = tl.load(lower + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(lower + second[None, :], mask=mask, other=0.0).to(tl.float32)
    return top, a + share[None, :] * (b - a)
