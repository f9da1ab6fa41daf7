"""Pixel cycles between two images, as a method returns them to the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastuda.data.labels import IGNORE


@dataclass(frozen=True)
class Cycles:
    """Where the cycles of one source image's pixels go: to a target pixel, and back to a source pixel."""

    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    """Height and width of the feature maps; pixels are counted along their rows."""
    labels: np.ndarray
    """[N] train id of every source pixel, 255 = ignore."""
    there: np.ndarray
    """[N] target pixel that every source pixel is matched to."""
    back: np.ndarray
    """[N] source pixel in which its cycle ends."""

    @property
    def valid(self) -> np.ndarray:
        """[N] bool: the source pixel has a label."""
        return self.labels != IGNORE

    @property
    def closed(self) -> np.ndarray:
        """[N] bool: the cycle ends in the class in which it began."""
        return self.valid & (self.labels == self.labels[self.back])

    @property
    def covered(self) -> np.ndarray:
        """[M] train id of a source pixel whose closed cycle passes through the target pixel; 255: none."""
        out = np.full(self.target_grid[0] * self.target_grid[1], IGNORE, np.uint8)
        out[self.there[self.closed]] = self.labels[self.closed]
        return out
