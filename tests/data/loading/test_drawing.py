"""The windows that are drawn: for a wanted class, and for variety."""

from pathlib import Path

import numpy as np
import pytest

from fastuda.config.resolve import resolve
from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.layouts import Item
from fastuda.data.labels import CITYSCAPES, CITYSCAPES_LABELS
from fastuda.data.loading.drawing import Candidate, Drawer

EMPTY = Domain("", "", Path(), [Item(Path(), None)], CITYSCAPES, CITYSCAPES_LABELS)


def windows(label, count, wanted=None, **settings):
    """What ``count`` draws of a crop of 8 x 8 show of an image with this label."""
    drawer = Drawer(EMPTY, EMPTY, DataConfig(crop=(8, 8), flip=0.0, **settings), 5)
    rngs = (np.random.default_rng([5, k]) for k in range(count))
    drawn = (Candidate(EMPTY, 0, drawer.augment[0], wanted, rng) for rng in rngs)
    return [drawer.window(candidate, label.shape, label)[1] for candidate in drawn]


def filled(cut):
    """Whether one class has three quarters of the labelled pixels."""
    counts = np.bincount(cut.ravel(), minlength=256)[:255]
    return counts.max() >= 0.75 * counts.sum()


def test_a_crop_that_one_class_fills_is_drawn_again():
    label = np.zeros((40, 40), np.uint8)
    label[20:, 20:], label[:10, :10] = 1, 255
    share = np.mean([filled(cut) for cut in windows(label, 2000)])
    assert 0.7 < share < 0.95
    varied = windows(label, 400, max_class_share=0.75)
    assert np.mean([filled(cut) for cut in varied]) == pytest.approx(share**11, abs=0.07)  # eleven draws
    only = windows(np.zeros((12, 12), np.uint8), 3, max_class_share=0.75)
    assert all((cut == 0).all() for cut in only)  # there is nothing better


def test_the_wanted_class_fills_as_much_of_the_crop_as_is_asked():
    label = np.zeros((40, 40), np.uint8)
    label[16:24, 16:24] = 1
    plain, some, more = (
        np.mean([(cut == 1).mean() > 0.25 for cut in windows(label, 400, wanted, rare_crop_share=share)])
        for wanted, share in ((None, None), (1, None), (1, 0.25))
    )
    assert more == pytest.approx(1 - (1 - plain) ** 10, abs=0.07) and more > some + 0.1 > plain


def test_the_published_crops():
    for name in ("gta5_cityscapes_sepico", "cityscapes_dark_zurich_sepico", "gta5_cityscapes_self_training"):
        data = resolve(name, {}, {}).data
        assert round(data.rare_crop_share * data.crop[0] * data.crop[1]) == 1500
        assert data.max_class_share == 0.75
