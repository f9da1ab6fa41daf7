"""The Triton kernels without a GPU: right in the interpreter, and sane as machine code for three GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.instruments import all_kernels  # which imports triton

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}


def python(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env | {"PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "file",
    ["interpreted.py", "interpreted_losses.py", "interpreted_accesses.py", "interpreted_arithmetic.py"],
)
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
"""The tests of a GPU share its compilation, in one worker."""
TILES = {"search_tiles", "tile_moments", "association_panel", "weight_panel", "symmetric_block"}
STACK = {(120, "prototype_losses"): 16}
"""Bytes that are known to spill: the float32 bound on sm_120, with two or three stages and four warps alike.
Eight warps take as many registers a thread, and narrower products on sm_90."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_without_spills(arch):
    rows = machine_code(arch)
    kl = {"slope_panel", "centre_slopes"}  # the same for all
    wanted = {80: all_kernels(), 90: all_kernels() - kl, 120: all_kernels()}
    assert {row["kernel"] for row in rows} >= wanted[arch]
    for row in rows:
        assert row["stack"] <= STACK.get((arch, row["kernel"]), 0), row
        assert row["shared"] <= SHARED_MEMORY[arch], row


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_half_precision_tiles_run_on_tensor_cores(arch):
    """And those of float32, to which KL goes in every dtype, do not: there they would be TF32."""
    instruction = "wgmma" if arch == 90 else "mma"
    found = set()
    for row in machine_code(arch):
        if row["kernel"] not in TILES:
            continue
        half = HALF.get(row["dtype"])
        if half and row["call"].endswith("cosine"):
            found.add((row["kernel"], half))
            assert row["products"], row
            assert all(x.startswith(instruction) and x.count(half) == 2 for x in row["products"]), row
        else:
            assert not row["products"], "float32 dropped to a narrower type"
    scaled = {"association_panel", "symmetric_block"}
    assert found == {(kernel, ".bf16") for kernel in TILES} | {(kernel, ".f16") for kernel in scaled}


PANELS = {"association_panel", "weight_panel", "symmetric_block"}
HALF = {"bfloat16": ".bf16", "float16": ".f16"}
"""What the operands of a tensor-core instruction are called."""

QUIET = {
    "project_rows", "pool_parts", "pool_planes_gradient", "product_sums", "affinity_maps",
    "affinity_gradient", "stretch_tables", "jaccard_slopes", "error_keys", "inner_sums", "finish_rows",
    "tap_sums", "weight_sums", "run_moments", "whole_moments", "run_sums", "whole_sums",
}  # fmt: skip
"""Kernels whose threads have nothing to tell each other in a loop."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_panels_are_stored_16_bytes_at_a_time(arch):
    """Also where the number of pixels is odd."""
    rows = [row for row in machine_code(arch) if row["kernel"] in PANELS and row["dtype"] in HALF]
    rows = [row for row in rows if row["call"].endswith(("cosine", "library"))]
    assert {row["kernel"] for row in rows} == PANELS
    for row in rows:
        assert 16 in row["stores"] and 2 not in row["stores"], row
        two = {"weight_panel"} if row["call"].endswith("cosine") else {"weight_panel", "symmetric_block"}
        if arch == 90 and row["kernel"] in two:  # two blocks a multiprocessor
            assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_threads_do_not_wait_for_each_other_without_need(arch):
    for row in machine_code(arch):
        if row["kernel"] in QUIET:
            assert row["barriers"] == row["shuffles"] == 0, row


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_second_image_compiles_nothing_anew(arch):
    """Its vectors begin anywhere where the number of pixels is odd."""
    counts = Counter(
        (row["call"], row["kernel"])
        for row in machine_code(arch)
        if (
            row["dtype"] == "bfloat16" and row["call"].endswith("cosine") and row["kernel"] != "merge_moments"
        )
        or row["call"].endswith(" kl")  # which is float32 inside, so that no dtype compiles anew either
    )
    diagonal = counts.pop(("aggregate backward cosine", "symmetric_block"))
    assert diagonal == 2, "a pair of blocks, and a block with itself"
    assert counts.pop(("association backward kl", "hop_sums")) == 2, "rows, and columns"
    assert counts and set(counts.values()) == {1}, counts
