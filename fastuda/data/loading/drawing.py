"""Draws the file and window of every sample; shared by all loaders, which therefore give the same batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.loading.sampling import BalancedSampler, RareSampler, build_sampler, order
from fastuda.data.loading.transforms import Augment, Window
from fastuda.data.tools.index import build_index
from fastuda.errors import UserError

SOURCE, TARGET = 0, 1
TRIES = 10
"""Largest number of windows drawn for one that shows the wanted class (DAFormer), and of redraws for one that
no class fills (mmsegmentation's RandomCrop)."""


class Drawer:
    """Draws sample ``k`` of a side as a pure function of (seed, side, k)."""

    def __init__(self, source: Domain, target: Domain, config: DataConfig, seed: int):
        self.domains = (source, target)
        self.seed = seed
        self.attempts = config.max_bad + 1
        plans = (
            (config.crop, config.source_resize, config.source_size),
            (config.target_crop or config.crop, config.target_resize, config.target_size),
        )
        self.augment = tuple(Augment(*plan, config.flip, config.resampling) for plan in plans)
        self.sampler = source_sampler(source, config, seed)
        share = config.rare_share / 2 if config.rare_crop_share is None else config.rare_crop_share
        self.rare_pixels = share * config.crop[0] * config.crop[1]
        self.max_class_share = config.max_class_share

    def candidates(self, side: int, k: int) -> Iterator[tuple[int, int | None, np.random.Generator]]:
        """Images for sample ``k``: the drawn one, then its replacements in case it cannot be read.

        Yields:
            Index of the image, class that its window has to show or None, random generator.
        """
        count = len(self.domains[side])
        permutation = order(self.seed, side, k // count, count)
        rng = np.random.default_rng([self.seed, side, k])
        for step in range(min(count, self.attempts)):
            if side == SOURCE and self.sampler is not None:
                wanted, index = self.sampler.draw(k, step, rng)
                yield index, wanted, rng
            else:
                yield int(permutation[(k + step) % count]), None, rng

    def window(
        self,
        side: int,
        size: tuple[int, int],
        label: np.ndarray | None,
        wanted: int | None,
        rng: np.random.Generator,
    ) -> tuple[Window, np.ndarray | None]:
        """Window of an image of ``size`` (height, width), and the label in it.

        If a class is ``wanted``, this is the first window that shows enough of it, or the last of ten.
        """
        if label is None:
            return self.augment[side].draw(size[0], size[1], rng), None
        window, cut = self._varied(side, size, label, rng)
        for _ in range(TRIES - 1 if wanted is not None else 0):
            if np.count_nonzero(cut == wanted) > self.rare_pixels:
                break
            window, cut = self._varied(side, size, label, rng)
        return window, cut

    def _varied(
        self, side: int, size: tuple[int, int], label: np.ndarray, rng: np.random.Generator
    ) -> tuple[Window, np.ndarray]:
        """Window and the label in it.

        This is the first window with two classes, each below ``max_class_share`` of the labelled pixels, or
        the last of eleven.
        """
        augment = self.augment[side]
        window = augment.draw(size[0], size[1], rng)
        cut = augment.label(label, window)
        for _ in range(TRIES if self.max_class_share < 1 else 0):
            counts = np.bincount(cut.ravel(), minlength=256)[:IGNORE]
            if np.count_nonzero(counts) > 1 and counts.max() < self.max_class_share * counts.sum():
                break
            window = augment.draw(size[0], size[1], rng)
            cut = augment.label(label, window)
        return window, cut


def source_sampler(source: Domain, config: DataConfig, seed: int) -> RareSampler | BalancedSampler | None:
    """Sampler that ``config.sampling`` names; None for uniform.

    Raises:
        UserError: more than ``config.max_bad`` labels cannot be read.
    """
    if config.sampling == "uniform":
        return None
    index = build_index(source, workers=config.workers)
    if len(index.bad) > config.max_bad:
        raise UserError(
            f"{len(index.bad)} labels could not be read (data.max_bad is {config.max_bad}):\n  "
            + "\n  ".join(index.bad)
        )
    return build_sampler(
        index,
        config.sampling,
        seed=seed,
        temperature=config.rare_temperature,
        min_share=config.rare_share,
    )
