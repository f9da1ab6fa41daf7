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


RANKS = (
    "fastuda/errors.py",
    "fastuda/system",
    "kernels",
    "fastuda/ops",
    "fastuda/models",
    "fastuda/data/labels.py",
    "fastuda/data/config.py",
    "fastuda/data/scenes",
    "fastuda/data/domains",
    "fastuda/data/tools",
    "fastuda/data/loading",
    "fastuda/methods",
    "fastuda/recipes",
    "fastuda/config",
    "fastuda/inference",
    "fastuda/report",
    "fastuda/engine",
    "fastuda/cli.py",
    "fastuda",
)
"""From the ground up: what stands here imports nothing that stands below it in this list."""
COMMANDS = ("fastuda/data/__main__.py", "fastuda/report/__main__.py")
MODULES = sorted(path for folder in ("fastuda", "kernels") for path in (ROOT / folder).rglob("*.py"))


def rank(path: Path) -> int:
    """The place of the longest entry that holds the file."""
    inside = path.relative_to(ROOT).as_posix()
    if inside in COMMANDS:
        return len(RANKS) - 1
    holding = [entry for entry in RANKS if inside == entry or inside.startswith(f"{entry}/")]
    return RANKS.index(max(holding, key=len))


def module_name(path: Path) -> str:
    """As the file is imported; ``kernels`` is installed as ``fastuda.kernels``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastuda", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_run_one_way():
    ranks = {module_name(path): rank(path) for path in MODULES}
    # the packages' own names: who imports fastuda.ops takes nothing of fastuda/__init__.py
    ranks.pop("fastuda")
    for path in MODULES:
        for name in imported(path) & ranks.keys():
            assert ranks[name] <= rank(path), f"{path.relative_to(ROOT)} imports {name}"


def test_every_module_can_be_the_first_import():
    """Each in a process of its own: forked, so that torch is imported once."""
    names = [module_name(path) for path in MODULES if path.name != "__main__.py"]
    code = FIRST_IMPORT.replace("NAMES", repr(names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


FIRST_IMPORT = """
import importlib, importlib.util, os, sys
import torch
for name in NAMES:
    if name.startswith("fastuda.kernels") and importlib.util.find_spec("triton") is None:
        continue
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"import {name}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_no_test_module_imports_another():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert not [name for name in imported(path) if name.startswith("tests.") and ".test_" in name], path


def test_the_references_are_imported_by_ops_alone():
    for path in sorted((ROOT / "fastuda").rglob("*.py")):
        if path.parent.name != "ops":
            names = [name for name in imported(path) if name.startswith("fastuda.ops")]
            assert not [name for name in names if "reference" in name.rsplit(".", 1)[-1]], path


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
