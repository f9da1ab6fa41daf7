"""Everything that can be wrong with files: named with its path, and never half-read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import BadFile, open_rgb
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.dali_feed import encoded_image
from fastuda.data.loading.evaluation import eval_loader
from fastuda.errors import UserError
from fastuda.inference.reading import read_ahead
from fastuda.models.normalization import IMAGENET
from fastuda.system.files import reading
from tests.data.data_files import ids, picture, save


def gta(root):
    return open_domain(f"gta5:{root}", role="source", data_root=".")


def city(root, role="source"):
    return open_domain(f"cityscapes:{root}", role=role, data_root=".")


def loader(source, target, **kwargs):
    config = DataConfig(crop=(16, 16), batch_size=2, workers=0, **kwargs)
    return build_loader(source, target, config, IMAGENET, seed=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gta6:x", "unknown domain 'gta6'; did you mean gta5"),
        ("gta5:/no/such/place", "no folder /no/such/place"),
        ("gta5", "no folder .*gta5.*gta5:PATH"),
        (":x", "has no name"),
        ("folder", "needs a path"),
    ],
)
def test_wrong_specs(tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        open_domain(spec, role="source", data_root=tmp_path)


def test_a_folder_without_its_kind_is_told_how_to_be_one(tmp_path):
    with pytest.raises(UserError, match=f"a folder of your own is folder:{tmp_path}"):
        open_domain(str(tmp_path), role="source", data_root=".")


def test_no_images(tmp_path):
    with pytest.raises(UserError, match=r"no images .*images/\{path\}"):
        gta(tmp_path)


def test_image_without_label_is_named(gta5):
    (gta5 / "labels" / "00002.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images .* the first is .*00002\.png"):
        gta(gta5)
    assert len(open_domain(f"gta5:{gta5}", role="target", data_root=".")) == 5


def test_two_images_of_one_label(gta5):
    save(picture(np.random.default_rng(0)), gta5 / "images" / "00001.jpg")
    with pytest.raises(UserError, match=r"00001\.jpg and .*00001\.png are two images of one label"):
        gta(gta5)


@pytest.mark.parametrize("name", ["../gta5/images/00001.png", "/etc/passwd", "a/../../b", "~/x"])
def test_lists_do_not_lead_out(gta5, name):
    (gta5 / "mine.txt").write_text(f"{name}\n")
    with pytest.raises(UserError, match=r"mine\.txt: .* leads out"):
        open_domain(f"gta5:{gta5}:mine", role="source", data_root=".")


def test_list_with_a_name_twice_or_missing(gta5):
    (gta5 / "mine.txt").write_text("00001\n00001\n")
    with pytest.raises(UserError, match="00001 is in the list twice"):
        open_domain(f"gta5:{gta5}:mine", role="source", data_root=".")
    (gta5 / "mine.txt").write_text("00001\n77777\n")
    with pytest.raises(UserError, match="lists 77777, which is no image"):
        open_domain(f"gta5:{gta5}:mine", role="source", data_root=".")


def test_label_of_another_size(cityscapes):
    label = city(cityscapes).items[1].label
    save(ids(np.random.default_rng(0), 10, 18), label)
    with pytest.raises(BadFile, match=rf"{label.name} is 18x10, its image is 36x20"):
        city(cityscapes).read_pair(1)


def test_value_outside_the_map_is_named(gta5):
    raw = np.asarray(Image.open(gta5 / "labels" / "00003.png")).copy()
    raw[:3, :3] = 77
    save(raw, gta5 / "labels" / "00003.png")
    with pytest.raises(BadFile, match=r"00003\.png holds label values \[77\] that gta5 does not define"):
        gta(gta5).read_label(3)
    with pytest.raises(UserError, match="77"):
        gta(gta5).check_labels(5)


def test_colour_outside_the_palette_is_named(gta5):
    save(np.full((20, 36, 3), 9, np.uint8), gta5 / "labels" / "00000.png")
    with pytest.raises(BadFile, match=r"the colour #090909"):
        gta(gta5).read_label(0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"not a picture at all")


def vanish(path):
    path.unlink()


def wrong_mode(path):
    save(np.ones((20, 36), np.float32), path.with_suffix(".tif"))
    path.with_suffix(".tif").rename(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


FAULTS = [truncate, empty, garbage, vanish, wrong_mode, a_folder]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_faults_are_named_and_skipped(gta5, cityscapes, fault, kind, caplog):
    source, target = gta(gta5), city(cityscapes, "target")
    path = getattr(source.items[2], kind)
    fault(path)
    batches = loader(source, target, max_bad=1)
    for _ in range(5):
        batch = next(batches)
        assert str(source.items[2].image) not in batch.source_files
    assert caplog.text.count(str(path)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_faults_stop_with_the_list(gta5, cityscapes, workers):
    source, target = gta(gta5), city(cityscapes, "target")
    truncate(source.items[1].image)
    empty(source.items[3].label)
    vanish(target.items[0].image)
    config = DataConfig(crop=(16, 16), batch_size=2, workers=workers, max_bad=2)
    batches = build_loader(source, target, config, IMAGENET, seed=0)
    with pytest.raises(UserError, match=r"3 files could not be read \(data\.max_bad is 2\)") as error:
        for _ in range(10):
            next(batches)
    for path in (source.items[1].image, source.items[3].label, target.items[0].image):
        assert str(path) in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_left(gta5, cityscapes, workers):
    source, target = gta(gta5), city(cityscapes, "target")
    shutil.rmtree(cityscapes / "leftImg8bit")
    config = DataConfig(crop=(16, 16), batch_size=1, workers=workers, max_bad=100)
    with pytest.raises(UserError, match="4 files could not be read"):
        next(build_loader(source, target, config, IMAGENET, seed=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_skips_nothing(cityscapes, workers):
    held_out = city(cityscapes, "evaluation")
    truncate(held_out.items[1].image)
    with pytest.raises(UserError, match=rf"needs every file: .*{held_out.items[1].image.name}"):
        list(eval_loader(held_out, DataConfig(workers=workers), IMAGENET))


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_images_are_read_as_a_viewer_shows_them(kind, orientation, tmp_path):
    """Their labels are drawn on what a viewer shows."""
    shown = picture(np.random.default_rng(0))
    place, exif = tmp_path / "images" / f"a.{kind}", Image.Exif()
    exif[0x0112] = orientation
    save(shown, place)
    Image.open(place).copy().save(place, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(place)))
    save(np.zeros(wanted.shape[:2], np.uint8), tmp_path / "labels" / "a.png")
    (tmp_path / "classes.yaml").write_text("names: [road]")
    domain = open_domain(f"folder:{tmp_path}", role="source", data_root=".")
    domain.check_files()
    image, label = domain.read_pair(0)
    assert np.array_equal(image, wanted) and label.shape == image.shape[:2]
    ((_, predicted),) = read_ahead([(place, Path("a"))])
    assert np.array_equal(predicted, wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(tmp_path):
    shown = picture(np.random.default_rng(0))
    Image.fromarray(shown).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12")
    assert np.array_equal(open_rgb(tmp_path / "a.png"), shown)


def test_an_image_too_large_to_decode_is_named(cityscapes, monkeypatch):
    held_out = city(cityscapes, "evaluation")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 36 // 2 - 1)
    path = held_out.items[0].image
    with pytest.raises(UserError, match=rf"{path} cannot be read: Image size"):
        held_out.check_files()
    with pytest.raises(BadFile, match=rf"{path} cannot be read"):
        encoded_image(held_out, 0)


@pytest.mark.parametrize(
    ("parse", "reason"),
    [
        (lambda path: path.read_text(encoding="utf-8"), "No such file or directory"),
        (lambda path: json.loads("{"), "Expecting property name"),
        (lambda path: json.loads("[" * 100_000), "recursion"),
        (lambda path: json.loads("{}")["images"], "no key 'images'"),
        (lambda path: int(json.loads("Infinity")), "infinity"),
        (lambda path: json.loads("[]").items(), "no attribute 'items'"),
    ],
    ids=["missing", "cut off", "deep", "no key", "endless", "no mapping"],
)
@pytest.mark.parametrize("error", [UserError, BadFile])
def test_reading_names_the_file_what_it_is_and_the_reason(tmp_path, parse, reason, error):
    options = (BadFile,) if error is BadFile else ()
    with (
        pytest.raises(error, match=rf"weak\.json cannot be read as weak labels: .*{reason}"),
        reading(tmp_path / "weak.json", "weak labels", *options),
    ):
        parse(tmp_path / "weak.json")
