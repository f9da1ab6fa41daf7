"""Data sets as they lie on disk."""

import json

import numpy as np
import pytest
from PIL import Image

from fastuda.data.domains.label_tables import CAMVID
from fastuda.data.domains.open import open_domain
from fastuda.data.domains.run import share_classes
from fastuda.data.labels import CITYSCAPES
from fastuda.errors import UserError
from tests.data.data_files import ids, picture, save


def source(root, name="gta5", **kwargs):
    return open_domain(f"{name}:{root}", role="source", data_root="none", **kwargs)


def test_gta5_palette_labels(gta5):
    domain = source(gta5)
    assert len(domain) == 5 and domain.classes == CITYSCAPES
    raw = np.asarray(Image.open(gta5 / "labels" / "00003.png"))
    label = domain.read_label(3)
    assert label.dtype == np.uint8 and set(np.unique(label)) <= set(range(19))
    assert (label[raw == 7] == 0).all() and (label[raw == 33] == 18).all()
    image = domain.read_image(3)
    assert image.shape == (20, 36, 3) and image.dtype == np.uint8


def test_gta5_colour_labels(gta5):
    domain = source(gta5)
    expected = domain.read_label(2)
    save(CITYSCAPES.colorize(expected), gta5 / "labels" / "00002.png")
    assert (source(gta5).read_label(2) == expected).all()


def test_gta5_label_of_another_size_is_fitted(gta5):
    save(ids(np.random.default_rng(0), 19, 36), gta5 / "labels" / "00001.png")
    image, label = source(gta5).read_pair(1)
    assert label.shape == image.shape[:2]


def test_gta5_split_list(gta5):
    (gta5 / "train.txt").write_text("00003.png\n# comment\n00001 extra words\n")
    domain = open_domain(f"gta5:{gta5}:train", role="source", data_root="none")
    assert [item.image.stem for item in domain.items] == ["00003", "00001"]


def test_cityscapes_splits(cityscapes):
    assert len(source(cityscapes, "cityscapes")) == 4
    assert len(open_domain(f"cityscapes:{cityscapes}", role="evaluation", data_root=".")) == 2
    assert len(open_domain(f"cityscapes:{cityscapes}", role="target", split="auto", data_root=".")) == 2
    assert len(open_domain(f"cityscapes:{cityscapes}:val", role="target", data_root=".")) == 2


def test_cityscapes_train_ids(cityscapes):
    expected = source(cityscapes, "cityscapes").read_label(0)
    for path in sorted((cityscapes / "gtFine").rglob("*_labelIds.png")):
        path.unlink()
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    assert all(item.label is None for item in target.items)
    for item in target.items:
        name = item.image.name.replace("leftImg8bit", "gtFine_labelTrainIds")
        save(expected, cityscapes / "gtFine" / "train" / "town" / name)
    assert (source(cityscapes, "cityscapes").read_label(0) == expected).all()


def test_cityscapes_under_the_data_root(cityscapes):
    assert len(open_domain("cityscapes", role="source", data_root=cityscapes.parent)) == 4


def test_camvid_splits(tmp_path):
    rng = np.random.default_rng(0)
    names = ["0001TP_1", "0006R0_1", "0016E5_1", "Seq05VD_1"]
    for name in names:
        save(picture(rng), tmp_path / "images" / f"{name}.png")
        save(rng.integers(0, 12, (20, 36), dtype=np.uint8), tmp_path / "labels" / f"{name}.png")
    splits = {"official": {"train": names[:2], "test": names[2:]}, "pair": {"night_train": names[:1]}}
    (tmp_path / "splits.json").write_text(json.dumps(splits))

    def stems(role, split=""):
        domain = open_domain(f"camvid:{tmp_path}{split}", role=role, data_root=".")
        return [item.image.stem for item in domain.items]

    assert stems("source") == names[:1]
    assert stems("target") == names[1:3]
    assert stems("evaluation") == names[3:]
    assert stems("source", ":train") == stems("source", ":official.train") == names[:2]
    assert stems("source", ":pair.night_train") == names[:1]
    assert stems("source", ":all") == sorted(names)
    with pytest.raises(UserError, match="no split 'dsk'; did you mean dusk"):
        stems("source", ":dsk")
    with pytest.raises(UserError, match=r"which split evaluates camvid:dusk.*data\.eval_split"):
        stems("evaluation", ":dusk")


