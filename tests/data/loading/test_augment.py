"""Colour jitter of the source, as a setting of every run."""

import colorsys
import dataclasses
import itertools

import pytest
import torch

from fastuda.config.resolve import resolve
from fastuda.data.config import DataConfig
from fastuda.data.loading.augment import _saturate, _turn_hue, colour_jitter, jitter_source
from fastuda.data.loading.batch import Batch
from fastuda.engine.stages import stage_config
from fastuda.models.normalization import CAFFE, IMAGENET
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


def oracle(rgb, turn, saturation):
    """Python's own conversion, pixel by pixel."""
    out = torch.empty_like(rgb)
    for y in range(rgb.shape[1]):
        for x in range(rgb.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*rgb[:, y, x].tolist())
            out[:, y, x] = rgb.new_tensor(colorsys.hsv_to_rgb((h + turn) % 1, min(s * saturation, 1), v))
    return out


def test_hue_and_saturation_are_those_of_hsv():
    rgb = torch.rand(4, 3, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rgb[:, :, 0, 0], rgb[:, :, 0, 1] = 0.0, 0.7  # black and grey have no hue
    rgb[:, :, 0, 2] = torch.tensor([0.5, 0.5, 0.1])  # two channels are the largest
    rgb[:, :, 0, 3] = torch.tensor([0.2, 0.9, 0.9])
    turn, saturation = (0.0, 0.2, -0.2, 0.45), (1.0, 0.6, 3.0, 1.2)
    turns, saturations = (torch.tensor(v, dtype=rgb.dtype).view(4, 1, 1, 1) for v in (turn, saturation))
    found = _turn_hue(_saturate(rgb, saturations), turns)
    for mine, image, t, s in zip(found, rgb, turn, saturation, strict=True):
        torch.testing.assert_close(mine, oracle(image, t, s), rtol=0, atol=1e-12)


def given(monkeypatch, *factors):
    """In place of the draws of brightness, contrast, saturation, hue and coin."""
    drawn = itertools.cycle(factors)
    monkeypatch.setattr(
        "fastuda.data.loading.augment._per_image", lambda x, *_: x.new_full((len(x), 1, 1, 1), next(drawn))
    )


@pytest.mark.parametrize("style", ["kornia", "pil"])
@pytest.mark.parametrize("step", range(4))
def test_every_step_is_the_librarys(style, step, monkeypatch, batch):
    """One step at a time, the others' factors being 1, or a turn of 0."""
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = (1.15, 0.9, 1.2, 0.17)[step]
    given(monkeypatch, *factors, 0.0)
    rgb, factor = colours(batch.source_image), factors[step]
    found = colours(colour_jitter(batch.source_image, IMAGENET, 0.2, 1.0, style=style))
    grey = torch.einsum("c,bchw->bhw", LUMA, rgb)[:, None]
    hsv = torch.stack(
        [oracle(image, factor if step == 3 else 0, factor if step == 2 else 1) for image in rgb]
    )
    wanted = {
        "kornia": (rgb + factor - 1, rgb * factor, hsv, hsv),
        "pil": (
            rgb * factor,
            factor * rgb + (1 - factor) * grey.mean((2, 3), keepdim=True),
            factor * rgb + (1 - factor) * grey,
            hsv,
        ),
    }
    torch.testing.assert_close(found, wanted[style][step].clamp(0, 1), rtol=0, atol=1e-5)


def test_the_order_is_drawn(monkeypatch, batch):
    given(monkeypatch, 1.1, 0.7, 1.2, 0.1, 0.0)
    torch.manual_seed(0)
    results = {colour_jitter(batch.source_image, IMAGENET, 0.2, 1.0).sum().item() for _ in range(20)}
    assert len(results) > 1


def test_the_hue_turns_as_far_as_asked(monkeypatch, batch):
    x, turns = batch.source_image[:1].expand(300, -1, -1, -1), []
    monkeypatch.setattr(
        "fastuda.data.loading.augment._turn_hue", lambda rgb, t: turns.append(t.abs().max().item()) or rgb
    )
    colour_jitter(x, IMAGENET, 0.3, 0.8)
    assert 0.29 < max(turns) <= 0.3  # of a circle, as the strength of the others
    turns.clear()
    colour_jitter(x, IMAGENET, 0.5, 1.0, hue=0.2, style="pil")
    assert 0.19 < max(turns) <= 0.2
    with pytest.raises(ValueError, match="choose kornia or pil"):
        colour_jitter(x, IMAGENET, 0.2, 0.8, style="gimp")


@pytest.mark.parametrize("normalization", [IMAGENET, CAFFE])
@pytest.mark.parametrize("style", ["kornia", "pil"])
def test_colours_stay_colours_and_a_share_is_left_alone(normalization, style):
    torch.manual_seed(0)
    x = normalization.apply(torch.randint(0, 256, (64, 3, 8, 8)).float())
    same = {"rtol": 0, "atol": 1e-2}
    torch.testing.assert_close(colour_jitter(x, normalization, 0.2, 0.0, style=style), x, **same)
    torch.testing.assert_close(colour_jitter(x, normalization, 0.0, 1.0, style=style), x, **same)
    y = colour_jitter(x, normalization, 0.2, 0.8, style=style)
    back = normalization.invert(y)
    assert back.min() >= 0 and back.max() <= 255
    changed = (y - x).flatten(1).abs().amax(1) > 1e-3
    assert 0.6 < changed.float().mean() < 0.95


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
