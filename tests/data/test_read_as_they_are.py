"""Files are read as what they are, or refused by name: orientations, masks, layouts, paths."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.label_tables import CAMVID
from fastuda.data.domains.open import absolute, parse_spec
from fastuda.data.loading.dali_feed import encoded_image
from fastuda.errors import UserError
from tests.data.data_files import RNG, folder, opened, picture, save
from tests.program import TINY, fastuda


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_are_turned_once_and_their_labels_never(tmp_path, orientation, mode, compression):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown, stored = picture(RNG, 8, 12), RNG.integers(0, 2, (8, 12), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    upright = Image.fromarray(shown).convert(mode)
    upright.save(tmp_path / "images" / "a.tif", exif=exif, compression=compression)
    upright.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(upright).convert("RGB"))
    assert (wanted.shape != shown.shape) == (5 <= orientation <= 8)
    drawn = RNG.integers(0, 2, wanted.shape[:2], dtype=np.uint8)
    Image.fromarray(drawn).save(tmp_path / "labels" / "a.png")
    (tmp_path / "classes.yaml").write_text("names: [road, car]\n")
    domain = opened(f"folder:{tmp_path}")
    domain.check_files()
    image, label = domain.read_pair(0)
    assert np.array_equal(image, wanted) and np.array_equal(label, drawn)
    data, height, width = encoded_image(domain, 0)
    assert (height, width) == drawn.shape
    (tmp_path / "encoded.png").write_bytes(data)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "encoded.png")), wanted)

    save(picture(RNG, 8, 12), tmp_path / "two" / "images" / "a.png")
    (tmp_path / "two" / "labels").mkdir()
    Image.fromarray(stored).save(tmp_path / "two" / "labels" / "a.tif", exif=exif, compression=compression)
    (tmp_path / "two" / "classes.yaml").write_text("names: [road, car]\nlabels: labels/{path}.tif\n")
    domain = opened(f"folder:{tmp_path / 'two'}")
    domain.check_files()
    assert np.array_equal(domain.read_pair(0)[1], stored)


def test_an_orientation_after_the_pixels_of_a_png(tmp_path):
    """Pillow writes it before them; others do not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(picture(RNG, 8, 12), tmp_path / "images" / "a.png")
    Image.open(path).copy().save(path, exif=exif)
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    last = data.index(b"IEND") - 4
    path.write_bytes(data[:at] + data[end:last] + data[at:end] + data[last:])
    assert Image.open(path).size == (12, 8)
    save(np.zeros((12, 8), np.uint8), tmp_path / "labels" / "a.png")
    (tmp_path / "classes.yaml").write_text("names: [road, car]\n")
    domain = opened(f"folder:{tmp_path}")
    domain.check_files()
    assert domain.read_pair(0)[0].shape == (12, 8, 3)
    assert encoded_image(domain, 0)[1:] == (12, 8)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("names: [bg, red]\nignore: [0]\n", r"ignore has 0, the id of bg \(the default ids are 0, 1, 2"),
        (
            "names: [bg, red]\nids: [0, 9]\nignore: [4, 9]\n",
            "ignore has 9, the id of red; remove it from one of them",
        ),
        (f"names: [bg]\nignore: [{1 << 31}]\n", "from -2147483648 to 2147483647"),
        ("names: [bg]\nids: [-1]\n", "from 0 to 65535"),
    ],
)
def test_ids_and_ignore_that_contradict_each_other(tmp_path, classes, message):
    with pytest.raises(UserError, match=message):
        opened(f"folder:{folder(tmp_path, classes=classes)}")


@pytest.mark.parametrize("void", [-1, -(1 << 31), 65536, (1 << 31) - 1])
def test_void_may_be_any_int32(tmp_path, void):
    root = folder(tmp_path, classes=f"names: [road, car]\nignore: {void}\nlabels: labels/{{path}}.tif\n")
    save(np.array([[0, 1, void]], np.int32), root / "labels" / "a.tif")
    assert opened(f"folder:{root}").read_label(0).tolist() == [[0, 1, 255]]
    save(np.array([[0, 1, -7]], np.int32), root / "labels" / "a.tif")
    with pytest.raises(BadFile, match=r"label values \[-7\]"):
        opened(f"folder:{root}").read_label(0)


def test_files_that_a_pattern_leaves_out_are_noted(tmp_path, caplog):
    for name in ("a.jpg", "b.JPG", "c.jpeg"):
        save(picture(RNG, 8, 10), tmp_path / "rgb" / name)
        save(np.zeros((8, 10), np.uint8), tmp_path / "truth" / f"{name[0]}.png")
    os.symlink(tmp_path / "gone.jpg", tmp_path / "rgb" / "d.jpg")
    (tmp_path / "classes.yaml").write_text("names: [road, car]\nimages: rgb/*.jpg\nlabels: truth/*.png\n")
    with caplog.at_level("INFO", "fastuda"):
        assert len(opened(f"folder:{tmp_path}")) == 1
        opened(f"folder:{tmp_path}", "target")
    assert caplog.text.count("3 files beside the images are left out: they do not match rgb/{star1}.jpg") == 1
    assert "b.JPG" in caplog.text


