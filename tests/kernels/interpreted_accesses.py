"""No kernel reads or writes what it must not: every address of every program, in the interpreter. Run by
tests/kernels/test_kernels.py in a process of its own, as interpreted.py.

Blocks of a launch run in any order on a GPU, and at once: that they run one after the other here hides a race
from the results, not from this test.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastuda.kernels import _class_planes, _moments, _panels, _search, _temperature
from fastuda.kernels import batch_norm_act as norm
from fastuda.kernels import category_pool as category
from fastuda.kernels import class_statistics as statistics
from fastuda.kernels import depthwise_conv2d as depthwise
from fastuda.kernels import local_affinity as affinity
from fastuda.kernels import smooth_max_pool as smooth_max
from fastuda.ops._backends import BACKENDS, launcher
from tests.cases import OPS, case
from tests.kernels.instruments import all_kernels, watched


@pytest.fixture(autouse=True)
def many_programs(monkeypatch):
    """Panels of one block, programs over several tiles, planes and rows in several parts."""
    torch.manual_seed(0)
    for module in (_panels, _search, _moments, _temperature):
        monkeypatch.setattr(module, "PANEL_BYTES", 1)
    monkeypatch.setattr(_search, "PROGRAMS", 1)
    monkeypatch.setattr(statistics, "TILES", 2)
    monkeypatch.setattr(category, "TILES", 2)
    monkeypatch.setattr(affinity, "BLOCK", 32)
    monkeypatch.setattr(_class_planes, "OUTPUTS", 32)
    monkeypatch.setattr(depthwise, "RUN", 64)
    monkeypatch.setattr(norm, "PROGRAMS", 4)
    monkeypatch.setattr(norm, "RUNS", 1)
    monkeypatch.setattr(smooth_max, "BLOCK", 32)
    monkeypatch.setattr(smooth_max, "BLOCKS", 2)


def both_ways(function, x, backend="triton"):
    leaf = x.clone().requires_grad_()
    value = function(leaf, backend)
    if value.requires_grad:
        torch.autograd.grad(value.float().square().sum(), leaf)


def calls():
    """Of every op with kernels its samples, and its operators."""
    for op in OPS:
        backends = [row.name for row in BACKENDS[op]]
        for _, x, function in case(op).small() if "triton" in backends else ():
            both_ways(function, x)
            if "library" in backends:
                both_ways(function, x.half())
        for operator, *args in case(op).operators("cpu") if "triton" in backends else ():
            launcher(op, operator)(*args)
        for dtype in (torch.float32, torch.float16) if "library" in backends else ():
            ((x, function),) = case(op).wide(512, "cpu", (97, 135))
            both_ways(function, x.to(dtype), "library")


def test_no_kernel_errs(monkeypatch):
    with monkeypatch.context() as patch, watched(patch) as (faults, launched):
        calls()
    assert faults == {}
    assert launched >= all_kernels()


@triton.jit
def neighbours_overlap(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * (B - 1) + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def reads_past_the_end(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n + 2), mask=i < n)


@triton.jit
def writes_past_the_end(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n + 1)


@triton.jit
def reads_its_neighbour(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    value = tl.load(x + i + 1, mask=i + 1 < n)
    tl.store(x + i, value, mask=i < n)


@triton.jit
def reads_what_it_stored(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)
    tl.store(y + i, tl.load(y + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def stores_twice(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i // 2, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def counts_what_it_reads(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(x + i * 0, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def reads_fresh_memory(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + i, tl.load(y + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (neighbours_overlap, "two programs write one address"),
        (reads_past_the_end, "load out of bounds"),
        (writes_past_the_end, "store out of bounds"),
        (reads_its_neighbour, "a program reads what another writes"),
        (reads_what_it_stored, "a program reads what it has stored itself"),
        (stores_twice, "one store writes an address twice"),
        (counts_what_it_reads, "atomics and plain accesses to one address"),
        (reads_fresh_memory, "read of memory that nothing has written"),
    ],
)
def test_a_planted_fault_is_found(kernel, fault, monkeypatch):
    storage = torch.zeros(64)
    with monkeypatch.context() as patch, watched(patch) as (faults, _):
        fresh = torch.empty(64)
        kernel[(3,)](storage[8:28], fresh[8:28], 20, B=8)
    assert fault in faults[kernel.fn.__name__]


def test_a_correct_kernel_is_not_accused(monkeypatch):
    with monkeypatch.context() as patch, watched(patch) as (faults, _):
        y = torch.empty(20)
        reads_past_the_end[(3,)](torch.zeros(22), y, 20, B=8)
        reads_fresh_memory[(3,)](torch.empty(20), y, 20, B=8)
        z = torch.empty(20).fill_(1)
        reads_fresh_memory[(3,)](torch.empty(20), z, 20, B=8)
    assert not faults
