"""One op at one size, and the bench's description of an op; ``tests/cases`` has a ``BENCH`` for each op."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOTH = ("fwd", "fwd+bwd")

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


class CannotExpress(Exception):
    """The provider cannot express this op, mode or dtype."""


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
    """Number of pixels of the features or of a square map of them, or the width of the output (2:1 or
    square)."""
    channels: int
    similarity: str = "cosine"
    batch: int = 1

    @property
    def backward(self) -> bool:
        """Whether the gradients are measured as well."""
        return self.mode == "fwd+bwd"

    @property
    def element(self) -> int:
        """Bytes of one element."""
        return torch.finfo(DTYPES[self.dtype]).bits // 8

    @property
    def products(self) -> float:
        """Number of tile products that every exact method without N x N storage needs."""
        return bench_of(self.op).products(self)

    @property
    def moved(self) -> int:
        """Bytes of inputs, outputs and their gradients; 0 if products bound the op."""
        return bench_of(self.op).moved(self)

    @property
    def shape(self) -> str:
        """The shape as printed in the table."""
        return bench_of(self.op).shape(self)


def row_shape(case: Case) -> str:
    """The shape of features that are compared by a similarity."""
    kind = "" if case.similarity == "cosine" else f" {case.similarity}"
    return f"{case.batch}x{case.pixels}x{case.channels}{kind}"


@dataclass(frozen=True)
class Bench:
    """The description of an op for the bench."""

    cases: list[Case]
    inputs: Callable[[Case, int, torch.Generator], Inputs]
    """Inputs in float32 with the given number of pixels. ``x``, ``source`` and ``target`` are then cast to
    the case's dtype; they and ``weight`` have gradients."""
    run: Callable[[Case, Inputs, str], Tensor]
    """The public op on a backend."""
    moved: Callable[[Case], int] = lambda case: 0
    products: Callable[[Case], float] = lambda case: 0.0
    shape: Callable[[Case], str] = row_shape
    others: dict[str, Callable[[Case], Run]] = field(default_factory=dict)
    """Other implementations of the same, by the names of ``bench.providers``."""


def bench_of(op: str) -> Bench:
    """The ``BENCH`` of an op."""
    from tests.cases import case

    return case(op).BENCH


def low(n: int) -> int:
    """Number of rows or columns of logits for ``n`` of an image."""
    return (n + 7) // 8


def label_blocks(generator: torch.Generator, *size: int, classes: int) -> Tensor:
    """Blocks of classes, 32 pixels wide."""
    coarse = torch.randint(0, classes, (size[0], size[1] // 32 + 1, size[2] // 32 + 1), generator=generator)
    return coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : size[1], : size[2]].contiguous()


def similar_rows(case: Case, n: int, generator: torch.Generator) -> Tensor:
    """Features with a common mean, as from a ReLU network, or probabilities."""
    x = torch.randn(case.batch, n, case.channels, generator=generator)
    return (2 * x).softmax(-1) if case.similarity == "kl" else x.add_(0.3).relu_()


def two_images(case: Case, n: int, generator: torch.Generator) -> Inputs:
    """Two images between which every cycle matches."""
    rows = {name: similar_rows(case, n, generator) for name in ("source", "target")}
    return {**rows, "labels": torch.zeros(case.batch, n, dtype=torch.int64)}


def upsampled(case: Case, n: int, generator: torch.Generator) -> Inputs:
    """Logits of a square image, at an eighth of its resolution, and its labels."""
    logits = 2 * torch.randn(case.batch, case.channels, low(n), low(n), generator=generator)
    return {"x": logits, "labels": label_blocks(generator, case.batch, n, n, classes=case.channels)}


def upsampled_bytes(case: Case) -> int:
    """Bytes for :func:`upsampled`: labels, logits and their gradient."""
    logits = 4 * case.batch * case.channels * low(case.pixels) ** 2
    return 8 * case.batch * case.pixels**2 + (2 * logits if case.backward else logits)


def upsampled_shape(case: Case) -> str:
    """Of :func:`upsampled`."""
    return f"{case.batch}x{case.channels}x{low(case.pixels)}² to {case.pixels}²"


def planes(case: Case, n: int, generator: torch.Generator) -> Inputs:
    """Probabilities of an image that is twice as wide as it is high."""
    return {"x": torch.randn(case.batch, case.channels, n // 2, n, generator=generator).softmax(1)}


def plane_shape(case: Case) -> str:
    """Of :func:`planes`."""
    return f"{case.batch}x{case.channels}x{case.pixels // 2}x{case.pixels}"


def unit_features(case: Case, n: int, generator: torch.Generator) -> Inputs:
    """Features of length one, with labels of 19 classes."""
    x = torch.nn.functional.normalize(torch.randn(n, case.channels, generator=generator).abs(), dim=1)
    return {"x": x, "labels": torch.randint(0, 19, (n,), generator=generator)}


def square_map(case: Case, n: int, generator: torch.Generator) -> Tensor:
    """Channels-last features of a square image."""
    side = math.isqrt(n)
    x = torch.randn(case.batch, case.channels, side, side, generator=generator)
    return x.to(memory_format=torch.channels_last)