def test_labels_that_the_pattern_of_the_images_takes_are_no_images(tmp_path):
    for name in ("a", "b"):
        save(picture(RNG, 8, 10), tmp_path / f"{name}.png")
        save(np.zeros((8, 10), np.uint8), tmp_path / f"{name}_label.png")
    classes = "names: [road, car]\nimages: '{path}.png'\nlabels: '{path}_label.png'\n"
    (tmp_path / "classes.yaml").write_text(classes)
    for role in ("source", "target", "evaluation"):
        assert [item.image.name for item in opened(f"folder:{tmp_path}", role).items] == ["a.png", "b.png"]
    (tmp_path / "b.png").unlink()  # a label without its image is none either
    assert [item.image.name for item in opened(f"folder:{tmp_path}", "target").items] == ["a.png"]
    # unless the names do not tell
    other = tmp_path / "other"
    for name in ("a", "b"):
        save(picture(RNG, 8, 10), other / f"{name}_rgb.png")
    save(np.zeros((8, 10), np.uint8), other / "a.png")
    (other / "classes.yaml").write_text(
        "names: [road, car]\nimages: '{path}_rgb.png'\nlabels: '{path}.png'\n"
    )
    assert len(opened(f"folder:{other}", "target")) == 2
    (tmp_path / "classes.yaml").write_text(classes.replace("_label", ""))
    with pytest.raises(UserError, match=r"a\.png is image and label at once"):
        opened(f"folder:{tmp_path}")


def test_acdc_reference_splits(tmp_path):
    for split in ("train", "val"):
        for ref, kind in (("", ""), ("_ref", "_ref")):
            place = f"night/{split}{ref}/GOPR0351/GOPR0351_frame_000001"
            save(picture(RNG, 8, 10), tmp_path / "rgb_anon" / f"{place}_rgb{kind}_anon.png")
            save(
                np.full((8, 10), 3 if ref else 5, np.uint8),
                tmp_path / "gt" / f"{place}_gt{kind}_labelTrainIds.png",
            )
    for split, value in (("night-train_ref", 3), ("train_ref", 3), ("night-train", 5), ("val_ref", 3)):
        domain = opened(f"acdc:{tmp_path}:{split}")
        assert len(domain) == 1 and (domain.read_label(0) == value).all()
    for split, held_out in (("night-train_ref", "night-val_ref"), ("train_ref", "val_ref")):
        assert opened(f"acdc:{tmp_path}:{split}", "evaluation").split == held_out
    with pytest.raises(UserError, match=r"looked for rgb_anon/fog/train_ref/\{sequence\}") as error:
        opened(f"acdc:{tmp_path}:fog-train_ref")
    assert "did you mean fog-train_ref" not in str(error.value)


def test_camvid_as_kaggle_has_it(tmp_path):
    train = np.array([[0, 1, 2, 10]], np.uint8)
    for split in ("train", "val", "test"):
        save(picture(RNG, 1, 4), tmp_path / split / "0001TP_1.png")
        save(CAMVID.colorize(train), tmp_path / f"{split}_labels" / "0001TP_1_L.png")
    assert np.array_equal(opened(f"camvid:{tmp_path}:train").read_label(0), train)
    assert opened(f"camvid:{tmp_path}:train", "evaluation").split == "test"
    (tmp_path / "train_labels" / "0001TP_1_L.png").unlink()
    with pytest.raises(UserError, match=r"looked for \{split\}annot/\{stem\}.png or \{split\}_labels"):
        opened(f"camvid:{tmp_path}:train")


