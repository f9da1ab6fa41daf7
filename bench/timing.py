"""Measures times of runs, and from them the rates of the machine and the floors of cases."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.case import DTYPES, Case

LONGEST, MOST = 0.5, 100
"""Longest extra time of a GPU measurement beyond its ``repeats`` runs, in seconds, and its number of runs."""


def seconds(run: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Sorted times of ``repeats`` runs after one warm-up."""
    if device == "cuda":
        return device_seconds([run], repeats)
    times = []
    for k in range(repeats + 1):
        start = time.perf_counter()
        run()
        if k:
            times.append(time.perf_counter() - start)
    return sorted(times)


def device_seconds(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """As :func:`seconds`, but measured with events and alternating between the ``runs``: at least
    ``repeats``, and more if they are short. The host does not wait in between."""
    for run in runs * (3 if len(runs) == 1 else 1):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    runs[0]()
    torch.cuda.synchronize()
    count = max(repeats, min(MOST, int(LONGEST / max(time.perf_counter() - began, 1e-9))))
    marks = []
    for k in range(count):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        runs[k % len(runs)]()
        pair[1].record()
        marks.append(pair)
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) / 1e3 for begin, end in marks)


def floor_rates(case: Case, device: str, repeats: int) -> dict[str, float]:
    """The floor of a case in milliseconds: on a CPU from a product and a copy of its own sizes, measured now;
    on a GPU from the measured rates."""
    if device == "cuda":
        rate, copied = _rates(case.dtype)
        work = 2.0 * case.products * case.batch * case.pixels**2 * case.channels
        return {"floor": 1e3 * max(work / rate, case.moved / copied)}
    product = copy = 0.0
    if case.products:
        a = torch.randn(case.pixels, case.channels, device=device).to(DTYPES[case.dtype])
        out = torch.empty(case.pixels, case.pixels, device=device, dtype=a.dtype)
        product = statistics.median(seconds(lambda: torch.mm(a, a.T, out=out), repeats, device))
    if case.moved:
        x = torch.randn(case.moved // 8, device=device)
        y = torch.empty_like(x)
        copy = statistics.median(seconds(lambda: y.copy_(x), 5 * repeats, device))
    return {"floor": 1e3 * max(case.products * case.batch * product, copy)}


def product_rate(dtype: str, device: str, repeats: int = 5) -> float:
    """Operations per second in a product of two large matrices of random values."""
    size, run = _product(dtype, device)
    return 2 * size**3 / statistics.median(seconds(run, repeats, device))


def networks_floor(step: Callable[[], object], dtype: str, device: str) -> float:
    """Seconds that the products of a step's networks (convolutions and linear layers, forward and backward)
    would take at the rate of :func:`product_rate`. Products inside ``fastuda.ops`` are not counted."""
    own = {torch.ops.aten.convolution_backward: _backward_operations}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step()
    return counter.get_total_flops() / product_rate(dtype, device)


def _backward_operations(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *more: object, out_shape: object = None
) -> int:
    """Operations of a convolution's backward: those of the forward, once per gradient. torch's own count
    ignores groups."""
    transposed, wanted = more[4], cast(Sequence[bool], more[7])
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(wanted[:2])


def _product(dtype: str, device: str) -> tuple[int, Callable[[], object]]:
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    return size, lambda: torch.mm(a, a.T, out=out)


def ceilings(device: str, repeats: int) -> list[dict[str, object]]:
    """Measure the machine's rates: a product of random values per dtype, and a copy."""
    moved = 2**30 if device == "cuda" else 2**28
    rows: list[dict[str, object]] = []

    def add(op: str, dtype: str, shape: str, amount: float, unit: str, run: Callable[[], object]) -> None:
        times = [1e3 * t for t in seconds(run, 5 * repeats, device)]
        median = statistics.median(times)
        rows.append({"op": op, "dtype": dtype, "shape": shape, "p20": times[len(times) // 5], "p50": median,
                      "p80": times[4 * len(times) // 5],
                      "note": f"{amount / median / 1e6:.1f} {unit}"})  # fmt: skip

    for name in DTYPES:
        size, run = _product(name, device)
        add("ceiling: product", name, f"{size}x{size}x{size}", 2 * size**3 / 1e3, "TFLOP/s", run)
    x = torch.randn(moved // 8, device=device)
    y = torch.empty_like(x)
    add("ceiling: copy", "float32", f"{moved >> 20} MiB read and written", moved, "GB/s", lambda: y.copy_(x))
    return rows


@cache
def _rates(dtype: str) -> tuple[float, float]:
    """A GPU's operations per second in products of ``dtype``, and its bytes per second in a copy."""
    rows = {(row["op"], row["dtype"]): 1e-3 * row["p50"] for row in ceilings("cuda", 3)}
    return 2 * 8192**3 / rows["ceiling: product", dtype], 2**30 / rows["ceiling: copy", "float32"]
