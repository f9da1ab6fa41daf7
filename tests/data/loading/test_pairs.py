"""Matched images: found from Dark Zurich's lists, moved with the target's window, refused where wrong."""

import numpy as np
import pytest
import torch

from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader, choose_loader
from fastuda.data.loading.pairs import read_pairs
from fastuda.errors import UserError
from fastuda.models.normalization import IMAGENET
from tests.data.data_files import ids, picture, save

RNG = np.random.default_rng(1)


@pytest.fixture
def zurich(tmp_path):
    """Three night frames; the day frames, in another order, are their negatives."""
    root = tmp_path / "zurich"
    lines = {"A": [], "B": []}
    for number, sequence in ((1, "A"), (2, "A"), (10, "B")):
        night = picture(RNG)
        save(night, root / f"rgb_anon/train/night/{sequence}/{sequence}_frame_{number}_rgb_anon.png")
        save(255 - night, root / f"rgb_anon/train/day/D/D_frame_{20 - number}_rgb_anon.png")
        lines[sequence].append(
            f"train/night/{sequence}/{sequence}_frame_{number},train/day/D/D_frame_{20 - number}"
        )
    for sequence, rows in lines.items():
        path = root / "corresp/train/night" / f"{sequence}_corresp.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows) + "\n")
    return root


def opened(root):
    return open_domain(f"dark_zurich:{root}", role="target", data_root=".")


def test_matches_of_dark_zurichs_lists(zurich):
    domain = opened(zurich)
    found = read_pairs("corresp/train/night", domain)
    for item, match in zip(domain.items, found, strict=True):
        number = int(item.image.name.split("_")[2])
        assert match == zurich / f"rgb_anon/train/day/D/D_frame_{20 - number}_rgb_anon.png"


@pytest.mark.parametrize("resize", [None, (16, 30)])
def test_matches_share_the_window(zurich, tmp_path, resize):
    gta5 = tmp_path / "gta5"
    for name in ("a.png", "b.png"):
        save(picture(RNG), gta5 / "images" / name)
        save(ids(RNG), gta5 / "labels" / name)
    source = open_domain(f"gta5:{gta5}", role="source", data_root=".")
    config = DataConfig(
        crop=(12, 20), target_resize=resize, batch_size=3, workers=0, pairs="corresp/train/night"
    )
    assert choose_loader(config) == "torch"
    loader = build_loader(source, opened(zurich), config, IMAGENET, seed=0)
    for _ in range(3):
        batch = next(loader)
        night, day = (IMAGENET.invert(x) for x in (batch.target_image, batch.target_match))
        assert day.shape == (3, 3, 12, 20)
        assert (night + day - 255).abs().max() <= (1e-2 if resize is None else 2)
    moved = batch.to("cpu")
    assert torch.equal(moved.target_match, batch.target_match)


def test_what_is_wrong_is_named(zurich):
    domain = opened(zurich)
    with pytest.raises(UserError, match=r"no CSV file nowhere in"):
        read_pairs("nowhere", domain)
    list_b = zurich / "corresp/train/night/B_corresp.csv"
    list_b.write_text("train/night/B/B_frame_10\n")
    with pytest.raises(UserError, match=r"B_corresp.csv has a line that is not image,match"):
        read_pairs("corresp/train/night", domain)
    list_b.write_text("train/night/B/B_frame_10,train/day/D/D_frame_99\n")
    with pytest.raises(UserError, match=r"D_frame_99_rgb_anon.png, which does not exist"):
        read_pairs("corresp/train/night", domain)
    list_b.unlink()
    with pytest.raises(UserError, match=r"has no match for rgb_anon/train/night/B/B_frame_10_rgb_anon.png"):
        read_pairs("corresp/train/night", domain)
    list_b.write_text("x,y\n")
    (zurich / "corresp/train/night/A_corresp.csv").unlink()
    with pytest.raises(UserError, match="names none of the images"):
        read_pairs("corresp/train/night", domain)
    with pytest.raises(UserError, match=r"data\.pairs needs data\.loader=torch"):
        choose_loader(DataConfig(pairs="x", loader="dali"))
