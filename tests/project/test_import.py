"""Importing is cheap and needs nothing optional; imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import ROOT, environment

LEAN = """
import sys
import fastuda, fastuda.ops
import torch
optional = {"triton", "nvidia.dali", "apex", "tensorboard", "matplotlib", "cv2"}
assert not optional & set(sys.modules), optional & set(sys.modules)
assert not torch.cuda.is_initialized()
"""

ABSENT = """
import sys
for name in ("triton", "nvidia", "nvidia.dali", "apex", "cv2", "fastuda._C"):
    sys.modules[name] = None
import torch
import fastuda.ops as F
import fastuda.train, fastuda.evaluate, fastuda.predict, fastuda.env, fastuda.engine.trainer
out = F.spatial_aggregate(torch.randn(1, 5, 3))
names = [row.name for row in F.backends("spatial_aggregate", torch.randn(1, 5, 3)) if row.usable]
assert names == ["reference"], names
"""


@pytest.mark.parametrize("code", [LEAN, ABSENT], ids=["lean", "without anything optional"])
def test_import(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


FORBIDDEN = {
    "kernels": ("fastuda.ops", "fastuda.methods", "fastuda.engine.trainer", "fastuda.data", "fastuda.models"),
    "fastuda/ops": (
        "fastuda.methods",
        "fastuda.models",
        "fastuda.data",
        "fastuda.engine.trainer",
        "fastuda.engine.run",
    ),
    "fastuda/models": ("fastuda.methods", "fastuda.data", "fastuda.engine.trainer", "fastuda.engine.run"),
    "fastuda/data": ("fastuda.methods", "fastuda.engine.trainer", "fastuda.engine.run", "fastuda.ops"),
    "fastuda/methods": (
        "fastuda.engine.trainer",
        "fastuda.engine.run",
        "fastuda.kernels",
        "fastuda.ops.reference",
    ),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_one_way(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported(path):
            assert not name.startswith(FORBIDDEN[folder]), f"{path.relative_to(ROOT)} imports {name}"


def test_the_reference_is_imported_by_ops_alone():
    for path in sorted((ROOT / "fastuda").rglob("*.py")):
        if path.parent.name != "ops":
            assert not any("ops.reference" in name for name in imported(path)), path


def test_kernels_are_never_imported_under_their_bare_name():
    for path in [*(ROOT / "fastuda").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not any(name.split(".")[0] == "kernels" for name in imported(path)), path


def test_no_file_loads_code():
    """No unpickling, no unsafe YAML, no shell."""
    banned = (
        "weights_only=False",
        "pickle.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "shell=True",
        "os.system",
    )
    for path in [*(ROOT / "fastuda").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        text = path.read_text()
        assert not [word for word in banned if word in text], path
        assert text.count("torch.load(") == text.count("weights_only=True") or "torch.load(" not in text, path
