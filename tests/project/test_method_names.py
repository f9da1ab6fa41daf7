"""Nothing outside ``fastuda/methods`` knows one method from another."""

import ast
import dataclasses

import pytest

from fastuda.config.schema import RunConfig
from fastuda.methods import METHODS
from tests.program import ROOT

CLASSES = {cls.__name__ for cls in METHODS.values()}
MODULES = {cls.__module__ for cls in METHODS.values()}
SHARED = {
    field.name
    for section in (RunConfig, *(f.default_factory for f in dataclasses.fields(RunConfig)))
    if dataclasses.is_dataclass(section)
    for field in dataclasses.fields(section)
}
SETTINGS = {f.name for cls in METHODS.values() for f in dataclasses.fields(cls.Config)} - SHARED - {"width"}
PACKAGE = ROOT / "fastuda"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "methods" not in path.parents]
SERVES_METHODS = [PACKAGE / name for name in ("data", "models", "ops")]
"""These have arguments that the methods' settings are named after."""


def known(text: str, settings: set[str] = SETTINGS) -> list[str]:
    """What a file knows of single methods: their names and settings as words or attributes, their classes and
    their modules; what docstrings and help texts tell is no matter."""
    out = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            out += {node.value} & (METHODS.keys() | settings)
        elif isinstance(node, ast.Attribute):
            out += {node.attr} & (CLASSES | settings)
        elif isinstance(node, ast.Name):
            out += {node.id} & CLASSES
        elif isinstance(node, ast.Import):
            out += {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            out += names & MODULES
    return out


def test_no_file_outside_methods_knows_a_method():
    assert {"lovasz_weight", "association_weight"} <= SETTINGS and len(FILES) > 90
    for path in FILES:
        serves = any(folder in path.parents for folder in SERVES_METHODS)
        assert known(path.read_text(), set() if serves else SETTINGS) == [], path


@pytest.mark.parametrize(
    "text",
    [
        "scores['source_only'] = 1",
        "from fastuda.methods.plca import adaptive_lsr",
        "from fastuda.methods import plca",
        "isinstance(method, PLCA)",
        "getattr(config, 'lovasz_weight', 0.0)",
        "config.association_weight",
    ],
)
def test_the_scan_finds_what_knows_a_method(text):
    assert known(text)
