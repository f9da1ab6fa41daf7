"""Registers operators: an annotated fake function gives the name, the schema and the shapes of each. Imports
only torch, no kernel.

An operator ``X`` has one overload per implementation, ``fastuda::X.cpu``, ``.triton``, ``.library`` and
``.cuda``, with the same arguments. C++ fills ``.cpu`` through ``TORCH_LIBRARY_IMPL``;
:mod:`fastuda.ops._backends` attaches the Triton launchers. The tensors that a forward saves for its backward
are part of the schema, so that every forward works with every backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("cpu", "triton", "library", "cuda")

library = torch.library.Library("fastuda", "DEF")

OPERATORS: list[str] = []
"""The names of all operators."""


def operator(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``fastuda::<name of the fake>`` with its signature, one overload per implementation."""
    # the kernels take numbers, not symbolic sizes
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
