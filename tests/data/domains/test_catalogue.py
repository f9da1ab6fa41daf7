"""Every data set of the table, in its own layout and with its own label values."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from fastuda.data.domains.catalogue import DOMAINS
from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.open import open_domain
from fastuda.data.labels import CITYSCAPES, UNKNOWN
from tests.data.data_files import only, picture, save

RNG = np.random.default_rng(0)


def names_of(domain, index=0):
    return {domain.classes.names[i] for i in np.unique(domain.read_label(index)) if i != 255}


def put(root, *paths, label=None):
    for path in paths:
        save(picture(RNG), root / path)
    if label is not None:
        path, values = label
        save(np.resize(np.array(values, np.uint8), (20, 36)), root / path)


def opened(name, root, role="evaluation", split=""):
    return open_domain(f"{name}:{root}{split}", role=role, data_root=".")


@pytest.mark.parametrize("entry", DOMAINS.values(), ids=lambda entry: entry.name)
def test_no_map_leads_outside_its_classes(entry):
    for layout in entry.layouts:
        for rule in layout.labels:
            label_map = rule.label_map
            found = {*label_map.ids.values(), *label_map.colors.values(), *label_map.names.values()} - {255}
            assert found <= set(range(len(entry.classes))) and UNKNOWN not in found
            assert found, rule.template


def test_cross_city(tmp_path):
    put(tmp_path, "Rio/Images/Train/a.png", "Tokyo/Images/Train/b.png")
    put(tmp_path, "Rio/Images/Test/c.png", label=("Rio/Labels/Test/c_eval.png", (7, 26, 22, 27)))
    assert len(opened("cross_city", tmp_path, "target")) == 2
    assert len(opened("cross_city", tmp_path, "target", ":Tokyo")) == 1
    test = opened("cross_city", tmp_path, "evaluation", ":Rio")
    assert test.split == "Rio-test" and names_of(test) == {"road", "car"} and len(test.classes) == 13
    city = opened("cross_city", tmp_path / "Rio")
    assert names_of(city) == {"road", "car"}


def test_dark_zurich(tmp_path, real_data):
    sample = real_data / "samples" / "dark_zurich"
    put(tmp_path, "rgb_anon/train/night/GOPR1/GOPR1_frame_1_rgb_anon.png")
    put(tmp_path, "rgb_anon/train/day/GOPR2/GOPR2_frame_1_rgb_anon.png")
    for folder, end, name in (("rgb_anon", "rgb_anon", "_rgb"), ("gt", "gt_labelTrainIds", "")):
        path = tmp_path / folder / "val" / "night" / "GOPR0374" / f"GOPR0374_frame_000801_{end}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes((sample / f"GOPR0374_frame_000801{name}.png").read_bytes())
    night, day = (
        opened("dark_zurich", tmp_path, "target"),
        opened("dark_zurich", tmp_path, "target", ":train-day"),
    )
    assert "night" in str(night.items[0].image) and "day" in str(day.items[0].image)
    held_out = opened("dark_zurich", tmp_path)
    image, _ = held_out.read_pair(0)
    assert image.shape == (1080, 1920, 3) and {"road", "sky", "car"} <= names_of(held_out)


def test_nighttime_driving(tmp_path):
    put(
        tmp_path,
        "leftImg8bit/test/night/0_leftImg8bit.png",
        label=("gtCoarse_daytime_trainvaltest/test/night/0_gtCoarse_labelTrainIds.png", (0, 18, 255)),
    )
    assert names_of(opened("nighttime_driving", tmp_path)) == {"road", "bicycle"}


def test_bdd100k(tmp_path, real_data):
    sample = (
        real_data / "samples" / "bdd100k" / "toolkit" / "tests_label_testcases_to_rle_sem_seg_masks_0.png"
    )
    for name in ("x", "y"):
        save(picture(RNG, 720, 1280), tmp_path / "images" / "10k" / "val" / f"{name}.jpg")
    label = tmp_path / "labels" / "sem_seg" / "masks" / "val" / "x.png"
    label.parent.mkdir(parents=True)
    label.write_bytes(sample.read_bytes())
    held_out = opened("bdd100k", tmp_path)
    assert len(held_out) == 1  # y has none, as some images of the published 10k set
    expected = np.asarray(Image.open(sample))
    assert expected.max() > 0 and (held_out.read_label(0) == expected).all()
    (tmp_path / "night.txt").write_text("x\n")
    assert len(opened("bdd100k", tmp_path, "evaluation", ":night")) == 1


def test_bdd100k_of_old(tmp_path):
    put(tmp_path, "seg/images/val/x.jpg", label=("seg/labels/val/x_train_id.png", (0, 13)))
    assert names_of(opened("bdd100k", tmp_path)) == {"road", "car"}


def test_acdc(tmp_path):
    for weather in ("fog", "night"):
        put(tmp_path, f"rgb_anon/{weather}/train/GP1/GP1_1_rgb_anon.png")
        put(
            tmp_path,
            f"rgb_anon/{weather}/val/GP1/GP1_2_rgb_anon.png",
            label=(f"gt/{weather}/val/GP1/GP1_2_gt_labelTrainIds.png", (8, 10)),
        )
    assert len(opened("acdc", tmp_path, "target")) == 2 and len(opened("acdc", tmp_path)) == 2
    night = opened("acdc", tmp_path, "evaluation", ":night-train")
    assert night.split == "night-val" and len(night) == 1
    assert names_of(night) == {"vegetation", "sky"}


def test_mapillary_two(tmp_path, real_data):
    sample = real_data / "samples" / "mapillary"
    for folder, name in (
        ("images", "__CRyFzoDOXn6unQ6a3DnQ.jpg"),
        ("v2.0/labels", "__CRyFzoDOXn6unQ6a3DnQ.png"),
    ):
        (tmp_path / "validation" / folder).mkdir(parents=True)
        (tmp_path / "validation" / folder / name).write_bytes((sample / name).read_bytes())
    held_out = opened("mapillary", tmp_path)
    # building, street light (no class) and pole: the colours of the file's own palette
    assert names_of(held_out) == {"building", "pole"}


def test_mapillary_one(tmp_path):
    put(tmp_path, "training/images/a.jpg", label=("training/labels/a.png", (13, 24, 27, 65)))
    assert names_of(opened("mapillary", tmp_path, "source")) == {"road", "sky"}


POLYGONS = {
    "imgHeight": 20,
    "imgWidth": 36,
    "objects": [
        {"label": "road", "polygon": [[0, 0], [36, 0], [36, 20], [0, 20]]},
        {"label": "cargroup", "polygon": [[4, 4], [10, 4], [10, 10], [4, 10]]},
        {"label": "sky", "polygon": [[0, 0], [36, 0], [36, 2]], "deleted": 1},
        {"label": "truck", "polygon": [[5, 5]]},
    ],
}


def idd(root, said):
    put(root, "leftImg8bit/val/7/000_leftImg8bit.png")
    path = root / "gtFine" / "val" / "7" / "000_gtFine_polygons.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(said))
    return opened("idd", root)


def test_idd_polygons(tmp_path):
    held_out = idd(tmp_path, POLYGONS)
    label = held_out.read_label(0)
    car = CITYSCAPES.names.index("car")
    assert (label[4:11, 4:11] == car).all() and (label == car).sum() == 49 and label[0, 0] == 0
    assert names_of(only(held_out, "car")) == {"car"}


def test_idd_polygon_without_a_class(tmp_path):
    said = POLYGONS | {"objects": [{"label": "spaceship", "polygon": [[0, 0], [1, 1], [2, 0]]}]}
    with pytest.raises(BadFile, match=r"000_gtFine_polygons\.json holds a polygon of 'spaceship'"):
        idd(tmp_path, said).read_label(0)


@pytest.mark.parametrize(
    "text",
    [
        '{"imgHeight": 3',
        json.dumps(POLYGONS | {"objects": ["car"]}),
        json.dumps(POLYGONS | {"imgWidth": math.inf}),
        json.dumps(POLYGONS | {"imgWidth": 10**7, "imgHeight": 10**7}),
        "[" * 100_000,
    ],
    ids=["cut off", "words", "endless", "huge", "deep"],
)
def test_idd_broken_polygons(tmp_path, text):
    held_out = idd(tmp_path, POLYGONS)
    held_out.items[0].label.write_text(text)
    with pytest.raises(BadFile, match="cannot be read as polygons"):
        held_out.read_label(0)


def test_idd_label_images(tmp_path):
    put(
        tmp_path,
        "leftImg8bit/val/7/000_leftImg8bit.jpg",
        label=("gtFine/val/7/000_gtFine_labelids.png", (0, 5, 12, 11)),
    )
    assert names_of(opened("idd", tmp_path)) == {"road", "terrain", "car"}


def test_carla_sample(tmp_path, real_data):
    for path in (real_data / "samples" / "carla").glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    domain = opened("carla", tmp_path, "source")
    assert len(domain) == 2
    image, label = domain.read_pair(0)
    assert image.shape == (540, 960, 3) and label.shape == (540, 960)
    assert {"road", "sidewalk", "car", "building", "pole"} <= names_of(domain)
    raw = np.asarray(Image.open(domain.items[0].label))[..., :3]
    assert (label[(raw == (157, 234, 50)).all(-1)] == 0).all()


@pytest.mark.parametrize(
    ("image", "label", "road"),
    [("rgb", "raw", (1, 24)), ("CameraRGB", "CameraSeg", (6, 7))],
    ids=("new", "old"),
)
def test_carla_raw_tags(tmp_path, image, label, road):
    save(picture(RNG), tmp_path / image / "1.png")
    tags = np.zeros((20, 36, 3), np.uint8)
    tags[:10, :, 0], tags[10:, :, 0] = road
    save(tags, tmp_path / label / "1.png")
    assert names_of(opened("carla", tmp_path, "source")) == {"road"}
    assert 255 not in np.unique(opened("carla", tmp_path, "source").read_label(0))
