"""The bench: every provider computes the op it claims to, the floor is positive, the table is up to date."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastuda
import fastuda.ops as F
from bench import beside, end_to_end, gpu_check, gpu_kit, loader, measure, published, table, timing, turns
from bench.case import CannotExpress, Case
from bench.gpu_stages import Work
from bench.providers import PROVIDERS
from bench.registry import CASES
from fastuda import cli
from fastuda.data.config import DataConfig
from fastuda.engine.trainer import Trainer
from fastuda.methods import METHODS
from fastuda.models import ModelConfig, build_model
from fastuda.models.norms import fuse_norms
from fastuda.ops import _backends

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
    assert timing.floor_rates(association, "cpu", 1)["floor"] > 0


def test_command_measures_and_writes(tmp_path):
    code = (
        "import sys; from bench import case, run, table;"
        "run.CASES = [case.Case('contrast_softmax', 'fwd', 'float32', 64, 64)];"
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
            names, losses = end_to_end.watch_losses(run), []
            for _ in range(2):
                run.step()
                losses.append(end_to_end.losses(run, names))
            found.append(losses)
    assert end_to_end.difference(*found) < 1e-3 and len(found[0][0]) > 1


def test_a_plain_network_has_none_of_our_layers(monkeypatch):
    """Its logits are the same."""
    model = build_model(ModelConfig(backbone="mobilenet_v2"), 5).eval()
    fuse_norms(model)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        wanted = model(x).logits
        published.plain(monkeypatch.setattr)
        monkeypatch.setattr(_backends, "select", lambda op, *_, **__: pytest.fail(f"{op} of fastuda ran"))
        assert torch.allclose(model(x).logits, wanted, atol=1e-5)


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
    assert float(row["plain_s"]) > 0 and float(row["plain_ratio"]) > 0 and "x plain torch" in done.stdout
    for side in end_to_end.SIDES:
        assert sum(float(row[f"{side}_{part}"]) for part in table.PARTS) == pytest.approx(1, abs=0.01)


def test_every_side_takes_as_many_timed_steps(tmp_path, monkeypatch):
    """A side's own functions are in place during its steps alone."""
    job = {"method": "plca", "backbone": "small", "crop": [32, 32], "batch": 1, "dtype": "float32",
           "device": "cpu", "settings": {}, "steps": 2, "sides": list(published.SIDES)}  # fmt: skip
    ours, used = F.aspp, []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda run: (used.append(F.aspp is ours), step(run)))
    times = turns.seconds(job, tmp_path)
    assert {name: len(of) for name, of in times.items()} == {"fused": 2, "published": 2, "plain": 2}
    assert used == [True, False, False, False, False, True, True, False, False] and F.aspp is ours


