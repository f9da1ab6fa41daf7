"""A run with HRDA through the command lines: evaluated, predicted, scored and exported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastuda.inference.exporting import Deployed, pictures
from fastuda.inference.saved import load_run
from fastuda.models.hrda import HRSegmentor
from tests.program import TINY, fastuda

CPU = torch.device("cpu")


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
    _, method, _ = load_run(run, CPU)
    assert isinstance(method.model, HRSegmentor) and method.model.detail == (16, 32)
    done = fastuda("predict", run, tmp_path / "in", *words, "--window", 32, 64)
    assert done.returncode == 0, done.stderr


def test_export_of_weights(run, tmp_path):
    out = tmp_path / "a.safetensors"
    assert fastuda("export", run, "--out", out).returncode == 0
    assert isinstance(load_run(out, CPU)[1].model, HRSegmentor)
    done = fastuda("export", run, "--out", tmp_path / "b.safetensors", "--size", 40, 64)
    assert done.returncode == 2 and "--size is for onnx and torch" in done.stderr


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_export_needs_the_size_of_the_images(run, tmp_path, form):
    """Two windows, which overlap, on an image whose height is no multiple of a cell."""
    out = tmp_path / f"a.{form}"
    done = fastuda("export", run, "--format", form, "--out", out)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.splitlines()[-1].startswith("error: a network with model.hrda cannot be exported for")
    if form == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name)
    done = fastuda("export", run, "--format", form, "--out", out, "--size", 40, 64)
    assert done.returncode == 0, done.stderr
    image = pictures(2, 40, 64)
    with torch.no_grad():
        wanted = Deployed(load_run(run, CPU)[1]).eval()(image)[1]
    if form == "torch":
        files = {"fastuda.json": ""}
        graph = torch.export.load(out, extra_files=files).module()
        p, size = graph(image)[1], json.loads(files["fastuda.json"])["size"]
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == ["batch", 3, 40, 64]
        p = torch.from_numpy(session.run(None, {"image": image.numpy()})[1])
        size = json.loads(session.get_modelmeta().custom_metadata_map["fastuda"])["size"]
    torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-5)
    assert size == [40, 64]


def test_a_network_of_one_scale_is_a_beginning(run, tmp_path, scenes_root):
    """The backbone and the head of a run at one scale are taken over; the attention starts from scratch."""
    plain = tmp_path / "plain"
    words = ("--method", "source_only", "--data-root", scenes_root, "--steps", 1, *TINY, "eval.pictures=0")
    assert fastuda("train", *words, "--out", plain).returncode == 0
    weights = ("--weights", plain / "model.safetensors")
    done = fastuda("train", *words, *weights, "--out", tmp_path / "two", "model.hrda=[16, 32]")
    assert done.returncode == 0, done.stderr
    assert "from scratch: attention.convs.0.weight" in done.stderr


def test_plca_with_its_aggregation(tmp_path, scenes_root):
    """Trained, evaluated with the aggregation at test time, and scored again."""
    out = tmp_path / "plca"
    words = ("--method", "plca", "--data-root", scenes_root, "--steps", 1, *TINY, "eval.pictures=0")
    done = fastuda("train", *words, "--out", out, "model.hrda=[16, 32]", "train.baseline=off")
    assert done.returncode == 0, done.stderr
    done = fastuda("evaluate", out, "--json")
    assert json.loads(done.stdout)["iou"] == json.loads((out / "result.json").read_text())["iou"]
    done = fastuda("export", out, "--out", tmp_path / "plca.pt2", "--size", 32, 64)
    assert done.returncode == 0, done.stderr
