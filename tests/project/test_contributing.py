"""The worked examples of CONTRIBUTING.md are built from its text, and its lists name files that are there."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch

from fastuda.data.domains import catalogue
from fastuda.data.domains.open import open_domain
from fastuda.methods import METHODS
from fastuda.models import ModelConfig, backbones, build_model
from tests.data.data_files import picture, save
from tests.program import ROOT, TINY, fastuda

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def part(title: str) -> str:
    """What stands under a heading."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def example(title: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", part(title), re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture
def method(tmp_path, monkeypatch):
    """The example method as a module that can be imported."""
    (tmp_path / "contributed_entropy.py").write_text(example("Adding a method"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        yield importlib.import_module("contributed_entropy")
    finally:
        METHODS.pop("entropy", None)
        sys.modules.pop("contributed_entropy", None)


def test_the_example_method_trains(method, tmp_path, scenes_root):
    run = tmp_path / "run"
    args = ["--method", "entropy", "--data-root", scenes_root, "--steps", 2, "--out", run, "--quiet"]
    done = fastuda("train", *args, *TINY, "log.every=1", "method.entropy_weight=0.01")
    assert done.returncode == 0, done.stderr
    curves = (run / "metrics.csv").read_text(encoding="utf-8")
    (value,) = re.findall(r"^2,train/entropy_of_target,(.*)$", curves, re.MULTILINE)
    (loss,) = re.findall(r"^2,train/entropy,(.*)$", curves, re.MULTILINE)
    assert 0.3 < float(value) <= 1 and float(loss) == pytest.approx(0.01 * float(value), rel=1e-4)


def test_the_example_method_refuses_a_negative_weight(method, scenes_root):
    done = fastuda("train", "--method", "entropy", "--print-config", "method.entropy_weight=-1")
    assert done.returncode == 2 and "method.entropy_weight" in done.stderr


def test_the_example_data_set_is_read(tmp_path, monkeypatch):
    entry = eval(example("Adding a data set"), dict(vars(catalogue)))
    assert entry.name not in catalogue.DOMAINS
    monkeypatch.setitem(catalogue.DOMAINS, entry.name, entry)
    save(picture(np.random.default_rng(0)), tmp_path / "training" / "image_2" / "000000_10.png")
    save(picture(np.random.default_rng(1)), tmp_path / "testing" / "image_2" / "000001_10.png")
    label = np.resize(np.array((7, 26, 0), np.uint8), (20, 36))
    save(label, tmp_path / "training" / "semantic" / "000000_10.png")
    domain = open_domain(f"{entry.name}:{tmp_path}", role="evaluation", data_root=".")
    assert domain.split == "train" and len(domain) == 1
    values = {7: "road", 26: "car", 0: None}
    names = np.array([*domain.classes.names, *[None] * (256 - len(domain.classes))], object)
    assert (names[domain.read_label(0)] == np.vectorize(values.get, otypes=[object])(label)).all()
    assert len(open_domain(f"{entry.name}:{tmp_path}:test", role="target", data_root=".")) == 1


def test_the_example_backbone_is_built(monkeypatch):
    namespace: dict = {"__name__": "contributed"}
    exec(example("Adding a backbone"), namespace)
    monkeypatch.setitem(backbones.BACKBONES, "plain", lambda caffe: namespace["PlainNet"]())
    model = build_model(ModelConfig(backbone="plain"), 5)
    output = model(torch.randn(2, 3, 64, 96))
    assert output.features.shape == (2, 128, 4, 6) and output.logits.shape == (2, 5, 4, 6)
    output.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_named_files_and_folders_are_there():
    own = ("fastuda/methods/entropy.py", "docs/methods/entropy.md", "tests/methods/test_entropy.py")
    recipe = "fastuda/recipes/gta5_cityscapes_entropy.yaml"
    for path in re.findall(r"`((?:fastuda|kernels|csrc|bench|tests|docs)/[\w./]*)`", TEXT):
        name = path.replace("/X.", "/contrast_softmax.").replace("test_X", "test_contrast_softmax")
        if "contrast_softmax.cu" in name or "X_math" in name:  # which that op does not have
            name = path.replace("/X.", "/class_statistics.").replace("X_math", "class_statistics_math")
        assert path in (*own, recipe) or "NAME" in path or (ROOT / name).exists(), path
    for folder in re.findall(r"^  (\w+)/ ", part("The tree"), re.MULTILINE):
        assert (ROOT / "fastuda" / folder).is_dir(), folder
    folders = {path.parent.name for path in (ROOT / "fastuda").glob("*/__init__.py")}
    assert folders == set(re.findall(r"^  (\w+)/ ", part("The tree"), re.MULTILINE))


def test_an_op_takes_nine_steps_at_most():
    steps = re.findall(r"^(\d+)\. ", part("Adding an op"), re.MULTILINE)
    assert steps == [str(i + 1) for i in range(len(steps))] and len(steps) <= 9
