"""Test and benchmark cases of the ops: one module per op, found by its name. They do not need pytest.

A module may define the following names:

- ``good()``: small valid arguments. Tests derive most invalid arguments from them and from the signature.
- ``BAD``: argument name to additional values that are out of range, besides -0.1, NaN, infinity and 10**30.
- ``faults()``: other invalid calls: changed arguments, exception type, and two texts that the message must
  contain: the name of the argument and the given value.
- ``edges()``: changed arguments that are unusual but valid.
- ``GRADIENTS``: number of leading tensors that have a gradient (default: 1).
- ``ANY_RANK``: the tensors may have any number of dimensions.
- ``hard()``: variant, shape, and a function of a tensor and a backend, whose result must be NaN if the first
  value of the tensor is NaN.
- ``memory()``: variant, a function, and the large tensors that it is called with.
- ``MEMORY``: variant to the MiB that forward and backward of ``memory()`` may hold.
- ``samples(device)``: name, input, and a function of an input and a backend, for GPU tests.
- ``small()``: the same in sizes for Triton's interpreter, with several blocks each.
- ``wide(width, device, sizes)``: an input and a function, as in ``samples``, with several panels of full
  tiles.
- ``operators(device)``: name of an operator and its small arguments, for every operator of the op.
- ``compiled(dtype)``: name of a case, name of an operator, and its arguments. The machine code is inspected.
- ``EVERY_DTYPE``: compile the kernels in every dtype, because they differ in more than a load.
- ``BENCH``: sizes, floor and competitors of the benchmark.
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
    """The cases of the generator ``name`` in every module that has one, each preceded by the op."""
    rows = [(op, row) for op in OPS for row in getattr(case(op), name, lambda *_: ())(*args)]
    return [(op, *row) if isinstance(row, tuple) else (op, row) for op, row in rows]


def good(op: str) -> dict[str, Any]:
    """Small valid arguments of the op."""
    return case(op).good()
