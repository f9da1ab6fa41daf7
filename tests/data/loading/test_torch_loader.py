"""Batches, sampling, sharding and resuming."""

import dataclasses
import subprocess
import sys

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
from fastuda.data.loading.transforms import Augment, Window
from fastuda.errors import UserError
from fastuda.models.normalization import IMAGENET
from tests.data.data_files import drawn, only


@pytest.fixture
def pair(gta5, cityscapes):
    source = open_domain(f"gta5:{gta5}", role="source", data_root=".")
    return source, open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")


def make(pair, seed=0, rank=0, world=1, **kwargs):
    said = {
        "crop": (16, 24),
        "source_resize": (16, 30),
        "target_resize": (16, 30),
        "batch_size": 2,
        "workers": 0,
    }
    return build_loader(*pair, DataConfig(**(said | kwargs)), IMAGENET, seed=seed, rank=rank, world=world)


def same(a, b):
    return (
        torch.equal(a.source_image, b.source_image)
        and torch.equal(a.source_label, b.source_label)
        and torch.equal(a.target_image, b.target_image)
        and a.source_files == b.source_files
        and a.target_files == b.target_files
    )


def test_batch(pair):
    batch = next(make(pair))
    assert batch.source_image.shape == batch.target_image.shape == (2, 3, 16, 24)
    assert batch.source_image.dtype == torch.float32 and batch.source_image.is_contiguous()
    assert batch.source_label.shape == (2, 16, 24) and batch.source_label.dtype == torch.int64
    assert set(batch.source_label.unique().tolist()) <= {*range(19), 255}
    assert len(batch.source_files) == len(batch.target_files) == 2
    assert not any("target" in f.name and "label" in f.name for f in dataclasses.fields(batch))


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


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
def test_resampled_window_equals_crop_of_the_whole(resampling):
    rng = np.random.default_rng(0)
    image, label = (
        rng.integers(0, 256, (37, 61, 3), dtype=np.uint8),
        rng.integers(0, 19, (37, 61), dtype=np.uint8),
    )
    whole = Window(50, 82, 0, 0, False)
    everything = Augment((50, 82), resampling=resampling)
    part = Augment((20, 30), resampling=resampling)
    window = Window(50, 82, 13, 27, True)
    big, ids = everything.image(image, whole), everything.label(label, whole)
    difference = part.image(image, window).astype(int) - big[13:33, 27:57][:, ::-1]
    assert abs(difference).max() <= 1
    assert (part.label(label, window) == ids[13:33, 27:57][:, ::-1]).all()
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    assert (big == np.asarray(Image.fromarray(image).resize((82, 50), filters[resampling]))).all()


def test_evaluated_images_are_resampled_alike(pair):
    source, _ = pair
    frames = {}
    for resampling in ("bilinear", "bicubic"):
        config = DataConfig(workers=0, eval_size=(10, 18), resampling=resampling)
        frames[resampling] = next(iter(eval_loader(source, config, IMAGENET)))[0]
    wanted = Image.fromarray(source.read_pair(0)[0]).resize((18, 10), Image.Resampling.BICUBIC)
    wanted = IMAGENET.apply(torch.from_numpy(np.asarray(wanted).copy()).permute(2, 0, 1))
    assert torch.equal(frames["bicubic"][0], wanted) and not torch.equal(*frames.values())


def test_small_images_are_padded():
    image, label = np.full((10, 12, 3), 200, np.uint8), np.zeros((10, 12), np.uint8)
    image, label = drawn(Augment((16, 16), flip=1.0), image, label, np.random.default_rng(0))
    assert (label[10:] == 255).all() and (label[:, 12:] == 255).all() and (label[:10, :12] == 0).all()
    assert (image[10:] == 0).all() and (image[:10, :12] == 200).all()


@given(
    st.integers(5, 90),
    st.integers(5, 90),
    st.integers(4, 60),
    st.integers(4, 60),
    st.integers(0, 30),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_size_gives_the_crop(height, width, crop_h, crop_w, low, seed):
    augment = Augment((crop_h, crop_w), resize=(max(low, 2), max(low, 2) + 20))
    rng = np.random.default_rng(seed)
    image, label = drawn(
        augment, np.ones((height, width, 3), np.uint8), np.ones((height, width), np.uint8), rng
    )
    assert image.shape == (crop_h, crop_w, 3) and label.shape == (crop_h, crop_w)
    assert ((label == 1) == (image[..., 0] == 1)).all() and (label == 1).any()


def test_every_image_once_per_pass_and_ranks_do_not_overlap(pair):
    loaders = [make(pair, batch_size=1, rank=rank, world=2) for rank in range(2)]
    files = [file for _ in range(10) for loader in loaders for file in next(loader).source_files]
    for start in range(0, 20, 5):
        assert len(set(files[start : start + 5])) == 5
    one = make(pair, batch_size=2)
    assert files == [file for _ in range(10) for file in next(one).source_files]


def test_seed_decides(pair):
    first = make(pair)
    assert same(next(first), next(make(pair)))
    assert not same(next(make(pair, seed=1)), next(make(pair)))
    assert not same(next(first), next(make(pair)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_is_exact_whatever_was_prefetched(pair, workers):
    whole = [next(loader) for loader in [make(pair)] for _ in range(7)]
    loader = make(pair, workers=workers)
    for expected in whole[:3]:
        assert same(next(loader), expected)
    state = loader.state_dict()
    loader.close()
    again = make(pair, workers=workers)
    again.load_state_dict(state)
    for expected in whole[3:]:
        assert same(next(again), expected)
    again.close()


def test_global_random_state_is_left_alone(pair):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    next(make(pair))
    assert torch.equal(torch.rand(2), expected)


def test_eval_loader(cityscapes):
    held_out = open_domain(f"cityscapes:{cityscapes}", role="evaluation", data_root=".")
    frames = list(eval_loader(held_out, DataConfig(workers=0, eval_size=(10, 18)), IMAGENET))
    assert [frame[2] for frame in frames] == [str(item.image) for item in held_out.items]
    image, label, _ = frames[0]
    assert image.shape == (1, 3, 10, 18) and label.shape == (1, 20, 36) and label.dtype == torch.int64
    shares = [eval_loader(held_out, DataConfig(workers=0), IMAGENET, rank=r, world=2) for r in range(2)]
    assert [len(share) for share in shares] == [1, 1]
    assert [frame[2] for share in shares for frame in share] == [frame[2] for frame in frames]


def test_domains_must_have_one_set_of_classes(pair):
    with pytest.raises(UserError, match="different classes"):
        make((only(pair[0], "road"), pair[1]))


DIES = """
import os, signal, sys
from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader
from fastuda.models.normalization import IMAGENET
source = open_domain("gta5:" + sys.argv[1], role="source", data_root=".")
target = open_domain("cityscapes:" + sys.argv[2], role="target", data_root=".")
loader = build_loader(source, target, DataConfig(crop=(16, 16), workers=1), IMAGENET, seed=0)
try:
    next(loader)
    os.kill(loader._batches._workers[0].pid, signal.SIGKILL)
    for _ in range(50):
        next(loader)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_worker_that_dies_is_an_error_not_a_hang(gta5, cityscapes):
    # torch reports a dead child from a signal handler, so it happens in a process of its own
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(gta5), str(cityscapes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "loader process died" in said or "DataLoader worker" in said, said
