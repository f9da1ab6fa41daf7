"""The cases of the bench: ops as data, one case per line, and the floor of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastuda.ops as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DILATIONS = (6, 12, 18, 24)
ASPP_CLASSES = 19


@dataclass(frozen=True)
class Case:
    """One op at one size.

    The floor is ``max(products * GEMM time, moved bytes / copy rate)``, where a product is the ``N x C`` by
    ``C x N`` GEMM of the case's dtype and the copy is of the same bytes, both measured in the same run.
    """

    op: str
    mode: str
    """fwd, or fwd+bwd."""
    dtype: str
    pixels: int
    channels: int
    similarity: str = "cosine"
    batch: int = 1

    @property
    def products(self) -> float:
        """Tile products that no exact method without N x N storage avoids."""
        if self.op == "aspp":
            # the pixels whose output is inside, of every tap; backward: features and weights
            share = _inside(math.isqrt(self.pixels)) * ASPP_CLASSES / self.pixels**2
            return 3 * share if self.mode == "fwd+bwd" else share
        if self.op == "contrast_softmax" or self.op in MEMORY_BOUND:
            return 0.0
        if self.op == "cycle_match":
            return 1.0 if self.similarity == "cosine" else 2.0
        if self.op == "cycle_association_loss":
            # tiles once and once for the temperatures; backward: tiles again and two gradients
            return 5.0 if self.mode == "fwd+bwd" else 2.0
        # temperatures and tiles half each, weighted sum; backward: half the tiles, weights, values, features
        return 5.5 if self.mode == "fwd+bwd" else 2.0

    @property
    def moved(self) -> int:
        """Bytes that must be read or written once, 0 where products bound the op."""
        if self.op in MEMORY_BOUND:
            return MEMORY_BOUND[self.op].moved(self)
        if self.op != "contrast_softmax":
            return 0
        arrays = 2 if self.mode == "fwd" else 5
        return arrays * _element(self) * self.batch * self.pixels * self.channels

    @property
    def shape(self) -> str:
        """As printed in the table."""
        if self.op in MEMORY_BOUND:
            return MEMORY_BOUND[self.op].shape(self)
        kind = "" if self.similarity == "cosine" else f" {self.similarity}"
        return f"{self.batch}x{self.pixels}x{self.channels}{kind}"


@dataclass(frozen=True)
class MemoryBound:
    """Cases of an op that is bound by memory traffic. ``pixels`` is the width of the output (2:1 or
    square), the number of features, or the pixels of a square map of them."""

    inputs: Callable[[Case, int, torch.Generator], dict[str, torch.Tensor]]
    moved: Callable[[Case], int]
    """Bytes of inputs, outputs and their gradients."""
    shape: Callable[[Case], str]


def _labels(generator: torch.Generator, *size: int, classes: int) -> torch.Tensor:
    """Blocks of classes, 32 pixels wide."""
    coarse = torch.randint(0, classes, (size[0], size[1] // 32 + 1, size[2] // 32 + 1), generator=generator)
    return coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : size[1], : size[2]].contiguous()


def _low(n: int) -> int:
    return (n + 7) // 8


def _square(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    logits = 2 * torch.randn(case.batch, case.channels, _low(n), _low(n), generator=generator)
    return {"x": logits, "labels": _labels(generator, case.batch, n, n, classes=case.channels)}


def _frame(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    logits = 2 * torch.randn(case.batch, case.channels, _low(n // 2), _low(n), generator=generator)
    return {"x": logits, "labels": _labels(generator, case.batch, n // 2, n, classes=case.channels)}


def _domain(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    size = (case.batch, case.channels, _low(n // 2), _low(n))
    logits = 4 * torch.randn(size[0], 2 * size[1], *size[2:], generator=generator)
    return {"x": logits, "seg": 4 * torch.randn(size, generator=generator)}


def _planes(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(case.batch, case.channels, n // 2, n, generator=generator).softmax(1)}


def _features(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.nn.functional.normalize(torch.randn(n, case.channels, generator=generator).abs(), dim=1)
    return {"x": x, "labels": torch.randint(0, 19, (n,), generator=generator)}


def _prototypes(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    features = _features(case, n, generator)
    statistics = F.class_statistics(features["x"], features["labels"], 19, backend="reference")
    return {**features, "mean": statistics.mean, "variance": statistics.variance}


def _attention(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(case.batch, n, case.channels, generator=generator).relu_()
    return {"x": x, "seg": 4 * torch.randn(case.batch, n, 19, generator=generator)}


def _inside(side: int) -> int:
    """Pairs of a pixel and one of DeepLab's taps that meet in a square image; the middle taps are one."""
    shifts = {(i * d, j * d) for d in DILATIONS for i in (-1, 0, 1) for j in (-1, 0, 1)}
    return sum(max(side - abs(i), 0) * max(side - abs(j), 0) for i, j in shifts)


