"""The bench: every provider computes the op it claims to, the floor is positive, the table is up to date."""

import csv
import dataclasses
import importlib
import math
import re
import subprocess
import sys

import pytest

import fastuda.ops as F
from bench import end_to_end, loader, measure, published, table
from bench.providers import PROVIDERS, CannotExpress
from bench.registry import CASES, Case
from fastuda import cli
from fastuda.data.config import DataConfig
from fastuda.methods import METHODS

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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_published_formulations_train_as_the_ops_do(method, tmp_path, monkeypatch):
    """In this process, step by step: the losses of what the bench compares."""
    job = {"method": method, "backbone": "small", "crop": [64, 64], "batch": 1, "dtype": "float32",
           "device": "cpu", "settings": {}}  # fmt: skip
    found = []
    for side in end_to_end.SIDES:
        with monkeypatch.context() as patched:
            if side == "published":
                before = {name: getattr(F, name) for name in published.OPS}
                published.use(patched.setattr)
                assert all(getattr(F, name) is not op for name, op in before.items())
            run = end_to_end.trainer(job, tmp_path)
            run.method.train()
            losses = []
            for _ in range(2):
                run._train_step()
                losses.append(end_to_end.losses(run))
            found.append(losses)
    assert end_to_end.difference(*found) < 1e-3 and len(found[0][0]) > 1


def test_a_step_is_timed_on_both_sides(tmp_path):
    rows = tmp_path / "rows.csv"
    args = ["--method", "plca", "--backbone", "small", "--crop", "64", "96", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.end_to_end", *args, "--dtype", "float32", "--csv", str(rows)],
        cwd=table.HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "plca: " in done.stdout and "steps/s against" in done.stdout
    with rows.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["fused_s"]) > 0 and 0 < float(row["loss_difference"]) < 1e-3
    for side in end_to_end.SIDES:
        assert sum(float(row[f"{side}_{part}"]) for part in table.PARTS) == pytest.approx(1, abs=0.01)


def test_steps_whose_losses_differ_get_no_time():
    assert end_to_end.difference([{"a": 1.0, "b": 2.0}], [{"a": 1.0, "b": 2.5}]) == pytest.approx(0.2)


def test_what_bounds_a_step_is_told_from_its_profile():
    row = dict.fromkeys((f"{side}_{part}" for side in ("fused", "published") for part in table.PARTS), "0.1")
    row |= {"method": "fada", "crop": "512x512", "ratio": "1.20", "published_ops": "0.25"}
    row |= {"fused_backbone": "0.6", "fused_heads": "0.2"}
    assert table.bound(row) == pytest.approx(4 / 3)
    told = " ".join(table.reason(row).split())
    assert "Ops are 25% of the published step: with ops that take no time it would be 1.33" in told
    assert "backbone 60% and heads 20%" in told


def test_a_step_waits_for_its_batch(scenes_root):
    config = DataConfig(crop=(16, 32), batch_size=1, workers=0)
    wait, step = loader.data_wait("torch", f"gta5:{scenes_root / 'scenes' / 'gta5'}", config, 2)
    assert 0 < wait < step
    assert "a step waits 0.010 s of 0.500 s" in loader.told(("x jpg", 512, "torch", 3.0, "0.010", "0.500"))


def command(monkeypatch, capsys, name, *words):
    """Exit code, output and errors of ``python -m bench.<name>`` in this process."""
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main)
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


@pytest.mark.parametrize("name", ["run", "end_to_end", "loader", "plot", "table", "adaptation"])
def test_help_says_what_it_does_and_how(name, monkeypatch, capsys):
    readme = (table.HERE / "README.md").stat().st_mtime_ns
    code, text, _ = command(monkeypatch, capsys, name, "--help")
    assert code == 0 and f"python -m bench.{name}" in text.partition("\nexamples:\n")[2]
    options = text.partition("\noptions:\n")[2].partition("\nexamples:\n")[0]
    told = re.findall(r"^  (--[\w-]+)[^\n]*?(?:  +|\n {10,})\S", options, re.MULTILINE)
    assert told == re.findall(r"^  (--[\w-]+)", options, re.MULTILINE)
    assert (table.HERE / "README.md").stat().st_mtime_ns == readme


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --op cycle_mtch", "the bench has no op 'cycle_mtch'; did you mean cycle_match?"),
        ("run --op cycle_match --pixels 5", "no case is of all that was asked for"),
        ("run --repeats 0", "--repeats is 0; it must be at least 1"),
        ("run --threads -1", "--threads is -1; it must be at least 0"),
        ("run --budget nan", "--budget is nan; it must be at least 0"),
        ("run --csv FILE/x.csv", "cannot write FILE/x.csv: "),
        ("run --csv FILE", "FILE has other columns than this bench; choose another --csv"),
        ("run --csv .", "cannot write .: it is no file"),
        ("run --csv=", "argument --csv: the path is empty; see --help"),
        ("end_to_end --method pcla", "unknown method 'pcla'; did you mean plca"),
        ("end_to_end --method plca --set alpha", "'alpha' is neither a flag nor key=value"),
        ("end_to_end --method plca --set alhpa=1", "unknown setting 'method.alhpa'"),
        ("end_to_end --steps 0", "--steps is 0; it must be at least 1"),
        ("end_to_end --csv FILE", "FILE has other columns than this bench; choose another --csv"),
        ("loader --photo FILE", "FILE cannot be read: no image that Pillow knows"),
        ("loader --photo nowhere.jpg", "nowhere.jpg cannot be read: it is not there any more"),
        ("loader --csv FILE/x.csv", "cannot write FILE/x.csv: "),
        ("loader --count 0", "--count is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a,b\n")
    code, out, err = command(monkeypatch, capsys, *words.split())
    assert code == 2 and out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert (tmp_path / "FILE").read_text() == "a,b\n"
