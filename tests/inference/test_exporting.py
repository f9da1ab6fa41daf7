"""Exported files compute what the run computes, at any size, and say what their classes are."""

import json
import resource

import numpy as np
import pytest
import torch

from fastuda.data.labels import CITYSCAPES
from fastuda.errors import UserError
from fastuda.inference.exporting import Deployed, check, pictures
from fastuda.inference.saved import load_run
from tests.program import fastuda, untrained_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """PLCA, whose prediction has the aggregation of features and probabilities in it."""
    return untrained_run(tmp_path_factory.mktemp("runs") / "plca", "plca", **{"model.input": "caffe"})


@pytest.fixture(scope="module")
def method(run):
    return load_run(run, CPU)[1]


SIZES = [(1, 64, 96), (3, 75, 101), (1, 160, 128)]


def test_the_deployed_network_is_the_prediction(method):
    """BGR in 0..255 less a mean, for this run: the normalisation is inside."""
    image = pictures(2, 40, 56)
    seen = method.model.input.apply(image)
    want = torch.nn.functional.interpolate(method.predict(seen).scores, (40, 56), mode="bilinear")
    with torch.no_grad():
        labels, p = Deployed(method)(image)
    torch.testing.assert_close(p, want.detach(), rtol=1e-4, atol=1e-5)
    assert labels.shape == (2, 40, 56) and torch.equal(labels, p.argmax(1))


def test_onnx(run, method, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "plca.onnx"
    done = fastuda("export", run, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["format"] == "onnx" and said["bytes"] == path.stat().st_size and said["difference"] < 1e-5
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [o.shape for o in session.get_outputs()] == [
        ["batch", "height", "width"],
        ["batch", 19, "height", "width"],
    ]
    about = json.loads(session.get_modelmeta().custom_metadata_map["fastuda"])
    assert about["classes"] == list(CITYSCAPES.names) and len(about["palette"]) == 19
    for size in [*SIZES, (1, 8, 8)]:  # the last leaves one feature pixel, whose similarities have no spread
        image = pictures(*size)
        with torch.no_grad():
            want = Deployed(method)(image)[1]
        labels, p = session.run(None, {"image": image.numpy()})
        assert np.abs(p - want.numpy()).max() < 1e-5 and (labels == p.argmax(1)).all()


def test_torch_export(run, method, tmp_path):
    path = tmp_path / "plca.pt2"
    done = fastuda("export", run, "--format", "torch", "--out", path)
    assert done.returncode == 0 and "probabilities within" in done.stdout, done.stderr
    files = {"fastuda.json": ""}
    graph = torch.export.load(path, extra_files=files).module()
    assert json.loads(files["fastuda.json"])["classes"] == list(CITYSCAPES.names)
    for size in SIZES:
        image = pictures(*size)
        with torch.no_grad():
            torch.testing.assert_close(graph(image)[1], Deployed(method)(image)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a.pt2", "a.onnx", "a.safetensors"])
def test_a_full_disk(name, run, tmp_path):
    """A limit on the size of files stands for it; torch's own writer of .pt2 would abort."""
    if name == "a.onnx":
        pytest.importorskip("onnxruntime")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = fastuda("export", run, "--out", tmp_path / name, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: cannot write {tmp_path / name}: File too large"
    assert not list(tmp_path.iterdir())


def test_settings_change_what_is_exported(run, method, tmp_path):
    done = fastuda("export", run, "--out", tmp_path / "a.pt2", "method.test_aggregation=false", "--quiet")
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    graph = torch.export.load(tmp_path / "a.pt2").module()
    image = pictures(*SIZES[0])
    with torch.no_grad():
        assert not torch.allclose(graph(image)[1], Deployed(method)(image)[1], atol=1e-3)


def test_safetensors_alone_is_a_run(run, tmp_path):
    from PIL import Image

    Image.fromarray(pictures(1, 48, 80)[0].permute(1, 2, 0).byte().numpy()).save(tmp_path / "a.png")
    path = tmp_path / "plca.safetensors"
    assert fastuda("export", run, "--out", path).returncode == 0
    for source, out in ((run, "x"), (path, "y")):
        done = fastuda("predict", source, tmp_path / "a.png", "--out", tmp_path / out, "--quiet")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x/labels/a.png").read_bytes() == (tmp_path / "y/labels/a.png").read_bytes()
    refused = fastuda("predict", run / "model.safetensors", tmp_path / "a.png", "--out", tmp_path / "z")
    assert refused.returncode == 2 and "cannot be used without its run folder" in refused.stderr


def test_a_difference_is_found(method):
    with torch.no_grad():
        assert check(method, Deployed(method)) == 0

        def other(image):
            p = Deployed(method)(image)[1].roll(1, 1)
            return p.argmax(1), p

        with pytest.raises(UserError, match="differs from the run"):
            check(method, other)
        with pytest.raises(UserError, match="not those of the largest"):
            check(method, lambda image: (Deployed(method)(image)[0] + 1, Deployed(method)(image)[1]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "a.bin"], "ends in none of .onnx, .pt2, .safetensors"),
        (["--out", "none/a.onnx"], "no folder"),
        (["--out", ".", "--format", "torch"], "is a folder; name the file"),
        (["--out", "/proc/a.safetensors"], "cannot write /proc/a.safetensors"),
        (["--out", "a.pt2", "method.x=1"], "unknown setting 'method.x'"),
    ],
)
def test_wrong_arguments_give_one_line(run, tmp_path, args, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fastuda("export", run, *args)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = fastuda("export", run, "--out", tmp_path / "a.onnx")
    assert done.returncode == 2 and "pip install 'fastuda[export]'" in done.stderr
