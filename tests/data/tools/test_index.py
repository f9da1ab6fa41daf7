"""The index, the samplers that live on it, and the checks of whole data sets."""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastuda.data.config import DataConfig
from fastuda.data.domains.open import open_domain
from fastuda.data.loading.build import build_loader
from fastuda.data.loading.sampling import (
    SUB_EPOCH,
    BalancedSampler,
    RareSampler,
    balanced_probabilities,
    class_probabilities,
)
from fastuda.data.tools import index as index_module
from fastuda.data.tools.check import check_domain, contact_sheet
from fastuda.data.tools.index import Index, build_index, cache_folder
from fastuda.errors import UserError
from fastuda.models.normalization import IMAGENET
from fastuda.system.files import written
from tests.data.data_files import only, picture, save
from tests.program import environment, fastuda


@pytest.fixture
def source(gta5):
    return open_domain(f"gta5:{gta5}", role="source", data_root=".")


def index_of(domain, folder, **kwargs):
    return build_index(domain, folder=folder, workers=0, quiet=True, **kwargs)


def test_counts_and_points(source, tmp_path):
    index = index_of(source, tmp_path)
    for i in range(len(source)):
        label = source.read_label(i)
        assert (index.counts[i] == np.bincount(label.ravel(), minlength=256)[:19]).all()
        assert len(index.first_points(i, 1)) == len(np.unique(label)) <= len(index.points[i])
        assert all(label[y, x] == c for y, x, c in index.points[i])
    assert index.frequency.sum() == pytest.approx(1)


def test_processes_give_the_same(source, tmp_path):
    one = index_of(source, tmp_path / "a")
    two = build_index(source, folder=tmp_path / "b", workers=2, quiet=True)
    assert (one.counts == two.counts).all() and one.points == two.points


def test_only_changed_labels_are_read_again(source, tmp_path, monkeypatch):
    index_of(source, tmp_path)
    read = []
    real = index_module.index_label
    monkeypatch.setattr(index_module, "index_label", lambda d, i, k: (read.append(i), real(d, i, k))[1])
    index_of(source, tmp_path)
    assert read == []
    save(np.full((20, 36), 7, np.uint8), source.items[3].label)
    index = index_of(source, tmp_path)
    assert read == [3] and index.counts[3, 0] == 720 and index.counts[3].sum() == 720


def test_touched_files_are_not_decoded_again(source, tmp_path, monkeypatch):
    before = index_of(source, tmp_path)
    for item in source.items:
        os.utime(item.label, (1, 1))
    monkeypatch.setattr(type(source), "read_label", lambda *_: pytest.fail("decoded"))
    assert (index_of(source, tmp_path).counts == before.counts).all()


def test_a_build_that_was_killed_goes_on(source, tmp_path, monkeypatch):
    whole = index_of(source, tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:37])
    read = []
    real = index_module.index_label
    monkeypatch.setattr(index_module, "index_label", lambda d, i, k: (read.append(i), real(d, i, k))[1])
    again = index_of(source, tmp_path)
    assert (again.counts == whole.counts).all() and read == [2, 3, 4]
    assert index_of(source, tmp_path) and read == [2, 3, 4]


def test_another_label_map_is_another_index(source, tmp_path):
    index_of(source, tmp_path)
    restricted = index_of(only(source, "road", "car"), tmp_path)
    assert restricted.counts.shape == (5, 2) and len(list(tmp_path.glob("*.jsonl"))) == 2


def test_bad_labels_are_listed_and_read_again_once_mended(source, tmp_path):
    path = source.items[1].label
    good = path.read_bytes()
    path.write_bytes(good[:50])
    index = index_of(source, tmp_path)
    assert len(index.bad) == 1 and str(path) in index.bad[0] and not index.counts[1].any()
    path.write_bytes(good)
    assert not index_of(source, tmp_path).bad


def test_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="FASTUDA_CACHE"):
        index_of(source, tmp_path / "file")


def test_index_needs_labels(cityscapes):
    for path in (cityscapes / "gtFine" / "train").rglob("*.png"):
        path.unlink()
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    with pytest.raises(UserError, match="without label"):
        build_index(target)


def test_rare_class_probabilities_are_the_published_formula():
    frequency = np.array([0.9, 0.09, 0.01, 0.0])
    weight = np.exp((1 - frequency[:3]) / 0.01)
    assert class_probabilities(frequency, 0.01) == pytest.approx([*(weight / weight.sum()), 0])


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.floats(1e-3, 1))
@settings(max_examples=50, deadline=None)
def test_rare_class_probabilities_are_a_distribution(weights, temperature):
    if weights.sum() == 0:
        return
    chances = class_probabilities(weights / weights.sum(), temperature)
    assert np.isfinite(chances).all() and chances.sum() == pytest.approx(1) and (chances >= 0).all()
    assert (chances[weights == 0] == 0).all()


