"""The cases of all ops in the bench, and their inputs."""

from __future__ import annotations

import torch

from bench.case import DTYPES, Case, Inputs, bench_of
from tests.cases import OPS, case

CASES = [size for op in OPS if hasattr(case(op), "BENCH") for size in bench_of(op).cases]
SWEEP = [
    Case(op, "fwd+bwd", "float32", pixels, 256)
    for op in ("cycle_association_loss", "spatial_aggregate")
    for pixels in (1024, 2048, 4096, 8192)
]
"""The sizes of the plot of time and memory against N."""


def make_inputs(case: Case, device: str, pixels: int | None = None) -> Inputs:
    """The inputs of the case's op, drawn from one seed."""
    made = bench_of(case.op).inputs(case, pixels or case.pixels, torch.Generator().manual_seed(0))
    for name, x in made.items():
        cast = DTYPES[case.dtype] if name in ("x", "source", "target") else x.dtype
        made[name] = x.to(device=device, dtype=cast)
        if name in ("x", "source", "target", "weight"):
            made[name].requires_grad_(case.backward)
    return made
