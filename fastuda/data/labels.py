"""Class sets, and what the values in label files mean: names, palettes and ids, the single source of all
three."""

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
"""What :meth:`LabelMap.decode` puts where a value is not in the map; no class has this id."""


@dataclass(frozen=True)
class ClassSet:
    """The classes a label map can hold; a train id is a position in ``names``."""

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


@dataclass(frozen=True)
class LabelMap:
    """Raw label values to train ids.

    A label file with one channel (grey, palette or 16-bit) holds raw ids. One with three holds colours, or
    the raw id in its first channel (``channel_zero``: SYNTHIA's 16-bit files, CARLA's raw ones).
    """

    ids: Mapping[int, int]
    """Every raw id that may occur, any int32; those without a class map to 255."""
    colors: Mapping[Color, int] = field(default_factory=dict)
    """Train id of every colour, for files with colours."""
    channel_zero: bool = False
    names: Mapping[str, int] = field(default_factory=dict)
    """Train id of every name, for files that name classes: polygons (Cityscapes' and IDD's JSON), weak
    labels."""
    id_colors: Mapping[int, Color] = field(default_factory=dict)
    """The data set's own colours of raw ids, where several share one, which ``colors`` gives to a class."""
    before: LabelMap | None = None
    """The map that :meth:`remap` began from, which knows every class of the files."""

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
        """uint8 train ids [H, W] of raw ids [H, W] or colours [H, W, 3 or 4]; 254 where a value is not in
        the map."""
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
        """uint8 train ids [H, W] of a palette file: by its indices, which are raw ids, or by its colours.

        The colours count where every one in use is in the map and some index has another class by its colour
        than by its number: an image editor has renumbered them. A file without a class colour in use is
        judged by its whole palette; one whose colours are mostly unknown is read by its indices.

        Args:
            raw: uint8 [H, W], the indices.
            palette: uint8 [N, 3], their colours.

        Raises:
            ValueError: the two readings differ, and neither is certain.
        """
        used = [i for i, count in enumerate(Image.fromarray(raw).histogram()) if count]
        if not (self.before or self)._reads_colors(used, list(map(tuple, palette.tolist()))):
            return self.decode(raw)
        table = np.full(256, UNKNOWN, np.uint8)
        for index in used:
            table[index] = self.colors[tuple(palette[index].tolist())]
        return table[raw]

    def _reads_colors(self, used: list[int], palette: list[Color]) -> bool:
        """Whether the colours of a palette file count, and not the indices; see :meth:`decode_indexed`."""

        def of(index: int) -> int:
            return self.colors.get(palette[index], UNKNOWN) if index < len(palette) else UNKNOWN

        if not self.colors or not palette:
            return False

        def differs(index: int) -> bool:
            if of(index) < UNKNOWN:
                return of(index) != self.ids.get(index) and palette[index] != self.id_colors.get(index)
            # void by its colour, if that is no padding, and not a value at all
            alone = judged is used and palette.count(palette[min(index, len(palette) - 1)]) == 1
            return of(index) == IGNORE and index not in self.ids and alone

        judged = used if any(of(i) < UNKNOWN for i in used) else list(range(len(palette)))
        differ = list(filter(differs, judged))
        unknown = sum(of(i) == UNKNOWN for i in judged)
        if not differ and len(palette) == 1 and used == [0] and of(0) == IGNORE != self.ids.get(0):
            differ = [0]  # void alone in its own palette, or the first class in black
        elif not differ or 2 * unknown > len(judged) or (unknown and judged is not used):
            return False
        elif not unknown:
            return True
        first = differ[0]
        raise ValueError(
            f"index {first} is {self._called(self.ids.get(first, UNKNOWN))} by its number and"
            f" {self._called(of(first))} by its colour #{bytes(palette[first]).hex()}"
        )

    def _called(self, train: int) -> str:
        """A train id in words."""
        names = [name for name, known in self.names.items() if known == train]
        return {IGNORE: "ignored", UNKNOWN: "unknown"}.get(train) or (names[0] if names else f"class {train}")

    def remap(self, table: Mapping[int, int], rest: int = IGNORE) -> LabelMap:
        """The same files with the train ids renumbered; classes that the table lacks become ``rest``, 255
        stays."""

        def renumber(train: int) -> int:
            return IGNORE if train == IGNORE else table.get(train, rest)

        return LabelMap(
            {raw: renumber(train) for raw, train in self.ids.items()},
            {color: renumber(train) for color, train in self.colors.items()},
            self.channel_zero,
            {name: renumber(train) for name, train in self.names.items()},
            self.id_colors,
            self.before or self,
        )

    def unknown(self, raw: np.ndarray) -> list[int] | list[str]:
        """The values of a raw label that are not in the map, most frequent first: ids, or colours as
        #rrggbb."""
        bad = raw[self.decode(raw) == UNKNOWN]
        colored = bad.ndim == 2 and not self.channel_zero
        if bad.ndim == 2:
            bad = bad @ np.array([1 << 16, 1 << 8, 1], np.int64) if colored else bad[:, 0]
        values, counts = np.unique(bad, return_counts=True)
        found = values[np.argsort(-counts, kind="stable")].tolist()
        return [f"#{value:06x}" for value in found] if colored else found