def rare_gta(root):
    """Road everywhere; a bicycle (33) in the last of eight images alone."""
    rng = np.random.default_rng(0)
    for i in range(8):
        label = np.full((20, 36), 7, np.uint8)
        if i == 7:
            label[:6, :6] = 33
        save(picture(rng), root / "images" / f"{i}.png")
        save(label, root / "labels" / f"{i}.png")
    return open_domain(f"gta5:{root}", role="source", data_root=".")


def test_rare_sampling_draws_the_rare_image(tmp_path, cityscapes, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    source = rare_gta(tmp_path / "gta")
    target = open_domain(f"cityscapes:{cityscapes}", role="target", data_root=".")
    shown = {}
    for sampling in ("uniform", "rare", "balanced"):
        config = DataConfig(crop=(12, 12), batch_size=2, workers=0, sampling=sampling)
        loader = build_loader(source, target, config, IMAGENET, seed=0)
        batches = [next(loader) for _ in range(30)]
        shown[sampling] = float(
            np.mean([(b.source_label == 18).flatten(1).any(1).float().mean() for b in batches])
        )
        again = build_loader(source, target, config, IMAGENET, seed=0)
        again.load_state_dict({**loader.state_dict(), "given": 29})
        assert next(again).source_files == batches[29].source_files
    assert shown["uniform"] < 0.2 < 0.35 < shown["balanced"] < shown["rare"]


def test_sampler_leaves_out_absent_classes(source, tmp_path):
    index = index_of(only(source, "road", "car"), tmp_path)
    sampler = RareSampler(index, 0.01, 2.0)  # nothing fills twice the image
    assert sampler.chances.sum() == pytest.approx(1) and all(len(found) for found in sampler.images)
    absent = Index(index.counts * [1, 0], index.pixels, index.points, ())
    rng = np.random.default_rng(0)
    for sampler in (RareSampler(absent, 0.01, 0.0), BalancedSampler(absent, 0)):
        assert {sampler.draw(k, 0, rng)[0] for k in range(20)} == {0}


def fada_draws(label_to_file, file_to_label, classes, rng):
    """One sub-epoch of the published loop, files shuffled first: the drawn (class, file)."""
    files = {c: list(rng.permutation(names)) for c, names in label_to_file.items()}
    at = dict.fromkeys(files, 0)
    dist, drawn = np.zeros(classes), []
    for _ in range(3000):
        dist1 = dist if dist.sum() == 0 else dist / dist.sum()
        w = 1 / np.log(1 + 1e-2 + dist1)
        c = rng.choice(classes, p=w / w.sum())
        if at[c] > len(files[c]) - 1:
            rng.shuffle(files[c])
            at[c] = 0
        file = files[c][at[c]]
        at[c] += 1
        drawn.append((c, file))
        dist[file_to_label[file]] += 1
    return drawn


def test_balanced_draws_are_those_of_the_published_loop():
    assert balanced_probabilities(np.zeros(4)) == pytest.approx([0.25] * 4)
    weight = 1 / np.log([1.61, 1.31, 1.11, 1.01])
    assert balanced_probabilities(np.array([60, 30, 10, 0])) == pytest.approx(weight / weight.sum())

    rng = np.random.default_rng(0)
    shown = rng.random((200, 6)) < [1.0, 0.9, 0.5, 0.2, 0.05, 0.02]
    shown[0] = True
    counts = shown * rng.integers(1, 100, shown.shape)
    sampler = BalancedSampler(Index(counts, np.full(200, 600), ((),) * 200, ()), seed=3)
    ours = [sampler.draw(k, 0, rng) for k in range(SUB_EPOCH)]
    assert all(shown[image, c] for c, image in ours)
    theirs = fada_draws(
        {c: np.flatnonzero(shown[:, c]) for c in range(6)}, [np.flatnonzero(row) for row in shown], 6, rng
    )
    shares = [np.bincount([c for c, _ in draws], minlength=6) / SUB_EPOCH for draws in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)  # 3 deviations of 3000 draws
    assert np.ptp(shares[0]) > 0.1  # not uniform over the classes
    for c in range(6):  # every image of a class once before any comes again
        images = [image for d, image in ours if d == c]
        n = int(shown[:, c].sum())
        assert len(set(images[:n])) == min(n, len(images))

    assert [sampler.draw(k, 0, rng) for k in (SUB_EPOCH + 7, 12)] == [
        BalancedSampler(Index(counts, np.full(200, 600), ((),) * 200, ()), 3).draw(k, 0, rng)
        for k in (SUB_EPOCH + 7, 12)
    ]
    wanted, image = sampler.draw(5, 1, rng)  # its image cannot be read: another of the class
    assert wanted == ours[5][0] and shown[image, wanted]


def test_report_of_a_good_data_set(source, tmp_path):
    report = check_domain(source, need_labels=True, workers=0, quiet=True)
    text = report.text()
    assert not report.problems and not report.notes
    assert report.labelled == 5 and report.sizes == {(36, 20): 5}
    assert "nothing wrong" in text and "36x20 (5)" in text and "traffic light" in text
    assert report.pixels.sum() == 5 * 720
    labels = [source.read_label(i) for i in range(5)]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    for name, c in (("road", 0), ("bicycle", 18), ("ignored", 255)):
        share = 100 * sum((label == c).sum() for label in labels) / (5 * 720)
        assert rows[name] == [f"{share:.3f}", str(sum((label == c).any() for label in labels))]
    assert contact_sheet(source, tmp_path / "a" / "sheet.png").stat().st_size > 1000


def test_report_names_everything_that_is_wrong(source, tmp_path):
    items = source.items
    items[0].image.write_bytes(items[0].image.read_bytes()[:99])
    save(np.full((20, 36), 200, np.uint8), items[1].label)
    save(np.full((9, 36), 7, np.uint8), items[2].label)
    items[4].image.write_bytes(items[3].image.read_bytes())
    report = check_domain(source, need_labels=True, workers=2, quiet=True)
    found = "\n".join(report.problems)
    assert len(report.problems) == 3
    assert f"{items[0].image} cannot be read" in found
    assert f"{items[1].label} holds label values [200]" in found
    assert f"{items[2].label} is 36x9, its image is 36x20" in found
    assert report.notes[-1:] == [f"{items[4].image} is the same image as {items[3].image}"]
    contact_sheet(source, tmp_path / "sheet.png")


def run(*args, **kwargs):
    from tests.program import fastuda

    return fastuda("data", *args, **kwargs)


def test_command_check(gta5, tmp_path):
    done = run("check", f"gta5:{gta5}", "--workers", 0, "--quiet", cwd=tmp_path)
    assert done.returncode == 0 and "nothing wrong" in done.stdout, done.stderr
    assert (tmp_path / "check_gta5_all.png").is_file()
    (gta5 / "images" / "00001.png").write_bytes(b"x")
    done = run("check", f"gta5:{gta5}", "--workers", 0, "--no-sheet", cwd=tmp_path)
    assert done.returncode == 1 and "00001.png cannot be read" in done.stdout
    done = run("check", f"gta5:{tmp_path}/nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no folder") and not done.stdout


def test_command_index_writes_weak_labels(gta5, tmp_path):
    weak = tmp_path / "weak.json"
    env = {"FASTUDA_CACHE": str(tmp_path / "cache")}
    done = run("index", f"gta5:{gta5}", "--workers", 0, "--quiet", "--weak", weak, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "bicycle" in done.stdout, done.stderr
    said = json.loads(weak.read_text())
    assert said["classes"][0] == "road" and set(said["images"]) == {f"images/{i:05d}.png" for i in range(5)}
    assert len(list((tmp_path / "cache").glob("gta5-*.jsonl"))) == 1


def test_command_synth_and_list(tmp_path):
    size = ("--source", 2, "--target", 2, "--evaluation", 1, "--height", 32, "--width", 64, "--quiet")
    done = run("synth", "--out", tmp_path / "s", *size, cwd=tmp_path)
    assert done.returncode == 0 and "source: 2 images" in done.stdout, done.stderr
    assert (tmp_path / "s" / "target.png").is_file()
    listed = run("list", cwd=tmp_path)
    assert "cityscapes" in listed.stdout and "folder" in listed.stdout


def test_tags_are_classes_with_more_than_a_share_of_the_image():
    counts, pixels = np.array([[20, 180, 0], [400, 1, 0]]), np.array([200, 1000])
    index = Index(counts, pixels, ((),) * 2, ())
    assert index.tags().tolist() == [[True, True, False], [True, True, False]]
    assert index.tags(0.1).tolist() == [[False, True, False], [True, False, False]]


def test_relative_tags_are_weaksegs_rule_at_any_resolution():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2000, (40, 5)) * (rng.random((40, 5)) < 0.6)
    counts[0, 2], counts[:, 4] = 3, 0
    pixels = np.full(40, 10000)
    m = np.zeros(5)
    for _ in range(10):  # the published loop, in pixels
        m = np.array(
            [c[c > t].mean() if (c > t).any() else 0 for c, t in zip(counts.T, 0.1 * m, strict=True)]
        )
    index = Index(counts, pixels, ((),) * 40, ())
    assert np.allclose(index.mean_share() * 10000, m)
    tags = index.relative_tags()
    assert (tags == (counts > 0.1 * m)).all() and not tags[0, 2] and not tags[:, 4].any()
    assert (Index(4 * counts, 4 * pixels, ((),) * 40, ()).relative_tags() == tags).all()
    # the published trap: Cityscapes' pixels at four times the resolution of the means
    trap = 4 * counts > 0.1 * m
    assert (index.relative_tags(0.025) == trap).mean() > 0.95 and tags.sum() < trap.sum()


def test_what_the_commands_write_is_whole_or_one_line_says_why(gta5, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    for command, flag in (("check", "--sheet"), ("index", "--weak")):
        args = [command, f"gta5:{gta5}", "--workers", 0, "--quiet", flag]
        out = tmp_path / "file" / command
        done = fastuda("data", *args, out)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.splitlines() == [f"error: cannot write {out.parent}: File exists"]
        out = tmp_path / "limited" / command
        done = fastuda(
            "data", *args, out,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)),
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.splitlines() == [f"error: cannot write {out}: File too large"]
        assert list(out.parent.iterdir()) == []
    done = fastuda("data", *args, tmp_path / "weak.csv")
    assert done.returncode == 2 and "--weak writes JSON" in done.stderr


@pytest.mark.parametrize("command", ["list", "check", "index", "cache", "synth"])
def test_help_of_a_command_says_what_it_does_and_how(command):
    text = fastuda("data", command, "--help").stdout
    about, examples = text.partition("\n\n")[2], text.partition("\nexamples:\n")[2]
    assert about[0].isupper() and f"python -m fastuda.data {command}" in examples


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("check gta5 --workers -1", "--workers is -1; it must be at least 0"),
        ("cache gta5 --out copy --edge 0", "--edge is 0; it must be at least 1"),
        ("cache gta5 --out copy --quality 101", "--quality is 101; it must be from 1 to 100"),
        ("cache gta5 --out copy --workers -1", "--workers is -1; it must be at least 0"),
        ("index gta5 --min-share nan", "--min-share is nan; it must be from 0 to 1"),
        ("index gta5 --tag-share -1", "--tag-share is -1.0; it must be from 0 to 1"),
        ("index gta5 --weak weak.CSV", "--weak writes JSON: give weak.CSV another suffix than .csv"),
        ("synth --out s --source 0", "--source is 0; it must be at least 1"),
        ("synth --out s --height 0", "--height is 0; it must be at least 1"),
        ("synth --out s --seed -1", "--seed is -1; it must be at least 0"),
        (f"check gta5:{'a' * 300}", "File name too long"),
        ("index gta5 --weak /", "cannot write /: Is a directory"),
        ("cache gta5 --out=", "argument --out: the path is empty; see --help"),
        ("check", "the following arguments are required: DOMAIN; see --help"),
        ("check gta5 --no-sheet --role target", None),
    ],
)
def test_wrong_numbers_and_places_are_named_before_anything_is_written(
    gta5, words, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    words = [word.replace("gta5", f"gta5:{gta5}") if word == "gta5" else word for word in words.split()]
    done = fastuda("data", *words, "--quiet")
    assert done.returncode == (2 if message else 0), done.stderr
    assert [line.startswith("error: ") and message in line for line in done.stderr.splitlines()] == [True] * (
        message is not None
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", gta5.name}


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    with written(tmp_path / "pipe") as place:
        place.write_text("x")
    reader.join(10)
    assert read == ["x"] and (tmp_path / "pipe").is_fifo()


def test_a_reader_that_has_gone_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    env = {key: value for key, value in environment().items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fastuda.data", "list"]
    done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("said", ["", "~/.cache/fastuda"])
def test_the_folder_of_the_indices(said, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", said)
    assert cache_folder() == Path.home() / ".cache" / "fastuda"


def test_a_list_that_is_no_text(gta5):
    (gta5 / "mine.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"mine\.txt cannot be read as a list of images"):
        open_domain(f"gta5:{gta5}:mine", role="source", data_root=".")


def test_a_file_named_in_another_encoding(gta5, tmp_path):
    for kind in ("images", "labels"):
        os.rename(gta5 / kind / "00000.png", os.fsencode(gta5 / kind) + b"/\xfc.png")
    with open(os.fsencode(gta5 / "images") + b"/\xfc.png", "wb") as file:
        file.write(b"x")
    env = {"PYTHONIOENCODING": "utf-8:strict"}
    done = run("check", f"gta5:{gta5}", "--workers", 0, "--no-sheet", "--quiet", cwd=tmp_path, env=env)
    assert done.returncode == 1 and r"\udcfc.png cannot be read" in done.stdout, done.stderr
