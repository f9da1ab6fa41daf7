"""The DALI loader gives the torch loader's batches: labels and files alike, images within rounding of the
resampling."""

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader, choose_loader
from fastuda.data.loading.dali_feed import has_end_marker
from fastuda.data.loading.dali_loader import DaliLoader
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.errors import UserError
from fastuda.models.normalization import CAFFE, IMAGENET
from tests.data.data_files import save

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="needs NVIDIA DALI",
)


def smooth(rng, height=120, width=200):
    small = Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def pair(tmp_path):
    """Palette labels beside PNGs in the source, JPEGs in the target."""
    rng = np.random.default_rng(0)
    for i in range(4):
        save(smooth(rng), tmp_path / "gta5" / "images" / f"{i}.png")
        label = np.kron(rng.choice(np.array([7, 26, 33], np.uint8), (12, 20)), np.ones((10, 10), np.uint8))
        save(
            label,
            tmp_path / "gta5" / "labels" / f"{i}.png",
            np.random.default_rng(1).integers(0, 256, 768).tolist(),
        )
    for i in range(4):
        save(smooth(rng, 90, 150), tmp_path / "city" / "leftImg8bit" / "train" / "a" / f"{i}_leftImg8bit.jpg")
    source = open_domain(f"gta5:{tmp_path / 'gta5'}", role="source", data_root=".")
    return source, open_domain(f"cityscapes:{tmp_path / 'city'}", role="target", data_root=".")


def config(**kwargs):
    return DataConfig(**({"crop": (48, 64), "batch_size": 2, "workers": 0} | kwargs))


def both(pair, normalization=CAFFE, **kwargs):
    said = config(**kwargs)
    return (kind(*pair, said, normalization, seed=3) for kind in (TorchLoader, DaliLoader))


@needs_dali
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"source_resize": (50, 90), "target_resize": (100, 160)},
        {"source_size": (60, 100), "target_size": (48, 64)},
        {"crop": (140, 170)},
        {"source_resize": (50, 60), "crop": (64, 64)},
        {"source_resize": (50, 90), "target_resize": (100, 160), "resampling": "bicubic"},
        {"source_size": (60, 100), "target_size": (48, 64), "resampling": "bicubic"},
    ],
    ids=["as it is", "ranges", "exact sizes", "padded", "resized and padded", "bicubic", "bicubic sizes"],
)
def test_parity(pair, sizes):
    one, two = both(pair, **sizes)
    for _ in range(4):
        a, b = next(one), next(two)
        assert a.source_files == b.source_files and a.target_files == b.target_files
        assert torch.equal(a.source_label, b.source_label) and b.source_label.dtype == torch.int64
        for x, y in ((a.source_image, b.source_image), (a.target_image, b.target_image)):
            difference = (x - y).abs()
            assert x.shape == y.shape and y.dtype == torch.float32
            assert difference.max() <= (3.01 if "resize" in str(sizes) or "size" in str(sizes) else 0)
            assert difference.mean() < 0.4
    two.close()


@needs_dali
@pytest.mark.parametrize("normalization", [IMAGENET, CAFFE], ids=["rgb", "bgr"])
def test_normalisation_is_the_same(pair, normalization):
    one, two = both(pair, normalization)
    assert torch.allclose(next(one).source_image, next(two).source_image, atol=1e-5)


@needs_dali
def test_ranks_resume_and_worker_processes(pair):
    whole = TorchLoader(*pair, config(), IMAGENET, seed=0, rank=1, world=2)
    expected = [next(whole) for _ in range(6)]
    first = DaliLoader(*pair, config(workers=2), IMAGENET, seed=0, rank=1, world=2)
    for batch in expected[:3]:
        assert next(first).source_files == batch.source_files
    state = first.state_dict()
    first.close()
    again = DaliLoader(*pair, config(), IMAGENET, seed=0, rank=1, world=2)
    again.load_state_dict(state)
    for batch in expected[3:]:
        found = next(again)
        assert found.target_files == batch.target_files and torch.equal(
            found.source_label, batch.source_label
        )


@needs_dali
def test_bad_files_are_skipped_alike(pair, caplog):
    source, target = pair
    path = source.items[1].image
    path.write_bytes(path.read_bytes()[:-300])
    jpeg = target.items[2].image
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    one, two = both(pair, max_bad=2)
    for _ in range(5):
        a, b = next(one), next(two)
        assert a.source_files == b.source_files and a.target_files == b.target_files
    assert caplog.text.count(f"{path} cannot be read") == 2  # once per loader
    target.items[0].image.unlink()
    with pytest.raises(UserError, match="3 files could not be read"):
        for _ in range(6):
            next(two)


@needs_dali
def test_images_that_dali_would_read_otherwise(pair):
    source, target = pair
    image = Image.open(source.items[0].image)
    image.convert("P").save(source.items[0].image)
    image.convert("L").save(source.items[1].image)
    image.convert("RGBA").save(source.items[2].image)
    turned = Image.Exif()
    turned[0x0112] = 6
    for item in target.items:
        Image.open(item.image).copy().save(item.image, exif=turned)
    one, two = both(pair)
    for _ in range(4):
        a, b = next(one), next(two)
        assert torch.allclose(a.source_image, b.source_image) and torch.allclose(
            a.target_image, b.target_image
        )


def test_end_markers():
    for kind, end in (("PNG", 14), ("JPEG", 2)):
        out = io.BytesIO()
        Image.fromarray(smooth(np.random.default_rng(0))).save(out, kind)
        assert has_end_marker(out.getvalue()) and not has_end_marker(out.getvalue()[:-end])
    assert not has_end_marker(b"") and not has_end_marker(b"GIF89a")


@pytest.mark.parametrize(
    ("crop", "gpu", "installed", "chosen", "why"),
    [
        ((128, 256), False, True, "torch", "small crops"),
        ((512, 512), False, True, "dali", "large crops"),
        ((128, 256), True, True, "dali", "on the GPU"),
        ((1024, 1024), True, False, "torch", "not installed"),
        ((1024, 1024), False, False, "torch", "not installed"),
    ],
)
def test_choice_of_the_loader(crop, gpu, installed, chosen, why, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("fastuda.data.loading.dali_loader.available", lambda: installed)
    assert choose_loader(DataConfig(crop=crop)) == chosen and why in caplog.text
    assert choose_loader(DataConfig(loader="dali")) == "dali"


def test_dali_that_is_not_there(pair, monkeypatch):
    monkeypatch.setattr("fastuda.data.loading.dali_loader.available", lambda: False)
    with pytest.raises(UserError, match="pip install nvidia-dali"):
        build_loader(*pair, config(loader="dali"), IMAGENET, seed=0)
