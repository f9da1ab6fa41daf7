"""Draws the file and window of every sample; shared by all loaders, which therefore give the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.loading.sampling import SOURCE, SourceSampler, order
from fastuda.data.loading.transforms import Augment, Window

TRIES = 10
"""Largest number of windows drawn for one that shows the wanted class (DAFormer), and of redraws for one that
no class fills (mmsegmentation's RandomCrop)."""


class Candidate(NamedTuple):
    """A drawn image, whose window is to be drawn next."""

    domain: Domain
    position: int
    """Index of the image in its domain."""
    augment: Augment
    wanted: int | None
    """Class that the window has to show."""
    rng: np.random.Generator


class Drawer:
    """Draws sample ``k`` of a side as a pure function of (seed, side, k)."""

    def __init__(self, sources: Domain | Sequence[Domain], target: Domain, config: DataConfig, seed: int):
        self.sources = (sources,) if isinstance(sources, Domain) else tuple(sources)
        self.target = target
        self.seed = seed
        self.attempts = config.max_bad + 1
        plan = config.flip, config.resampling
        of_target = config.target_resize, config.target_size
        self.augment = (
            Augment(config.crop, config.source_resize, config.source_size, *plan),
            Augment(config.target_crop or config.crop, *of_target, *plan),
        )
        # a labelled part of the target has the scale of the target
        folder = target.root.resolve()
        part = [len(self.sources) > 1 and source.root.resolve() == folder for source in self.sources]
        as_target = Augment(config.crop, *of_target, *plan)
        self.source_augment = [as_target if is_part else self.augment[SOURCE] for is_part in part]
        self.sampler = SourceSampler(self.sources, config, seed)
        share = config.rare_share / 2 if config.rare_crop_share is None else config.rare_crop_share
        self.rare_pixels = share * config.crop[0] * config.crop[1]
        self.max_class_share = config.max_class_share

    def candidates(self, side: int, k: int) -> Iterator[Candidate]:
        """Images for sample ``k``: the drawn one, then its replacements in case it cannot be read."""
        rng = np.random.default_rng([self.seed, side, k])
        if side == SOURCE:
            for number, index, wanted in self.sampler.draw(k, rng, self.attempts):
                yield Candidate(self.sources[number], index, self.source_augment[number], wanted, rng)
            return
        count = len(self.target)
        permutation = order(self.seed, side, k // count, count)
        for step in range(min(count, self.attempts)):
            yield Candidate(self.target, int(permutation[(k + step) % count]), self.augment[side], None, rng)

    def window(
        self, candidate: Candidate, size: tuple[int, int], label: np.ndarray | None
    ) -> tuple[Window, np.ndarray | None]:
        """Window of an image of ``size`` (height, width), and the label in it.

        If a class is wanted, this is the first window that shows enough of it, or the last of ten.
        """
        if label is None:
            return candidate.augment.draw(size[0], size[1], candidate.rng), None
        window, cut = self._varied(candidate, size, label)
        for _ in range(TRIES - 1 if candidate.wanted is not None else 0):
            if np.count_nonzero(cut == candidate.wanted) > self.rare_pixels:
                break
            window, cut = self._varied(candidate, size, label)
        return window, cut

    def _varied(
        self, candidate: Candidate, size: tuple[int, int], label: np.ndarray
    ) -> tuple[Window, np.ndarray]:
        """Window and the label in it.

        This is the first window with two classes, each below ``max_class_share`` of the labelled pixels, or
        the last of eleven.
        """
        augment, rng = candidate.augment, candidate.rng
        window = augment.draw(size[0], size[1], rng)
        cut = augment.label(label, window)
        for _ in range(TRIES if self.max_class_share < 1 else 0):
            counts = np.bincount(cut.ravel(), minlength=256)[:IGNORE]
            if np.count_nonzero(counts) > 1 and counts.max() < self.max_class_share * counts.sum():
                break
            window = augment.draw(size[0], size[1], rng)
            cut = augment.label(label, window)
        return window, cut