def test_camvid_as_segnet_has_it(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        save(picture(rng), tmp_path / split / "0001TP_1.png")
        save(rng.integers(0, 12, (20, 36), dtype=np.uint8), tmp_path / f"{split}annot" / "0001TP_1.png")
    domain = open_domain(f"camvid:{tmp_path}:train", role="source", data_root=".")
    assert len(domain) == 1 and domain.items[0].label.parent.name == "trainannot"
    assert len(open_domain(f"camvid:{tmp_path}:dusk", role="source", data_root=".")) == 2


def test_camvid_as_published(tmp_path):
    rng = np.random.default_rng(0)
    save(picture(rng), tmp_path / "701_StillsRaw_full" / "0001TP_1.png")
    label = rng.integers(0, 11, (20, 36))
    save(CAMVID.colorize(label), tmp_path / "LabeledApproved_full" / "0001TP_1_L.png")
    assert (source(tmp_path, "camvid").read_label(0) == label).all()


@pytest.mark.parametrize(
    ("split", "count"),
    [
        ("uda_dusk2day.source_train_dusk", 124),
        ("seq.Seq05VD", 171),
        ("official.test", 233),
        ("dusk", 124),
        ("day", 406),
    ],
)
def test_camvid_itself(real_data, split, count):
    domain = open_domain(f"camvid:{real_data / 'camvid'}:{split}", role="source", data_root=".")
    assert len(domain) == count
    image, label = domain.read_pair(0)
    assert image.shape == (270, 360, 3) and set(np.unique(label)) <= {*range(11), 255}


def test_camvid_splits_that_are_not_there(real_data):
    root = real_data / "camvid"
    with pytest.raises(UserError, match=r"has no split 'uda_dusk2day.target'; did you mean"):
        source(f"{root}:uda_dusk2day.target", "camvid")
    with pytest.raises(UserError, match="is a group"):
        source(f"{root}:uda_dusk2day", "camvid")


def test_synthia_sixteen_bit_labels(real_data, tmp_path):
    (tmp_path / "RGB").mkdir()
    (tmp_path / "GT" / "LABELS").mkdir(parents=True)
    samples = real_data / "samples" / "synthia"
    (tmp_path / "RGB" / "0.png").write_bytes((samples / "000000_rgb.png").read_bytes())
    (tmp_path / "GT" / "LABELS" / "0.png").write_bytes((samples / "000000_label.png").read_bytes())
    domain = source(tmp_path, "synthia")
    label = domain.read_label(0)
    colours = np.asarray(Image.open(samples / "000000_color.png").convert("RGB"))
    for name, colour in (("road", (128, 64, 128)), ("sky", (128, 128, 128)), ("building", (128, 0, 0))):
        shown = (colours == colour).all(-1)
        assert shown.any() and ((label == domain.classes.names.index(name)) == shown).all()


def test_cityscapes_sample(real_data, tmp_path):
    samples = real_data / "samples" / "cityscapes"
    stem = "frankfurt_000000_000294"
    folders = {"leftImg8bit": "leftImg8bit", "gtFine_labelIds": "gtFine"}
    for suffix, folder in folders.items():
        target = tmp_path / folder / "train" / "frankfurt" / f"{stem}_{suffix}.png"
        target.parent.mkdir(parents=True)
        target.write_bytes((samples / f"{stem}_{suffix}.png").read_bytes())
    expected = np.asarray(Image.open(samples / f"{stem}_gtFine_labelTrainIds.png"))
    # the sample's two label files were scaled down one by one and differ at a few borders
    assert (source(tmp_path, "cityscapes").read_label(0) == expected).mean() > 0.99


def folder(root, **said):
    rng = np.random.default_rng(0)
    for i in range(3):
        save(picture(rng), root / "images" / "a" / f"{i}.jpg")
        save(rng.choice(np.array([10, 20, 0], np.uint8), (20, 36)), root / "labels" / "a" / f"{i}.png")
    (root / "classes.yaml").write_text(
        json.dumps({"names": ["lane", "tree"], "ids": [10, 20], "ignore": 0} | said)
    )
    return root


def test_folder(tmp_path):
    domain = source(folder(tmp_path), "folder")
    assert len(domain) == 3 and domain.classes.names == ("lane", "tree")
    assert set(np.unique(domain.read_label(0))) == {0, 1, 255}


def test_folder_by_two_globs(tmp_path):
    folder(tmp_path, images="photos/*_rgb.png", labels="truth/*_seg.png")
    save(picture(np.random.default_rng(0)), tmp_path / "photos" / "x_rgb.png")
    save(np.full((20, 36), 20, np.uint8), tmp_path / "truth" / "x_seg.png")
    domain = source(tmp_path, "folder")
    assert [item.image.name for item in domain.items] == ["x_rgb.png"] and (domain.read_label(0) == 1).all()


def test_folder_without_labels_is_a_target(tmp_path):
    folder(tmp_path)
    for path in (tmp_path / "labels" / "a").iterdir():
        path.unlink()
    assert len(open_domain(f"folder:{tmp_path}", role="target", data_root=".")) == 3
    with pytest.raises(UserError, match="3 of 3 images"):
        source(tmp_path, "folder")


def test_folder_takes_names_of_other_domains(tmp_path, cityscapes):
    mine = source(folder(tmp_path / "mine", same_as={"lane": "road"}), "folder")
    theirs = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    ours, city = share_classes(mine, theirs)
    assert ours.classes.names == city.classes.names == ("road", "vegetation")
    assert set(np.unique(ours.read_label(0))) == {0, 1, 255}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"nmes": 1}, "unknown key 'nmes'; did you mean names"),
        ({"ids": [1]}, "2 names, 1 ids"),
        ({"ids": [1, 1]}, "a value twice"),
        ({"ids": ["x", 2]}, "integers"),
        ({"palette": [[1, 2]]}, "palette"),
        ({"names": []}, "needs `names`"),
        ({"labels": "../{path}.png"}, "inside the folder"),
        ({"labels": "labels/*_x.png"}, "same stars"),
        ({"same_as": {"car": "auto"}}, "same_as"),
        ({"same_as": {"lane": ["road"]}}, r"same_as has \['road'\], which is not a name"),
        ({"names": ["lane", False]}, "names has False, which is not a name; put it in quotes"),
        ({"names": [str(i) for i in range(300)]}, "has 300 names; there can be 254"),
        ({"palette": 3}, "palette must be a list"),
        ({"palette": [[1, 2, 3]] * 2}, "palette has a colour twice"),
        ({"images": None}, "images must be a pattern .*, not None"),
        ({"labels": "labels/{path.png"}, "labels must be a pattern"),
        ({"labels": "labels/{path!r}.png"}, "labels must be a pattern"),
        ({"images": "{0}.jpg", "labels": "{0}.png"}, "images must be a pattern"),
    ],
)
def test_folder_description_with_a_mistake(tmp_path, said, message):
    with pytest.raises(UserError, match=message):
        source(folder(tmp_path, **said), "folder")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"names: [\xff\xfe]", r"classes\.yaml cannot be read"),
        (b"names: [2020-13-45]", r"classes\.yaml is not valid YAML: month"),
        (b"names: [a", r"classes\.yaml is not valid YAML"),
        (b"names: &n [a, b]\nids: *n", "aliases"),
    ],
)
def test_folder_description_that_cannot_be_read(tmp_path, said, message):
    (folder(tmp_path) / "classes.yaml").write_bytes(said)
    with pytest.raises(UserError, match=message):
        source(tmp_path, "folder")


