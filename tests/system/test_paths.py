"""A tilde is the home folder in every flag and setting that takes a path."""

from pathlib import Path

import pytest
import yaml

from fastuda.config.resolve import resolve
from fastuda.system.paths import at_home
from fastuda.system.settings import parse_overrides
from tests.program import fastuda


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_where_a_tilde_is_the_home_folder(home):
    assert at_home("~/x") == f"{home}/x" and at_home("~") == str(home)
    assert at_home("cityscapes:~/data:val") == f"cityscapes:{home}/data:val"
    for text in ("a/~/b", "backup~", "x~/y", "~nobody-of-this-name/x", "", "scenes"):
        assert at_home(text) == text


def test_flags_settings_and_files(home):
    Path("c.yaml").write_text("data: {target: 'cityscapes:~/c'}\n")
    words = ["model.weights=~/w.pth", "data.weak_labels=~/weak.json"]
    config = resolve("c.yaml", {"data.source": "gta5:~/gta5"}, parse_overrides(words))
    assert config.model.weights == f"{home}/w.pth" and config.data.weak_labels == f"{home}/weak.json"
    assert config.data.target == f"cityscapes:{home}/c" and config.data.source == f"gta5:{home}/gta5"


def test_command_lines(home):
    small = ("--source", 2, "--target", 2, "--evaluation", 1, "--height", 32, "--width", 64, "--quiet")
    assert fastuda("data.__main__", "synth", "--out=~/scenes", *small).returncode == 0
    assert (home / "scenes").is_dir() and not Path("~").exists()
    done = fastuda("train", "--config=~/c.yaml")
    assert done.returncode == 2 and f"no configuration file {home}/c.yaml" in done.stderr
    done = fastuda("train", "--weights=~/w.pth", "--source=scenes:~/scenes", "--print-config")
    settings = yaml.safe_load(done.stdout)
    assert settings["model"]["weights"] == f"{home}/w.pth"
    assert settings["data"]["source"] == f"scenes:{home}/scenes"
