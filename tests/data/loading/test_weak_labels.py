"""Weak labels: written by the index, read from JSON and CSV, moved with the crop, refused where wrong."""

import json

import numpy as np
import pytest
import torch

from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.domains.run import share_classes
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.weak_labels import read_weak_labels
from fastuda.errors import UserError
from fastuda.methods.weakseg import WeakSeg
from fastuda.models import ModelConfig, build_model
from fastuda.models.normalization import IMAGENET
from tests.program import fastuda


@pytest.fixture
def pair(gta5, cityscapes):
    """A source, and a target with the weak labels that its own label maps give, five points per class."""
    source = open_domain(f"gta5:{gta5}", role="source", data_root=".")
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    weak = cityscapes / "weak.json"
    arguments = ("--workers", 0, "--quiet", "--points", 5, "--weak", weak)
    done = fastuda("data", "index", f"cityscapes:{cityscapes}", *arguments)
    assert done.returncode == 0, done.stderr
    held_out = open_domain(f"cityscapes:{cityscapes}", role="evaluation", data_root=".")
    source, target, _ = share_classes(source, target, held_out)
    return source, target, weak


@pytest.mark.parametrize("resize", [None, (20, 60)])
def test_tags_and_points_are_those_of_the_window(pair, resize):
    source, target, path = pair
    config = DataConfig(
        crop=(16, 24), target_resize=resize, batch_size=2, workers=0, loader="torch", weak_labels=str(path)
    )
    loader = build_loader(source, target, config, IMAGENET, seed=3)
    labelled = open_domain(f"cityscapes:{target.root}:train", role="source", data_root=".")
    by_file = {str(item.image): i for i, item in enumerate(labelled.items)}
    seen = 0
    for _ in range(6):
        batch = next(loader)
        assert batch.target_tags.dtype == torch.bool and batch.target_points.shape[::2] == (2, 3)
        for file, tags, points in zip(
            batch.target_files, batch.target_tags, batch.target_points, strict=True
        ):
            label = labelled.read_label(by_file[file])
            assert tags.nonzero().flatten().tolist() == [c for c in np.unique(label).tolist() if c != 255]
            for y, x, c in points[points[:, 2] != 255].tolist():
                assert 0 <= y < 16 and 0 <= x < 24 and tags[c]
                seen += 1
    assert seen > 5
    if resize is None:
        drawer = loader.samples.drawer
        weak = loader.samples.weak
        for index in range(len(target)):
            label = labelled.read_label(by_file[str(target.items[index].image)])
            window = drawer.augment[1].draw(*label.shape, np.random.default_rng(index))
            cut = drawer.augment[1].label(label, window)
            _, points = weak.crop(index, label.shape, window, (16, 24))
            assert all(cut[y, x] == c for y, x, c in points[points[:, 2] != 255].tolist())


def test_csv_says_the_same(pair, tmp_path):
    _, target, path = pair
    lines = ["image,class,y,x"]
    for image, said in json.loads(path.read_text())["images"].items():
        lines += [f"{image.rpartition('/')[2]},{name},," for name in said["tags"]]
        lines += [f"{image},{name.upper()},{y},{x}" for y, x, name in said["points"]]
    (tmp_path / "weak.csv").write_text("\n".join(lines))
    one, two = read_weak_labels(path, target), read_weak_labels(tmp_path / "weak.csv", target)
    assert torch.equal(one.tags, two.tags) and one.points == two.points and one.most_points > 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as weak labels"),
        ('{"images": {"x.png": {}}}', "names no image of cityscapes"),
        ('{"images": {"FIRST": {"tags": ["raod"]}}}', "unknown class 'raod'; did you mean road"),
        ('{"images": {"FIRST": {"tags": ["xyzzy"]}}}', "unknown class 'xyzzy'; there are bicycle"),
        ('{"images": {"FIRST": {"tags": []}}}', "has no entry for 3 of the 4 images"),
        ('{"images": {"FIRST": {"points": [[1, 2]]}}}', "cannot be read as weak labels"),
        ('{"images": {"FIRST": {"points": [[Infinity, 2, "car"]]}}}', "cannot be read as weak labels"),
        ("[" * 100_000, "cannot be read as weak labels"),
    ],
    ids=range(8),
)
def test_what_is_wrong_is_named(pair, tmp_path, text, message):
    _, target, path = pair
    first = next(iter(json.loads(path.read_text())["images"]))
    (tmp_path / "weak.json").write_text(text.replace("FIRST", first))
    with pytest.raises(UserError, match=message):
        read_weak_labels(tmp_path / "weak.json", target)
    with pytest.raises(UserError, match="no file"):
        read_weak_labels(tmp_path / "none.json", target)


