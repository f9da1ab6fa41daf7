"""Shared fixtures and rules: seeds, real data where it is, tiny scenes, skips by capability."""

import ctypes
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
SHARED_DATA = Path(os.environ.get("FASTUDA_TEST_DATA", TESTS.parents[1] / "shared" / "data"))

# a machine without a package index may lack what only some tests, and those that borrow from them, need
if importlib.util.find_spec("hypothesis") is None:
    collect_ignore = [
        str(path)
        for path in Path(__file__).parent.rglob("test_*.py")
        if re.search(r"^from (hypothesis|tests\.ops)\b.* import", path.read_text(), re.MULTILINE)
    ]


# fixtures of a module that train or compile for long: the tests that share one run in one process
COSTLY = ("two_ranks", "whole", "checkout", "emulated", "built")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    # several processes end together when the long tests begin first
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        shared = next((name for name in COSTLY if name in item.fixturenames), None)
        if shared and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(f"{item.module.__name__}:{shared}"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_logger():
    """A command line that ran in this process leaves its handlers, which would count a record twice."""
    logger = logging.getLogger("fastuda")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def real_data() -> Path:
    """Folder with real images and weights; tests that use it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA} (set FASTUDA_TEST_DATA)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory) -> Path:
    """A data root that holds tiny built-in scenes."""
    from fastuda.data.scenes import ScenesConfig, ensure_scenes

    root = tmp_path_factory.mktemp("scenes_data")
    config = ScenesConfig(source=8, target=8, evaluation=3, height=32, width=64)
    ensure_scenes(root / "scenes", config, quiet=True)
    return root


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The CUDA kernels, compiled for the CPU: blocks one after the other, threads from barrier to barrier."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    sources = sorted((TESTS.parent / "csrc" / "cuda").glob("*.cu"))
    emulation = ["-x", "c++", "-include", TESTS / "kernels" / "emulated_cuda.h"]
    options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-ffp-contract=fast"]
    subprocess.run([compiler, *options, *emulation, *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))