def test_unlabelled_images_of_one_stem(tmp_path):
    for name in ("0.jpg", "0.tif"):
        save(picture(RNG, 32, 64), tmp_path / "images" / name)
    (tmp_path / "classes.yaml").write_text("names: [road, car]\n")
    domain = opened(f"folder:{tmp_path}", "target")
    assert len(domain) == 2
    assert {domain.short_name(i) for i in range(2)} == {"images_0.jpg", "images_0.tif"}
    done = fastuda(
        "data.__main__",
        "cache",
        f"folder:{tmp_path}",
        "--role",
        "target",
        "--out",
        tmp_path / "copy",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    assert len(opened(f"folder:{tmp_path / 'copy'}", "target")) == 2
    save(np.zeros((32, 64), np.uint8), tmp_path / "labels" / "0.png")
    with pytest.raises(UserError, match="are two images of one label"):
        opened(f"folder:{tmp_path}", "target")


VOID = np.full((32, 64), 255, np.uint8)


def trained(tmp_path, source, target, *more):
    names = ("--source", f"folder:{source}", "--target", f"folder:{target}")
    small = ("--backbone", "small", "--steps", 1, "--device", "cpu", "--out", tmp_path / "run")
    return fastuda("train", "--method", "source_only", *names, *small, *TINY, *more)


def wide(root, label=None, split=""):
    rng = np.random.default_rng(1)
    for i in range(20):
        save(picture(rng, 32, 64), root / "images" / split / f"{i:02d}.png")
        values = rng.integers(0, 2, (32, 64), dtype=np.uint8) if label is None else label
        save(values, root / "labels" / split / f"{i:02d}.png")
    (root / "classes.yaml").write_text("names: [road, car]\n")
    return root


def test_wholly_void_splits_are_named_before_training(tmp_path):
    source, target = wide(tmp_path / "source", VOID), wide(tmp_path / "target", VOID, "val")
    wide(tmp_path / "target", None, "train")
    done = trained(tmp_path, source, target)
    assert done.returncode == 2 and "no label of folder in" in done.stderr
    assert "(split all) has a pixel of road, car: all 20 are void" in done.stderr
    done = trained(tmp_path, wide(tmp_path / "good"), target)
    assert done.returncode == 2 and "(split val) has a pixel of road, car" in done.stderr
    # a label that the sixteen looked at first are without
    save(np.zeros((32, 64), np.uint8), target / "labels" / "val" / "19.png")
    opened(f"folder:{target}", "evaluation").check_labels(16)


def test_classes_that_no_label_of_the_source_shows(tmp_path):
    source = wide(tmp_path / "source", np.zeros((32, 64), np.uint8))
    done = trained(tmp_path, source, wide(tmp_path / "target"), "data.classes=[car]")
    assert done.returncode == 2 and "has a pixel of car: all 20 are void" in done.stderr


def test_masks_of_0_and_255(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = wide(tmp_path / "own", np.repeat(np.array([[0, 255]], np.uint8), 32, 0).repeat(32, 1))
    done = trained(tmp_path, root, root, "data.eval_split=none")
    assert done.returncode == 2 and "write ids: [0, 255] if it is the second class" in done.stderr
    done = fastuda("data.__main__", "check", f"folder:{root}", "--no-sheet", "--workers", 0, "--quiet")
    assert done.returncode == 1 and "hold only 0 and 255" in done.stdout
    (root / "classes.yaml").write_text("names: [road, car]\nids: [0, 255]\n")
    domain = opened(f"folder:{root}")
    domain.check_labels(16)
    assert np.unique(domain.read_label(0)).tolist() == [0, 1]
    (root / "classes.yaml").write_text("names: [road, car]\nignore: 255\n")
    opened(f"folder:{root}").check_labels(16)


def test_quiet_draws_no_bar_of_the_indexing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    source, target = wide(tmp_path / "source"), wide(tmp_path / "target")
    done = trained(tmp_path, source, target, "--quiet", "data.sampling=rare")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").iterdir()) and "indexing" not in done.stderr


def test_paths_with_colons(tmp_path):
    root = tmp_path / "12:30" / "own"
    folder(root, ("train/a.png", "val/b.png"))
    assert parse_spec(f"folder:{root}") == ("folder", str(root), None)
    assert parse_spec(f"folder:{root}:val") == ("folder", str(root), "val")
    assert parse_spec("camvid:data:official.train") == ("camvid", "data", "official.train")
    assert parse_spec("scenes") == ("scenes", None, None)
    assert [i.image.stem for i in opened(f"folder:{root}:val").items] == ["b"]
    assert [i.image.stem for i in opened(f"folder:{root}", "evaluation").items] == ["b"]
    assert len(opened(f"folder:{root}", "evaluation", split="none")) == 0


def test_a_run_is_evaluated_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wide(tmp_path / "own"), wide(tmp_path / "other")
    (tmp_path / "elsewhere").mkdir()
    done = trained(tmp_path, "own", "other")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = fastuda("evaluate", "../run", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["iou"] == json.loads((tmp_path / "run" / "result.json").read_text())["iou"]


def test_absolute_paths_keep_the_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = absolute(DataConfig(source="folder:own:train", target="cityscapes", weak_labels="w.json"))
    assert (data.source, data.target) == (f"folder:{tmp_path / 'own'}:train", "cityscapes")
    assert (data.data_root, data.weak_labels) == (str(tmp_path / "data"), str(tmp_path / "w.json"))
    assert absolute(data) == data