def test_a_table_with_an_endless_field(pair, tmp_path):
    (tmp_path / "weak.csv").write_text('image,class\n"' + "x" * 200_000)
    with pytest.raises(UserError, match=r"weak\.csv cannot be read as weak labels: field larger"):
        read_weak_labels(tmp_path / "weak.csv", pair[1])


def test_dali_does_not_carry_them(pair):
    source, target, path = pair
    with pytest.raises(UserError, match=r"data\.loader=torch"):
        build_loader(source, target, DataConfig(loader="dali", weak_labels=str(path)), IMAGENET, seed=0)


def test_target_crop_may_differ(pair):
    source, target, _ = pair
    config = DataConfig(crop=(16, 24), target_crop=(8, 16), batch_size=1, workers=0, loader="torch")
    batch = next(build_loader(source, target, config, IMAGENET, seed=0))
    assert batch.source_image.shape[2:] == (16, 24) and batch.target_image.shape[2:] == (8, 16)


def test_classes_that_the_run_does_not_train_are_left_out(pair, gta5, cityscapes):
    _, _, path = pair
    source = open_domain(f"gta5:{gta5}", role="source", data_root=".")
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    every = read_weak_labels(path, target)
    kept = ["car", "road", "sky"]
    _, some = share_classes(source, target, classes=kept)
    weak = read_weak_labels(path, some)
    numbers = [target.classes.names.index(name) for name in some.classes.names]
    assert sorted(some.classes.names) == kept and torch.equal(weak.tags, every.tags[:, numbers])
    assert every.tags.sum() > weak.tags.sum() > 0
    points = [[(y, x, numbers.index(c)) for y, x, c in image if c in numbers] for image in every.points]
    assert [list(image) for image in weak.points] == points

    # two classes of the target that are one class of the run
    _, merged = share_classes(source, target, classes=kept, aliases=["bus=car"])
    car = merged.classes.names.index("car")
    both = every.tags[:, [target.classes.names.index(name) for name in ("car", "bus")]].any(1)
    assert torch.equal(read_weak_labels(path, merged).tags[:, car], both)


def test_a_file_without_points_gives_none(pair, tmp_path, caplog):
    caplog.set_level("INFO")
    source, target, path = pair
    said = json.loads(path.read_text())["images"]
    tags = tmp_path / "tags.json"
    tags.write_text(json.dumps({"images": {image: {"tags": one["tags"]} for image, one in said.items()}}))
    config = DataConfig(crop=(16, 24), batch_size=2, workers=0, loader="torch", weak_labels=str(tags))
    batch = next(build_loader(source, target, config, IMAGENET, seed=0))
    assert batch.target_tags.any() and batch.target_points is None
    assert f"weak labels {tags}: " in caplog.text and " tags and 0 points of 4 images" in caplog.text
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="small"), len(target.classes))
    weakseg = WeakSeg(WeakSeg.Config(weak_labels="points", category_width=8), model, len(target.classes))
    with pytest.raises(UserError, match=r"weak_labels is points, but the file of data\.weak_labels has no"):
        list(weakseg.phases(batch, 0))
