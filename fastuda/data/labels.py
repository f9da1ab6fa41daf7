"""Class sets and label maps: class names, colours, and what the values in label files mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

Color = tuple[int, int, int]

IGNORE = 255
UNKNOWN = 254
"""Result of :meth:`LabelMap.decode` for a value that is not in the map; never a train id."""


@dataclass(frozen=True)
class ClassSet:
    """Names and colours of classes; a train id is a position in ``names``."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(f"{len(self.names)} names but {len(self.palette)} colours")
        if not 0 < len(self.names) <= UNKNOWN:
            raise ValueError(f"a class set has 1 to {UNKNOWN} classes, not {len(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, *names: str) -> ClassSet:
        """These classes, in this order."""
        kept = [self.names.index(name) for name in names]
        return ClassSet(names, tuple(self.palette[i] for i in kept))

    @cached_property
    def _color_table(self) -> np.ndarray:
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.palette)] = self.palette
        return table

    def colorize(self, labels: np.ndarray) -> np.ndarray:
        """Colours ``uint8 [H, W, 3]`` of train ids [H, W]; ignored pixels are black."""
        return self._color_table[labels]

    def flat_palette(self) -> list[int]:
        """The 768 numbers of a PNG palette."""
        return self._color_table.ravel().tolist()


@dataclass(frozen=True)
class LabelMap:
    """Maps the raw values of label files to train ids.

    A label file with one channel (grey, palette or 16-bit) holds raw ids. A file with three channels holds
    colours, or the raw id in its first channel (``channel_zero``).
    """

    ids: Mapping[int, int]
    """Train id of every valid raw id, which may be any int32; 255 for one without a class."""
    colors: Mapping[Color, int] = field(default_factory=dict)
    """Train id of every valid colour; 255 for one without a class."""
    channel_zero: bool = False
    """The first channel holds the raw id (SYNTHIA's 16-bit files, raw files of CARLA)."""
    names: Mapping[str, int] = field(default_factory=dict)
    """Train id of every class name, for polygons (JSON of Cityscapes and IDD) and weak labels."""
    id_colors: Mapping[int, Color] = field(default_factory=dict)
    """Colour of every raw id, for data sets in which several ids share a colour."""
    original: LabelMap | None = None
    """The map before :meth:`remap`, with every class of the data set."""

    @cached_property
    def _id_table(self) -> np.ndarray:
        table = np.full(1 << 16, UNKNOWN, np.uint8)
        for raw, train in self.ids.items():
            if 0 <= raw < len(table):
                table[raw] = train
        return table

    @cached_property
    def _color_table(self) -> np.ndarray:
        table = np.full(1 << 24, UNKNOWN, np.uint8)
        for (r, g, b), train in self.colors.items():
            table[r << 16 | g << 8 | b] = train
        return table

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """Train ids ``uint8 [H, W]`` of raw ids [H, W] or colours [H, W, 3 or 4]; 254 for a value that is
        not in the map."""
        if raw.ndim == 3 and not self.channel_zero:
            packed = raw[..., 0].astype(np.int32) << 16 | raw[..., 1].astype(np.int32) << 8 | raw[..., 2]
            return self._color_table[packed]
        if raw.ndim == 3:
            raw = raw[..., 0]
        if raw.dtype == np.uint8:
            return self._id_table[:256][raw]
        inside = (raw >= 0) & (raw < len(self._id_table))
        label = np.where(inside, self._id_table[np.where(inside, raw, 0)], np.uint8(UNKNOWN))
        for value, train in self.ids.items():
            if not 0 <= value < len(self._id_table):
                label[raw == value] = train
        return label

    def decode_indexed(self, raw: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """Train ids ``uint8 [H, W]`` of a palette file, read by its indices (raw ids) or by its colours.

        Image editors renumber the palette. The file is therefore read by colour if all colours in use are in
        the map and the colour of some index is another class than its number. If no colour in use is that of
        a class, the whole palette is compared. If most colours are unknown, the file is read by index.

        Args:
            raw: ``uint8 [H, W]`` indices.
            palette: ``uint8 [N, 3]`` colours of the indices.

        Raises:
            ValueError: the two readings differ, and neither is certain.
        """
        used = [i for i, count in enumerate(Image.fromarray(raw).histogram()) if count]
        if not (self.original or self)._reads_colors(used, list(map(tuple, palette.tolist()))):
            return self.decode(raw)
        table = np.full(256, UNKNOWN, np.uint8)
        for index in used:
            table[index] = self.colors[tuple(palette[index].tolist())]
        return table[raw]

    def _reads_colors(self, used: list[int], palette: list[Color]) -> bool:
        """Whether a palette file is read by its colours; see :meth:`decode_indexed`."""
        if not self.colors or not palette:
            return False

        def by_color(index: int) -> int:
            return self.colors.get(palette[index], UNKNOWN) if index < len(palette) else UNKNOWN

        def differs(index: int) -> bool:
            if by_color(index) < UNKNOWN:
                return by_color(index) != self.ids.get(index) and palette[index] != self.id_colors.get(index)
            # a void colour counts only if it does not pad the palette and its index is no raw id
            single = compared is used and palette.count(palette[min(index, len(palette) - 1)]) == 1
            return by_color(index) == IGNORE and index not in self.ids and single

        compared = used if any(by_color(i) < UNKNOWN for i in used) else list(range(len(palette)))
        differing = list(filter(differs, compared))
        unknown = sum(by_color(i) == UNKNOWN for i in compared)
        if not differing and len(palette) == 1 and used == [0] and by_color(0) == IGNORE != self.ids.get(0):
            differing = [0]  # either a file that is all void, or the first class shown in black
        elif not differing or 2 * unknown > len(compared) or (unknown and compared is not used):
            return False
        elif not unknown:
            return True
        first = differing[0]
        raise ValueError(
            f"index {first} is {self._describe(self.ids.get(first, UNKNOWN))} by its number and"
            f" {self._describe(by_color(first))} by its colour #{bytes(palette[first]).hex()}"
        )

    def _describe(self, train: int) -> str:
        """Class name of a train id, for messages."""
        names = [name for name, number in self.names.items() if number == train]
        return {IGNORE: "ignored", UNKNOWN: "unknown"}.get(train) or (names[0] if names else f"class {train}")

    def remap(self, table: Mapping[int, int], rest: int = IGNORE) -> LabelMap:
        """The same map with train ids renumbered by ``table``.

        A class that is not in the table becomes ``rest``; 255 stays 255.
        """

        def renumber(train: int) -> int:
            return IGNORE if train == IGNORE else table.get(train, rest)

        return LabelMap(
            {raw: renumber(train) for raw, train in self.ids.items()},
            {color: renumber(train) for color, train in self.colors.items()},
            self.channel_zero,
            {name: renumber(train) for name, train in self.names.items()},
            self.id_colors,
            self.original or self,
        )

    def unknown(self, raw: np.ndarray) -> list[int] | list[str]:
        """Values of a raw label that are not in the map, most frequent first: ids, or colours as
        ``#rrggbb``."""
        bad = raw[self.decode(raw) == UNKNOWN]
        colored = bad.ndim == 2 and not self.channel_zero
        if bad.ndim == 2:
            bad = bad @ np.array([1 << 16, 1 << 8, 1], np.int64) if colored else bad[:, 0]
        values, counts = np.unique(bad, return_counts=True)
        by_frequency = values[np.argsort(-counts, kind="stable")].tolist()
        return [f"#{value:06x}" for value in by_frequency] if colored else by_frequency


class Row(NamedTuple):
    """One row of Cityscapes' table of labels."""

    name: str
    id: int
    train_id: int
    color: Color


CITYSCAPES_ROWS = (
    Row("unlabeled", 0, 255, (0, 0, 0)),
    Row("ego vehicle", 1, 255, (0, 0, 0)),
    Row("rectification border", 2, 255, (0, 0, 0)),
    Row("out of roi", 3, 255, (0, 0, 0)),
    Row("static", 4, 255, (0, 0, 0)),
    Row("dynamic", 5, 255, (111, 74, 0)),
    Row("ground", 6, 255, (81, 0, 81)),
    Row("road", 7, 0, (128, 64, 128)),
    Row("sidewalk", 8, 1, (244, 35, 232)),
    Row("parking", 9, 255, (250, 170, 160)),
    Row("rail track", 10, 255, (230, 150, 140)),
    Row("building", 11, 2, (70, 70, 70)),
    Row("wall", 12, 3, (102, 102, 156)),
    Row("fence", 13, 4, (190, 153, 153)),
    Row("guard rail", 14, 255, (180, 165, 180)),
    Row("bridge", 15, 255, (150, 100, 100)),
    Row("tunnel", 16, 255, (150, 120, 90)),
    Row("pole", 17, 5, (153, 153, 153)),
    Row("polegroup", 18, 255, (153, 153, 153)),
    Row("traffic light", 19, 6, (250, 170, 30)),
    Row("traffic sign", 20, 7, (220, 220, 0)),
    Row("vegetation", 21, 8, (107, 142, 35)),
    Row("terrain", 22, 9, (152, 251, 152)),
    Row("sky", 23, 10, (70, 130, 180)),
    Row("person", 24, 11, (220, 20, 60)),
    Row("rider", 25, 12, (255, 0, 0)),
    Row("car", 26, 13, (0, 0, 142)),
    Row("truck", 27, 14, (0, 0, 70)),
    Row("bus", 28, 15, (0, 60, 100)),
    Row("caravan", 29, 255, (0, 0, 90)),
    Row("trailer", 30, 255, (0, 0, 110)),
    Row("train", 31, 16, (0, 80, 100)),
    Row("motorcycle", 32, 17, (0, 0, 230)),
    Row("bicycle", 33, 18, (119, 11, 32)),
    Row("license plate", 34, 255, (0, 0, 142)),
)


def _classes(rows: Iterable[Row]) -> ClassSet:
    kept = sorted((row for row in rows if row.train_id != IGNORE), key=lambda row: row.train_id)
    return ClassSet(tuple(row.name for row in kept), tuple(row.color for row in kept))


def _colors(rows: Iterable[Row]) -> dict[Color, int]:
    """Train id of every colour; a colour of both a class and an ignored row belongs to the class."""
    colors: dict[Color, int] = {}
    for row in sorted(rows, key=lambda row: row.train_id):
        colors.setdefault(row.color, row.train_id)
    return colors


CITYSCAPES = _classes(CITYSCAPES_ROWS)
CITYSCAPES_IDS = tuple(
    row.id for row in sorted(CITYSCAPES_ROWS, key=lambda row: row.train_id) if row.train_id != IGNORE
)
"""labelIds of the 19 classes in the order of their train ids; GTA5 uses the same."""
CITYSCAPES_LABELS = LabelMap(
    {row.id: row.train_id for row in CITYSCAPES_ROWS} | {IGNORE: IGNORE},
    _colors(CITYSCAPES_ROWS) | {(20, 20, 20): IGNORE},
    names={row.name: row.train_id for row in CITYSCAPES_ROWS},
    id_colors={row.id: row.color for row in CITYSCAPES_ROWS},
)
"""Label files with labelIds or with Cityscapes' colours, as in Cityscapes and GTA5."""

SYNTHIA_16 = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
SYNTHIA_13 = (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Cityscapes train ids of the 16- and 13-class protocols of SYNTHIA -> Cityscapes."""


def train_ids(classes: ClassSet) -> LabelMap:
    """Label map of files that hold train ids or the colours of the class set."""
    ids = {i: i for i in range(len(classes))} | {IGNORE: IGNORE}
    return LabelMap(ids, {(0, 0, 0): IGNORE} | {color: i for i, color in enumerate(classes.palette)})


CITYSCAPES_TRAIN_IDS = train_ids(CITYSCAPES)
