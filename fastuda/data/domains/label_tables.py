"""Classes and label maps of the data sets whose label values differ from Cityscapes'."""

from __future__ import annotations

from fastuda.data.labels import (
    CITYSCAPES,
    CITYSCAPES_LABELS,
    IGNORE,
    SYNTHIA_16,
    ClassSet,
    Color,
    LabelMap,
)

_TRAIN = {name: i for i, name in enumerate(CITYSCAPES.names)}

_SYNTHIA = (
    "", "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "traffic sign",
    "person", "bicycle", "motorcycle", "", "", "traffic light", "", "rider", "", "bus", "", "wall", "",
)  # fmt: skip
SYNTHIA = CITYSCAPES.pick(*(CITYSCAPES.names[i] for i in SYNTHIA_16))
SYNTHIA_LABELS = LabelMap(
    {i: SYNTHIA.names.index(name) if name else IGNORE for i, name in enumerate(_SYNTHIA)}, channel_zero=True
)
"""SYNTHIA-RAND-CITYSCAPES: the first channel of a 16-bit file holds the raw id. The benchmark leaves out
terrain (16), truck (18) and train (20); 13, 14 and 22 are parking, road work and lane marking."""

_CAMVID: dict[str, tuple[Color, ...]] = {
    "sky": ((128, 128, 128),),
    "building": ((128, 0, 0), (0, 128, 64), (64, 192, 0), (64, 0, 64), (192, 0, 128)),
    "pole": ((192, 192, 128), (0, 0, 64)),
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),
    "pavement": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),
    "tree": ((128, 128, 0), (192, 192, 0)),
    "sign symbol": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),
    "fence": ((64, 64, 128),),
    "car": ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),
    "pedestrian": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),
    "bicyclist": ((0, 128, 192), (192, 0, 192)),
}
"""The usual 11 classes, each with its colours among the 32 of the original labels."""
CAMVID = ClassSet(tuple(_CAMVID), tuple(colors[0] for colors in _CAMVID.values()))
CAMVID_LABELS = LabelMap(
    {i: i for i in range(len(CAMVID))} | {11: IGNORE, IGNORE: IGNORE},
    {(0, 0, 0): IGNORE} | {color: i for i, colors in enumerate(_CAMVID.values()) for color in colors},
)
"""SegNet's ids, in which 11 is void, or the 32 colours of the original files."""

CROSS_CITY = CITYSCAPES.pick(
    "road", "sidewalk", "building", "traffic light", "traffic sign", "vegetation", "sky",
    "person", "rider", "car", "bus", "motorcycle", "bicycle",
)  # fmt: skip
"""The 13 annotated classes of Cross-City."""
CROSS_CITY_LABELS = CITYSCAPES_LABELS.remap({_TRAIN[name]: i for i, name in enumerate(CROSS_CITY.names)})


def _map(classes: dict[str, tuple[int, ...]], count: int) -> LabelMap:
    """Label map from the raw ids of each class; other ids below ``count`` are ignored."""
    ids = dict.fromkeys(range(count), IGNORE) | {IGNORE: IGNORE}
    return LabelMap(ids | {raw: _TRAIN[name] for name, raws in classes.items() for raw in raws})


VISTAS_1_LABELS = _map(
    {
        "road": (13, 24, 41),
        "sidewalk": (2, 15),
        "building": (17,),
        "wall": (6,),
        "fence": (3,),
        "pole": (45, 47),
        "traffic light": (48,),
        "traffic sign": (50,),
        "vegetation": (30,),
        "terrain": (29,),
        "sky": (27,),
        "person": (19,),
        "rider": (20, 21, 22),
        "car": (55,),
        "truck": (61,),
        "bus": (54,),
        "train": (58,),
        "motorcycle": (57,),
        "bicycle": (52,),
    },
    66,
)
"""Mapillary Vistas 1.2: its 66 ids, merged as in the domain generalisation literature (road includes lane
markings and manholes, sidewalk includes curbs, pole includes utility poles, signs count from the front)."""

