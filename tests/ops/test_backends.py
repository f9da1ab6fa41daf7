"""Backend selection, registration, and the direction of imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastuda.ops as F
from fastuda.ops import _backends
from tests.cases import OPS

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_op_has_a_reference_and_a_module_of_cases():
    public = [op for op in F.__all__ if op.islower() and op not in ("backends", "release_memory")]
    assert public == list(OPS)
    for op in OPS:
        rows = F.backends(op)
        assert rows[-1].name == "reference" and rows[-1].usable
        for row in rows:  # no time was measured on a GPU
            assert row.why and (row.name in ("cpu", "reference")) != row.why.endswith(
                "predicted, not measured"
            )


def test_unknown_op_and_backend_say_what_there_is():
    with pytest.raises(ValueError, match=r"no op is named 'cycle'; there are .*cycle_match"):
        F.backends("cycle")
    x = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match="has no backend 'fast'; it has auto, "):
        F.cycle_match(x, x, backend="fast")


def test_a_named_backend_that_cannot_run_raises_with_its_reason():
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="backend 'cuda' cannot run"):
        F.local_affinity(x, backend="cuda")


@pytest.mark.parametrize("device", [False, True])
def test_without_a_device_nothing_of_a_gpu_is_usable(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(_backends, "INTERPRETED", False)
    monkeypatch.setattr(_backends, "TRITON_ERROR", "")
    said = {row.name: row for row in F.backends("cycle_match")}["triton"]
    assert said.usable == device and (device or said.reason == "torch finds no CUDA device")


def test_environment_variable_sets_the_default():
    code = (
        "import torch, fastuda.ops as F\n"
        "x = torch.rand(1, 3, 4, 4)\n"
        "try: F.local_affinity(x)\n"
        "except ValueError as e: print(e)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"FASTUDA_BACKEND": "cuda", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert "backend 'cuda' cannot run" in out.stdout, out.stderr


def test_reference_says_once_why_it_runs(caplog, monkeypatch):
    monkeypatch.setattr(_backends, "_said", set())
    monkeypatch.setattr(_backends, "EXTENSION_ERROR", "the C++ extension is not built")
    x = torch.randn(1, 3, 4)
    with caplog.at_level("WARNING", logger="fastuda"):
        F.cycle_match(x, x)
        F.cycle_match(x, x)
        F.spatial_aggregate(x)
    assert len(caplog.records) == 1 and "the C++ extension is not built" in caplog.text
