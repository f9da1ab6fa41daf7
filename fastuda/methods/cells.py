"""Labels at the resolution of feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastuda.system.settings import Share


def _averaged(index: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """[B, count, h, w]: the share of each value in each cell; cells may overlap."""
    values = torch.arange(count, device=index.device)[:, None, None]
    return nnf.adaptive_avg_pool2d((index[:, None] == values).float(), size)


def _counted(index: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """The same as :func:`_averaged` for cells that divide the image, without a plane per value."""
    batch, height, width = index.shape
    h, w = size
    pixels = index.view(batch, h, height // h, w, width // w)
    cell = torch.arange(batch * h * w, device=index.device).view(batch, h, 1, w, 1)
    counts = torch.zeros(batch * h * w * count, device=index.device)
    counts.scatter_add_(0, (cell * count + pixels).flatten(), counts.new_ones(index.numel()))
    return counts.view(batch, h, w, count).movedim(3, 1) / (height * width // (h * w))


def downsample_labels(
    labels: Tensor, size: tuple[int, int], num_classes: int, min_share: Share, ignore_index: int = 255
) -> Tensor:
    """Downsample labels: a cell gets its most frequent class if that fills at least ``min_share`` of the
    cell.

    Args:
        labels: [B, H, W].
        size: height and width of the feature map.
        num_classes: K.
        min_share: published 0.75.
        ignore_index: label of cells without such a class, or in which it is the majority itself.

    Returns:
        [B, h, w] int64. Source: SePiCo, authors' losses/contrastive_loss.py.
    """
    index = torch.where(labels == ignore_index, num_classes, labels)
    shares = _counted if labels.shape[1] % size[0] == 0 == labels.shape[2] % size[1] else _averaged
    share, winner = shares(index, size, num_classes + 1).max(1)
    sure = (share >= min_share) & (winner < num_classes)
    return torch.where(sure, winner, ignore_index)