VISTAS_2_LABELS = _map(
    {
        "road": (21, *range(35, 45), *range(46, 56), 57, 58, 74),
        "sidewalk": (4, 24),
        "building": (27,),
        "wall": (12,),
        "fence": (5,),
        "pole": (85, 88),
        "traffic light": tuple(range(90, 96)),
        "traffic sign": (99, 100, 101, 103),
        "vegetation": (64,),
        "terrain": (63,),
        "sky": (61,),
        "person": (30, 31),
        "rider": (32, 33, 34),
        "car": (108,),
        "truck": (114,),
        "bus": (107,),
        "train": (111,),
        "motorcycle": (110,),
        "bicycle": (105,),
    },
    124,
)
"""Mapillary Vistas 2.0: its 124 ids, merged alike."""

_IDD = (
    "road", "parking", "drivable fallback", "sidewalk", "rail track", "non-drivable fallback",
    "person", "animal", "rider", "motorcycle", "bicycle", "autorickshaw", "car", "truck", "bus",
    "caravan", "trailer", "train", "vehicle fallback", "curb", "wall", "fence", "guard rail",
    "billboard", "traffic sign", "traffic light", "pole", "polegroup", "obs-str-bar-fallback",
    "building", "bridge", "tunnel", "vegetation", "sky", "fallback background", "unlabeled",
    "ego vehicle", "rectification border", "out of roi", "license plate",
)  # fmt: skip
_IDD_TRAIN = {name: _TRAIN.get(name, IGNORE) for name in _IDD} | {"non-drivable fallback": _TRAIN["terrain"]}
IDD_LABELS = LabelMap(
    {i: _IDD_TRAIN[name] for i, name in enumerate(_IDD)} | {IGNORE: IGNORE}, names=_IDD_TRAIN
)
"""IDD polygons and labelids, by the csTrainId column of its public table."""

_CARLA_COLORS: dict[Color, str] = {
    (70, 70, 70): "building",
    (190, 153, 153): "fence",
    (100, 40, 40): "fence",
    (220, 20, 60): "person",
    (153, 153, 153): "pole",
    (157, 234, 50): "road",
    (128, 64, 128): "road",
    (244, 35, 232): "sidewalk",
    (107, 142, 35): "vegetation",
    (0, 0, 142): "car",
    (102, 102, 156): "wall",
    (220, 220, 0): "traffic sign",
    (70, 130, 180): "sky",
    (250, 170, 30): "traffic light",
    (145, 170, 100): "terrain",
    (152, 251, 152): "terrain",
    (255, 0, 0): "rider",
    (0, 0, 70): "truck",
    (0, 60, 100): "bus",
    (0, 80, 100): "train",
    (0, 0, 230): "motorcycle",
    (119, 11, 32): "bicycle",
}
_CARLA_IGNORED: tuple[Color, ...] = (
    (0, 0, 0), (250, 170, 160), (55, 90, 80), (72, 0, 90), (81, 0, 81), (150, 100, 100), (230, 150, 140),
    (180, 165, 180), (110, 190, 160), (170, 120, 50), (45, 60, 150),
)  # fmt: skip
_CARLA_RAW = (
    "", "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
    "bicycle", "", "", "", "", "road", "", "", "", "",
)  # fmt: skip
_CARLA_OLD_RAW = (
    "", "building", "fence", "", "person", "pole", "road", "road", "sidewalk", "vegetation", "car", "wall",
    "traffic sign", "sky", "", "", "", "", "traffic light", "", "", "", "terrain",
)  # fmt: skip
CARLA_COLORS = LabelMap(
    {},
    dict.fromkeys(_CARLA_IGNORED, IGNORE) | {color: _TRAIN[name] for color, name in _CARLA_COLORS.items()},
)
"""CARLA images in its CityScapesPalette, all versions. Lane lines are road; the single vehicle class of old
versions is car."""
CARLA_RAW = LabelMap({i: _TRAIN.get(name, IGNORE) for i, name in enumerate(_CARLA_RAW)}, channel_zero=True)
"""Raw images of CARLA since 0.9.14, with the tag in the red channel."""
CARLA_OLD_RAW = LabelMap(
    {i: _TRAIN.get(name, IGNORE) for i, name in enumerate(_CARLA_OLD_RAW)}, channel_zero=True
)
"""Raw images of CARLA up to 0.9.13."""
