"""An own folder with everything wrong that a first one has: each thing is named, and nothing is lost."""

import numpy as np
import pytest
from PIL import Image

from tests.program import TINY, fastuda


def scene(seed):
    label = np.zeros((48, 64), np.uint8)
    label[:24], label[10:30, 10:30] = 1, 2
    noise = np.random.default_rng(seed).integers(0, 20, (48, 64, 3), np.uint8)
    return np.array([[120, 60, 120], [80, 140, 220], [40, 160, 40]], np.uint8)[label] + noise, label


@pytest.fixture
def folders(tmp_path):
    """Two data sets of eight pairs in folders with a space and a letter beyond ASCII."""
    for name in ("my source", "ziel-ü"):
        for part in ("images", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "classes.yaml").write_text("names: [road, sky, tree]\n")
        for i in range(8):
            image, label = scene(i)
            Image.fromarray(image).save(tmp_path / name / "images" / f"straße {i}.png")
            Image.fromarray(label).save(tmp_path / name / "labels" / f"straße {i}.png")
    return tmp_path / "my source", tmp_path / "ziel-ü"


def train(source, target, out, *more):
    args = ["--method", "plca", "--source", f"folder:{source}", "--target", f"folder:{target}", "--out", out]
    return fastuda("train", *args, "--backbone", "small", "--steps", 2, "--quiet", *TINY, *more)


def spoil(source):
    """The faults that training skips; returns the files that must be named."""
    image, label = scene(0)
    Image.fromarray(label[:40, :50]).save(source / "labels" / "straße 0.png")
    whole = (source / "images" / "straße 1.png").read_bytes()
    (source / "images" / "straße 1.png").write_bytes(whole[:300])
    whole = (source / "labels" / "straße 2.png").read_bytes()
    (source / "labels" / "straße 2.png").write_bytes(whole[:60])
    (source / "images" / "straße 3.png").write_bytes(b"")
    rgba = np.dstack([image, np.full(image.shape[:2], 200, np.uint8)])
    Image.fromarray(rgba).save(source / "images" / "straße 4.png")
    (source / "labels" / "straße 5.png").unlink()
    (source / "images" / "._straße 6.png").write_bytes(b"a resource fork")
    (source / "images" / "Thumbs.db").write_bytes(b"not an image")
    return ["labels/straße 0.png", "images/straße 1.png", "labels/straße 2.png", "images/straße 3.png"]


def test_check_names_every_fault(folders, tmp_path):
    named = spoil(folders[0])
    done = fastuda("data", "check", f"folder:{folders[0]}", "--no-sheet", "--workers", 0, "--quiet")
    assert done.returncode == 1
    assert [name for name in named if name not in done.stdout] == [] and "4 problems" in done.stdout
    assert "1 of 8 images have no label and are left out" in done.stderr


def test_training_goes_on_without_what_cannot_be_read(folders, tmp_path):
    spoil(folders[0])
    done = train(*folders, tmp_path / "run", "data.max_bad=4")
    assert done.returncode == 0 and "mIoU3" in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_a_wrong_label_map_is_named_before_training_with_the_way_out(folders, tmp_path):
    label = scene(0)[1]
    path = folders[0] / "labels" / "straße 0.png"
    label[0, 0] = 9
    Image.fromarray(label).save(path)
    done = train(*folders, tmp_path / "run")
    assert done.returncode == 2 and f"{path} holds label values [9]" in done.stderr
    assert "ids or ignore in classes.yaml" in done.stderr and not (tmp_path / "run").exists()
    Image.fromarray(np.dstack([label] * 3 + [np.full(label.shape, 255, np.uint8)])).save(path)
    done = train(*folders, tmp_path / "run")
    assert done.returncode == 2 and "is a colour picture" in done.stderr and "palette" in done.stderr


def test_what_would_stop_the_evaluation_is_named_before_the_training(folders, tmp_path):
    (folders[1] / "images" / "straße 3.png").write_bytes(b"")
    Image.fromarray(scene(0)[1][:30]).save(folders[1] / "labels" / "straße 4.png")
    done = train(*folders, tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "straße 3.png cannot be read: it is empty" in done.stderr
    assert "straße 4.png differs in size from its image" in done.stderr


def test_a_training_whose_evaluation_stopped_goes_on(folders, tmp_path):
    path = folders[1] / "images" / "straße 3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])  # the header is right
    done = train(*folders, tmp_path / "run")
    assert done.returncode == 2 and "--resume auto" in done.stderr
    path.write_bytes(whole)
    done = train(*folders, tmp_path / "run", "--resume", "auto")
    assert done.returncode == 0 and "mIoU3" in done.stdout, done.stderr


@pytest.mark.parametrize("eval_split", ["auto", "none"])
def test_images_of_one_name_in_several_folders_leave_a_picture_each(eval_split, folders, tmp_path):
    for part in ("images", "labels"):
        for name in ("monday", "tuesday"):
            (folders[1] / part / name).mkdir()
            (folders[1] / part / f"straße {len(name)}.png").rename(folders[1] / part / name / "1.png")
    out = tmp_path / "run"
    done = train(*folders, out, f"data.eval_split={eval_split}")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (out / "preds").iterdir()}
    assert len(names) == 8 and {"images_monday_1.png", "images_tuesday_1.png", "straße 0.png"} <= names


def test_hidden_files_are_not_predicted(folders, tmp_path):
    assert train(*folders, tmp_path / "run").returncode == 0
    (folders[1] / "images" / "._straße 1.png").write_bytes(b"a resource fork")
    done = fastuda("predict", tmp_path / "run", folders[1] / "images", "--out", tmp_path / "p", "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "p" / "labels").iterdir())) == 8


def test_quiet_draws_the_scenes_without_a_bar(tmp_path, monkeypatch):
    from fastuda.data import scenes

    tiny = scenes.ScenesConfig(source=4, target=4, evaluation=2, height=32, width=64)
    drawn = scenes.ensure_scenes
    monkeypatch.setattr(scenes, "ensure_scenes", lambda root, quiet: drawn(root, tiny, quiet=quiet))
    for quiet, shown in (("--quiet", False), ("--seed=0", True)):
        root, out = tmp_path / f"data{shown}", tmp_path / f"run{shown}"
        done = fastuda("train", "--data-root", root, "--out", out, "--steps", 1, quiet, *TINY)
        assert done.returncode == 0 and ("drawing scenes" in done.stderr) == shown, done.stderr
