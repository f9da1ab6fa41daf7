"""Predicting: what goes in, how it goes through the network, what comes out, what is said of faults."""

import importlib.util
import json
import os
import resource
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
import yaml
from PIL import Image

from fastuda.data.labels import CITYSCAPES, CITYSCAPES_IDS, ClassSet
from fastuda.errors import UserError
from fastuda.inference.predictor import Predictor, label_ids
from fastuda.inference.saved import load_run, override
from fastuda.inference.windows import Inference, probabilities
from fastuda.methods.base import SegPrediction
from tests.program import fastuda, untrained_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("runs") / "plca", "plca")


@pytest.fixture(scope="module")
def method(run):
    return load_run(run, CPU)[1]


def picture(seed=0, size=(48, 80)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 10, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR))


def read(path):
    return np.asarray(Image.open(path))


class Pattern(torch.nn.Module):
    """A method whose logits are a fixed function of single pixels: windows and mirrors cannot change it."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.align_corners = False
        self.sizes = []

    def segment(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        return SegPrediction(torch.stack([images[:, i % 3] * (i + 1) for i in range(5)], 1), False)


def test_windows_and_mirrors_of_a_pixelwise_network_change_nothing():
    image = torch.randn(1, 3, 37, 50)
    whole = probabilities(Pattern().segment(image), (37, 50), False)
    for how in (
        Inference(window=(16, 24)),
        Inference(window=(16, 64), overlap=0.5, flip=True),
        Inference(flip=True),
    ):
        found = how(Pattern(), image)
        assert found.are_probabilities and found.scores.shape == (1, 5, 37, 50)
        torch.testing.assert_close(found.scores, whole)


def test_windows_cover_and_overlap_as_asked():
    method = Pattern()
    Inference(window=(16, 24), overlap=0.0)(method, torch.zeros(1, 3, 32, 48))
    assert method.sizes == [(16, 24)] * 4
    method = Pattern()
    Inference(window=(16, 24), overlap=0.5)(method, torch.zeros(1, 3, 33, 24))
    assert method.sizes == [(16, 24)] * 4  # from rows 0, 8, 16 and 17


def test_the_mean_over_scales_and_mirrors_is_the_literal_one(method):
    image = method.model.input.apply(torch.from_numpy(picture().copy()).permute(2, 0, 1))[None]
    want = 0.0
    for size in ((36, 60), (48, 80)):
        seen = nnf.interpolate(image, size, mode="bilinear", antialias=True)
        for axes in ([], [3]):
            scores = method.predict(seen.flip(axes)).scores  # PLCA's are probabilities
            p = nnf.interpolate(scores, size, mode="bilinear").flip(axes)
            want = want + nnf.interpolate(p, (48, 80), mode="bilinear") / 4
    with torch.no_grad():
        found = Inference(scales=(0.75, 1.0), flip=True)(method, image).scores
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_logits_become_probabilities_after_upsampling():
    logits = torch.randn(1, 4, 3, 5)
    want = nnf.interpolate(logits, (9, 15), mode="bilinear").softmax(1)
    torch.testing.assert_close(probabilities(SegPrediction(logits, False), (9, 15), False), want)
    known = logits.softmax(1)
    assert torch.equal(probabilities(SegPrediction(known, True), (3, 5), False), known)


@pytest.mark.parametrize(
    "wrong", [{"window": (4, 100)}, {"overlap": 1.0}, {"scales": (1.0, 0.0)}, {"scales": ()}]
)
def test_inference_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        Inference(**wrong)


def test_labels_are_the_argmax_of_the_probabilities(method):
    for how in (Inference(), Inference(scales=(1.0, 1.25), flip=True)):
        predictor = Predictor(method, CITYSCAPES, CPU, inference=how)
        plain, none = predictor(picture())
        labels, p = predictor(picture(), with_probabilities=True)
        assert none is None and p.dtype == np.float16 and p.shape == (19, 48, 80)
        assert np.abs(p.astype(np.float32).sum(0) - 1).max() < 0.01
        assert (plain == labels).mean() > 0.99  # rounding may turn a tie
        assert (p.max(0) - np.take_along_axis(p, labels[None].astype(np.int64), 0)[0]).max() < 2e-3


def test_everything_that_can_be_saved(run, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.b.jpg")
    save = ["--save", "labels", "color", "overlay", "probabilities"]
    done = fastuda(
        "predict", run, tmp_path / "a.b.jpg", "--out", tmp_path / "out", *save, "--json", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["images"] == 1 and said["images_per_second"] > 0 and said["bad"] == []
    found = sorted(str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert found == [
        "classes.yaml",
        "color/a.b.png",
        "labels/a.b.png",
        "overlay/a.b.png",
        "probabilities/a.b.npy",
    ]
    scores = np.load(tmp_path / "out" / "probabilities" / "a.b.npy")
    assert scores.dtype == np.float16
    assert (scores.argmax(0) == read(tmp_path / "out" / "labels" / "a.b.png")).mean() > 0.98
    assert yaml.safe_load((tmp_path / "out" / "classes.yaml").read_text())["names"] == list(CITYSCAPES.names)


def test_label_files_in_the_ids_of_cityscapes(run, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for ids in ("train", "cityscapes"):
        done = fastuda(
            "predict", run, tmp_path / "a.png", "--out", tmp_path / ids, "--ids", ids, "--quiet",
            "--save", "labels", "color",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    train, official = (read(tmp_path / ids / "labels" / "a.png") for ids in ("train", "cityscapes"))
    assert np.array_equal(official, np.array(CITYSCAPES_IDS, np.uint8)[train])
    assert np.array_equal(read(tmp_path / "cityscapes/color/a.png"), train)  # a palette picture has no ids
    said = yaml.safe_load((tmp_path / "cityscapes" / "classes.yaml").read_text())
    assert said["ids"] == list(CITYSCAPES_IDS) and said["names"] == list(CITYSCAPES.names)
    assert "ids" not in yaml.safe_load((tmp_path / "train" / "classes.yaml").read_text())


def test_classes_that_cityscapes_lacks_have_no_ids():
    with pytest.raises(UserError, match="--ids cityscapes: Cityscapes has no class named tram"):
        label_ids("cityscapes", ClassSet(("road", "tram"), ((0, 0, 0), (1, 1, 1))))
    assert label_ids("cityscapes", ClassSet(("pavement", "Road"), ((0, 0, 0), (1, 1, 1)))) == (8, 7)
    assert label_ids("train", CITYSCAPES) is None


def test_windows_scales_flip_and_settings_reach_the_network(run, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")

    def labels(*args):
        done = fastuda("predict", run, tmp_path / "a.png", "--out", tmp_path / "out", "--quiet", *args)
        assert done.returncode == 0 and done.stdout == "" and done.stderr == "", done.stderr
        return read(tmp_path / "out" / "labels" / "a.png")

    plain = labels()
    others = [
        labels("--window", 24, 32),
        labels("--scales", 0.5, 1.5),
        labels("--flip"),
        labels("method.test_aggregation=false"),
        labels("--size", 24, 40),
    ]
    assert all(other.shape == plain.shape and (other != plain).any() for other in others)
    assert (labels("--amp", "force-bf16") == plain).mean() > 0.8
    unknown = fastuda(
        "predict", run, tmp_path / "a.png", "--out", tmp_path / "out", "method.agregation=false"
    )
    assert unknown.returncode == 2 and "unknown setting 'method.agregation'; did you mean" in unknown.stderr


def test_settings_reach_the_parts_of_a_composition(tmp_path):
    run = untrained_run(tmp_path / "run", "plca+self_training")
    config, method, _ = load_run(run, CPU)
    image = torch.randn(1, 3, 64, 64)
    on = method.predict(image).scores
    config = override(config, method, ["method.plca.test_aggregation=false"])
    assert (
        method.members["plca"].config is method.config.plca
        and not config.method_config().plca.test_aggregation
    )
    assert not torch.equal(on, method.predict(image).scores)


def test_evaluate_takes_the_same_flags(run, scenes_root, tmp_path):
    def miou(*args):
        done = fastuda("evaluate", run, "--data-root", scenes_root, "--json", *args, "data.workers=0")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["iou"]

    assert miou("--scales", 0.5, 1, "--flip") != miou()


def test_pictures_lie_upright_as_a_viewer_shows_them(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif)
    done = fastuda("predict", run, tmp_path / "a.jpg", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 0 and read(tmp_path / "out" / "overlay" / "a.png").shape == (80, 48, 3)


def test_bad_files_are_named_and_left_out(run, tmp_path):
    folder = tmp_path / "my images é"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "straße 1.png")
    Image.fromarray(np.dstack([picture(1), np.full((48, 80), 9, np.uint8)])).save(folder / "rgba.png")
    Image.fromarray(picture(2)[..., 0]).save(folder / "grey.png")
    whole = (folder / "straße 1.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    done = fastuda("predict", run, folder, "--out", folder / "out", "--json")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert said["images"] == 3 and len(said["bad"]) == 2
    assert (
        "skipped" in done.stderr
        and "half.png" in done.stderr
        and "empty.jpg cannot be read: it is empty" in done.stderr
    )
    assert {f.name for f in (folder / "out" / "labels").iterdir()} == {"straße 1.png", "rgba.png", "grey.png"}
    again = fastuda("predict", run, folder, "--out", folder / "out", "--json", "--quiet")
    assert json.loads(again.stdout)["images"] == 3  # its own pictures are not predicted in turn
    only = fastuda("predict", run, folder / "half.png", "--out", tmp_path / "none")
    assert only.returncode == 2 and "no file could be read" in only.stderr


def test_numbers_of_the_picture_out_of_range(run, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for flags, message in (
        (["--size", 0, 9], "--size is 0; it must be at least 1"),
        (["--scales", "inf"], "every scale must be positive"),
    ):
        done = fastuda("predict", run, tmp_path / "a.png", "--out", tmp_path / "out", *flags)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_images_that_lie_in_out_or_are_not_given(run, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    done = fastuda("predict", run, tmp_path, "--out", tmp_path)
    assert done.returncode == 2 and f"{tmp_path} is --out or lies inside it" in done.stderr
    done = fastuda("predict", run, "method.x=1", "--out", tmp_path)
    assert done.returncode == 2 and "no image, video or folder is given" in done.stderr
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_picture_that_memory_does_not_hold(run, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr("fastuda.inference.windows.Inference._pass", full)
    done = fastuda("predict", run, tmp_path / "a.png", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "out of memory on cpu: slide a --window" in done.stderr


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["missing.png"], "no image, video or folder at"),
        (["."], "no images in"),
        (["a.png", "a.jpg"], "would have the same output name"),
    ],
)
def test_wrong_arguments_give_one_line(run, tmp_path, names, message):
    for name in names[1:] and names:
        Image.fromarray(picture()).save(tmp_path / name)
    done = fastuda("predict", run, *(tmp_path / name for name in names), "--out", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tiled.tif", "plain.png", "grey.tif", "palette.png"])
def test_a_picture_over_pillows_limit_is_read_by_windows(kind, run, tmp_path, monkeypatch):
    """The limit is lowered; what comes out is what comes out of the whole picture at once."""
    rasterio = pytest.importorskip("rasterio")
    image = Image.fromarray(picture(size=(100, 140)))
    path = tmp_path / kind
    if kind == "tiled.tif":
        with rasterio.open(
            path, "w", driver="GTiff", height=100, width=140, count=3, dtype="uint8", tiled=True,
            blockxsize=32, blockysize=32, compress="deflate", photometric="rgb",
        ) as file:  # fmt: skip
            file.write(np.asarray(image).transpose(2, 0, 1))
    else:
        image.convert({"grey.tif": "L", "palette.png": "P"}.get(kind, "RGB")).save(path)
    flags = ("--window", 32, 48, "--save", "labels", "color", "overlay", "probabilities", "--quiet")
    flags += ("data.eval_size=null", "--ids", "cityscapes")
    assert fastuda("predict", run, path, "--out", tmp_path / "whole", *flags).returncode == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    done = fastuda("predict", run, path, "--out", tmp_path / "parts", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    monkeypatch.undo()
    stem = path.stem
    scores = [np.load(tmp_path / out / "probabilities" / f"{stem}.npy") for out in ("whole", "parts")]
    assert np.abs(scores[0].astype(np.float32) - scores[1]).max() < 2e-3
    for kind in ("labels", "color", "overlay"):
        whole, parts = (read(tmp_path / out / kind / f"{stem}.png") for out in ("whole", "parts"))
        assert (whole == parts[..., :3] if kind == "overlay" else whole == parts).mean() > 0.999
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "classes.yaml", "color", "labels", "overlay", "probabilities",
    ]  # fmt: skip


def test_a_picture_over_pillows_limit_without_a_window_or_rasterio(run, tmp_path, monkeypatch):
    Image.fromarray(picture(size=(100, 140))).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    if importlib.util.find_spec("rasterio"):
        done = fastuda("predict", run, tmp_path / "a.png", "--out", tmp_path / "out")
        assert done.returncode == 2 and "read it in parts by --window H W" in done.stderr
    monkeypatch.setitem(sys.modules, "rasterio", None)
    done = fastuda("predict", run, tmp_path / "a.png", "--out", tmp_path / "out", "--window", 32, 32)
    assert done.returncode == 2 and "needs rasterio: pip install 'fastuda[large]'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def film(tmp_path):
    """A film of five frames whose pictures move."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (80, 48))
    for shift in range(5):
        writer.write(np.ascontiguousarray(np.roll(picture(), 8 * shift, 1)[..., ::-1]))
    writer.release()
    return path


