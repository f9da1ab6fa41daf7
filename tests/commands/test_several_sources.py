"""Several sources from the command line: training, resuming, the report, and the data commands."""

import shutil

import pytest
import torch

from fastuda.config.resolve import resolve
from fastuda.engine.run import default_folder, wants_baseline
from fastuda.report.comparison import read_groups
from tests.program import TINY, curves, equal, fastuda, state, without_clocks


@pytest.fixture(scope="module")
def few(scenes_root, tmp_path_factory):
    """A list of three labelled images of the target, and one with a held-out image as well."""
    city = scenes_root / "scenes" / "cityscapes"
    train, val = (sorted((city / "leftImg8bit" / split).rglob("*.png")) for split in ("train", "val"))
    folder = tmp_path_factory.mktemp("lists")
    for name, images in (("few", train[:3]), ("wrong", [*train[:3], val[0]])):
        (folder / f"{name}.txt").write_text("".join(f"{path.relative_to(city)}\n" for path in images))
    return city, folder


def arguments(scenes_root, few, out, *more, split="few.txt"):
    city, folder = few
    return ["--method", "self_training", "--source", f"scenes,cityscapes:{city}:{folder / split}",
            "--data-root", scenes_root, "--backbone", "small", "--out", out, "--steps", 4, *TINY,
            "data.source_weights=[1, 1]", "checkpoint.every=1", "checkpoint.keep=9", "log.every=2",
            *more]  # fmt: skip


def test_a_run_of_two_sources_resumes_bit_for_bit_and_is_reported(scenes_root, few, tmp_path):
    whole, out = tmp_path / "runs" / "whole", tmp_path / "run"
    more = ["data.sampling=rare", "log.report=true"]
    done = fastuda("train", *arguments(scenes_root, few, whole, *more))
    assert done.returncode == 0, done.stderr
    log = (whole / "log.txt").read_text()
    assert "source scenes (all): 8 images, 50.0 % of the draws, 0.5 passes in 4 steps" in log
    assert "few.txt): 3 images, 50.0 % of the draws, 1.3 passes in 4 steps" in log
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step_0000002.pt", out / "checkpoints" / "last.pt")
    shutil.copy(whole / "metrics.csv", out)
    shutil.copy(whole / "config.yaml", out)
    torch.manual_seed(99)
    again = fastuda("train", "--resume", "auto", "--out", out, "--quiet")
    assert again.returncode == 0, again.stderr
    assert equal(without_clocks(state(whole)), without_clocks(state(out))) and curves(whole) == curves(out)
    page = (whole / "report.html").read_text()
    assert "self_training: scenes + cityscapes to scenes (val)" in page
    assert "Measured on 3 held-out images" in page
    (group,) = read_groups([tmp_path / "runs"])
    assert group.domains == "scenes + cityscapes -> scenes (val)"


def test_an_evaluated_image_among_the_sources_stops_the_run_at_once(scenes_root, few, tmp_path):
    out = tmp_path / "run"
    done = fastuda("train", *arguments(scenes_root, few, out, split="wrong.txt"))
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 4 images of the source cityscapes (split ")
    assert "are evaluated, in scenes (split val); the first is " in done.stderr


def test_the_folder_and_the_baseline_of_several_sources():
    config = resolve(None, {"data.source": "scenes,gta5:/x", "data.target": "scenes"}, {})
    assert default_folder(config).name.startswith("scenes+gta5_scenes_plca_") and not wants_baseline(config)
    assert wants_baseline(resolve(None, {"data.source": "scenes,scenes:more", "method.name": "plca"}, {}))


def test_data_commands_take_several_and_refuse_what_is_of_one(scenes_root, few, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    city, folder = few
    both = f"gta5:{scenes_root / 'scenes' / 'gta5'},cityscapes:{city}:{folder / 'few.txt'}"
    done = fastuda("data", "check", both, "--workers", 0, "--quiet")
    assert done.returncode == 0 and done.stdout.count("nothing wrong") == 2, done.stderr
    assert len(list(tmp_path.glob("check_*.png"))) == 2
    done = fastuda("data", "index", both, "--workers", 0, "--quiet")
    assert done.returncode == 0 and done.stdout.count("drawn by data.sampling=rare") == 2
    assert "gta5, split all, in " in done.stdout and "few.txt, in " in done.stdout
    for words in (
        ["cache", both, "--out", "x"],
        ["index", both, "--weak", "w.json"],
        ["check", both, "--sheet", "s"],
    ):
        done = fastuda("data", *words)
        assert done.returncode == 2 and "are 2: take one after another" in done.stderr
    assert not (tmp_path / "x").exists()
