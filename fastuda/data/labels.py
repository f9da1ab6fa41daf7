"""Class sets: names, palettes and the ids that data sets write into their label files. The single source
of all three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = 255
UNKNOWN = 254
"""Marks, in a lookup table, a value that the data set does not define."""


@dataclass(frozen=True)
class ClassSet:
    """The classes a label map can hold; a train id is a position in ``names``."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.names)

    def colorize(self, labels: np.ndarray) -> np.ndarray:
        """RGB picture [H, W, 3] of train ids [H, W]; ignored pixels are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.palette)] = self.palette
        return table[labels]

    def flat_palette(self) -> list[int]:
        """The 768 numbers of a PNG palette."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.palette)] = self.palette
        return table.ravel().tolist()


CITYSCAPES = ClassSet(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    palette=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
)

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds of the 19 classes, in train-id order; GTA5 uses the same."""

SYNTHIA_16 = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
SYNTHIA_13 = (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Train ids of the 16- and 13-class protocols of SYNTHIA -> Cityscapes."""

CAMVID = ClassSet(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)

CAMVID_COLORS: dict[tuple[int, int, int], int] = {
    (128, 128, 128): 0,
    (0, 128, 64): 1,
    (128, 0, 0): 1,
    (64, 192, 0): 1,
    (64, 0, 64): 1,
    (192, 0, 128): 1,
    (192, 192, 128): 2,
    (0, 0, 64): 2,
    (128, 64, 128): 3,
    (128, 0, 192): 3,
    (192, 0, 64): 3,
    (0, 0, 192): 4,
    (64, 192, 128): 4,
    (128, 128, 192): 4,
    (128, 128, 0): 5,
    (192, 192, 0): 5,
    (192, 128, 128): 6,
    (128, 128, 64): 6,
    (0, 64, 64): 6,
    (64, 64, 128): 7,
    (64, 0, 128): 8,
    (64, 128, 192): 8,
    (192, 128, 192): 8,
    (192, 64, 128): 8,
    (128, 64, 64): 8,
    (64, 64, 0): 9,
    (192, 128, 64): 9,
    (64, 0, 192): 9,
    (64, 128, 64): 9,
    (0, 128, 192): 10,
    (192, 0, 192): 10,
    (0, 0, 0): IGNORE,
}
"""The 32 colours of the original CamVid labels, merged into the customary 11 classes."""


def lookup(ids: Sequence[int], ignored: Sequence[int]) -> np.ndarray:
    """Table of 65,536 entries from label-file value to train id; undefined values become :data:`UNKNOWN`."""
    table = np.full(65536, UNKNOWN, np.uint8)
    table[list(ignored)] = IGNORE
    table[list(ids)] = np.arange(len(ids), dtype=np.uint8)
    return table