def test_a_video(run, film, tmp_path):
    import cv2

    save = ["--save", "labels", "color", "overlay", "probabilities"]
    done = fastuda("predict", run, film, "--out", tmp_path / "out", *save)
    assert done.returncode == 0 and done.stdout.startswith("5 images, "), done.stderr
    assert "5/5" in done.stderr and "images/s" in done.stderr
    names = [f"{i:06d}" for i in range(5)]
    assert sorted(p.stem for p in (tmp_path / "out" / "labels" / "a film").iterdir()) == names
    assert sorted(p.stem for p in (tmp_path / "out" / "probabilities" / "a film").iterdir()) == names
    capture = cv2.VideoCapture(str(tmp_path / "out" / "color" / "a film.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 10 and capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    shown = capture.read()[1][..., ::-1].astype(int)
    drawn = CITYSCAPES.colorize(read(tmp_path / "out" / "labels" / "a film" / "000000.png")).astype(int)
    assert np.abs(shown - drawn).mean() < 25  # lossy, but the same picture
    assert not list((tmp_path / "out").rglob(".*.draft*"))


@pytest.mark.parametrize("limit", [200, 1000])
def test_a_video_that_is_cut_off_is_not_put_in_place(limit, run, film, tmp_path):
    """By a limit on the size of files, which stands for a full disk: OpenCV says nothing of it."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    done = fastuda("predict", run, film, "--out", out, "--save", "overlay", preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    place = out / "overlay" / "a film.mp4"
    assert done.stderr.splitlines()[-1] == f"error: cannot write {place}: File too large"
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_a_file_given_twice_is_predicted_once(run, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    done = fastuda(
        "predict", run, tmp_path, tmp_path / "a.png", "--out", tmp_path / "out", "--json", "--quiet"
    )
    assert done.returncode == 0 and json.loads(done.stdout)["images"] == 1


def test_a_broken_video_is_left_out(run, film, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture()).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "cut.mp4").write_bytes(film.read_bytes()[:100])
    done = fastuda("predict", run, tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode == 1 and "cut.mp4 cannot be read as a video" in done.stderr
    assert (tmp_path / "out" / "labels" / "a.png").is_file()
    assert not list((tmp_path / "out").rglob("cut*"))


def test_without_opencv_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "a.mp4").write_bytes(b"film")
    done = fastuda("predict", run, tmp_path / "a.mp4", "--out", tmp_path / "out")
    assert done.returncode == 2 and "pip install 'fastuda[video]'" in done.stderr
