"""The Triton kernels without a GPU: right in the interpreter, and sane as machine code for two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


def python(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env | {"PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_losses.py"])
def test_every_kernel_is_right_in_the_interpreter(file):
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 does not loop with numpy >= 2.4")
    run = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"),
        str(HERE / file),
        TRITON_INTERPRET="1",
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@cache
def machine_code(arch: int) -> list[dict]:
    run = python(str(HERE / "aot.py"), "--arch", str(arch))
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


ARCHS = [pytest.param(arch, marks=pytest.mark.xdist_group(f"triton-aot-{arch}")) for arch in SHARED_MEMORY]
"""Both tests of a GPU share its compilation, in one worker."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_without_spills(arch):
    rows = machine_code(arch)
    assert {row["kernel"] for row in rows} >= {
        "search_tiles",
        "tile_moments",
        "association_panel",
        "weight_panel",
        "slope_panel",
        "project_rows",
        "softmax_rows",
        "softmax_rows_gradient",
        "upsampled_losses",
        "upsampled_counts",
        "class_moments",
        "pool_parts",
        "merge_parts",
        "pool_planes_gradient",
        "affinity_maps",
        "affinity_products",
        "affinity_gradient",
        "product_sums",
        "encoded_losses",
        "prototype_losses",
        "prototype_gradient",
        "bank_losses",
        "bank_gradient",
        "jaccard_slopes",
        "upsampled_sums",
        "class_plane",
        "class_gradient",
        "pooled_chunks",
        "pooled_features_gradient",
        "pooled_logits_gradient",
        "sum_taps",
        "spread_taps",
    }
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[arch], row


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_half_precision_tiles_run_on_tensor_cores(arch):
    """And those of float32, to which KL goes in every dtype, do not: there they would be TF32."""
    tiles = {"search_tiles", "tile_moments", "association_panel", "weight_panel", "slope_panel"}
    instruction = "wgmma" if arch == 90 else "mma"
    found = set()
    for row in machine_code(arch):
        if row["kernel"] not in tiles:
            continue
        if row["dtype"] == "bfloat16" and row["call"].endswith("cosine"):
            found.add(row["kernel"])
            assert row["products"], row
            assert all(x.startswith(instruction) and x.count("bf16") == 2 for x in row["products"]), row
        else:
            assert not row["products"], "float32 dropped to a narrower type"
    assert found == tiles
