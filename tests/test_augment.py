"""Colour jitter of the source, as a setting of every run."""

import dataclasses

import pytest
import torch

from fastuda.augment import colour_jitter, jitter_source
from fastuda.config import resolve
from fastuda.data.batch import Batch
from fastuda.data.config import DataConfig
from fastuda.models.weights import IMAGENET
from fastuda.stages import stage_config
from tests.program import TINY, curves, fastuda

LUMA = torch.tensor([0.299, 0.587, 0.114])


def colours(x):
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET.mean, IMAGENET.std))
    return x * std + mean


@pytest.fixture
def batch():
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET.mean, IMAGENET.std))
    rgb = 0.4 + 0.2 * torch.rand(2, 4, 3, 8, 8)
    label = torch.zeros(4, 8, 8, dtype=torch.int64)
    names = ("a", "b", "c", "d")
    return Batch((rgb[0] - mean) / std, label, (rgb[1] - mean) / std, names, names)


def test_only_source_images_change(batch):
    assert jitter_source(batch, DataConfig(), IMAGENET) is batch
    out = jitter_source(batch, DataConfig(jitter=0.5, jitter_hue=0.2), IMAGENET)
    changed = {
        f.name for f in dataclasses.fields(Batch) if getattr(out, f.name) is not getattr(batch, f.name)
    }
    assert changed == {"source_image"}
    moved = (out.source_image - batch.source_image).abs().flatten(1).amax(1)
    assert (moved > 1e-3).all() and moved.unique().numel() == 4  # all of them, each in its own way


def test_a_turn_of_the_hue_keeps_brightness_and_chroma(batch):
    out = colour_jitter(batch.source_image, IMAGENET, 0.0, 1.0, hue=0.5)
    before, after = colours(batch.source_image), colours(out)
    luma = [torch.einsum("c,bchw->bhw", LUMA, x) for x in (before, after)]
    torch.testing.assert_close(luma[0], luma[1], atol=1e-3, rtol=0)
    assert (after - before).abs().max() > 0.05


def test_largest_turn_is_in_circles(batch):
    """Half a circle turns the chroma to its opposite; the draw never reaches beyond the turn asked for."""
    x = batch.source_image[:1].expand(200, -1, -1, -1)
    to_iq = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    chroma = torch.einsum("kc,bchw->bkhw", to_iq, colours(x))
    turned = torch.einsum("kc,bchw->bkhw", to_iq, colours(colour_jitter(x, IMAGENET, 0.0, 1.0, hue=0.2)))
    cosine = torch.nn.functional.cosine_similarity(chroma, turned, dim=1).mean((1, 2)).clamp(-1, 1)
    largest = cosine.acos().max().item() / (2 * torch.pi)
    assert 0.18 < largest < 0.202


def test_a_run_takes_it(scenes_root, tmp_path):
    losses = []
    for name, extra in (("plain", ()), ("jittered", ("data.jitter=0.5", "data.jitter_hue=0.2"))):
        out = tmp_path / name
        args = ("--method", "source_only", "--data-root", scenes_root, "--out", out, "--steps", 1, *TINY)
        assert fastuda("train", *args, *extra).returncode == 0
        losses.append(next(value for _, key, value in curves(out) if key == "train/ce"))
    assert losses[0] != losses[1]


def test_fada_jitters_where_it_is_published_to(tmp_path):
    for name, last in (("gta5_cityscapes_fada", 0.5), ("gta5_cityscapes_fada_vgg16", 0.0)):
        config = resolve(name, {}, {})
        stages = [stage_config(config, stage, tmp_path).data for stage in ("source", "adapt", "distill")]
        assert [s.jitter for s in stages] == [0.0, 0.5, last]
        assert [s.jitter_hue for s in stages] == [0.0, 0.2, 0.4 * last]
