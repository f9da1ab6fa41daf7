"""Smaller copies: right, resumable, and never half of one."""

import contextlib
import errno
import resource
import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image

from fastuda.data.domains.open import open_domain
from fastuda.data.domains.run import share_classes
from fastuda.data.tools import cache as cache_module
from fastuda.data.tools.cache import CacheSettings, build_cache
from fastuda.errors import UserError, cannot_write
from tests.data.data_files import save
from tests.program import fastuda


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
    real, written = cache_module.write_image, []

    def full(path, image, **options):
        if len(written) == 5:
            raise cannot_write(path, OSError(errno.ENOSPC, "No space left on device"))
        written.append(path)
        real(path, image, **options)

    monkeypatch.setattr(cache_module, "write_image", full)
    with pytest.raises(UserError, match="No space left on device; the copies so far are kept"):
        copy(source, how)
    with pytest.raises(UserError, match=r"no classes\.yaml"):
        opened(how)
    assert not [path for path in how.out.rglob(".*")]
    monkeypatch.setattr(
        cache_module, "write_image", lambda path, *a, **k: (written.append(path), real(path, *a, **k))
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


def own(folder, **values):
    """A data set of a user's, with one image."""
    save(np.zeros((8, 8, 3), np.uint8), folder / "images" / "1.png")
    save(np.eye(8, dtype=np.uint8) * 255, folder / "labels" / "1.png")
    (folder / "classes.yaml").write_text(yaml.safe_dump({"names": ["a", "b"], **values}))
    return open_domain(f"folder:{folder}", role="source", data_root=".")


def test_other_meanings_of_the_labels_are_another_copy(tmp_path):
    how = settings(tmp_path, edge=None)
    copy(own(tmp_path / "own", ids=[0, 255]), how)
    with pytest.raises(UserError, match="with other settings"):
        copy(own(tmp_path / "own", ids=[255, 0]), how)


def test_what_is_void_needs_no_saying_again(tmp_path):
    how = settings(tmp_path, edge=None)
    copy(own(tmp_path / "own", ignore=255), how)
    opened(how).check_labels(16)


def test_bad_files_are_named_and_left_out(source, tmp_path):
    source.items[1].image.write_bytes(b"x")
    how = settings(tmp_path)
    (bad,) = copy(source, how)
    assert str(source.items[1].image) in bad and len(opened(how)) == 4


def test_strangers_are_left_alone(source, tmp_path):
    how = settings(tmp_path)
    copy(source, how)
    refused = r"with other settings \(.*cache\.json\); delete it or choose another --out"
    with pytest.raises(UserError, match=refused):
        copy(source, settings(tmp_path, edge=12))
    (how.out / "cache.json").write_text("{")
    with pytest.raises(UserError, match=refused):
        copy(source, how)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        copy(source, CacheSettings(tmp_path / "full", 10, "png", 95))


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of ``size`` on ``folder``; the test skips where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_a_full_disk_ends_in_one_line_and_the_copy_goes_on_later(source, gta5, tmp_path, format):
    """A disk of eight pages for ten files and the manifest; the processes fill it together."""
    disk = tmp_path / "disk"
    how = settings(disk)
    args = ["cache", f"gta5:{gta5}", "--out", how.out, "--format", format, "--quiet"]
    with small_disk(disk, "32k"):
        done = fastuda("data", *args, "--workers", 2, env={})
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: cannot write {how.out}") and line.endswith("run it again")
        assert "No space left on device" in line
        kept = [path for kind in ("images", "labels") for path in (how.out / kind).rglob("*.*")]
        assert kept and all(Image.open(path).load() for path in kept)
        assert not list(how.out.rglob(".*")) and not (how.out / "classes.yaml").exists()
        with pytest.raises(UserError, match=r"no classes\.yaml"):
            opened(how)
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        done = fastuda("data", *args, "--workers", 0)
        assert done.returncode == 0, done.stderr
        copies = opened(how)
        assert len(copies) == 5 and all(copies.read_pair(i)[0].shape == (20, 36, 3) for i in range(5))


@pytest.mark.parametrize("limit", [50, 1000])
def test_a_file_that_cannot_be_finished_is_not_left(gta5, tmp_path, limit):
    """The manifest does not fit into 50 bytes; of the pictures the JPEGs do not fit into 1000."""
    out = tmp_path / "copy"
    args = ["cache", f"gta5:{gta5}", "--out", out, "--workers", 0, "--quiet"]
    done = fastuda(
        "data", *args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: cannot write {out}") and "File too large" in done.stderr
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert left == ([] if limit == 50 else ["cache.json", "labels/images/00000.png"])
    done = fastuda("data", *args)
    assert done.returncode == 0, done.stderr
    assert len(open_domain(f"folder:{out}", role="source", data_root=".")) == 5
