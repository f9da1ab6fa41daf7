"""What the README says runs, runs."""

import re
from pathlib import Path

from fastuda.config.resolve import resolve
from fastuda.data.domains.catalogue import DOMAINS
from fastuda.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_op_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "BackendStatus" in capsys.readouterr().out


def test_it_is_short():
    assert len(README.splitlines()) <= 120 and len(README.split()) <= 1250


def test_every_method_domain_and_configuration_is_named():
    for name in METHODS:
        assert f"| `{name}` |" in README, name
    domains = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name in DOMAINS:
        assert f"`{name}:DIR" in domains, name
    for name in re.findall(r"--config ([a-z0-9_]+)[ `)]", README):
        assert resolve(name, {}, {})
