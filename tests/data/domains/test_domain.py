"""Readers of the data sets' own layouts, and what they say of bad files."""

import numpy as np
import pytest
from PIL import Image

from fastuda.data.domains.open import open_domain, share_classes
from fastuda.data.labels import CITYSCAPES, CITYSCAPES_IDS
from fastuda.errors import UserError


def write(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array.astype(np.uint8))
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)


def rgb(h=8, w=10):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3))


def ids(h=8, w=10, values=(7, 26, 0)):
    return np.resize(np.array(values), (h, w))


def gta5(root, n=2):
    for i in range(n):
        write(root / "images" / f"{i:05d}.png", rgb())
        write(root / "labels" / f"{i:05d}.png", ids(), [0] * 768)
    return root


def source(root, spec="gta5"):
    return open_domain(f"{spec}:{root}", role="source", data_root="nowhere")


def test_gta5_palette_and_colour_labels(tmp_path):
    domain = source(gta5(tmp_path))
    assert len(domain) == 2 and domain.classes is CITYSCAPES
    assert set(np.unique(domain.read_label(0))) == {0, 13, 255}
    colored = CITYSCAPES.colorize(domain.read_label(0))
    write(tmp_path / "labels" / "00000.png", colored)
    assert np.array_equal(domain.read_label(0), domain.read_label(1))


def test_every_cityscapes_id_has_its_train_id(tmp_path):
    write(tmp_path / "images" / "a.png", rgb(1, 19))
    write(tmp_path / "labels" / "a.png", np.array([CITYSCAPES_IDS]))
    assert source(tmp_path).read_label(0)[0].tolist() == list(range(19))


def test_cityscapes_layout(tmp_path):
    for split in ("train", "val"):
        stem = tmp_path / "leftImg8bit" / split / "bonn" / "bonn_000000_000019"
        write(stem.with_name(stem.name + "_leftImg8bit.png"), rgb())
        label = tmp_path / "gtFine" / split / "bonn" / "bonn_000000_000019_gtFine_labelIds.png"
        write(label, ids())
    target = open_domain(f"cityscapes:{tmp_path}", role="target", data_root="nowhere")
    val = open_domain(f"cityscapes:{tmp_path}", role="target", data_root="nowhere", split="val")
    assert target.split == "train" and val.split == "val" and len(val) == 1
    label.rename(label.with_name("bonn_000000_000019_gtFine_labelTrainIds.png"))
    write(label.with_name("bonn_000000_000019_gtFine_labelTrainIds.png"), ids(values=(0, 18, 255)))
    val = open_domain(f"cityscapes:{tmp_path}", role="target", data_root="nowhere", split="val")
    assert set(np.unique(val.read_label(0))) == {0, 18, 255}


def test_own_folder(tmp_path):
    write(tmp_path / "images" / "train" / "sub" / "a.jpg", rgb())
    write(tmp_path / "labels" / "train" / "sub" / "a.png", ids(values=(1, 5, 9)))
    (tmp_path / "classes.yaml").write_text("names: [road, car]\nids: [5, 1]\nignore: [9]\n")
    domain = source(tmp_path, "folder")
    assert domain.classes.names == ("road", "car")
    assert domain.read_label(0)[0, :3].tolist() == [1, 0, 255]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b]\nids: [1]\n", "2 names, 1 ids"),
        ("classes: [a]\n", "needs `names`"),
        ("names: [a\n", "is not valid YAML"),
        ("names: &n [a, b]\nids: *n\n", "aliases"),
        (None, "no classes.yaml"),
    ],
)
def test_bad_classes_yaml(tmp_path, text, message):
    write(tmp_path / "images" / "a.png", rgb())
    if text is not None:
        (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        source(tmp_path, "folder")


def test_unknown_domain_missing_folder_and_no_images(tmp_path):
    with pytest.raises(UserError, match=r"did you mean cityscapes"):
        source(tmp_path, "cityscape")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images for split 'all'"):
        source(tmp_path)


def test_image_without_label(tmp_path):
    (gta5(tmp_path) / "labels" / "00001.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images .* the first is .*00001\.png"):
        source(tmp_path)
    assert len(open_domain(f"gta5:{tmp_path}", role="target", data_root="nowhere")) == 2


def test_label_of_another_size_alien_id_and_truncated_png(tmp_path):
    domain = source(gta5(tmp_path))
    write(tmp_path / "labels" / "00000.png", ids(8, 9))
    with pytest.raises(UserError, match=r"00000\.png is 9x8, its image is 10x8"):
        domain.read_pair(0)
    write(tmp_path / "labels" / "00000.png", ids(values=(7, 99)))
    with pytest.raises(UserError, match=r"00000\.png holds label values \[99\]"):
        domain.read_pair(0)
    path = tmp_path / "images" / "00001.png"
    path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(UserError, match=r"00001\.png cannot be read"):
        domain.read_image(1)


def test_alien_colour(tmp_path):
    write(gta5(tmp_path) / "labels" / "00000.png", np.full((8, 10, 3), 1))
    with pytest.raises(UserError, match="colour #010101"):
        source(tmp_path).read_label(0)


def test_shared_classes_are_found_by_name(tmp_path):
    for name, names in (("one", "[road, tree, car]"), ("two", "[car, sky, road]")):
        root = tmp_path / name
        write(root / "images" / "a.png", rgb(1, 4))
        write(root / "labels" / "a.png", np.array([[0, 1, 2, 255]]))
        (root / "classes.yaml").write_text(f"names: {names}\n")
    one, two = share_classes(source(tmp_path / "one", "folder"), source(tmp_path / "two", "folder"))
    assert one.classes.names == two.classes.names == ("car", "road")
    assert one.read_label(0)[0].tolist() == [1, 255, 0, 255]
    assert two.read_label(0)[0].tolist() == [0, 255, 1, 255]


def test_real_cityscapes_and_synthia_samples(tmp_path, real_data):
    samples = real_data / "samples"
    city = samples / "cityscapes"
    stem = "frankfurt_000000_000294"
    write(
        tmp_path / "images" / "a.png", np.asarray(Image.open(city / f"{stem}_leftImg8bit.png").convert("RGB"))
    )
    write(tmp_path / "labels" / "a.png", np.asarray(Image.open(city / f"{stem}_gtFine_labelIds.png")))
    found = source(tmp_path).read_label(0)
    # the sample's two label files were scaled down one by one and differ at a few borders
    assert (found == np.asarray(Image.open(city / f"{stem}_gtFine_labelTrainIds.png"))).mean() > 0.99

    root = tmp_path / "synthia"
    for folder, name in (("RGB", "000000_rgb.png"), ("GT/LABELS", "000000_label.png")):
        (root / folder).mkdir(parents=True)
        (root / folder / "0.png").write_bytes((samples / "synthia" / name).read_bytes())
    label = source(root, "synthia").read_label(0)
    names = [source(root, "synthia").classes.names[i] for i in np.unique(label[label != 255])]
    assert {"sky", "building", "road", "vegetation", "car"} <= set(names)


def test_real_camvid_splits(real_data):
    root = real_data / "camvid"
    dusk = source(f"{root}:uda_dusk2day.source_train_dusk", "camvid")
    assert len(dusk) == 124
    image, label = dusk.read_pair(0)
    assert image.shape == (270, 360, 3) and set(np.unique(label)) <= {*range(11), 255}
    with pytest.raises(UserError, match=r"has no split 'uda_dusk2day.target'; did you mean"):
        source(f"{root}:uda_dusk2day.target", "camvid")
    with pytest.raises(UserError, match="is a group"):
        source(f"{root}:uda_dusk2day", "camvid")
