"""Several sources: how often each is drawn, and that every loader, rank and resumed run draws the same."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastuda.data.config import DataConfig
from fastuda.data.domains.run import open_run
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.dali_feed import Feed
from fastuda.data.loading.sampling import SOURCE, RareSampler
from fastuda.errors import UserError
from fastuda.models.normalization import IMAGENET


@pytest.fixture
def mixed(gta5, cityscapes, tmp_path, monkeypatch):
    """Settings of GTA5 with two labelled images of Cityscapes' four."""
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    images = sorted((cityscapes / "leftImg8bit" / "train").rglob("*.png"))
    (cityscapes / "few.txt").write_text("".join(f"{path.relative_to(cityscapes)}\n" for path in images[:2]))
    sources = f"gta5:{gta5},cityscapes:{cityscapes}:few.txt"
    return {"source": sources, "target": f"cityscapes:{cityscapes}", "crop": (16, 24), "workers": 0}


def make(settings, seed=0, rank=0, world=1, **more):
    config = DataConfig(**{**settings, "batch_size": 2, **more})
    domains = open_run(config)
    loader = build_loader(
        domains.sources, domains.target, config, IMAGENET, seed=seed, rank=rank, world=world
    )
    return loader, domains


def files(loader, batches):
    return [file for _ in range(batches) for file in next(loader).source_files]


def of_city(drawn):
    return np.mean(["leftImg8bit" in file for file in drawn])


def test_without_weights_every_image_of_all_sources_comes_once_per_pass(mixed):
    loader, domains = make(mixed)
    drawn = files(loader, 7)  # two passes of seven images
    every = {str(item.image) for source in domains.sources for item in source.items}
    assert set(drawn[:7]) == set(drawn[7:]) == every and len(every) == 7
    assert drawn[:7] != drawn[7:]


@pytest.mark.parametrize("sampling", ["uniform", "rare", "balanced"])
@pytest.mark.parametrize(("weights", "share"), [((1, 1), 0.5), ((3, 1), 0.25), ((0, 1), 1.0), (None, 2 / 7)])
def test_sources_are_drawn_by_their_weights(mixed, sampling, weights, share):
    loader, domains = make(mixed, sampling=sampling, source_weights=weights)
    drawer = loader.samples.drawer
    drawn = [next(drawer.candidates(SOURCE, k)) for k in range(1000)]
    assert np.mean([c.domain is domains.sources[1] for c in drawn]) == pytest.approx(share, abs=0.05)
    counts = Counter(c.position for c in drawn if c.domain is domains.sources[1])
    assert set(counts) == {0, 1} and min(counts.values()) > 0.3 * sum(counts.values())
    assert all((c.wanted is None) == (sampling == "uniform") for c in drawn)
    assert drawer.sampler.shares.tolist() == pytest.approx([1 - share, share])


def test_rare_classes_are_those_of_each_source(mixed):
    samplers = make(mixed, sampling="rare")[0].samples.drawer.sampler.samplers
    assert all(isinstance(sampler, RareSampler) for sampler in samplers)
    assert [max(images.max() for images in sampler.images) for sampler in samplers] == [4, 1]


def test_a_single_source_ignores_its_weight(mixed):
    alone = {**mixed, "source": mixed["source"].split(",")[0]}
    assert files(make(alone)[0], 5) == files(make(alone, source_weights=(0.3,))[0], 5)


def test_labels_are_read_by_the_map_of_their_source(mixed):
    loader, domains = make(mixed, source_weights=(1, 1), flip=0.0, crop=(20, 36))
    by_file = {
        str(item.image): torch.from_numpy(source.read_label(i).astype(np.int64))
        for source in domains.sources
        for i, item in enumerate(source.items)
    }
    for _ in range(6):
        batch = next(loader)
        for file, label in zip(batch.source_files, batch.source_label, strict=True):
            assert torch.equal(label, by_file[file])


def test_a_part_of_the_target_has_the_targets_scale(mixed):
    """Whatever size the source is resized to."""
    loader, _ = make(mixed, source_size=(40, 72), target_size=(20, 36))
    drawer = loader.samples.drawer
    sizes = {
        (c.domain.name, drawer.window(c, (20, 36), np.zeros((20, 36), np.uint8))[0][:2])
        for c in (next(drawer.candidates(SOURCE, k)) for k in range(14))
    }
    assert sizes == {("gta5", (40, 72)), ("cityscapes", (20, 36))}


def test_ranks_share_the_draws_and_a_resumed_loader_goes_on(mixed):
    settings = {"source_weights": (1, 1), "sampling": "rare"}
    whole = files(make(mixed, batch_size=1, **settings)[0], 8)
    ranks = [make(mixed, batch_size=1, rank=rank, world=2, **settings)[0] for rank in range(2)]
    assert [file for _ in range(4) for loader in ranks for file in files(loader, 1)] == whole
    first, again = make(mixed, **settings)[0], make(mixed, **settings)[0]
    expected = files(first, 4)
    assert 0 < of_city(expected) < 1
    state = make(mixed, **settings)[0].state_dict() | {"given": 2}
    again.load_state_dict(state)
    assert files(again, 2) == expected[4:]


def test_dali_is_fed_the_same_images_and_labels(mixed):
    loader, _ = make(mixed, source_weights=(1, 1), sampling="rare")
    feed = Feed(make(mixed, source_weights=(1, 1), sampling="rare")[0].samples.drawer, 0, 2, 0, 1)
    for step in range(4):
        batch = next(loader)
        for place in range(2):
            arrays = feed(SimpleNamespace(idx_in_epoch=2 * step + place))
            notes = json.loads(bytes(arrays[-1]))
            assert notes["source"] == batch.source_files[place] and notes["complete"]
            assert np.array_equal(arrays[7], batch.source_label[place].numpy())


def test_an_unreadable_image_is_replaced_within_its_source(mixed):
    loader, domains = make(mixed, source_weights=(0, 1))
    Path(domains.sources[1].items[0].image).write_bytes(b"x")
    assert set(files(loader, 5)) == {str(domains.sources[1].items[1].image)}
    assert len(loader.bad) == 1


def test_sources_in_other_classes_are_refused(mixed, gta5):
    config = DataConfig(**mixed)
    domains = open_run(config)
    other = domains.sources[0].renumber(domains.classes.pick("road"), {0: 0})
    with pytest.raises(UserError, match="gta5 and cityscapes have different classes"):
        build_loader((domains.sources[1], other), domains.target, config, IMAGENET, seed=0)
