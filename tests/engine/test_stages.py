"""Three stages in one command: folders, labels, resuming, messages."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastuda.config.resolve import resolve
from fastuda.config.schema import TrainConfig
from fastuda.data.domains.classes import class_mapping
from fastuda.data.labels import ClassSet
from fastuda.engine.run import supervised
from fastuda.engine.stages import stage_config, write_pseudo_labels
from fastuda.errors import UserError
from fastuda.system.distributed import World
from tests.program import TINY, fastuda, untrained_run


def arguments(root, out):
    small = ("method.width=8", "checkpoint.every=1", "stages.distill.train.steps=1")
    return [
        "--method",
        "fada",
        "--data-root",
        root,
        "--out",
        out,
        "--steps",
        2,
        "--stages",
        "--quiet",
        *TINY,
        *small,
    ]


def test_three_stages_in_one_command(scenes_root, tmp_path):
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, out))
    assert done.returncode == 0, done.stderr
    header = done.stdout.splitlines()[0].split()
    assert header == ["class", "source", "adapt", "distill"] and "mIoU19" in done.stdout
    steps = [json.loads((out / stage / "result.json").read_text())["step"]
             for stage in ("1_source", "2_adapt", "3_distill")]  # fmt: skip
    assert steps == [2, 2, 1]
    labels = sorted((out / "3_labels" / "labels").rglob("*.png"))
    images = sorted((out / "3_labels" / "images").rglob("*.png"))
    assert len(labels) == len(images) > 2 and all(p.is_symlink() for p in images)
    assert np.asarray(Image.open(labels[0])).shape == np.asarray(Image.open(images[0])).shape[:2]

    # a stage that was cut short is done again; one that ended is left alone
    before = {p: p.stat().st_mtime_ns for p in (out / "2_adapt").rglob("*") if p.is_file()}
    os.remove(out / "3_distill" / "result.json")
    refused = fastuda("train", *arguments(scenes_root, out))
    assert refused.returncode == 2 and "--resume auto" in refused.stderr
    again = fastuda("train", *arguments(scenes_root, out), "--resume", "auto")
    assert again.returncode == 0 and again.stdout.splitlines()[0] == done.stdout.splitlines()[0], again.stderr
    assert {p: p.stat().st_mtime_ns for p in (out / "2_adapt").rglob("*") if p.is_file()} == before

    # the last stage goes on with more steps; one that others began from does not
    more = fastuda("train", *arguments(scenes_root, out), "--resume", "auto", "stages.distill.train.steps=2")
    assert more.returncode == 0, more.stderr
    assert json.loads((out / "3_distill" / "result.json").read_text())["step"] == 2
    assert {p: p.stat().st_mtime_ns for p in (out / "2_adapt").rglob("*") if p.is_file()} == before
    kept = fastuda("train", *arguments(scenes_root, out), "--resume", "auto", "stages.adapt.train.steps=3")
    assert kept.returncode == 2 and "3_distill and 3_labels started from its weights then" in kept.stderr
    shutil.rmtree(out / "3_labels")
    shutil.rmtree(out / "3_distill")
    last = fastuda("train", *arguments(scenes_root, out), "--resume", "auto", "stages.adapt.train.steps=3")
    assert last.returncode == 0, last.stderr
    assert json.loads((out / "2_adapt" / "result.json").read_text())["step"] == 3


def test_the_second_stage_starts_from_the_first(tmp_path):
    config = resolve("gta5_cityscapes_fada", {}, {})
    source, adapt, distill = (
        stage_config(config, stage, tmp_path) for stage in ("source", "adapt", "distill")
    )
    assert source.method == {"name": "source_only", "lovasz_weight": 0.0} == distill.method
    assert (source.train.steps, adapt.train.steps, source.optim.lr, adapt.optim.lr) == (
        20000,
        40000,
        5e-4,
        2.5e-4,
    )
    assert adapt.model.weights == str(tmp_path / "1_source" / "model.safetensors")
    assert adapt.method["name"] == "fada" and distill.model.weights is None
    images = [stage.train.accumulate * stage.data.batch_size for stage in (source, adapt, distill)]
    assert images == [8, 4, 8]
    assert [stage.data.eval_size for stage in (source, adapt, distill)] == [(512, 1024)] * 2 + [(1024, 2048)]
    assert distill.train.sync_bn and not adapt.train.sync_bn
    assert distill.data.source.startswith("folder:") and distill.data.sampling == "uniform"


def test_the_last_stage_of_several_sources_has_one(tmp_path):
    settings = {
        "data.source": "synthia,camvid",
        "data.source_weights": [1, 2],
        "data.classes": ["sky", "car"],
    }
    distill = stage_config(resolve("gta5_cityscapes_plca", settings, {}), "distill", tmp_path).data
    assert distill.source.startswith("folder:") and distill.source_weights is None
    assert distill.classes == ("sky", "car")


def test_the_last_stage_reads_the_target_as_the_target_was_read(tmp_path):
    own = {"source_size": [720, 1280], "source_resize": [8, 9], "target_resize": [512, 600]}
    config = resolve("gta5_cityscapes_plca", {"data.target_crop": [256, 512]}, {"data": own})
    distill = stage_config(config, "distill", tmp_path).data
    assert (distill.crop, distill.source_resize, distill.source_size) == ((256, 512), (512, 600), None)
    same = resolve("gta5_cityscapes_plca", {"data.crop": [256, 512]}, {"stages": {"distill": {"data": own}}})
    distill = stage_config(same, "distill", tmp_path).data
    assert (distill.crop, distill.source_resize, distill.source_size) == ((256, 512), (8, 9), (720, 1280))


def test_the_last_stage_knows_the_names_of_its_labels(tmp_path):
    """Its source has the run's classes, under the target's names."""
    for name, classes in (("source", ["street", "auto", "sky"]), ("target", ["sky", "road", "car", "bus"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "classes.yaml").write_text(f"names: {json.dumps(classes)}")
    domains = {part: f"folder:{tmp_path / part}" for part in ("source", "target")}
    data = {"class_alias": ["road=street", "car=auto", "bus=auto"], "classes": ["street", "auto"]}
    config = resolve(None, {"method.name": "fada"}, {"data": {**domains, **data}})
    for stage in ("source", "adapt"):
        assert stage_config(config, stage, tmp_path).data.class_alias == config.data.class_alias
    distill = stage_config(config, "distill", tmp_path).data
    mapping = class_mapping(
        ClassSet(("road", "car"), ((0, 0, 0), (1, 1, 1))),
        ClassSet(("sky", "road", "car", "bus"), ((0, 0, 0),) * 4),
        distill.classes,
        distill.class_alias,
    )
    assert mapping.shared.names == ("road", "car") and mapping.target == {1: 0, 2: 1, 3: 1}


def test_the_processes_share_the_labelling(scenes_root, tmp_path, monkeypatch):
    class Half(World):
        def agree(self, value):
            return value

        def barrier(self):
            pass

    run = untrained_run(tmp_path / "run", **{"data.data_root": str(scenes_root)})
    asked = []
    for rank in (1, 0):
        monkeypatch.setattr(
            "fastuda.system.distributed.start",
            lambda *of, rank=rank: asked.append(of) or Half(rank, 2, torch.device("cpu")),
        )
        write_pseudo_labels(run, tmp_path / "labels", TrainConfig(device="cpu", timeout=7.0), quiet=True)
        found = [len(list((tmp_path / "labels" / part).rglob("*.png"))) for part in ("images", "labels")]
        assert found == [4 if rank else 8] * 2 and (tmp_path / "labels" / "classes.yaml").is_file() != rank
    assert asked == [("cpu", 7.0)] * 2


def test_a_setting_of_a_stage_leaves_its_others_alone(tmp_path):
    own = {"stages": {"distill": {"data": {"batch_size": 2}, "train": {"steps": 7}}}}
    distill = stage_config(resolve("gta5_cityscapes_fada", {}, own), "distill", tmp_path)
    assert (distill.data.batch_size, distill.train.steps) == (2, 7)
    assert distill.data.crop == (512, 1024) and distill.data.flip == 0.5 and distill.optim.horizon == 31250


STAGES = ("source", "adapt", "distill")


@pytest.mark.parametrize(
    ("flags", "overrides", "steps", "rates"),
    [
        ({}, {}, (20000, 40000, 20000), (5e-4, 2.5e-4, 5e-4)),
        ({"train.steps": 100}, {}, (100, 100, 100), (5e-4, 2.5e-4, 5e-4)),
        ({"train.steps": 100}, {"stages": {"distill": {"train": {"steps": 7}}}}, (100, 100, 7), None),
        ({"train.steps": 100}, {"stages": {"distill": {"train.steps": 7}}}, (100, 100, 7), None),
        ({}, {"optim": {"lr": 0.1}, "train": {"steps": 5}}, (5, 5, 5), (0.1, 0.1, 0.1)),
    ],
)
def test_what_is_said_of_the_run_holds_for_its_stages(flags, overrides, steps, rates, tmp_path):
    config = resolve("gta5_cityscapes_fada", flags, overrides)
    stages = [stage_config(config, stage, tmp_path) for stage in STAGES]
    assert tuple(stage.train.steps for stage in stages) == steps
    assert rates is None or tuple(stage.optim.lr for stage in stages) == rates
    assert [stage.train.accumulate for stage in stages] == [2, 1, 2] and stages[2].data.crop == (512, 1024)


def test_a_composition_begins_with_its_parts_supervised_objective():
    for name, lovasz in (("plca+self_training", 0.75), ("fada+plca", 0.75), ("fada+asanet", 0.0)):
        config = resolve(None, {"method.name": name}, {})
        assert supervised(config, config).method == {"name": "source_only", "lovasz_weight": lovasz}
    own = resolve(None, {"method.name": "self_training+plca"}, {"method": {"plca": {"lovasz_weight": 0.0}}})
    assert supervised(own, own).method["lovasz_weight"] == 0.0


def test_the_baseline_takes_over_what_a_method_of_ones_own_says(tmp_path, monkeypatch):
    (tmp_path / "own_supervised.py").write_text("""
from dataclasses import dataclass
from fastuda.methods import Method

class Own(Method):
    @dataclass(frozen=True)
    class Config(Method.Config):
        lovasz_weight: float = 7.0
        half: float = 3.0

        def supervised(self):
            return {"lovasz_weight": self.half / 2}
""")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_supervised:Own", "plca+own_supervised:Own"):
        config = resolve(None, {"method.name": name}, {})
        assert supervised(config, config).method == {"name": "source_only", "lovasz_weight": 1.5}


def test_unknown_stage():
    config = resolve(None, {}, {"stages": {"warmup": {"train.steps": 3}}})
    with pytest.raises(UserError, match=r"stages has \['warmup'\]; there are source, adapt, distill"):
        stage_config(config, "source", None)
    with pytest.raises(UserError, match=r"stages\.source must be a section of settings, got 3"):
        stage_config(resolve(None, {}, {"stages": {"source": 3}}), "source", None)
