"""The domains of a run: several sources, their common classes, lists, and what is held out."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from fastuda.config.resolve import resolve
from fastuda.data.config import DataConfig
from fastuda.data.domains.open import absolute, only_scenes, open_domain, source_title, split_specs
from fastuda.data.domains.run import mapping_of, open_run
from fastuda.errors import UserError
from fastuda.system.settings import build
from tests.data.data_files import folder


def config(source, target, **settings):
    return build(DataConfig, {"source": str(source), "target": str(target), **settings}, "data")


def test_sources_are_joined_by_commas(tmp_path, monkeypatch):
    assert split_specs("gta5,synthia:/x:train") == ("gta5", "synthia:/x:train")
    assert split_specs("gta5:a,b") == ("gta5:a", "b")
    odd = tmp_path / "a,b,c"
    odd.mkdir()
    assert split_specs(f"gta5:{odd}:val,folder:x") == (f"gta5:{odd}:val", "folder:x")
    monkeypatch.setenv("HOME", "/home/u")
    assert split_specs("gta5,synthia:~/x")[1] == "synthia:/home/u/x"
    assert source_title("gta5,folder:/data/mine") == "gta5 + folder:mine"
    assert only_scenes("scenes,scenes:x") and not only_scenes("scenes,gta5")
    for wrong in ("gta5,", ",gta5", "gta5,:x"):
        with pytest.raises(UserError, match="has no name"):
            split_specs(wrong)


def test_only_the_built_in_scenes_take_their_recipe():
    assert resolve(None, {"data.source": "scenes,scenes:more"}, {}).model.backbone == "small"
    assert resolve(None, {"data.source": "scenes,gta5"}, {}).model.backbone == "resnet101"


@pytest.fixture
def three(tmp_path):
    """Sources of road and car, of sky and road, and a target of all three and another."""
    names = {"a": "[road, car]", "b": "[sky, Road]", "t": "[sky, car, road, dog]"}
    for name, classes in names.items():
        folder(tmp_path / name, ("0.png", "1.png"), f"names: {classes}\n")
    return tmp_path


def test_a_class_needs_one_source_that_has_it(three):
    data = config(f"folder:{three}/a,folder:{three}/b", f"folder:{three}/t", eval_split="none")
    (a, b), target, held_out = open_run(data)
    assert target.classes.names == a.classes.names == b.classes.names == ("sky", "car", "road")
    assert not len(held_out)
    for domain, numbers in ((a, (2, 1)), (b, (0, 2))):
        own = open_domain(f"folder:{domain.root}", role="source", data_root=".").read_label(0)
        assert np.array_equal(domain.read_label(0), np.choose(own, numbers))
    assert mapping_of(data).shared == target.classes
    only = open_run(dataclasses.replace(data, classes=("road",)))
    assert only.classes.names == ("road",)
    assert set(np.unique(only.sources[0].read_label(0))) == {0, 255}


def test_a_source_without_a_shared_class_is_named(three):
    folder(three / "c", ("0.png",), "names: [cat, mouse]\n")
    data = config(f"folder:{three}/a,folder:{three}/c", f"folder:{three}/t", eval_split="none")
    with pytest.raises(UserError, match=r"folder has none of the classes car, road; it has cat, mouse"):
        open_run(data)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0]])
def test_weights_that_do_not_fit_the_sources_are_refused(three, weights):
    source = f"folder:{three}/a,folder:{three}/b"
    data = config(source, f"folder:{three}/t", eval_split="none", source_weights=weights)
    with pytest.raises(
        UserError, match=r"data\.source_weights is \[.*\]; folder:.* needs 2 weights, not all 0"
    ):
        open_run(data)
    with pytest.raises(UserError, match=r"data\.source_weights is \[-1\.0, 1\.0\]; each number must be"):
        config(source, f"folder:{three}/t", source_weights=[-1.0, 1.0])


def names_in(root, split, count):
    images = sorted(root.rglob(f"{split}/town/*.png"))[:count]
    return [f"{path.relative_to(root).as_posix()}\n" for path in images]


@pytest.mark.parametrize("place", ["in the data set", "elsewhere", "in the working directory"])
def test_a_labelled_part_of_the_target_is_a_list(cityscapes, gta5, tmp_path, monkeypatch, place):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    where = {"in the data set": cityscapes, "elsewhere": tmp_path, "in the working directory": Path()}[place]
    (where / "few.txt").write_text("".join(names_in(cityscapes / "leftImg8bit", "train", 2)))
    split = str(where / "few.txt") if place == "elsewhere" else "few.txt"
    data = config(f"gta5:{gta5},cityscapes:{cityscapes}:{split}", f"cityscapes:{cityscapes}")
    sources, target, held_out = open_run(data)
    assert [len(domain) for domain in (*sources, target, held_out)] == [5, 2, 4, 2]
    assert all(item.label for item in sources[1].items)
    stored = absolute(data).source
    monkeypatch.chdir(tmp_path)
    assert [len(source) for source in open_run(dataclasses.replace(data, source=stored)).sources] == [5, 2]
    if place == "in the data set":
        assert stored.endswith(":few.txt") and "few.txt:" not in stored


def test_a_listed_part_of_the_target_is_evaluated_as_the_target_is(cityscapes, tmp_path):
    (cityscapes / "few.txt").write_text("".join(names_in(cityscapes / "leftImg8bit", "train", 2)))
    assert open_domain(f"cityscapes:{cityscapes}:few.txt", role="evaluation", data_root=".").split == "val"
    root = folder(tmp_path / "own")
    (root / "few.txt").write_text("a.png\n")
    with pytest.raises(UserError, match=r"which split evaluates folder:few\.txt"):
        open_domain(f"folder:{root}:few.txt", role="evaluation", data_root=".")


def test_a_list_that_is_not_there_is_one_line(cityscapes):
    with pytest.raises(UserError, match=r"no list few\.txt in .*cityscapes or in the working directory"):
        open_domain(f"cityscapes:{cityscapes}:few.txt", role="source", data_root=".")


def test_an_evaluated_image_is_refused_as_a_source(cityscapes, gta5, tmp_path):
    target = f"cityscapes:{cityscapes}"
    names = names_in(cityscapes / "leftImg8bit", "train", 2) + names_in(cityscapes / "leftImg8bit", "val", 1)
    (cityscapes / "few.txt").write_text("".join(names))
    said = (
        r"1 of 3 images of the source cityscapes \(split few\.txt\) are evaluated, in cityscapes"
        r" \(split val\); the first is .*val.*: leave them out"
    )
    with pytest.raises(UserError, match=said):
        open_run(config(f"gta5:{gta5},{target}:few.txt", target))
    with pytest.raises(
        UserError, match=r"2 of 2 images of the source cityscapes \(split val\) are evaluated"
    ):
        open_run(config(f"{target}:val", target))
    os.symlink(cityscapes, tmp_path / "link")  # under another name
    with pytest.raises(UserError, match=r"2 of 2 images"):
        open_run(config(f"cityscapes:{tmp_path / 'link'}:val", target))
    assert len(open_run(config(f"{target}:val", target, eval_split="train")).held_out) == 4
    assert len(open_run(config(f"{target}:val", target, eval_split="none")).sources[0]) == 2
