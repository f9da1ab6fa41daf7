"""The UPerNet head: pooled context on the coarsest map, and a pyramid from there to the finest map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.models.daformer import unit

TAPS = (-0.25, 0.75, 0.75, -0.25)
"""Weights of the four fine cells around the centre of a coarse cell. After bilinear enlargement, the fine
cells on each side of the centre lie on a line; the weights are the mean of the two lines at the centre."""


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with ``align_corners=False``."""
    return nnf.interpolate(x, list(size), mode="bilinear", align_corners=False)


def reduced(x: Tensor, ratio: int) -> Tensor:
    """The inverse of bilinear enlargement: the map [B, C, ceil(h / ratio), ceil(w / ratio)] whose
    enlargement is ``x`` [B, C, h, w]. Exact if the ratio divides the sides; otherwise ``x`` is first resized
    to the next multiples."""
    if ratio == 1:
        return x
    rows, columns = ((side + ratio - 1) // ratio for side in x.shape[2:])
    x = resized(x, (rows * ratio, columns * ratio))
    if ratio % 2:
        return x[:, :, ratio // 2 :: ratio, ratio // 2 :: ratio]
    x = nnf.pad(x, (1, 1, 1, 1), mode="replicate")
    return _centres(_centres(x, ratio, rows).mT, ratio, columns).mT


def pooled(x: Tensor, scale: int) -> Tensor:
    """:func:`torch.nn.functional.adaptive_avg_pool2d` of ``x`` [B, C, h, w] to [B, C, scale, scale], as two
    products, because ONNX has no adaptive pooling for images of any size."""
    rows, columns = (_bins(x, side, scale) for side in x.shape[2:])
    return rows @ x @ columns.mT


def _bins(x: Tensor, side: int, scale: int) -> Tensor:
    """[scale, side]: each row has the weights of one bin, which sum to 1."""
    number = torch.arange(scale, device=x.device)[:, None]
    cell = torch.arange(side, device=x.device)
    first, last = number * side // scale, ((number + 1) * side + scale - 1) // scale  # ONNX rounds towards 0
    return ((cell >= first) & (cell < last)).to(x.dtype) / (last - first).to(x.dtype)


def _centres(x: Tensor, ratio: int, count: int) -> Tensor:
    """``x`` [B, C, 1 + count ratio + 1, w] at the centres of groups of ``ratio`` rows."""
    parts = []
    for first, weight in enumerate(TAPS, ratio // 2 - 1):
        parts.append(weight * x[:, :, first : first + (count - 1) * ratio + 1 : ratio])
    return parts[0] + parts[1] + parts[2] + parts[3]


class UPerNetHead(nn.Module):
    """``pooling (1, 2, 3, 6) on the coarsest map -> 3x3 -> sums with the finer maps, from coarse to fine ->
    3x3 each, concat -> 3x3 -> dropout -> 1x1 K``, each map at its own resolution.

    The input is the maps resized to the finest one and concatenated, as
    :class:`~fastuda.models.mit.MiT` and :class:`~fastuda.models.foreign.ForeignBackbone` return them; the
    head takes each back to its own grid (:func:`reduced`).

    Source: Xiao et al., Unified Perceptual Parsing, ECCV 2018, as in mmsegmentation and transformers.

    Args:
        widths: channels of each map, from fine to coarse.
        strides: pixels between neighbouring cells of each map.
        num_classes: K.
        width: channels of every map of the pyramid.
        dropout: rate before the classifier; mmsegmentation's 0.1.
    """

    SCALES = (1, 2, 3, 6)

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        width: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.widths = list(widths)
        self.ratios = [round(stride / min(strides)) for stride in strides]
        *finer, coarsest = self.widths
        self.pooled = nn.ModuleList(unit(coarsest, width) for _ in self.SCALES)
        self.context = unit(coarsest + len(self.SCALES) * width, width, 3)
        self.lateral = nn.ModuleList(unit(channels, width) for channels in finer)
        self.smooth = nn.ModuleList(unit(width, width, 3) for _ in finer)
        self.fuse = unit(len(self.widths) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        stages = features.split(self.widths, 1)
        *finer, coarsest = (reduced(x, ratio) for x, ratio in zip(stages, self.ratios, strict=True))
        context = [
            resized(branch(pooled(coarsest, scale)), coarsest.shape[2:])
            for branch, scale in zip(self.pooled, self.SCALES, strict=True)
        ]
        level = self.context(torch.cat([coarsest, *context], 1))
        pyramid = [level]
        for lateral, smooth, stage in reversed(list(zip(self.lateral, self.smooth, finer, strict=True))):
            level = lateral(stage) + resized(level, stage.shape[2:])
            pyramid.insert(0, smooth(level))
        size = features.shape[2:]
        joined = torch.cat([pyramid[0], *(resized(x, size) for x in pyramid[1:])], 1)
        return self.classifier(self.dropout(self.fuse(joined)))
