"""Smaller copies: right, resumable, and never half of one."""

import errno

import numpy as np
import pytest
from PIL import Image

from fastuda.data import cache as cache_module
from fastuda.data.cache import CacheSettings, build_cache
from fastuda.data.domains import open_domain, share_classes
from fastuda.errors import UserError
from tests.data.data_files import save


@pytest.fixture
def source(gta5):
    return open_domain(f"gta5:{gta5}", role="source", data_root=".")


def settings(tmp_path, edge=10, format="png"):
    return CacheSettings(tmp_path / "copy", edge, format, 95)


def copy(domain, how, **kwargs):
    return build_cache(domain, how, workers=0, quiet=True, **kwargs)


def opened(how):
    return open_domain(f"folder:{how.out}", role="source", data_root=".")


def test_copies_are_the_resized_originals(source, tmp_path):
    how = settings(tmp_path)
    assert copy(source, how) == []
    copies = opened(how)
    assert len(copies) == 5 and copies.classes == source.classes
    for i in range(5):
        image, label = source.read_pair(i)
        small = Image.fromarray(image).resize((18, 10), Image.Resampling.BILINEAR)
        assert (copies.read_image(i) == np.asarray(small)).all()
        nearest = Image.fromarray(label).resize((18, 10), Image.Resampling.NEAREST)
        assert (copies.read_label(i) == np.asarray(nearest)).all()


def test_size_is_kept_and_nothing_enlarged(source, tmp_path):
    for edge in (None, 4000):
        how = CacheSettings(tmp_path / str(edge), edge, "png", 95)
        copy(source, how)
        assert (opened(how).read_image(2) == source.read_image(2)).all()


def test_jpeg_and_processes(source, tmp_path):
    how = settings(tmp_path, format="jpg")
    assert build_cache(source, how, workers=2, quiet=True) == []
    assert opened(how).read_image(0).shape == (10, 18, 3)


def test_unlabelled_targets(cityscapes, tmp_path):
    for path in (cityscapes / "gtFine" / "train").rglob("*.png"):
        path.unlink()
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    how = settings(tmp_path)
    copy(target, how)
    copies = open_domain(f"folder:{how.out}", role="target", data_root=".")
    assert len(copies) == 4 and all(item.label is None for item in copies.items)


def test_restricted_classes_survive(source, tmp_path, cityscapes):
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    source, _ = share_classes(source, target, classes=("road", "car"))
    how = settings(tmp_path, edge=None)
    copy(source, how)
    assert (opened(how).read_label(0) == source.read_label(0)).all()


def test_interrupted_copy_cannot_be_opened_and_goes_on(source, tmp_path, monkeypatch):
    how = settings(tmp_path)
    real, written = cache_module._atomic, []

    def full(path, image, **options):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, image, **options)

    monkeypatch.setattr(cache_module, "_atomic", full)
    with pytest.raises(UserError, match="No space left on device; the copies so far are kept"):
        copy(source, how)
    with pytest.raises(UserError, match=r"no classes\.yaml"):
        opened(how)
    assert not [path for path in how.out.rglob(".*")]
    monkeypatch.setattr(
        cache_module, "_atomic", lambda path, *a, **k: (written.append(path), real(path, *a, **k))
    )
    del written[:]
    copy(source, how)
    assert len(opened(how)) == 5 and len(written) == 10 - 4  # the third pair had its label alone: both anew


def test_changed_originals_are_copied_again(source, tmp_path):
    import os
    import time

    how = settings(tmp_path, edge=None)
    copy(source, how)
    save(np.full((20, 36), 7, np.uint8), source.items[2].label)
    later = time.time() + 5
    os.utime(source.items[2].label, (later, later))
    copy(source, how)
    assert (opened(how).read_label(2) == 0).all()


def test_bad_files_are_named_and_left_out(source, tmp_path):
    source.items[1].image.write_bytes(b"x")
    how = settings(tmp_path)
    (bad,) = copy(source, how)
    assert str(source.items[1].image) in bad and len(opened(how)) == 4


def test_strangers_are_left_alone(source, tmp_path):
    how = settings(tmp_path)
    copy(source, how)
    with pytest.raises(UserError, match="made otherwise"):
        copy(source, settings(tmp_path, edge=12))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        copy(source, CacheSettings(tmp_path / "full", 10, "png", 95))
