"""The one contract between the loaders and the methods."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One training batch: labelled source images beside unlabelled target images.

    There is no target label map, so that no method can read one. Weak target labels are present only where
    the domain has them.
    """

    source_image: Tensor
    """[B, 3, H, W] float32, normalised as the model's weights ask."""
    source_label: Tensor
    """[B, H, W] int64 train ids, 255 = ignore."""
    target_image: Tensor
    """[B, 3, H, W] float32."""
    source_files: tuple[str, ...]
    target_files: tuple[str, ...]
    target_tags: Tensor | None = None
    """[B, K] bool: which classes the target image shows."""
    target_points: Tensor | None = None
    """[B, P, 3] int64 rows (y, x, class); class 255 pads; none where no image has any."""
    target_match: Tensor | None = None
    """[B, 3, H, W] float32: images of the same places as the target's, such as by day for those by night,
    resized, cropped and flipped as they are."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader's pinning thread calls it."""
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