class Row(NamedTuple):
    """One line of the Cityscapes table."""

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
    """Colours to train ids; a colour that a class shares with an ignored row is the class's."""
    colors: dict[Color, int] = {}
    for row in sorted(rows, key=lambda row: row.train_id):
        colors.setdefault(row.color, row.train_id)
    return colors


CITYSCAPES = _classes(CITYSCAPES_ROWS)
CITYSCAPES_IDS = tuple(
    row.id for row in sorted(CITYSCAPES_ROWS, key=lambda row: row.train_id) if row.train_id != IGNORE
)
"""The labelIds of the 19 classes, in train-id order; GTA5 uses the same."""
CITYSCAPES_LABELS = LabelMap(
    {row.id: row.train_id for row in CITYSCAPES_ROWS} | {IGNORE: IGNORE},
    _colors(CITYSCAPES_ROWS) | {(20, 20, 20): IGNORE},
    names={row.name: row.train_id for row in CITYSCAPES_ROWS},
    id_colors={row.id: row.color for row in CITYSCAPES_ROWS},
)
"""Label files with labelIds, or with Cityscapes' colours; GTA5's are such."""

SYNTHIA_16 = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
SYNTHIA_13 = (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Train ids of the 16- and 13-class protocols of SYNTHIA -> Cityscapes."""

SYNTHIA = CITYSCAPES.pick(*(CITYSCAPES.names[i] for i in SYNTHIA_16))
_SYNTHIA_NAMES = {
    1: "sky",
    2: "building",
    3: "road",
    4: "sidewalk",
    5: "fence",
    6: "vegetation",
    7: "pole",
    8: "car",
    9: "traffic sign",
    10: "person",
    11: "bicycle",
    12: "motorcycle",
    15: "traffic light",
    17: "rider",
    19: "bus",
    21: "wall",
}
SYNTHIA_LABELS = LabelMap(
    {i: SYNTHIA.names.index(_SYNTHIA_NAMES[i]) if i in _SYNTHIA_NAMES else IGNORE for i in range(23)},
    channel_zero=True,
)
"""SYNTHIA-RAND-CITYSCAPES: the class is the first channel of a 16-bit file. Terrain (16), truck (18) and
train (20) are no classes of its benchmark; 13, 14 and 22 are parking, road work and lane marking."""

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


CAMVID_LABELS = LabelMap({**{i: i for i in range(len(CAMVID))}, 11: IGNORE, IGNORE: IGNORE}, CAMVID_COLORS)
"""SegNet's ids with 11 for void, or the original files' 32 colours."""


def train_ids(classes: ClassSet) -> LabelMap:
    """The map of files that already hold train ids, or the class set's colours."""
    ids = {i: i for i in range(len(classes))} | {IGNORE: IGNORE}
    return LabelMap(ids, {(0, 0, 0): IGNORE} | {color: i for i, color in enumerate(classes.palette)})


CITYSCAPES_TRAIN_IDS = train_ids(CITYSCAPES)