def _head(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    side = math.isqrt(n)
    x = torch.randn(case.batch, case.channels, side, side, generator=generator).relu_()
    weight = torch.randn(len(DILATIONS), ASPP_CLASSES, case.channels, 3, 3, generator=generator) * 0.01
    return {"x": x.to(memory_format=torch.channels_last), "weight": weight}


def _depthwise(case: Case, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    side = math.isqrt(n)
    x = torch.randn(case.batch, case.channels, side, side, generator=generator)
    weight = torch.randn(case.channels, 1, 3, 3, generator=generator)
    return {"x": x.to(memory_format=torch.channels_last), "weight": weight}


def _element(c: Case) -> int:
    """Bytes of one."""
    return torch.finfo(DTYPES[c.dtype]).bits // 8


def _square_shape(c: Case) -> str:
    return f"{c.batch}x{c.channels}x{_low(c.pixels)}² to {c.pixels}²"


def _square_bytes(c: Case) -> int:
    low = 4 * c.batch * c.channels * _low(c.pixels) ** 2
    return 8 * c.batch * c.pixels**2 + (low if c.mode == "fwd" else 2 * low)


MEMORY_BOUND = {
    "upsample_cross_entropy": MemoryBound(_square, _square_bytes, _square_shape),
    "lovasz_softmax": MemoryBound(_square, _square_bytes, _square_shape),
    "domain_cross_entropy": MemoryBound(
        _domain,
        lambda c: (
            (3 if c.mode == "fwd" else 5) * 4 * c.batch * c.channels * _low(c.pixels // 2) * _low(c.pixels)
        ),
        lambda c: f"{c.batch}x{2 * c.channels} to {c.pixels // 2}x{c.pixels}",
    ),
    "upsample_confusion": MemoryBound(
        _frame,
        lambda c: 8 * c.batch * c.pixels**2 // 2,
        lambda c: f"{c.batch}x{c.channels} to {c.pixels // 2}x{c.pixels}",
    ),
    "local_affinity": MemoryBound(
        _planes,
        lambda c: (9 if c.mode == "fwd" else 19) * 4 * c.batch * c.channels * c.pixels**2 // 2,
        lambda c: f"{c.batch}x{c.channels}x{c.pixels // 2}x{c.pixels}",
    ),
    "class_statistics": MemoryBound(
        _features, lambda c: 4 * c.pixels * c.channels, lambda c: f"{c.pixels}x{c.channels}, 19 classes"
    ),
    "prototype_contrast": MemoryBound(
        _prototypes,
        lambda c: 3 * 4 * c.pixels * c.channels,
        lambda c: f"{c.pixels}x{c.channels}, 19 prototypes",
    ),
    "smooth_max_pool": MemoryBound(
        _planes,
        lambda c: (1 if c.mode == "fwd" else 3) * 4 * c.batch * c.channels * c.pixels**2 // 2,
        lambda c: f"{c.batch}x{c.channels}x{c.pixels // 2}x{c.pixels}",
    ),
    "category_pool": MemoryBound(
        _attention,
        lambda c: (1 if c.mode == "fwd" else 2) * 4 * c.batch * c.pixels * c.channels,
        lambda c: f"{c.batch}x{c.pixels}x{c.channels}, 19 classes",
    ),
    "depthwise_conv2d": MemoryBound(
        _depthwise,
        lambda c: (2 if c.mode == "fwd" else 5) * _element(c) * c.batch * c.pixels * c.channels,
        lambda c: f"{c.batch}x{c.channels}x{math.isqrt(c.pixels)}², 3x3 dilated by 4",
    ),
    "aspp": MemoryBound(
        _head,
        lambda c: (1 if c.mode == "fwd" else 3) * _element(c) * c.batch * c.pixels * c.channels,
        lambda c: f"{c.batch}x{c.channels}x{math.isqrt(c.pixels)}², {len(DILATIONS)} branches, 19 classes",
    ),
}
BOTH = ("fwd", "fwd+bwd")
CASES = [
    *(
        Case(op, mode, dtype, pixels, 2048)
        for op in ("cycle_association_loss", "spatial_aggregate")
        for dtype in ("bfloat16", "float32")
        for pixels in (4096, 8464)
        for mode in BOTH
    ),
    *(Case("cycle_match", "fwd", dtype, 4096, 2048) for dtype in ("bfloat16", "float32")),
    *(
        Case(op, "fwd+bwd", "float32", 8464, 19, "kl")
        for op in ("cycle_association_loss", "spatial_aggregate")
    ),
    *(Case("contrast_softmax", mode, "float32", 8464, 8464) for mode in BOTH),
    Case("cycle_association_loss", "fwd+bwd", "bfloat16", 32768, 256),
    *(Case("upsample_cross_entropy", mode, "float32", 730, 19, batch=2) for mode in BOTH),
    Case("lovasz_softmax", "fwd+bwd", "float32", 730, 19, batch=2),
    Case("upsample_confusion", "fwd", "float32", 2048, 19),
    *(Case("domain_cross_entropy", mode, "float32", 1024, 19) for mode in BOTH),
    *(Case("local_affinity", mode, "float32", 1024, 19) for mode in BOTH),
    Case("class_statistics", "fwd", "float32", 12800, 512),
    Case("prototype_contrast", "fwd+bwd", "float32", 12800, 512),
    Case("smooth_max_pool", "fwd+bwd", "float32", 1024, 19),
    Case("category_pool", "fwd+bwd", "float32", 8464, 2048),
    *(Case("depthwise_conv2d", mode, "float32", 1024, 960) for mode in BOTH),
    *(Case("aspp", mode, "float32", 4096, 512) for mode in BOTH),
    *(Case("aspp", "fwd+bwd", dtype, 8464, 2048) for dtype in ("bfloat16", "float32")),
]
SWEEP = [
    Case(op, "fwd+bwd", "float32", pixels, 256)
    for op in ("cycle_association_loss", "spatial_aggregate")
    for pixels in (1024, 2048, 4096, 8192)
]
"""The sizes of the plot of time and memory against N."""


def make_inputs(case: Case, device: str, pixels: int | None = None) -> dict[str, torch.Tensor]:
    """Features with a common mean, as a ReLU network gives them, or probabilities; every cycle matches."""
    n = pixels or case.pixels
    generator = torch.Generator().manual_seed(0)
    if case.op in MEMORY_BOUND:
        made = {k: v.to(device) for k, v in MEMORY_BOUND[case.op].inputs(case, n, generator).items()}
        made["x"] = made["x"].to(DTYPES[case.dtype])
        for name in made.keys() & {"x", "weight"}:
            made[name].requires_grad_(case.mode != "fwd")
        return made

    def rows(shift: float) -> torch.Tensor:
        shape = (case.batch, n, case.channels)
        x = torch.randn(shape, generator=generator)
        if case.op == "contrast_softmax":
            x = x[..., : case.channels]
        elif case.similarity == "kl":
            x = (2 * x).softmax(-1)
        else:
            x = x.add_(shift).relu_()
        return x.to(device=device, dtype=DTYPES[case.dtype]).requires_grad_(case.mode != "fwd")

    if case.op == "contrast_softmax":
        return {"x": rows(0.0)}
    if case.op == "spatial_aggregate":
        return {"x": rows(0.3)}
    labels = torch.zeros(case.batch, n, dtype=torch.int64, device=device)
    return {"source": rows(0.3), "target": rows(0.3), "labels": labels}
