"""The command lines with ``--device cuda``, from training to the page about it. Run by `make test-gpu`."""

from __future__ import annotations

import json
import math

import pytest

from tests.program import TINY, curves, fastuda

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def done(module, *args):
    """A command's output; it ended well."""
    ran = fastuda(module, *args, "--device", DEVICE)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.timeout(300)
def test_from_training_to_the_page(scenes_root, tmp_path):
    """Every loop over images, every picture and every file that a run leaves."""
    run, settings = tmp_path / "run", [*TINY[:7], "log.tensorboard=false", "eval.every=2", "--quiet"]
    at = ("--data-root", scenes_root, "--out", run)
    done("train", "--method", "plca", "--amp", *at, "--steps", 3, *settings)
    done("train", "--resume", "auto", "--out", run, "--steps", 5, "--quiet")
    assert {step for step, name, _ in curves(run) if name == "val/mIoU19"} >= {2, 4, 5}
    values = [value for _, name, value in curves(run) if name.startswith("train/")]
    assert values and all(math.isfinite(float(value)) for value in values)
    assert len(list((run / "preds").glob("*.png"))) == 3

    plain = json.loads(done("evaluate", run, "--json", "--ccd", "--pictures", 2))
    assert 0 <= plain["mIoU19"] <= 100
    averaged = ("--window", 16, 32, "--scales", 0.5, 1, "--flip", "--amp")
    assert json.loads(done("evaluate", run, "--json", *averaged))["mIoU19"] >= 0

    images = scenes_root / "scenes" / "cityscapes" / "leftImg8bit" / "val"
    kinds = ("labels", "color", "overlay", "probabilities")
    for extra in ((), averaged):
        out = tmp_path / f"predictions{len(extra)}"
        done("predict", run, images, "--out", out, "--quiet", "--save", *kinds, *extra)
        assert all(len([f for f in (out / kind).rglob("*") if f.is_file()]) == 3 for kind in kinds)

    done("report", run, "--quiet")
    assert (run / "report.html").stat().st_size > 10000
    shares = json.loads(done("profile", "--method", "plca", *at[:2], *TINY[:7], "--steps", 2, "--json"))
    assert shares and "backbone" in json.dumps(shares)


@pytest.mark.timeout(300)
def test_three_stages(scenes_root, tmp_path):
    """The labels of the last stage are made on the GPU as well."""
    at = ("--data-root", scenes_root, "--out", tmp_path / "fada")
    settings = [*TINY[:7], "log.tensorboard=false", "log.report=false", "--quiet"]
    done("train", "--method", "fada", "--stages", *at, "--steps", 2, *settings)
    assert (tmp_path / "fada" / "3_distill" / "result.json").is_file()
