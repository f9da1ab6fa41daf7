"""Samplers of source images: uniform, by rare classes, or balanced over the classes.

Every draw is a pure function of (seed, number), so a counter is the whole state of a loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.tools.index import Index, build_index
from fastuda.errors import UserError

SOURCE, TARGET = 0, 1
"""The sides of a batch."""


@lru_cache(maxsize=8)
def order(seed: int, side: int, epoch: int, count: int) -> np.ndarray:
    """Random order of one pass over ``count`` images."""
    return np.random.default_rng([seed, side, epoch]).permutation(count)


def class_probabilities(frequency: np.ndarray, temperature: float) -> np.ndarray:
    """``P(c) = softmax((1 - f_c) / T)`` over the classes that occur (DAFormer, eq. 8); float64 [K].

    Args:
        frequency: share f_c of every class among the labelled pixels.
        temperature: T; a lower one draws rare classes more often (DAFormer: 0.01).
    """
    present = frequency > 0
    lowest = frequency[present].min()
    weight = np.where(present, np.exp(np.minimum(lowest - frequency, 0) / temperature), 0.0)
    return weight / weight.sum()


class RareSampler:
    """Draws a class by :func:`class_probabilities`, then an image that shows it."""

    def __init__(self, index: Index, temperature: float, min_share: float):
        """An image shows a class that fills ``min_share`` of it, or has any pixel if no image reaches that.

        Classes that never occur are left out.
        """
        enough, any_pixel = index.tags(min_share), index.tags()
        self.images = _images(np.where(enough.any(0), enough, any_pixel))
        self.chances = class_probabilities(index.frequency, temperature)

    def draw(self, k: int, step: int, rng: np.random.Generator) -> tuple[int, int]:
        """Class and image of sample ``k``; ``step`` counts its unreadable images so far."""
        drawn = int(rng.choice(len(self.chances), p=self.chances))
        images = self.images[drawn]
        return drawn, int(images[rng.integers(len(images))])


SUB_EPOCH = 3000
"""Number of draws after which the counts start again (FADA)."""


def balanced_probabilities(occurrences: np.ndarray) -> np.ndarray:
    """``P(c)`` proportional to ``1 / log(1.01 + r_c)``; float64 [K].

    r_c is the share of class c among the occurrences of classes in the images drawn so far, at first 0.
    Source: FADA, authors' gta5.py.
    """
    weight = 1 / np.log(1.01 + occurrences / max(occurrences.sum(), 1))
    return weight / weight.sum()


class BalancedSampler:
    """FADA's class-balanced draws: a class by :func:`balanced_probabilities`, then the next image with a
    pixel of it. Every class in that image then counts as occurred once more.

    The counts start again every :data:`SUB_EPOCH` draws, as published. The published code then continues in
    the order of the files. Here the images of a class are shuffled per sub-epoch, which keeps sample ``k`` a
    function of (seed, k).
    """

    def __init__(self, index: Index, seed: int):
        self.shown = index.tags()
        self.images = _images(self.shown)
        self.seed = seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0))

    def draw(self, k: int, step: int, rng: np.random.Generator) -> tuple[int, int]:
        """Class and image of sample ``k``; ``step`` counts its unreadable images so far."""
        epoch, place = divmod(k, SUB_EPOCH)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._sub_epoch(epoch))
        drawn, image = self._cached[1][place].tolist()
        if step:
            image = int(rng.choice(self.images[drawn]))
        return drawn, image

    def _sub_epoch(self, epoch: int) -> np.ndarray:
        """Classes and images, int64 [SUB_EPOCH, 2]."""
        rng = np.random.default_rng([self.seed, epoch])
        present = np.flatnonzero(self.shown.any(0))
        shown = self.shown[:, present]
        orders = [rng.permutation(self.images[c]) for c in present]
        place, occurrences = np.zeros(len(present), int), np.zeros(len(present))
        drawn = np.empty((SUB_EPOCH, 2), int)
        for row in drawn:
            c = int(rng.choice(len(present), p=balanced_probabilities(occurrences)))
            if place[c] == len(orders[c]):
                orders[c], place[c] = rng.permutation(orders[c]), 0
            row[:] = present[c], orders[c][place[c]]
            place[c] += 1
            occurrences += shown[row[1]]
        return drawn


class SourceSampler:
    """Draws images of one or several sources as ``config.sampling`` and ``config.source_weights`` say.

    Without weights, sources are drawn in proportion to their numbers of images: uniform sampling then goes
    through all images of all sources before it repeats one. Otherwise a source is drawn by its weight first,
    then an image in it, uniformly or by the class frequencies of that source.

    Raises:
        UserError: more than ``config.max_bad`` labels of a source cannot be read, or none has a class.
    """

    def __init__(self, sources: Sequence[Domain], config: DataConfig, seed: int):
        self.seed = seed
        self.counts = [len(source) for source in sources]
        self.first = np.cumsum([0, *self.counts])
        self.shares = source_shares(sources, config)
        """Probability of each source."""
        self.together = config.sampling == "uniform" and (config.source_weights is None or len(sources) == 1)
        self.samplers = [class_sampler(source, config, seed) for source in sources]

    def draw(self, k: int, rng: np.random.Generator, most: int) -> Iterator[tuple[int, int, int | None]]:
        """Up to ``most`` images for sample ``k``: the first one, then its replacements.

        Yields:
            Number of the source, index of the image in it, class that its window has to show or None.
        """
        if self.together:
            total = int(self.first[-1])
            permutation = order(self.seed, SOURCE, k // total, total)
            for step in range(min(total, most)):
                image = int(permutation[(k + step) % total])
                number = int(np.searchsorted(self.first, image, "right")) - 1
                yield number, image - int(self.first[number]), None
            return
        number = int(rng.choice(len(self.shares), p=self.shares)) if len(self.shares) > 1 else 0
        sampler, count = self.samplers[number], self.counts[number]
        begin = int(rng.integers(count)) if sampler is None else 0
        for step in range(min(count, most)):
            if sampler is None:
                yield number, (begin + step) % count, None
            else:
                wanted, index = sampler.draw(k, step, rng)
                yield number, index, wanted


def class_sampler(source: Domain, config: DataConfig, seed: int) -> RareSampler | BalancedSampler | None:
    """Sampler by classes that ``config.sampling`` names; None for uniform.

    Raises:
        UserError: more than ``config.max_bad`` labels cannot be read, or none has a class.
    """
    if config.sampling == "uniform":
        return None
    index = source_index(source, config)
    if config.sampling == "rare":
        return RareSampler(index, config.rare_temperature, config.rare_share)
    return BalancedSampler(index, seed)


def source_shares(sources: Sequence[Domain], config: DataConfig) -> np.ndarray:
    """float64: probability that a source image is drawn from each source."""
    counts = [len(source) for source in sources]
    weights = np.array(counts if config.source_weights is None else config.source_weights, float)
    return weights / weights.sum()


def source_index(source: Domain, config: DataConfig) -> Index:
    """Index of a source's labels.

    Raises:
        UserError: more than ``config.max_bad`` labels cannot be read, or none has a class.
    """
    index = build_index(source, workers=config.workers)
    if len(index.bad) > config.max_bad:
        raise UserError(
            f"{len(index.bad)} labels could not be read (data.max_bad is {config.max_bad}):\n  "
            + "\n  ".join(index.bad)
        )
    if not index.counts.any():
        raise UserError(f"no labelled pixel in the source {source.name}: nothing to sample classes from")
    return index


def _images(shown: np.ndarray) -> tuple[np.ndarray, ...]:
    """Indices of the images that show each class, from bool [N, K]."""
    return tuple(np.flatnonzero(column) for column in shown.T)
