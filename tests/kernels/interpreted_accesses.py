"""No kernel reads or writes what it must not: every address of every program, in the interpreter. Run by
tests/kernels/test_kernels.py in a process of its own, as interpreted.py.

Blocks of a launch run in any order on a GPU, and at once: that they run one after the other here hides a race
from the results, not from this test.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
import triton.language as tl

import fastuda.ops as F
from fastuda.kernels import _class_planes, _panels, _search, _temperature
from fastuda.kernels import category_pool as category
from fastuda.kernels import class_statistics as statistics
from fastuda.kernels import depthwise_conv2d as depthwise
from fastuda.kernels import local_affinity as affinity
from fastuda.kernels import smooth_max_pool as smooth_max
from tests.kernels.instruments import all_kernels, watched
from tests.kernels.interpreted_losses import launchers


@pytest.fixture(autouse=True)
def many_programs(monkeypatch):
    """Panels of one block, programs over several tiles, planes and rows in several parts."""
    torch.manual_seed(0)
    for module in (_panels, _search, _temperature):
        monkeypatch.setattr(module, "PANEL_BYTES", 1)
    monkeypatch.setattr(_search, "PROGRAMS", 1)
    monkeypatch.setattr(statistics, "TILES", 2)
    monkeypatch.setattr(category, "TILES", 2)
    monkeypatch.setattr(affinity, "BLOCK", 32)
    monkeypatch.setattr(_class_planes, "OUTPUTS", 32)
    monkeypatch.setattr(depthwise, "RUN", 64)
    monkeypatch.setattr(smooth_max, "BLOCK", 32)
    monkeypatch.setattr(smooth_max, "BLOCKS", 2)


def both_ways(function, *shape, positive=False):
    """Call ``function`` on a leaf of ``shape`` and go back through it."""
    x = torch.rand(shape) if positive else torch.randn(shape)
    leaf = (x.softmax(1) if positive else x).requires_grad_()
    value = function(leaf)
    torch.autograd.grad(value.float().sum(), leaf)


def labels_of(*shape, classes=5):
    labels = torch.randint(0, classes, shape)
    labels[torch.rand(shape) < 0.2] = 255
    return labels


def similarities():
    """The ops of similarity tiles: wide features take the pass over tiles for their temperatures."""
    for dtype in (torch.float32, torch.float16):
        source, target = torch.rand(1, 97, 150).to(dtype), torch.rand(1, 135, 150).to(dtype)
        labels = labels_of(1, 97)
        F.cycle_match(source, target, backend="triton")
        leaf = source.clone().requires_grad_()
        loss, _ = F.cycle_association_loss(leaf, target, labels, backend="triton")
        torch.autograd.grad(loss, leaf)
        leaf = target.clone().requires_grad_()
        torch.autograd.grad(F.spatial_aggregate(leaf, backend="triton").float().sum(), leaf)
    p, q = torch.rand(1, 97, 12).softmax(-1), torch.rand(1, 135, 12).softmax(-1).requires_grad_()
    loss, _ = F.cycle_association_loss(p, q, labels, similarity="kl", backend="triton")
    torch.autograd.grad(loss, q)
    torch.autograd.grad(F.spatial_aggregate(q, similarity="kl", backend="triton").sum(), q)
    wide = torch.rand(1, 135, 70).softmax(-1).requires_grad_()  # too wide for sums in registers
    loss, _ = F.cycle_association_loss(wide[:, :97], wide, labels, similarity="kl", backend="triton")
    torch.autograd.grad(loss, wide)
    torch.autograd.grad(F.spatial_aggregate(wide, similarity="kl", backend="triton").sum(), wide)


def products_by_the_library():
    """The same ops with products in panels."""
    for dtype in (torch.float32, torch.float16):
        source, target = torch.rand(1, 97, 512).to(dtype), torch.rand(1, 135, 512).to(dtype)
        F.cycle_match(source, target, backend="library")
        leaf = source.requires_grad_()
        loss, _ = F.cycle_association_loss(leaf, target, labels_of(1, 97), backend="library")
        torch.autograd.grad(loss, leaf)
        leaf = target.clone().requires_grad_()
        torch.autograd.grad(F.spatial_aggregate(leaf, backend="library").float().sum(), leaf)


def upsamplings():
    """The losses and counts of upsampled maps: five source rows are two blocks, and so are 20 columns."""
    low, high = (1, 5, 6, 20), (15, 46)
    hard, soft = labels_of(1, *high), torch.randn(1, 5, *high).softmax(1)
    for settings in (
        dict(labels=hard),
        dict(labels=soft),
        dict(labels=hard, pixel_weight=torch.rand(1, *high)),
    ):
        both_ways(partial(F.upsample_cross_entropy, backend="triton", **settings), *low)
    both_ways(
        partial(F.lovasz_softmax, labels=labels_of(1, *high, classes=3), from_logits=True, backend="triton"),
        1,
        3,
        6,
        20,
    )
    seg = torch.randn(1, 5, 4, 7)
    for threshold in (None, 0.4):
        both_ways(
            lambda z, threshold=threshold: F.domain_cross_entropy(
                z, seg, encode="target", size=high, hard_threshold=threshold, backend="triton"
            ),
            *(1, 10, 6, 20),
        )
    for classes in (5, 40):  # a histogram, and single counts
        F.upsample_confusion(torch.randn(2, classes, 6, 20), labels_of(2, *high), backend="triton")


def maps():
    """Pooling, affinities and the row soft-max."""
    both_ways(partial(F.smooth_max_pool, backend="triton"), 2, 3, 13, 17)
    for settings in (dict(), dict(neighbours=4, distance=3), dict(kind="product")):
        both_ways(partial(F.local_affinity, backend="triton", **settings), 1, 2, 9, 20, positive=True)
    both_ways(partial(F.affinity_cleaning_loss, backend="triton"), 2, 3, 9, 20)
    both_ways(lambda x: F.contrast_softmax(x, backend="triton").square(), 70, 2100)
    features, weight = torch.randn(2, 150, 9, 11), torch.randn(150, 1, 3, 3)
    settings = dict(stride=2, padding=4, dilation=2, backend="triton")
    both_ways(lambda x: F.depthwise_conv2d(x, weight, **settings), *features.shape)
    both_ways(lambda x: F.depthwise_conv2d(features, x, **settings), *weight.shape)


def prototypes():
    """Statistics, pooling by class and the contrasts with prototypes."""
    labels = labels_of(150)
    F.class_statistics(torch.randn(150, 70), labels, 5, backend="triton")
    logits = torch.randn(2, 150, 5)
    both_ways(lambda x: F.category_pool(x, logits, backend="triton"), 2, 150, 70)
    features = torch.randn(2, 150, 70)
    both_ways(lambda x: F.category_pool(features, x, backend="triton"), 2, 150, 5)
    given = F.ClassStatistics(torch.ones(5), torch.randn(5, 40), torch.rand(5, 40))
    bank = F.PrototypeBank(torch.randn(5, 30, 40), torch.arange(5) * 7)
    for kind, these in (("proto", given), ("dist", given), ("bank", bank)):
        both_ways(
            lambda x, kind=kind, these=these: F.prototype_contrast(
                x, labels, these, kind=kind, backend="triton"
            ),
            *(150, 40),
        )


def test_no_kernel_errs(monkeypatch):
    with monkeypatch.context() as patch, watched(patch) as (faults, launched):
        for run in (similarities, products_by_the_library, upsamplings, maps, prototypes):
            run()
        for call in launchers():
            call()
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
