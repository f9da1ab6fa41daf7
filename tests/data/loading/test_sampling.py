"""Rare-class and class-balanced sampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.sampling import (
    SUB_EPOCH,
    BalancedSampler,
    RareSampler,
    balanced_probabilities,
    class_probabilities,
)
from fastuda.data.tools.index import Index, build_index
from fastuda.models.normalization import IMAGENET
from tests.data.data_files import only, picture, save


def test_rare_class_probabilities_are_the_published_formula():
    frequency = np.array([0.9, 0.09, 0.01, 0.0])
    weight = np.exp((1 - frequency[:3]) / 0.01)
    assert class_probabilities(frequency, 0.01) == pytest.approx([*(weight / weight.sum()), 0])


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.floats(1e-3, 1))
@settings(max_examples=50, deadline=None)
def test_rare_class_probabilities_are_a_distribution(weights, temperature):
    if weights.sum() == 0:
        return
    chances = class_probabilities(weights / weights.sum(), temperature)
    assert np.isfinite(chances).all() and chances.sum() == pytest.approx(1) and (chances >= 0).all()
    assert (chances[weights == 0] == 0).all()


def rare_gta(root):
    """Road everywhere; a bicycle (33) in the last of eight images alone."""
    rng = np.random.default_rng(0)
    for i in range(8):
        label = np.full((20, 36), 7, np.uint8)
        if i == 7:
            label[:6, :6] = 33
        save(picture(rng), root / "images" / f"{i}.png")
        save(label, root / "labels" / f"{i}.png")
    return open_domain(f"gta5:{root}", role="source", data_root=".")


def test_rare_sampling_draws_the_rare_image(tmp_path, cityscapes, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    source = rare_gta(tmp_path / "gta")
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    shown = {}
    for sampling in ("uniform", "rare", "balanced"):
        config = DataConfig(crop=(12, 12), batch_size=2, workers=0, sampling=sampling)
        loader = build_loader(source, target, config, IMAGENET, seed=0)
        batches = [next(loader) for _ in range(30)]
        shown[sampling] = float(
            np.mean([(b.source_label == 18).flatten(1).any(1).float().mean() for b in batches])
        )
        again = build_loader(source, target, config, IMAGENET, seed=0)
        again.load_state_dict({**loader.state_dict(), "given": 29})
        assert next(again).source_files == batches[29].source_files
    assert shown["uniform"] < 0.2 < 0.35 < shown["balanced"] < shown["rare"]


def test_sampler_leaves_out_absent_classes(source, tmp_path):
    index = build_index(only(source, "road", "car"), folder=tmp_path, workers=0, quiet=True)
    sampler = RareSampler(index, 0.01, 2.0)  # nothing fills twice the image
    assert sampler.chances.sum() == pytest.approx(1) and all(map(len, sampler.images))
    absent = Index(index.counts * [1, 0], index.pixels, index.points, ())
    rng = np.random.default_rng(0)
    for sampler in (RareSampler(absent, 0.01, 0.0), BalancedSampler(absent, 0)):
        assert {sampler.draw(k, 0, rng)[0] for k in range(20)} == {0}


def fada_draws(label_to_file, file_to_label, classes, rng):
    """One sub-epoch of the published loop, files shuffled first: the drawn (class, file)."""
    files = {c: list(rng.permutation(names)) for c, names in label_to_file.items()}
    at = dict.fromkeys(files, 0)
    dist, drawn = np.zeros(classes), []
    for _ in range(3000):
        dist1 = dist if dist.sum() == 0 else dist / dist.sum()
        w = 1 / np.log(1 + 1e-2 + dist1)
        c = rng.choice(classes, p=w / w.sum())
        if at[c] > len(files[c]) - 1:
            rng.shuffle(files[c])
            at[c] = 0
        file = files[c][at[c]]
        at[c] += 1
        drawn.append((c, file))
        dist[file_to_label[file]] += 1
    return drawn


def test_balanced_draws_are_those_of_the_published_loop():
    assert balanced_probabilities(np.zeros(4)) == pytest.approx([0.25] * 4)
    weight = 1 / np.log([1.61, 1.31, 1.11, 1.01])
    assert balanced_probabilities(np.array([60, 30, 10, 0])) == pytest.approx(weight / weight.sum())

    rng = np.random.default_rng(0)
    shown = rng.random((200, 6)) < [1.0, 0.9, 0.5, 0.2, 0.05, 0.02]
    shown[0] = True
    counts = shown * rng.integers(1, 100, shown.shape)
    sampler = BalancedSampler(Index(counts, np.full(200, 600), ((),) * 200, ()), seed=3)
    ours = [sampler.draw(k, 0, rng) for k in range(SUB_EPOCH)]
    assert all(shown[image, c] for c, image in ours)
    theirs = fada_draws(
        {c: np.flatnonzero(shown[:, c]) for c in range(6)}, [np.flatnonzero(row) for row in shown], 6, rng
    )
    shares = [np.bincount([c for c, _ in draws], minlength=6) / SUB_EPOCH for draws in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)  # 3 deviations of 3000 draws
    assert np.ptp(shares[0]) > 0.1  # not uniform over the classes
    for c in range(6):  # every image of a class once before any comes again
        images = [image for d, image in ours if d == c]
        n = int(shown[:, c].sum())
        assert len(set(images[:n])) == min(n, len(images))

    assert [sampler.draw(k, 0, rng) for k in (SUB_EPOCH + 7, 12)] == [
        BalancedSampler(Index(counts, np.full(200, 600), ((),) * 200, ()), 3).draw(k, 0, rng)
        for k in (SUB_EPOCH + 7, 12)
    ]
    wanted, image = sampler.draw(5, 1, rng)  # its image cannot be read: another of the class
    assert wanted == ours[5][0] and shown[image, wanted]
