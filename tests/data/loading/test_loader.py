"""Augmentation and the endless loader."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.evaluation import eval_loader
from fastuda.data.loading.transforms import Augment
from fastuda.data.scenes import ScenesConfig, ensure_scenes
from fastuda.errors import UserError
from fastuda.models.normalization import Normalization
from tests.data.data_files import drawn


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    config = ScenesConfig(source=7, target=5, evaluation=3, height=32, width=64)
    return ensure_scenes(tmp_path_factory.mktemp("data") / "scenes", config, quiet=True)


def loader(root, workers=0, **kwargs):
    config = dataclasses.replace(
        DataConfig(crop=(24, 48), batch_size=2, workers=workers), **kwargs.pop("config", {})
    )
    source = open_domain(f"scenes:{root}", role="source", data_root=root)
    target = open_domain(f"scenes:{root}", role="target", data_root=root)
    return build_loader(source, target, config, Normalization(), seed=kwargs.pop("seed", 3), **kwargs)


def take(batches, n):
    return list(itertools.islice(batches, n))


def same(a, b):
    assert a.source_files == b.source_files and a.target_files == b.target_files
    for name in ("source_image", "source_label", "target_image"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_batches_have_the_contract(root):
    batch = next(loader(root))
    assert batch.source_image.shape == batch.target_image.shape == (2, 3, 24, 48)
    assert batch.source_label.shape == (2, 24, 48) and batch.source_label.dtype == torch.int64
    assert not any("target" in f.name and "label" in f.name for f in dataclasses.fields(batch))


def test_workers_do_not_change_the_samples(root):
    for a, b in zip(take(loader(root), 6), take(loader(root, workers=2), 6), strict=True):
        same(a, b)


def test_resume_goes_on_exactly_whatever_was_prefetched(root):
    whole = take(loader(root), 9)
    first = loader(root, workers=2)
    take(first, 4)
    state = first.state_dict()
    first.close()
    second = loader(root)
    second.load_state_dict(state)
    for a, b in zip(whole[4:], take(second, 5), strict=True):
        same(a, b)


def test_every_file_once_an_epoch_and_ranks_do_not_overlap(root):
    ranks = [take(loader(root, rank=r, world=2, config={"batch_size": 1}), 14) for r in range(2)]
    files = [name for pair in zip(*ranks, strict=True) for batch in pair for name in batch.source_files]
    for epoch in range(4):
        assert len(set(files[7 * epoch : 7 * epoch + 7])) == 7
    joint = take(loader(root, config={"batch_size": 2}), 14)
    assert [name for batch in joint for name in batch.source_files] == files


def test_seeds_differ(root):
    a, b = take(loader(root, seed=1), 4), take(loader(root, seed=2), 4)
    assert [x.source_files for x in a] != [x.source_files for x in b]


def test_unreadable_files_are_named_skipped_and_at_last_too_many(root, tmp_path, caplog):
    import shutil

    shutil.copytree(root, tmp_path / "scenes")
    broken = sorted((tmp_path / "scenes" / "gta5" / "images").iterdir())[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    batches = take(loader(tmp_path / "scenes", config={"max_bad": 2}), 8)
    assert all(str(path) not in batch.source_files for batch in batches for path in broken)
    with pytest.raises(UserError, match=r"2 files could not be read .*max_bad is 1") as error:
        take(loader(tmp_path / "scenes", config={"max_bad": 1}), 8)
    assert all(str(path) in str(error.value) for path in broken)


def test_evaluation_sees_every_image_once_at_label_resolution(root):
    domain = open_domain(f"scenes:{root}", role="target", data_root=root, split="val")
    config = DataConfig(eval_size=(16, 32), workers=0)
    seen = list(eval_loader(domain, config, Normalization()))
    assert [name for _, _, name in seen] == [str(image) for image, _ in domain.items]
    assert seen[0][0].shape == (1, 3, 16, 32) and seen[0][1].shape == (1, 32, 64)
    parts = [list(eval_loader(domain, config, Normalization(), rank=r, world=2)) for r in range(2)]
    assert sorted(name for part in parts for *_, name in part) == [str(image) for image, _ in domain.items]


@settings(max_examples=50, deadline=None)
@given(
    h=st.integers(5, 60), w=st.integers(5, 60), crop=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    resize=st.one_of(st.none(), st.tuples(st.integers(15, 30), st.integers(30, 60))),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_image_and_label_stay_together(h, w, crop, resize, seed):
    y, x = np.mgrid[:h, :w]
    image = np.stack([4 * x, 4 * y, 0 * x], -1).astype(np.uint8)
    label = (x // 4).astype(np.uint8)
    a, b = drawn(Augment(crop, resize), image, label, np.random.default_rng(seed))
    assert a.shape == (*crop, 3) and b.shape == crop
    valid = b != 255
    # the picture holds its own coordinates, so that each label can be checked against where it came from
    where = a[..., 0][valid] / 4 - (4.0 * b[valid] + 1.5)
    shrink = 1.0 if resize is None else max(1.0, min(h, w) / resize[0])
    assert np.abs(where).max(initial=0) <= 2 + 1.5 * shrink
    c, d = drawn(Augment(crop, resize), image, label, np.random.default_rng(seed))
    assert np.array_equal(a, c) and np.array_equal(b, d)


def test_exact_size_and_flip():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    label = np.arange(24, dtype=np.uint8).reshape(4, 6)
    a, b = drawn(Augment((4, 6), flip=1.0), image, label, np.random.default_rng(0))
    assert np.array_equal(a, image[:, ::-1]) and np.array_equal(b, label[:, ::-1])
    a, b = drawn(Augment((8, 12), size=(8, 12), flip=0.0), image, label, np.random.default_rng(0))
    assert np.array_equal(b, label.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(a, np.asarray(Image.fromarray(image).resize((12, 8), Image.Resampling.BILINEAR)))
