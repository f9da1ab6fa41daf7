"""Small data sets on disk, in the layouts of the real ones."""

import numpy as np
import pytest

from fastuda.data.domains.open import open_domain
from fastuda.data.labels import CITYSCAPES_ROWS
from tests.data.data_files import ids, picture, save


@pytest.fixture
def gta5(tmp_path):
    """Five pairs; the labels are palette files, as in GTA5."""
    rng = np.random.default_rng(1)
    palette = np.zeros((256, 3), np.uint8)
    for row in CITYSCAPES_ROWS:
        palette[row.id] = row.color
    root = tmp_path / "gta5"
    for i in range(5):
        save(picture(rng), root / "images" / f"{i:05d}.png")
        save(ids(rng), root / "labels" / f"{i:05d}.png", palette.ravel().tolist())
    return root


@pytest.fixture
def cityscapes(tmp_path):
    """Four training and two validation pairs with labelIds."""
    rng = np.random.default_rng(2)
    root = tmp_path / "cityscapes"
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            stem = f"town_{i:06d}_000019"
            save(picture(rng), root / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png")
            save(ids(rng), root / "gtFine" / split / "town" / f"{stem}_gtFine_labelIds.png")
    return root


@pytest.fixture
def source(gta5):
    return open_domain(f"gta5:{gta5}", role="source", data_root=".")
