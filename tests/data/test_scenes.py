"""The built-in scenes: deterministic, complete, fast, and two really different domains."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastuda.data import scenes
from fastuda.data.domains.open import open_domain
from fastuda.data.scenes import ScenesConfig, ensure_scenes
from fastuda.data.scenes.street import draw_scene
from fastuda.errors import UserError

TINY = ScenesConfig(source=3, target=2, evaluation=2, height=32, width=64)


def test_a_scene_is_a_function_of_its_arguments():
    for domain in ("synthetic", "real"):
        one, two = draw_scene(domain, 3, 5, (64, 128)), draw_scene(domain, 3, 5, (64, 128))
        assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])
        assert not np.array_equal(one[1], draw_scene(domain, 3, 6, (64, 128))[1])
    assert one[0].shape == (64, 128, 3) and one[0].dtype == np.uint8 and one[1].max() < 19


@pytest.mark.slow
def test_all_classes_occur_in_both_domains():
    for domain in ("synthetic", "real"):
        seen = np.zeros(19, np.int64)
        for index in range(40):
            seen += np.bincount(draw_scene(domain, 0, index, (128, 256))[1].ravel(), minlength=19)
        assert (seen > 0).all(), f"{domain}: {np.flatnonzero(seen == 0)} never occur"


def test_domains_differ_in_colour_and_noise():
    looks = {}
    for domain in ("synthetic", "real"):
        images = np.stack([draw_scene(domain, 0, i, (64, 128))[0] for i in range(6)]).astype(float)
        colorful = images.max(-1) - images.min(-1)
        looks[domain] = (colorful.mean(), np.abs(np.diff(images, axis=2)).mean())
    assert looks["synthetic"][0] > 1.5 * looks["real"][0]


def test_layouts_are_read_by_the_real_readers(tmp_path):
    root = ensure_scenes(tmp_path / "scenes", TINY, quiet=True)
    source = open_domain(f"gta5:{root / 'gta5'}", role="source", data_root=tmp_path)
    target = open_domain(f"cityscapes:{root / 'cityscapes'}", role="target", data_root=tmp_path)
    val = open_domain(f"scenes:{root}", role="target", data_root=tmp_path, split="val")
    assert (len(source), len(target), len(val)) == (3, 2, 2)
    for index, domain in ((0, source), (1, target), (1, val)):
        image, label = domain.read_pair(index)
        assert image.shape == (32, 64, 3) and set(np.unique(label)) <= {*range(19), 255}
    assert np.array_equal(source.read_label(2), draw_scene("synthetic", 0, 2, (32, 64))[1])
    assert np.array_equal(val.read_label(1), draw_scene("real", 0, 1_000_001, (32, 64))[1])


def test_other_settings_are_drawn_anew_and_strangers_are_left_alone(tmp_path):
    root = ensure_scenes(tmp_path / "scenes", TINY, quiet=True)
    stamp = (root / "scenes.json").stat().st_mtime_ns
    ensure_scenes(root, TINY, quiet=True)
    assert (root / "scenes.json").stat().st_mtime_ns == stamp
    ensure_scenes(root, ScenesConfig(source=1, target=1, evaluation=1, height=32, width=64), quiet=True)
    assert json.loads((root / "scenes.json").read_text())["source"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is not part of the scenes"):
        ensure_scenes(tmp_path / "mine", TINY, quiet=True)
    (root / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is not part of the scenes"):
        ensure_scenes(root, TINY, quiet=True)
    assert {(place / "thesis.txt").read_text() for place in (tmp_path / "mine", root)} == {"precious"}
    (tmp_path / "real" / "gta5").mkdir(parents=True)
    with pytest.raises(UserError, match="holds gta5, which is not part of the scenes"):
        ensure_scenes(tmp_path / "real", TINY, quiet=True)


@pytest.mark.parametrize("said", ["[1]", "{", ""])
def test_a_damaged_manifest_is_drawn_over(tmp_path, said, monkeypatch):
    root = ensure_scenes(tmp_path / "scenes", TINY, quiet=True)
    (root / "scenes.json").write_text(said)
    monkeypatch.setattr(scenes, "ScenesConfig", lambda: TINY)
    ensure_scenes(root, quiet=True)
    assert json.loads((root / "scenes.json").read_text())["source"] == 3


def test_a_file_where_the_scenes_should_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{place}.*: Not a directory"):
            ensure_scenes(place, TINY, quiet=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ensure_scenes(Path("."), TINY, quiet=True) == tmp_path / "here"
    assert len(open_domain(f"scenes:{tmp_path / 'here'}", role="source", data_root=".")) == 3


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes.ProcessPoolExecutor, "map", full)
    with pytest.raises(UserError, match="No space left"):
        ensure_scenes(tmp_path / "scenes", TINY, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before the renaming", "at the renaming"])
def test_scenes_that_another_process_drew_meanwhile_stay(tmp_path, monkeypatch, moment):
    root, jobs, rename = tmp_path / "scenes", scenes._jobs, Path.rename
    others = ensure_scenes(tmp_path / "others", TINY, quiet=True)
    stamp = (others / "scenes.json").stat().st_ino

    def late_jobs(*given):
        rename(others, root)
        return jobs(*given)

    def late_rename(self, target):
        rename(others, root)
        rename(self, target)

    if moment == "before the renaming":
        monkeypatch.setattr(scenes, "_jobs", late_jobs)
    else:
        monkeypatch.setattr(Path, "rename", late_rename)
    assert ensure_scenes(root, TINY, quiet=True) == root
    assert stamp == (root / "scenes.json").stat().st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
