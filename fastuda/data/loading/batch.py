"""The batch that loaders pass to methods."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Training batch of labelled source images and unlabelled target images.

    It has no target labels, so no method can use them. Weak labels are present only if ``data.weak_labels``
    is set.
    """

    source_image: Tensor
    """[B, 3, H, W] float32, normalised for the weights of the model."""
    source_label: Tensor
    """[B, H, W] int64 train ids; 255 is ignored."""
    target_image: Tensor
    """[B, 3, H, W] float32."""
    source_files: tuple[str, ...]
    target_files: tuple[str, ...]
    target_tags: Tensor | None = None
    """[B, K] bool: classes that the target image shows."""
    target_points: Tensor | None = None
    """[B, P, 3] int64 rows (y, x, class), padded by class 255; None if no image has points."""
    target_match: Tensor | None = None
    """[B, 3, H, W] float32: images of the same places as the target images, for example by day instead of by
    night, with the same resizing, crop and flip."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by the pinning thread of the DataLoader."""
        pinned: dict[str, Any] = {
            f.name: value.pin_memory()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
