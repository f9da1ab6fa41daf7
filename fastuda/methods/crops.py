"""Class-balanced crops (SePiCo, section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def cut(images: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut windows [B, C, *size] from images [B, C, H, W] at each image's top-left ``corners`` [B, 2]."""
    rows = corners[:, 0, None] + torch.arange(size[0], device=images.device)
    columns = corners[:, 1, None] + torch.arange(size[1], device=images.device)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images.movedim(1, -1)[index, rows[:, :, None], columns[:, None]].movedim(-1, 1)


def balanced_crops(labels: Tensor, size: tuple[int, int], candidates: int, num_classes: int) -> Tensor:
    """Draw random crops, and return the top-left corners [B, 2] of the one with the best class balance.

    A crop scores ``sum over classes of ln n_c``, or 0 if it has one class only or if a class fills at least
    75% of it. The first of equal crops wins. Source: SePiCo, section 3.5 (CBC).

    Args:
        labels: [B, H, W].
        size: height and width of the crops, at most those of the labels.
        candidates: number of crops to draw; published 10.
        num_classes: number of classes K.

    Raises:
        ValueError: the labels are smaller than the crop.
    """
    batch, height, width = labels.shape
    if height < size[0] or width < size[1]:
        raise ValueError(f"a crop of {size[0]} x {size[1]} does not fit into {height} x {width}")
    device = labels.device
    rows = torch.randint(height - size[0] + 1, (batch, candidates), device=device)
    columns = torch.randint(width - size[1] + 1, (batch, candidates), device=device)
    planes = labels[:, None] == torch.arange(num_classes, device=device)[:, None, None]
    # counts of a window from the four corners in the summed-area table
    table = nnf.pad(planes.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32), (1, 0, 1, 0))
    image = torch.arange(batch, device=device)[:, None]
    bottom, right = rows + size[0], columns + size[1]
    counts = (
        table[image, :, bottom, right] - table[image, :, rows, right]
        - table[image, :, bottom, columns] + table[image, :, rows, columns]
    )  # fmt: skip
    score = counts.clamp(min=1).float().log().sum(-1)
    dull = ((counts > 0).sum(-1) <= 1) | (counts.amax(-1) >= 0.75 * size[0] * size[1])
    best = torch.where(dull, 0.0, score).argmax(1, keepdim=True)
    return torch.cat([rows.gather(1, best), columns.gather(1, best)], 1)
