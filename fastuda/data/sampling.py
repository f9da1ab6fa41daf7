"""Which source image comes when: uniform, by rare classes, or balanced over the classes.

Every draw is a pure function of (seed, number), so that a counter is the whole state of a loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastuda.data.index import Index
from fastuda.errors import UserError, nearest

SAMPLINGS = ("uniform", "rare", "balanced")


@lru_cache(maxsize=8)
def order(seed: int, side: int, epoch: int, count: int) -> np.ndarray:
    """The order of one pass over ``count`` images."""
    return np.random.default_rng([seed, side, epoch]).permutation(count)


def class_probabilities(frequency: np.ndarray, temperature: float) -> np.ndarray:
    """``P(c) = softmax((1 - f_c) / T)`` over the classes that occur (DAFormer, eq. 8); float64 [K].

    Args:
        frequency: share of every class among the labelled pixels.
        temperature: lower draws rare classes more often (DAFormer: 0.01).
    """
    present = frequency > 0
    lowest = frequency[present].min()
    weight = np.where(present, np.exp(np.minimum(lowest - frequency, 0) / temperature), 0.0)
    return weight / weight.sum()


@dataclass(frozen=True)
class ClassSampler:
    """Draw a class, then an image that shows it, then a crop that shows it too."""

    chances: np.ndarray
    """float64 [K]."""
    images: tuple[np.ndarray, ...]
    """Of every class, the images that show enough of it."""

    @staticmethod
    def build(index: Index, sampling: str, temperature: float, min_share: float) -> ClassSampler:
        """``rare``: :func:`class_probabilities`; ``balanced``: every class that occurs alike.

        An image shows a class when it fills ``min_share`` of it, or, where no image has as much, at all; a
        class that occurs nowhere is left out.

        Raises:
            UserError: an unknown sampling, or no labelled pixel.
        """
        if sampling not in SAMPLINGS[1:]:
            raise UserError(f"data.sampling={sampling}{nearest(sampling, SAMPLINGS)}")
        if not index.counts.any():
            raise UserError("no labelled pixel in the source: nothing to sample classes from")
        enough, any_pixel = index.tags(min_share), index.tags()
        images = tuple(
            np.flatnonzero(enough[:, c] if enough[:, c].any() else any_pixel[:, c])
            for c in range(index.counts.shape[1])
        )
        if sampling == "rare":
            chances = class_probabilities(index.frequency, temperature)
        else:
            chances = np.array([float(len(found) > 0) for found in images])
            chances /= chances.sum()
        return ClassSampler(chances, images)

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Class and image."""
        wanted = int(rng.choice(len(self.chances), p=self.chances))
        found = self.images[wanted]
        return wanted, int(found[rng.integers(len(found))])
