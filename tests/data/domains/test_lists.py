"""Lists of images: every line names one image."""

import unicodedata

import pytest

from fastuda.data.domains.open import open_domain
from fastuda.errors import UserError
from tests.data.data_files import folder, opened
from tests.program import fastuda


def listed(root, *lines, names):
    folder(root, names)
    (root / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    domain = opened(f"folder:{root}:train")
    return [item.image.relative_to(root / "images").as_posix() for item in domain.items]


@pytest.mark.parametrize(
    ("line", "names", "taken"),
    [
        ("road 2.png", ("road.png", "road 2.png"), "road 2.png"),
        ("road 2", ("road.png", "road 2.png"), "road 2.png"),
        ("road 2.png 17", ("road.png", "road 2.png"), "road 2.png"),
        ("road.png labels/road.png", ("road.png", "road 2.png"), "road.png"),
        ("road with words", ("road.png",), "road.png"),
        ("s1/0.png", ("s1/0.png", "s2/0.png"), "s1/0.png"),
        ("s2/0", ("s1/0.png", "s2/0.png"), "s2/0.png"),
        ("images/s2/0.png", ("s1/0.png", "s2/0.png"), "s2/0.png"),
        ("./images/s2/0", ("s1/0.png", "s2/0.png"), "s2/0.png"),
        (r"s1\0.png", ("s1/0.png", "s2/0.png"), "s1/0.png"),
        ("0.png", ("0.png", "s2/0.png"), "0.png"),
        ("b/0.png", ("a/b/0.png", "a/c/0.png"), "a/b/0.png"),
        ("shot.001", ("shot.001.png", "shot.002.png"), "shot.001.png"),
    ],
)
def test_a_line_takes_the_image_that_it_names(tmp_path, line, names, taken):
    assert listed(tmp_path, line, names=names) == [taken]


@pytest.mark.parametrize(
    ("lines", "names", "message"),
    [
        (
            ["0.png"],
            ("s1/0.png", "s2/0.png"),
            r"0\.png fits two images, images/s1/0\.png and images/s2/0\.png",
        ),
        (["0"], ("s1/0.png", "s2/0.png"), "0 fits two images"),
        (["road 2.png"], ("road.png",), r"train\.txt lists road 2\.png, which is no image"),
        (["road", "images/road.png"], ("road.png",), r"images/road\.png is in the list twice \(as road\)"),
        (["s3/0.png"], ("s1/0.png", "s2/0.png"), r"lists s3/0\.png, which is no image"),
    ],
)
def test_a_line_without_one_image_is_refused(tmp_path, lines, names, message):
    with pytest.raises(UserError, match=message):
        listed(tmp_path, *lines, names=names)


@pytest.mark.parametrize(("on_disk", "in_list"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_either_unicode_form(tmp_path, on_disk, in_list):
    file = unicodedata.normalize(on_disk, "Straße für Bäume.png")
    line = unicodedata.normalize(in_list, "Straße für Bäume.png")
    assert listed(tmp_path, line, names=(file,)) == [file]


def test_two_files_that_differ_in_the_unicode_form_alone(tmp_path):
    both = [unicodedata.normalize(form, "ä.png") for form in ("NFC", "NFD")]
    assert listed(tmp_path, both[1], names=both) == [both[1]]
    assert listed(tmp_path, both[0].removesuffix(".png"), names=both) == [both[0]]


def test_check_notes_images_of_both_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "own", ("a.png", "b.png", "c.png"))
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("b\nc\n")
    done = fastuda("data.__main__", "check", f"folder:{root}", "--no-sheet", "--workers", 0, "--quiet")
    assert "note: 1 images are also in split val, the first is" in done.stdout and "b.png" in done.stdout
    (root / "val.txt").write_text("c\n")
    done = fastuda("data.__main__", "check", f"folder:{root}", "--no-sheet", "--workers", 0, "--quiet")
    assert done.returncode == 0 and "also in split" not in done.stdout


def test_a_list_that_is_no_text(gta5):
    (gta5 / "mine.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"mine\.txt cannot be read as a list of images"):
        open_domain(f"gta5:{gta5}:mine", role="source", data_root=".")
