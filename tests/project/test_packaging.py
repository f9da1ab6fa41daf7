"""Wheel, sdist and editable install, imported from outside and from inside the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = (
    "import fastuda, fastuda.kernels, fastuda.ops, fastuda.train;"
    "from fastuda.config.resolve import shipped;"
    "print(fastuda.__file__, len(shipped()) > 2, fastuda.ops.backends('cycle_match')[-1].name)"
)

pytestmark = pytest.mark.slow


def run(*args, cwd=ROOT, **env):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH",)}
    done = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env={**clean, "FASTUDA_BUILD": "none", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, so that nothing built before is seen."""
    place = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("fastuda", "kernels", "csrc", "docs", "examples", "bench", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, place)
    return place


@pytest.fixture
def python(tmp_path):
    """The interpreter of a fresh environment that sees this one's packages, but no fastuda."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


def pip(python, *args, cwd):
    return run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "--ignore-installed", *args, cwd=cwd,
    )  # fmt: skip


def probe(python, cwd):
    return run(python, "-c", PROBE, cwd=cwd).split()


def test_wheel(checkout, python, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        checkout,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "fastuda/py.typed",
        "fastuda/recipes/scenes.yaml",
        "fastuda/report/templates/report.html",
        "fastuda/report/templates/style.css",
        "fastuda/kernels/__init__.py",
        "fastuda/train.py",
    ):
        assert name in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    pip(python, wheel, cwd=tmp_path)
    assert run(python.parent / "fastuda", "--version", cwd=tmp_path).startswith("fastuda 0.")
    assert "C++ extension: " in run(python.parent / "fastuda", "env", cwd=tmp_path)
    outside = probe(python, tmp_path)
    assert "site-packages" in outside[0] and outside[1:] == ["True", "reference"]
    inside = probe(python, checkout)
    assert inside[0].startswith(str(checkout)) and inside[1:] == ["True", "reference"]


def test_sdist(checkout, python, tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", code, tmp_path, cwd=checkout).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"kernels/__init__.py", "fastuda/recipes/scenes.yaml", "docs/methods/plca.md"} <= names
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", (checkout / "README.md").read_text())
    assert linked and not [link for link in linked if link not in names]
    assert not [n for n in names if n.endswith((".so", ".pyc"))]
    pip(python, tmp_path / name, cwd=tmp_path)
    assert probe(python, tmp_path)[1:] == ["True", "reference"]


def test_editable(checkout, python, tmp_path):
    pip(python, "-e", checkout, cwd=tmp_path)
    found = probe(python, tmp_path)
    assert found[0].startswith(str(checkout)) and found[1:] == ["True", "reference"]
    assert probe(python, checkout)[1:] == ["True", "reference"]


def test_no_kernel_is_in_two_units():
    """One that is in none is a unit by itself."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "units").glob("*.cpp"))
    included = re.findall(r'#include "\.\./cpu/(\w+\.cpp)"', text)
    assert len(included) == len(set(included))
    assert set(included) <= {path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}


@pytest.mark.parametrize("ninja", [True, False])
@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "no C++ compiler was found (no-such-compiler)"), ("false", "false failed (")],
)
def test_an_install_without_a_working_compiler_says_so_and_works(
    checkout, tmp_path, ninja, compiler, message
):
    if not sys.platform.startswith("linux"):
        pytest.skip("the extension is built on Linux")
    # the programs of this environment without its ninja
    path = os.environ["PATH"] if ninja else _programs(tmp_path / "bin", "false", "uname", "ldconfig")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "FASTUDA_BUILD": "auto", "CXX": compiler, "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0 and message in done.stderr, done.stderr
    assert "building without the C++ extension" in done.stderr
    assert not list((checkout / "fastuda").glob("_C*.so"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "FASTUDA_BUILD": "cpu", "CXX": compiler, "PATH": path},
    )  # fmt: skip
    assert done.returncode != 0


def _programs(folder, *names):
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)