def test_an_option_is_timed_beside_steps_without_it(tmp_path):
    rows = tmp_path / "results" / "beside.csv"
    args = ["--method", "self_training", "--set", "mask_ratio=0.7", "--beside", "mask_ratio=0"]
    args += ["--backbone", "small", "--crop", "32", "64", "--steps", "1", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.end_to_end", *args, "--threads", "1", "--csv", str(rows)],
        cwd=table.HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "self_training mask_ratio=0.7: " in done.stdout and "times a step with mask_ratio=0" in done.stdout
    with rows.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert tuple(row) == beside.COLUMNS and row["settings"] == "mask_ratio=0.7"
    ratio = float(row["seconds"]) / float(row["beside_s"])
    assert float(row["ratio"]) == pytest.approx(ratio, abs=0.1 * ratio)


def test_steps_whose_losses_differ_get_no_time():
    assert end_to_end.difference([{"a": 1.0, "b": 2.0}], [{"a": 1.0, "b": 2.5}]) == pytest.approx(0.2)


@pytest.mark.parametrize("in_float32", [1.0, 1.5])
def test_sides_that_differ_in_bfloat16_are_compared_in_float32(in_float32, monkeypatch):
    loss = {"bfloat16": {"fused": 1.0, "published": 1.2}, "float32": {"fused": 1.0, "published": in_float32}}
    monkeypatch.setattr(
        end_to_end, "side", lambda job, name, timeout: {"losses": [{"a": loss[job["dtype"]][name]}]}
    )
    job = {"method": "plca", "dtype": "bfloat16", "steps": 3}
    sides = {name: end_to_end.side(job, name, 1.0) for name in end_to_end.SIDES}
    if in_float32 == 1.0:
        assert end_to_end.agreement(job, "published", sides) == "0.0e+00 (float32)"
    else:
        with pytest.raises(end_to_end.Failed, match=r"published: .* differ by 0\.33 in float32"):
            end_to_end.agreement(job, "published", sides)


def test_what_ops_alone_could_gain_in_a_step():
    assert table.bound({"published_ops": "0.25"}) == pytest.approx(4 / 3)


@pytest.mark.parametrize("groups", [1, 16])
def test_the_floor_of_networks_counts_forward_and_both_gradients(groups, monkeypatch):
    monkeypatch.setattr(timing, "product_rate", lambda dtype, device: 1000.0)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    layer = torch.nn.Conv2d(16, 32, 3, padding=1, groups=groups)
    operations = 3 * 2 * (2 * 8 * 8) * (32 * 9 * 16 // groups)
    assert timing.networks_floor(lambda: layer(x).sum().backward(), "float32", "cpu") == operations / 1000


def test_a_step_waits_for_its_batch(scenes_root):
    config = DataConfig(crop=(16, 32), batch_size=1, workers=0)
    wait, step = loader.data_wait("torch", f"gta5:{scenes_root / 'scenes' / 'gta5'}", config, 2)
    assert 0 < wait < step
    assert "a step waits 0.010 s of 0.500 s" in loader.line_of(("x jpg", 512, "torch", 3.0, "0.010", "0.500"))


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
        ("run --op cycle_match --pixels 5", "no case matches --op, --mode"),
        ("run --repeats 0", "--repeats is 0; it must be at least 1"),
        ("run --threads -1", "--threads is -1; it must be at least 0"),
        ("run --budget nan", "--budget is nan; it must be at least 0"),
        ("run --csv FILE/x.csv", "cannot write FILE/x.csv: "),
        ("run --csv FILE", "FILE has other columns than this bench; choose another --csv"),
        ("run --csv .", "cannot write .: it is not a file"),
        ("run --csv=", "argument --csv: the path is empty; see --help"),
        ("end_to_end --method pcla", "unknown method 'pcla'; did you mean plca"),
        ("end_to_end --method plca --set alpha", "'alpha' is neither a flag nor key=value"),
        ("end_to_end --method plca --set alhpa=1", "unknown setting 'method.alhpa'"),
        ("end_to_end --method plca --beside alhpa=1", "unknown setting 'method.alhpa'"),
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


def test_the_gpu_check_fits_its_time():
    assert gpu_check.TOTAL == {1: 420, 2: 210}
    for part, stages in gpu_check.PARTS.items():
        assert sum(stage.limit for stage in stages) + 15 <= gpu_check.TOTAL[part]
    names = [stage.name for stages in gpu_check.PARTS.values() for stage in stages]
    assert len(names) == len(set(names))


def test_the_gpu_check_runs_every_gpu_test_or_leaves_it_out_on_purpose():
    commands = [stage.command for stages in gpu_check.PARTS.values() for stage in stages]
    chosen = [command[command.index("-k") + 1] for command in commands if "-k" in command]
    words = set(re.findall(r"\w+", " ".join(chosen))) - {"and", "or"}
    left_out = set()
    for path in (table.HERE.parent / "tests" / "gpu").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            if path.stem != "test_sanitizer" and not any(word in name for word in words):
                left_out.add(name)
    assert left_out == {
        "test_from_training_to_the_page", "test_three_stages", "test_plca_lands_where_the_cpu_lands",
        "test_resume_goes_on_from_the_checkpoint", "test_addresses_beyond_two_billion",
        "test_maps_beyond_two_billion",
    }  # fmt: skip


def a_check(out, after=None, kit="nowhere"):
    return gpu_check.Check(out, True, after or out, out / kit)


FAILING = """
import time
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("name", ["batch norm none-triton", "well"])
def test_a(name):
    assert name == "well"

@pytest.mark.xdist_group("large")
def test_b():
    assert False

@pytest.mark.xdist_group("large")
def test_c():
    time.sleep(600)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_failures_of_a_stage_that_is_cut_off_run_again(workers, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(FAILING)
    stage = gpu_check.tests("x", 1, "tests/test_x.py", *(("-n", "2", "--dist", "loadgroup") * (workers > 0)))
    check = a_check(tmp_path)
    command = [sys.executable, *stage.command]
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=check.environment, stdout=stream, stderr=stream, start_new_session=True
        )
        end = time.monotonic() + 100
        while len(gpu_check.failed(log)) < 2 and time.monotonic() < end:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ids = ["tests/test_x.py::test_a[batch norm none-triton]", "tests/test_x.py::test_b"]
    assert sorted(gpu_check.failed(log)) == ids, log.read_text()
    again = gpu_check.PARTS[2][0]
    assert again.name == "failed" and "{workers}" in again.command
    check.rehearse = False
    command = [sys.executable, *check._filled(dataclasses.replace(again, command=again.command[:-1]))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 failed" in done.stdout, done.stdout + done.stderr
    (tmp_path / "summary").write_text(done.stdout)  # the lines at pytest's end name them with their reasons
    assert sorted(gpu_check.failed(tmp_path / "summary")) == ids


def test_part_2_reads_the_results_of_part_1_where_they_are(tmp_path, monkeypatch):
    before, out = tmp_path / "before", tmp_path / "out"
    before.mkdir()
    (before / "log.txt").write_text("FAILED tests/gpu/test_ops.py::test_x[a b] - assert 1 == 2\n")
    rows = [("slow", "x", "2"), ("fast", "x", "1")]
    text = "choice,op,ms\n" + "".join(f"{','.join(row)}\n" for row in rows)
    (before / "choices.csv").write_text(text)
    check = a_check(out, before)
    assert "tests/gpu/test_ops.py::test_x[a b]" in check._filled(gpu_check.PARTS[2][0])
    filled = list(check._filled(gpu_check.inner("winners", 1)))
    assert filled[filled.index("--after") + 1] == str(before)
    asked = []
    monkeypatch.setattr(Work, "choices", lambda self, names: asked.append(names))
    Work(out, True, before, "").winners()
    assert [names[0] for names in asked] == ["fast"]


def test_a_stage_is_cut_off_at_its_limit(tmp_path):
    stage = gpu_check.Stage("x", 1, ("-c", "print('begun', flush=True); import time; time.sleep(60)"))
    assert not a_check(tmp_path).run(stage, 9)
    assert (tmp_path / "summary.txt").read_text().startswith("x: cut off at 1 s")


def test_the_gpu_check_goes_on_without_a_kit_or_a_library_and_says_so(tmp_path, monkeypatch):
    """A kit that cannot be read, and a library that cannot be loaded."""
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "kit.json").write_text("{")
    check = a_check(tmp_path, kit="kit")
    (tmp_path / "_cuda.so").write_text("no library")
    monkeypatch.setattr(fastuda, "__path__", [str(tmp_path)])
    check.prepare()
    said = (tmp_path / "summary.txt").read_text()
    assert "is not used: JSONDecodeError" in said
    assert "the CUDA kernels do not load" in said


def test_a_library_of_other_sources_is_not_installed(tmp_path, monkeypatch):
    made = {"triton": gpu_kit.triton_identity(), "kernels": 0, "arch": 90, "commit": "of the kit"}
    kit, package = tmp_path / "kit", tmp_path / "package"
    package.mkdir()
    kit.mkdir()
    (kit / "_cuda.so").write_text("a library")
    told: list[str] = []
    for sources, there in (("others", False), (gpu_kit.sources(), True)):
        (kit / "kit.json").write_text(json.dumps(made | {"sources": sources}))
        gpu_kit.install(kit, package, told.append)
        assert (package / "_cuda.so").exists() is there
    assert "csrc has changed" in told[0] and len(told) == 3
    monkeypatch.setattr(gpu_kit, "commit", lambda: "")  # no .git
    assert gpu_kit.commit_of(kit) == "of the kit" and gpu_kit.commit_of(tmp_path) == ""


def test_the_gpu_check_says_where_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_check", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=table.HERE.parent, capture_output=True, text=True)
    assert done.returncode != 0 and "finds no CUDA device here" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_gpu_check_is_rehearsed_on_the_cpu(tmp_path):
    """Every stage of both parts runs, so that no slip of the pen costs a GPU's time: small, in the
    interpreter, the tests of tests/gpu collected only."""
    for part, stages in gpu_check.PARTS.items():
        out = tmp_path / str(part)
        command = [sys.executable, "-m", "bench.gpu_check", str(out), "--rehearse", "--part", str(part)]
        command += ["--after", str(tmp_path / "1")] if part == 2 else []
        done = subprocess.run(command, cwd=table.HERE.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-4000:]
        for stage in stages:
            assert f"\n{stage.name}: ok" in done.stdout
        assert "Triton kernels were compiled here" in done.stdout
    files = {path.name for path in (tmp_path / "1").iterdir()}
    assert files == {"summary.txt", "log.txt", "ops.csv", "choices.csv", "steps.csv", "profile.txt"}
    rows = list(csv.DictReader((tmp_path / "1" / "ops.csv").open()))
    assert {row["provider"] for row in rows} >= {"fastuda", "reference", "authors", "sdpa"}
    assert all(row["p50"] for row in rows), "what fails here fails there"
    for part in "12":
        assert all(row["ms"] for row in csv.DictReader((tmp_path / part / "choices.csv").open()))
    (row,) = csv.DictReader((tmp_path / "1" / "steps.csv").open())
    assert row["fused_s"] and row["ratio"] and row["fused_ops"] and not row["plain_s"]


KIT = """
import sys
from pathlib import Path
from bench import gpu_kit
from triton import knobs
if len(sys.argv) > 2:
    hits = []
    knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
    Path(sys.argv[1]).rename(sys.argv[2])
    found = gpu_kit.install(Path(sys.argv[2]), Path(sys.argv[2]), print)
    assert found == {"TRITON_CACHE_DIR": f"{sys.argv[2]}/triton"}
    gpu_kit.compile_kernels(Path(sys.argv[2]), 90, "pooling torch.float32")
    assert hits and all(hits), hits
else:
    gpu_kit.build_library = lambda folder, arch: "left out of this test"
    sys.argv += ["--only", "pooling torch.float32"]
    gpu_kit.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_a_kit_are_found_where_it_is_moved(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    for folders in (["kit"], ["kit", "moved"]):
        command = [sys.executable, "-c", KIT, *(str(tmp_path / name) for name in folders)]
        done = subprocess.run(command, cwd=table.HERE.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels for sm_90" in done.stdout
    assert list((tmp_path / "moved").rglob("cuda_utils*.so"))
    facts = json.loads((tmp_path / "moved" / "kit.json").read_text())
    (tmp_path / "moved" / "kit.json").write_text(json.dumps(facts | {"triton": "another"}))
    told: list[str] = []
    assert gpu_kit.install(tmp_path / "moved", tmp_path, told.append) == {}
    assert "another Triton" in told[0]
    assert gpu_kit.install(tmp_path / "nowhere", tmp_path, told.append) == {}
