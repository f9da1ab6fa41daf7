"""The examples run, and do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.program import TINY, fastuda, untrained_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plca_loss_in_your_trainer(capsys):
    losses = load("plca_loss_in_your_trainer").main(steps=3)
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert "cycles close in their class" in capsys.readouterr().out


def test_supervised_without_full_resolution_logits():
    first, last = load("supervised_without_full_resolution_logits").main()
    assert last < 0.8 * first


def test_aggregate_at_inference():
    labels = load("aggregate_at_inference").main()
    assert labels.shape == (1, 256, 512) and labels.dtype == torch.uint8 and labels.max() < 19


def test_segment_with_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run = untrained_run(tmp_path / "run")
    done = fastuda("export", run, "--out", tmp_path / "run.onnx")
    assert done.returncode == 0, done.stderr
    image = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(image).save(tmp_path / "a.png")
    example = EXAMPLES / "segment_with_onnx.py"
    shown = subprocess.run(
        [sys.executable, "-I", example, tmp_path / "run.onnx", tmp_path / "a.png", tmp_path / "out.png"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    code = example.read_text()
    assert "import fastuda" not in code and "import torch" not in code
    done = fastuda("predict", run, tmp_path / "a.png", "--out", tmp_path / "p", "--quiet")
    assert done.returncode == 0, done.stderr
    ours = np.asarray(Image.open(tmp_path / "p" / "color" / "a.png").convert("RGB"))
    assert (np.asarray(Image.open(tmp_path / "out.png")) == ours).all(-1).mean() > 0.99


def test_before_and_after(tmp_path, scenes_root):
    run = tmp_path / "run"
    args = ["--method", "plca", "--data-root", scenes_root, "--out", run, "--steps", 1, "--quiet"]
    done = fastuda("train", *args, *TINY[:7], "log.tensorboard=false", "log.report=false")
    assert done.returncode == 0, done.stderr
    page = load("before_and_after").main(str(tmp_path / "picture.png"), [str(run)], rows=2)
    assert page.size == (5 * 64 + 4 * 6, 26 + 2 * 32 + 6)
    shown = np.asarray(Image.open(tmp_path / "picture.png"))
    target = np.asarray(Image.open(sorted((scenes_root / "scenes").rglob("val/**/*_leftImg8bit.png"))[0]))
    assert (shown[26 : 26 + 32, 70 : 70 + 64] == target).all()


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
