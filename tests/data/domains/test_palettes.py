"""Palette files are read by number or by colour, or refused."""

import numpy as np
import pytest
from PIL import Image

from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.label_tables import CAMVID
from fastuda.data.labels import CITYSCAPES, CITYSCAPES_ROWS, IGNORE
from fastuda.data.loading.build import build_loader
from fastuda.models.normalization import IMAGENET
from tests.data.data_files import RNG, folder, only, opened, picture, save


def indexed(path, train, order, classes, void=None):
    """A label as an image editor saves it: its colours in a palette, cut to those in use, in any order."""
    colors = [classes.palette[c] for c in order] + ([void] if void else [])
    index = np.full(256, len(order), np.uint8)
    index[list(order)] = np.arange(len(order))
    image = Image.fromarray(index[train])
    image.putpalette([value for color in colors for value in color])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    assert Image.open(path).mode == "P"


COLOURS = "names: [road, car, tree]\npalette: [[128, 64, 128], [0, 0, 142], [107, 142, 35]]\n"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_a_palette_of_the_classes_colours_is_read_by_colour(tmp_path, order):
    root = folder(tmp_path, classes=COLOURS)
    classes = opened(f"folder:{root}").classes
    train = np.array([[0, 1, 2, IGNORE], [2, 2, 1, 0]], np.uint8)
    indexed(root / "labels" / "a.png", train, order, classes, void=(0, 0, 0))
    assert np.array_equal(opened(f"folder:{root}").read_label(0), train)


def test_the_reading_is_that_of_all_classes_where_few_are_trained(tmp_path):
    """Index 1 is car, the trained class, by its number; its colour is another class's."""
    root = folder(tmp_path, classes=COLOURS)
    domain = opened(f"folder:{root}")
    train = np.array([[0, 2, 2, 0]], np.uint8)
    indexed(root / "labels" / "a.png", train, (0, 2), domain.classes)
    assert only(domain, "car").read_label(0).tolist() == [[255, 255, 255, 255]]


@pytest.mark.parametrize("order", [range(11), (5, 3, 1, 0, 2, 4, 10, 6, 8, 7, 9)])
def test_camvid_in_a_palette(tmp_path, order):
    train = np.array([[*range(11), IGNORE]], np.uint8)
    save(picture(RNG, 1, 12), tmp_path / "images" / "0001TP_1.png")
    indexed(tmp_path / "labels" / "0001TP_1.png", train, tuple(order), CAMVID, void=(0, 0, 0))
    assert np.array_equal(opened(f"camvid:{tmp_path}").read_label(0), train)


def test_cityscapes_colours_in_a_palette(tmp_path):
    train = np.array([[*range(19), IGNORE]], np.uint8)
    save(picture(RNG, 1, 20), tmp_path / "images" / "a.png")
    indexed(tmp_path / "labels" / "a.png", train, tuple(reversed(range(19))), CITYSCAPES, void=(0, 0, 0))
    assert np.array_equal(opened(f"gta5:{tmp_path}").read_label(0), train)


def by_number(root, raw, palette, classes=COLOURS):
    folder(root, classes=classes)
    save(np.array([raw], np.uint8), root / "labels" / "a.png", list(np.ravel(palette)))
    return opened(f"folder:{root}").read_label(0)[0].tolist()


VOC = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]]


@pytest.mark.parametrize(
    "palette",
    [
        [[i, i, i] for i in range(256)],  # grey
        [[0, 0, 0]] * 256,
        VOC,
        [[128, 64, 128], [0, 0, 142], [107, 142, 35]],  # the classes' own
        [[7, 7, 7], [0, 0, 142], [9, 9, 9]],  # mostly unknown
    ],
)
@pytest.mark.parametrize("raw", [[0, 1, 2], [0, 0, 0], [2, 1, 1]])
def test_a_palette_that_says_nothing_is_read_by_number(tmp_path, palette, raw):
    assert by_number(tmp_path, raw, palette) == raw


def test_gta5_with_its_plates_is_read_by_number(gta5):
    """Licence plates, 34, have the colour of cars."""
    palette = np.zeros((256, 3), np.uint8)
    for row in CITYSCAPES_ROWS:
        palette[row.id] = row.color
    save(np.array([[7, 26, 34, 0, 34]], np.uint8), gta5 / "labels" / "00000.png", palette.ravel().tolist())
    assert opened(f"gta5:{gta5}").read_label(0).tolist() == [[0, 13, 255, 255, 255]]
    save(np.array([[34]], np.uint8), gta5 / "labels" / "00001.png", palette.ravel().tolist())
    assert opened(f"gta5:{gta5}").read_label(1).tolist() == [[255]]


@pytest.mark.parametrize(
    ("raw", "palette", "message"),
    [
        (
            [0, 1, 2],
            [[0, 0, 142], [128, 64, 128], [1, 2, 3]],
            "index 0 is road by its number and car by its colour #00008e; save it as RGB to read colours,"
            " or leave palette out of classes.yaml to read numbers",
        ),
        ([0, 0], [[0, 0, 0]], "index 0 is road by its number and ignored by its colour #000000"),
    ],
)
def test_an_unclear_palette_is_refused_with_both_readings(tmp_path, raw, palette, message):
    with pytest.raises(BadFile, match=message) as error:
        by_number(tmp_path, raw, palette)
    assert error.value.fatal


def test_the_loader_reads_palettes_by_colour_too(tmp_path):
    root = folder(tmp_path, classes=COLOURS)
    indexed(
        root / "labels" / "a.png", np.full((8, 10), 2, np.uint8), (2, 0, 1), opened(f"folder:{root}").classes
    )
    domain = opened(f"folder:{root}")
    batches = build_loader(
        domain, domain, DataConfig(crop=(8, 10), batch_size=1, workers=0), IMAGENET, seed=0
    )
    assert next(batches).source_label.unique().tolist() == [2]
