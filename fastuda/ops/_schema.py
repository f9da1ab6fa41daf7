"""How an operator is registered: an annotated fake gives its name, its schema and its shapes. Torch only; no
kernel is imported here.

An operator ``X`` has one overload per implementation, ``fastuda::X.cpu``, ``.triton``, ``.library`` and
``.cuda``, with the same arguments. C++ fills ``.cpu`` through ``TORCH_LIBRARY_IMPL``; the Triton launchers
are attached by :mod:`fastuda.ops._backends` when they are first needed. What a forward saves for its backward
is part of the schema, so that any forward pairs with any backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("cpu", "triton", "library", "cuda")

library = torch.library.Library("fastuda", "DEF")

OPERATORS: list[str] = []
"""The names of all."""


def operator(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``fastuda::<name of the fake>`` with its signature, one overload per implementation."""
    # a symbolic size would reach kernels that take numbers
    schema = torch.library.infer_schema(fake, mutates_args=()).replace("SymInt", "int")
    for implementation in IMPLEMENTATIONS:
        name = f"{fake.__name__}.{implementation}"
        library.define(name + schema)
        torch.library.register_fake(f"fastuda::{name}", fake, lib=library)
    OPERATORS.append(fake.__name__)
    return fake


def index(x: Tensor, *shape: int) -> Tensor:
    """Empty int64, on the device of ``x``."""
    return x.new_empty(shape, dtype=torch.int64)


def statistic(x: Tensor, *shape: int) -> Tensor:
    """Empty float64 for float64 ``x``, float32 for every other."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