def test_folder_names_that_are_the_same_elsewhere_are_one_class(tmp_path):
    same = {"lane": "road", "kerb": "road"}
    said = {"names": ["lane", "tree", "kerb"], "ids": [10, 20, 30], "same_as": same}
    domain = source(folder(tmp_path, **said), "folder")
    assert domain.classes.names == ("road", "tree")
    assert domain.label_map.decode(np.array([[10, 20, 30, 0]])).tolist() == [[0, 1, 0, 255]]


def test_folder_without_description(tmp_path):
    with pytest.raises(UserError, match=r"no classes\.yaml"):
        source(tmp_path, "folder")


def test_share_classes_renumbers_every_split(gta5, cityscapes):
    with_all = source(gta5)
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    held_out = open_domain(f"cityscapes:{cityscapes}", role="evaluation", data_root=".")
    three = share_classes(with_all, target, held_out, classes=("car", "sky"))
    assert all(domain.classes.names == ("sky", "car") for domain in three)
    full, small = with_all.read_label(0), three[0].read_label(0)
    assert (small[full == 13] == 1).all() and (small[full == 10] == 0).all()
    assert (small[(full != 13) & (full != 10)] == 255).all()


def test_folder_with_splits_and_ids_in_another_order(tmp_path):
    for split, values in (("train", [1, 5, 9]), ("val", [5, 5, 5])):
        save(picture(np.random.default_rng(0), 1, 3), tmp_path / "images" / split / "sub" / "a.jpg")
        save(np.array([values], np.uint8), tmp_path / "labels" / split / "sub" / "a.png")
    (tmp_path / "classes.yaml").write_text("names: [road, car]\nids: [5, 1]\nignore: [9]\n")
    domain = source(tmp_path, "folder")
    assert domain.classes.names == ("road", "car") and domain.read_label(0)[0].tolist() == [1, 0, 255]
    held_out = open_domain(f"folder:{tmp_path}", role="evaluation", data_root=".")
    assert held_out.read_label(0)[0].tolist() == [0, 0, 0]


def test_shared_classes_are_found_by_name(tmp_path):
    for name, names in (("one", "[road, tree, car]"), ("two", "[car, sky, road]")):
        save(picture(np.random.default_rng(0), 1, 4), tmp_path / name / "images" / "a.png")
        save(np.array([[0, 1, 2, 255]], np.uint8), tmp_path / name / "labels" / "a.png")
        (tmp_path / name / "classes.yaml").write_text(f"names: {names}\n")
    one, two = share_classes(source(tmp_path / "one", "folder"), source(tmp_path / "two", "folder"))
    assert one.classes.names == two.classes.names == ("car", "road")
    assert one.read_label(0)[0].tolist() == [1, 255, 0, 255]
    assert two.read_label(0)[0].tolist() == [0, 255, 1, 255]
