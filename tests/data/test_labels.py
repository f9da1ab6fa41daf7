"""Class sets, label maps, and class matching."""

import numpy as np
import pytest

from fastuda.data.domains.classes import class_mapping, positions
from fastuda.data.domains.label_tables import CAMVID, CAMVID_LABELS, SYNTHIA, SYNTHIA_LABELS
from fastuda.data.labels import (
    CITYSCAPES,
    CITYSCAPES_IDS,
    CITYSCAPES_LABELS,
    CITYSCAPES_ROWS,
    IGNORE,
    UNKNOWN,
    ClassSet,
    LabelMap,
)
from fastuda.errors import UserError


def test_the_nineteen_classes():
    assert len(CITYSCAPES) == 19 and CITYSCAPES.names[0] == "road" and CITYSCAPES.names[18] == "bicycle"
    assert CITYSCAPES_IDS == (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    assert len(set(CITYSCAPES.palette)) == 19


@pytest.mark.parametrize("row", CITYSCAPES_ROWS, ids=lambda row: row.name)
def test_ids_and_colours_agree(row):
    raw = np.array([[row.id]], np.uint8)
    assert CITYSCAPES_LABELS.decode(raw)[0, 0] == row.train_id
    if row.train_id != IGNORE:
        colour = np.array([[row.color]], np.uint8)
        assert CITYSCAPES_LABELS.decode(colour)[0, 0] == row.train_id


def test_sixteen_bit_ids_do_not_wrap():
    raw = np.array([[7, 263, 65535]], np.uint16)
    assert CITYSCAPES_LABELS.decode(raw).tolist() == [[0, UNKNOWN, UNKNOWN]]


def test_unknown_values_are_listed_by_frequency():
    raw = np.array([[7, 77, 77], [90, 7, 7]], np.uint8)
    assert CITYSCAPES_LABELS.unknown(raw) == [77, 90]
    colours = np.array([[[1, 2, 3], [128, 64, 128]]], np.uint8)
    assert CITYSCAPES_LABELS.unknown(colours) == ["#010203"]


def test_camvid_merges_the_original_colours():
    raw = np.array([[[64, 128, 192], [192, 0, 64], [0, 0, 0]]], np.uint8)  # SUV, lane marking, void
    assert CAMVID_LABELS.decode(raw).tolist() == [[8, 3, IGNORE]]
    assert CAMVID_LABELS.decode(np.array([[10, 11]], np.uint8)).tolist() == [[10, IGNORE]]


def test_synthia_has_the_sixteen_classes_of_its_benchmark():
    assert set(CITYSCAPES.names) - set(SYNTHIA.names) == {"terrain", "truck", "train"}
    raw = np.zeros((1, 23, 3), np.uint16)
    raw[0, :, 0] = np.arange(23)
    train = SYNTHIA_LABELS.decode(raw)[0]
    assert sorted(train[train != IGNORE].tolist()) == list(range(16))
    assert SYNTHIA.names[train[3]] == "road" and SYNTHIA.names[train[17]] == "rider"


def test_remap_composes():
    table = {5: 0, 0: 1}
    raw = np.array([[7, 17, 11, 99]], np.uint8)
    assert CITYSCAPES_LABELS.remap(table).decode(raw).tolist() == [[1, 0, IGNORE, UNKNOWN]]


def test_class_set_refuses_nonsense():
    with pytest.raises(ValueError, match="names but"):
        ClassSet(("a",), ())
    with pytest.raises(ValueError, match="1 to 254"):
        ClassSet((), ())


def test_colorize_paints_ignored_black():
    assert CITYSCAPES.colorize(np.array([[0, 255]], np.uint8)).tolist() == [[[128, 64, 128], [0, 0, 0]]]


def test_mapping_of_equal_sets_is_the_identity():
    mapping = class_mapping(CITYSCAPES, CITYSCAPES)
    assert mapping.shared == CITYSCAPES
    assert mapping.source == mapping.target == {i: i for i in range(19)}


def test_mapping_finds_synonyms_and_says_what_is_left_out():
    mapping = class_mapping(CITYSCAPES, CAMVID)
    assert ("sidewalk", "pavement") in mapping.renamed and ("person", "pedestrian") in mapping.renamed
    assert mapping.target_only == ("bicyclist",)
    assert "truck" in mapping.source_only
    assert mapping.shared.names == tuple(n for n in CAMVID.names if n != "bicyclist")
    text = mapping.describe()
    assert "sidewalk = pavement" in text and "only in the target: bicyclist" in text


@pytest.mark.parametrize("names", [("道路", "建筑", "सड़क"), ("bär", "br"), ("-", "+")])
def test_names_in_other_scripts_stay_apart(names):
    mine = ClassSet(names, tuple((i, 0, 0) for i in range(len(names))))
    assert class_mapping(mine, mine).source == {i: i for i in range(len(names))}


def test_mapping_merges_classes_by_alias():
    mapping = class_mapping(CAMVID, CITYSCAPES, aliases=("rider=bicyclist", "bicycle=bicyclist"))
    both = {mapping.target[CITYSCAPES.names.index(n)] for n in ("rider", "bicycle")}
    assert both == {mapping.source[CAMVID.names.index("bicyclist")]}


def test_classes_are_found_by_their_own_name_before_a_synonym():
    ade = ["Light", "traffic_light", "tree", "sky, cloud", "tree"]
    assert positions(["traffic light", "vegetation", "sky", "TREE"], ade) == [1, 2, None, 2]
    assert positions(["traffic light"], ade[:1]) == [0]


def test_mapping_keeps_the_classes_named():
    mapping = class_mapping(CITYSCAPES, SYNTHIA, classes=("car", "road"))
    assert mapping.shared.names == ("road", "car")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"classes": ("raod",)}, "no class 'raod'; did you mean road"),
        ({"aliases": ("rider",)}, "not of the form"),
        ({"aliases": ("ridr=person",)}, "no class 'ridr'"),
    ],
)
def test_mapping_names_a_wrong_class(kwargs, message):
    with pytest.raises(UserError, match=message):
        class_mapping(CITYSCAPES, CITYSCAPES, **kwargs)


def test_no_class_in_common():
    other = ClassSet(("cell",), ((0, 0, 0),))
    with pytest.raises(UserError, match=r"no class in common.*cell"):
        class_mapping(other, CITYSCAPES)


def test_label_map_of_a_single_id():
    assert LabelMap({3: 0}).decode(np.array([[3, 4]], np.uint8)).tolist() == [[0, UNKNOWN]]


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_ids_outside_of_the_table_are_no_class(kind):
    raw = np.array([[0, 65535], [-1, 65536], [-1, 1 << 30]], kind)
    known = LabelMap({0: 3, 65535: 4})
    assert known.decode(raw).tolist() == [[3, 4], [UNKNOWN, UNKNOWN], [UNKNOWN, UNKNOWN]]
    assert known.unknown(raw) == [-1, 65536, 1 << 30]
