"""A run with HRDA through the command lines: evaluated, predicted, scored, and why it is not exported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastuda.inference.saved import load_run
from fastuda.models.hrda import HRSegmentor
from tests.program import TINY, fastuda


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes_root):
    out = tmp_path_factory.mktemp("hrda") / "run"
    words = ("--method", "self_training", "--data-root", scenes_root, "--out", out, "--steps", 2, "--quiet")
    done = fastuda("train", *words, *TINY, "model.hrda=[16, 32]", "eval.pictures=0")
    assert done.returncode == 0, done.stderr
    return out


def test_the_saved_run_scores_as_the_training_did(run):
    done = fastuda("evaluate", run, "--json", "--ccd")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["iou"] == json.loads((run / "result.json").read_text())["iou"]
    assert scores["mean_ccd"] > 0


def test_it_predicts_images_of_any_size(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (45, 110, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    words = ("--out", tmp_path / "out", "--save", "labels", "probabilities")
    done = fastuda("predict", run, tmp_path / "in", *words)
    assert done.returncode == 0, done.stderr
    labels = np.asarray(Image.open(tmp_path / "out" / "labels" / "a.png"))
    p = np.load(tmp_path / "out" / "probabilities" / "a.npy")
    assert labels.shape == (45, 110) and p.shape[1:] == labels.shape
    _, method, _ = load_run(run, torch.device("cpu"))
    assert isinstance(method.model, HRSegmentor) and method.model.detail == (16, 32)
    done = fastuda("predict", run, tmp_path / "in", *words, "--window", 32, 64)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["onnx", "torch", "safetensors"])
def test_export_says_why_not(run, tmp_path, form):
    out = tmp_path / f"a.{form}"
    done = fastuda("export", run, "--format", form, "--out", out)
    if form == "safetensors":
        assert done.returncode == 0 and isinstance(load_run(out, torch.device("cpu"))[1].model, HRSegmentor)
        return
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.splitlines()[-1].startswith("error: a network with model.hrda cannot be exported")


def test_a_network_of_one_scale_is_a_beginning(run, tmp_path, scenes_root):
    """The backbone and the head of a run at one scale are taken over; the attention starts from scratch."""
    plain = tmp_path / "plain"
    words = ("--method", "source_only", "--data-root", scenes_root, "--steps", 1, *TINY, "eval.pictures=0")
    assert fastuda("train", *words, "--out", plain).returncode == 0
    weights = ("--weights", plain / "model.safetensors")
    done = fastuda("train", *words, *weights, "--out", tmp_path / "two", "model.hrda=[16, 32]")
    assert done.returncode == 0, done.stderr
    assert "from scratch: attention.convs.0.weight" in done.stderr
    method = fastuda("train", "--method", "plca", *words[2:], "--out", tmp_path / "no", "model.hrda=[16, 32]")
    assert method.returncode == 2 and "pairs features with logits" in method.stderr
