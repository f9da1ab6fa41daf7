"""What tests and bench know of each op: one module an op, found by its name, without pytest. It defines

- ``good()``: small arguments that the op takes. Its signature and they tell most of what it must refuse.
- ``BAD``: by setting, values out of range beside -0.1, NaN, infinity and 10**30.
- ``faults()``: what else it refuses: changed arguments, exception, the argument named, what is shown of it.
- ``edges()``: changed arguments that are legal.
- ``GRADIENTS``: how many of the first tensors have a gradient, 1 unless said.
- ``ANY_RANK``: the number of dimensions is free.
- ``hard()``: by variant, a shape and a function of it whose result is NaN where the first value is.
- ``memory()`` and ``MEMORY``: by variant, a call on large leaves, and the MiB that forward and backward hold.
- ``samples(device)``: names, inputs, and functions of an input and a backend, for GPUs.
- ``small()``: the same of sizes for Triton's interpreter, several blocks each.
- ``wide(width, device, sizes)``: an input, and a function as above: several panels of whole tiles.
- ``operators(device)``: each operator's arguments, small.
- ``compiled(dtype)``: names and operators' arguments of which the machine code is looked at.
- ``EVERY_DTYPE``: it differs with the dtype beyond a load.
- ``BENCH``: sizes, floor and competitors.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

OPS = tuple(sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")))


@cache
def case(op: str) -> ModuleType:
    """The module of an op."""
    return importlib.import_module(f"{__name__}.{op}")


def every(name: str, *args: Any) -> list[tuple[Any, ...]]:
    """What the function of that name yields in every module that has one, the op put before it."""
    rows = [(op, row) for op in OPS for row in getattr(case(op), name, lambda *_: ())(*args)]
    return [(op, *row) if isinstance(row, tuple) else (op, row) for op, row in rows]


def good(op: str) -> dict[str, Any]:
    """Small arguments that the op takes."""
    return case(op).good()
