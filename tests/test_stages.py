"""Three stages in one command: folders, labels, resuming, messages."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fastuda.config import resolve
from fastuda.errors import UserError
from fastuda.stages import stage_config
from tests.program import TINY, fastuda


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


def test_a_setting_of_a_stage_leaves_its_others_alone(tmp_path):
    own = {"stages": {"distill": {"data": {"batch_size": 2}, "train": {"steps": 7}}}}
    distill = stage_config(resolve("gta5_cityscapes_fada", {}, own), "distill", tmp_path)
    assert (distill.data.batch_size, distill.train.steps) == (2, 7)
    assert distill.data.crop == (512, 1024) and distill.data.flip == 0.5 and distill.optim.horizon == 31250


def test_unknown_stage():
    config = resolve(None, {}, {"stages": {"warmup": {"train.steps": 3}}})
    with pytest.raises(UserError, match=r"stages has \['warmup'\]; there are source, adapt, distill"):
        stage_config(config, "source", None)
