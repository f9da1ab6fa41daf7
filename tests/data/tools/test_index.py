"""The index of the classes in labels."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastuda.data.domains.open import open_domain
from fastuda.data.tools import index as index_module
from fastuda.data.tools.index import Index, build_index, cache_folder
from fastuda.errors import UserError
from tests.data.data_files import only, save


def index_of(domain, folder, **kwargs):
    return build_index(domain, folder=folder, workers=0, quiet=True, **kwargs)


def test_counts_and_points(source, tmp_path):
    index = index_of(source, tmp_path)
    for i in range(len(source)):
        label = source.read_label(i)
        assert (index.counts[i] == np.bincount(label.ravel(), minlength=256)[:19]).all()
        assert len(index.first_points(i, 1)) == len(np.unique(label)) <= len(index.points[i])
        assert all(label[y, x] == c for y, x, c in index.points[i])
    assert index.frequency.sum() == pytest.approx(1)


def test_processes_give_the_same(source, tmp_path):
    one = index_of(source, tmp_path / "a")
    two = build_index(source, folder=tmp_path / "b", workers=2, quiet=True)
    assert (one.counts == two.counts).all() and one.points == two.points


def test_only_changed_labels_are_read_again(source, tmp_path, monkeypatch):
    index_of(source, tmp_path)
    read = []
    real = index_module.index_label
    monkeypatch.setattr(index_module, "index_label", lambda d, i, k: (read.append(i), real(d, i, k))[1])
    index_of(source, tmp_path)
    assert read == []
    save(np.full((20, 36), 7, np.uint8), source.items[3].label)
    index = index_of(source, tmp_path)
    assert read == [3] and index.counts[3, 0] == 720 and index.counts[3].sum() == 720


def test_touched_files_are_not_decoded_again(source, tmp_path, monkeypatch):
    before = index_of(source, tmp_path)
    for item in source.items:
        os.utime(item.label, (1, 1))
    monkeypatch.setattr(type(source), "read_label", lambda *_: pytest.fail("decoded"))
    assert (index_of(source, tmp_path).counts == before.counts).all()


def test_a_build_that_was_killed_goes_on(source, tmp_path, monkeypatch):
    whole = index_of(source, tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:37])
    read = []
    real = index_module.index_label
    monkeypatch.setattr(index_module, "index_label", lambda d, i, k: (read.append(i), real(d, i, k))[1])
    again = index_of(source, tmp_path)
    assert (again.counts == whole.counts).all() and read == [2, 3, 4]
    assert index_of(source, tmp_path) and read == [2, 3, 4]


def test_another_label_map_is_another_index(source, tmp_path):
    index_of(source, tmp_path)
    restricted = index_of(only(source, "road", "car"), tmp_path)
    assert restricted.counts.shape == (5, 2) and len(list(tmp_path.glob("*.jsonl"))) == 2


def test_bad_labels_are_listed_and_read_again_once_mended(source, tmp_path):
    path = source.items[1].label
    good = path.read_bytes()
    path.write_bytes(good[:50])
    index = index_of(source, tmp_path)
    assert len(index.bad) == 1 and str(path) in index.bad[0] and not index.counts[1].any()
    path.write_bytes(good)
    assert not index_of(source, tmp_path).bad


def test_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="FASTUDA_CACHE"):
        index_of(source, tmp_path / "file")


def test_index_needs_labels(cityscapes):
    for path in (cityscapes / "gtFine" / "train").rglob("*.png"):
        path.unlink()
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    with pytest.raises(UserError, match="without label"):
        build_index(target)


def test_tags_are_classes_with_more_than_a_share_of_the_image():
    counts, pixels = np.array([[20, 180, 0], [400, 1, 0]]), np.array([200, 1000])
    index = Index(counts, pixels, ((),) * 2, ())
    assert index.tags().tolist() == [[True, True, False], [True, True, False]]
    assert index.tags(0.1).tolist() == [[False, True, False], [True, False, False]]


def test_relative_tags_are_weaksegs_rule_at_any_resolution():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2000, (40, 5)) * (rng.random((40, 5)) < 0.6)
    counts[0, 2], counts[:, 4] = 3, 0
    pixels = np.full(40, 10000)
    m = np.zeros(5)
    for _ in range(10):  # the published loop, in pixels
        m = np.array(
            [c[c > t].mean() if (c > t).any() else 0 for c, t in zip(counts.T, 0.1 * m, strict=True)]
        )
    index = Index(counts, pixels, ((),) * 40, ())
    assert np.allclose(index.mean_share() * 10000, m)
    tags = index.relative_tags()
    assert (tags == (counts > 0.1 * m)).all() and not tags[0, 2] and not tags[:, 4].any()
    assert (Index(4 * counts, 4 * pixels, ((),) * 40, ()).relative_tags() == tags).all()
    # the published trap: Cityscapes' pixels at four times the resolution of the means
    trap = 4 * counts > 0.1 * m
    assert (index.relative_tags(0.025) == trap).mean() > 0.95 and tags.sum() < trap.sum()


@pytest.mark.parametrize("said", ["", "~/.cache/fastuda"])
def test_the_folder_of_the_indices(said, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", said)
    assert cache_folder() == Path.home() / ".cache" / "fastuda"
