"""The worked examples of CONTRIBUTING.md are built from its text, and its lists name files that are there."""

import importlib
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastuda.data.domains import catalogue
from fastuda.data.domains.open import open_domain
from fastuda.methods import METHODS
from fastuda.models import ModelConfig, backbones, build_model
from tests.data.data_files import picture, save
from tests.program import ROOT, TINY, environment, fastuda

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def part(title: str) -> str:
    """What stands under a heading."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def examples(title: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", part(title), re.DOTALL | re.MULTILINE)


def example(title: str) -> str:
    (code,) = examples(title)
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


@pytest.fixture
def with_the_example_op(tmp_path):
    """A checkout in which the example op's files are added."""
    for path in ROOT.iterdir():
        if path.name not in ("fastuda", "tests", ".git"):
            (tmp_path / path.name).symlink_to(path)
    own, case = examples("Adding an op")
    for folder, inside, code in (("fastuda", "ops", own), ("tests", "cases", case)):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.name != inside:
                (tmp_path / folder / path.name).symlink_to(path)
        shutil.copytree(ROOT / folder / inside, tmp_path / folder / inside)
        (tmp_path / folder / inside / "pixel_entropy.py").write_text(code, encoding="utf-8")
    exports = tmp_path / "fastuda" / "ops" / "__init__.py"
    text = exports.read_text(encoding="utf-8").replace(
        '    "prototype', '    "pixel_entropy",\n    "prototype', 1
    )
    line = "from fastuda.ops.pixel_entropy import pixel_entropy\n"
    exports.write_text(text.replace("\n__all__", f"{line}\n__all__"), encoding="utf-8")
    return tmp_path


def test_the_tests_take_the_example_op_by_themselves(with_the_example_op):
    names = ("backends", "bad_arguments", "hard_values", "operators")
    files = [f"tests/ops/test_{name}.py" for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-k", "pixel_entropy or every_public_op"]
    command = [sys.executable, "-m", "pytest", *files, *options]
    done = subprocess.run(command, cwd=with_the_example_op, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 30, done.stdout[-1000:]


MEASURED = """
from bench.measure import error_of
from bench.registry import CASES
import fastuda.ops as F
import torch
x = torch.tensor([0.0, 0.0, 1000.0]).reshape(1, 3, 1, 1).repeat(1, 1, 1, 2)
x[..., 1] = 0
errors = [error_of(case, "fastuda", "cpu") for case in CASES if case.op == "pixel_entropy"]
print(F.pixel_entropy(x).flatten().tolist(), errors)
"""


def test_the_bench_takes_the_example_op_by_itself(with_the_example_op):
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, cwd=with_the_example_op, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *entropies, fwd, both = map(float, re.findall(r"[\d.e-]+", done.stdout))
    assert entropies == pytest.approx([0, math.log(3)]) and fwd < 1e-5 and both < 1e-4


def test_named_files_and_folders_are_there():
    own = ("fastuda/methods/entropy.py", "docs/methods/entropy.md", "tests/methods/test_entropy.py")
    own += ("fastuda/recipes/gta5_cityscapes_entropy.yaml",)
    own += ("fastuda/ops/pixel_entropy.py", "tests/cases/pixel_entropy.py")
    for path in re.findall(r"`((?:fastuda|kernels|csrc|bench|tests|docs)/[\w./]*)`", TEXT):
        name = path.replace("test_X.", "test_class_statistics.").replace("/X.", "/class_statistics.")
        name = name.replace("X_math", "class_statistics_math")
        assert path in own or "NAME" in path or (ROOT / name).exists(), path
    for folder in re.findall(r"^  (\w+)/ ", part("The tree"), re.MULTILINE):
        assert (ROOT / "fastuda" / folder).is_dir(), folder
    folders = {path.parent.name for path in (ROOT / "fastuda").glob("*/__init__.py")}
    assert folders == set(re.findall(r"^  (\w+)/ ", part("The tree"), re.MULTILINE))


COMMON = (
    "fastuda/ops/_[!_]*.py",
    *(f"bench/{name}.py" for name in ("case", "gpu_kit", "measure", "providers", "registry", "run", "table")),
    "tests/gpu/[!t_]*.py",
    "csrc/cuda/*.[!c]*",
    "tests/kernels/aot.py",
    "tests/kernels/threads*",
    "tests/conftest.py",
    "tests/kernels/test_kernels.py",
    "tests/ops/test_bad_arguments.py",
    "tests/ops/test_operators.py",
    "mkdocs.yml",
    "docs/ops/index.md",
    "docs/tables.py",
)
"""What every op needs and none is named in."""


def test_an_op_is_its_own_files():
    listed = re.findall(r"^\d+\. (.*)$", part("Adding an op"), re.MULTILINE)
    assert len(listed) <= 9
    for op in ("class_statistics", "contrast_softmax", "category_pool", "smooth_max_pool"):
        for entry in listed[:-1]:
            path = re.findall(r"`([\w./]+)`", entry)[0].replace("X", op)
            assert (ROOT / path).is_file() or (op != "class_statistics" and "cuda" in path), path
        for path in (path for pattern in COMMON for path in ROOT.glob(pattern)):
            assert not re.search(rf"\b{op}\b", path.read_text(encoding="utf-8")), path
