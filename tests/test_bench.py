"""The bench: every provider computes the op it claims to, the floor is positive, the table is up to date."""

import csv
import dataclasses
import math
import subprocess
import sys

import pytest

from bench import measure, table
from bench.providers import PROVIDERS, CannotExpress
from bench.registry import CASES, Case

SMALL = list(dict.fromkeys(dataclasses.replace(c, pixels=96, channels=min(c.channels, 24)) for c in CASES))


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name not in ("compile", "keops")])
@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c.op}-{c.mode}-{c.dtype}-{c.similarity}")
def test_providers_compute_the_op(case, provider, monkeypatch):
    monkeypatch.setattr(measure, "CHECK_PIXELS", 96)
    try:
        assert 0 <= measure.error_of(case, provider, "cpu") < math.inf
    except CannotExpress:
        assert provider not in ("fastuda", "reference")


def test_a_wrong_provider_gets_no_number(monkeypatch):
    def wrong(case):
        right = PROVIDERS["reference"](case)
        return lambda inputs: 1.1 * right(inputs)

    monkeypatch.setitem(measure.PROVIDERS, "fastuda", wrong)
    monkeypatch.setattr(measure, "CHECK_PIXELS", 96)
    with pytest.raises(ValueError, match="error"):
        measure.error_of(SMALL[0], "fastuda", "cpu")


def test_floor_counts_products_and_bytes():
    association = Case("cycle_association_loss", "fwd+bwd", "float32", 64, 32)
    assert association.products == 5 and association.moved == 0
    assert Case("contrast_softmax", "fwd", "float32", 64, 64).moved == 2 * 4 * 64 * 64
    assert measure.floor_rates(association, "cpu", 1)["floor"] > 0


def test_command_measures_and_writes(tmp_path):
    code = (
        "import sys; from bench import registry, run, table;"
        "run.CASES = [registry.Case('contrast_softmax', 'fwd', 'float32', 64, 64)];"
        "table.write = lambda: None;"
        f"sys.argv = ['run', '--provider', 'fastuda', '--provider', 'reference', '--repeats', '2', "
        f"'--csv', {str(tmp_path / 'out.csv')!r}]; run.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=table.HERE.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["provider"] for row in rows] == ["reference", "fastuda"]
    assert all(float(row["p50"]) > 0 and row["to_floor"] for row in rows)


def test_readme_is_generated_from_the_results():
    before = (table.HERE / "README.md").read_text()
    try:
        table.write()
        assert (table.HERE / "README.md").read_text() == before, "run python -m bench.table"
    finally:
        (table.HERE / "README.md").write_text(before)


def test_a_step_is_compared_with_its_references(tmp_path):
    rows = tmp_path / "rows.csv"
    args = ["--method", "plca", "--backbone", "small", "--crop", "64", "96", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.end_to_end", *args, "--dtype", "float32", "--csv", str(rows)],
        cwd=table.HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with rows.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["fused_s"]) > 0 and 0 < float(row["loss_difference"]) < 1e-3


def test_steps_whose_losses_differ_get_no_time():
    from bench.end_to_end import difference

    assert difference([{"a": 1.0, "b": 2.0}], [{"a": 1.0, "b": 2.5}]) == pytest.approx(0.2)
