"""Implementations to compare: fastuda, its reference, and torch.compile. On a GPU also fastuda's second
backend and fastuda as a CUDA graph. Ops can name further competitors: the authors' formulation, which stores
every matrix in the inputs' dtype (:mod:`bench.published`), SDPA, KeOps, FAISS."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastuda.ops as F
from bench.case import CannotExpress, Case, Inputs, Run, bench_of


def public(case: Case, backend: str) -> Run:
    """The op of fastuda on one backend."""
    return lambda t: bench_of(case.op).run(case, t, backend)


def other(name: str) -> Callable[[Case], Run]:
    """A competitor that the op names."""

    def provider(case: Case) -> Run:
        competitors = bench_of(case.op).others
        if name not in competitors:
            raise CannotExpress
        return competitors[name](case)

    return provider


def compiled(case: Case) -> Run:
    """The reference compiled with torch.compile."""
    torch._dynamo.reset()  # otherwise earlier cases count as recompilations, whose number is limited
    return torch.compile(public(case, "reference"), dynamic=False)


def second(case: Case, name: str) -> Run:
    """A usable backend of fastuda; on a GPU, one that ``auto`` does not choose."""
    op = public(case, name)

    def run(t: Inputs) -> torch.Tensor:
        floats = [x for x in t.values() if x.is_floating_point()]
        usable = [row.name for row in F.backends(case.op, *floats[:2]) if row.usable]
        if name not in usable[int(name == "triton") :]:
            raise CannotExpress(f"{case.op} has no second backend {name} here")
        return op(t)

    return run


def graph(case: Case) -> Run:
    """fastuda on a GPU as a CUDA graph, which :mod:`bench.measure` captures and replays, so that host time
    does not count."""
    op = public(case, "auto")

    def run(t: Inputs) -> torch.Tensor:
        if not next(iter(t.values())).is_cuda or case.op == "upsample_confusion":
            raise CannotExpress("graphs are of CUDA, and of ops that raise nothing the labels tell")
        return op(t)

    return run


PROVIDERS: dict[str, Callable[[Case], Run]] = {
    "fastuda": lambda case: public(case, "auto"),
    "reference": lambda case: public(case, "reference"),
    "authors": other("authors"),
    "compile": compiled,
    "sdpa": other("sdpa"),
    "graph": graph,
    "triton": lambda case: second(case, "triton"),
    "library": lambda case: second(case, "library"),
    "keops": other("keops"),
    "faiss": other("faiss"),
}
