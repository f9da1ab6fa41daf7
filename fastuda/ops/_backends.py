"""Which implementation of an op runs, and why the others do not.

``backend="auto"`` walks the rows of :data:`BACKENDS` best-first and takes the first that can run the given
tensors; the reference always can. A named backend never falls back: it raises with its reason. The
environment variable ``FASTUDA_BACKEND``, read once at import, replaces ``auto``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastuda
from fastuda.ops._schema import OPERATORS, library

log = logging.getLogger("fastuda")

DEFAULT_BACKEND = os.environ.get("FASTUDA_BACKEND", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

try:
    from fastuda import _C  # type: ignore[attr-defined]

    EXTENSION_ERROR, EXTENSION_BUILD = "", str(getattr(_C, "BUILD", "built before it said how"))
except ImportError as error:
    EXTENSION_BUILD = ""
    EXTENSION_ERROR = f"the C++ extension is not built ({error})"


def _load_cuda() -> str:
    """Load the library of CUDA kernels. Returns why it cannot be loaded, or the empty string."""
    files = [Path(folder) / "_cuda.so" for folder in fastuda.__path__]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return "the CUDA kernels are not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA kernels do not load ({error})"
    return ""


CUDA_ERROR = _load_cuda()

TRITON_ERROR = "" if importlib.util.find_spec("triton") else "triton is not installed"


@dataclass(frozen=True)
class Backend:
    """One implementation of one public op."""

    op: str
    name: str
    """reference, cpu, triton, library or cuda: the overload of the registered operators it runs."""
    device: str
    dtypes: tuple[torch.dtype, ...]
    why: str
    """Why it comes before the rows after it."""
    operators: tuple[str, ...] = ()
    """The registered operators that the implementation must fill."""
    limit: Callable[..., str] | None = None
    """Called with the tensors: why the implementation does not take them, or the empty string."""

    def refusal(self, *tensors: Tensor, named: bool = False) -> str:
        """Why this backend cannot run these tensors, or the empty string when it can."""
        if self.name == "reference":
            return ""
        errors = {"cpu": EXTENSION_ERROR, "cuda": CUDA_ERROR, "triton": TRITON_ERROR, "library": TRITON_ERROR}
        missing = errors.get(self.name, "")
        if missing:
            return missing
        for operator in self.operators:
            if not _has_kernel(f"fastuda::{operator}.{self.name}", self.device.upper()):
                return f"{operator}.{self.name} is not in this build"
        if not tensors and self.device == "cuda" and not INTERPRETED and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        for tensor in tensors:
            interpreted = self.name in ("triton", "library") and named and INTERPRETED
            if tensor.device.type != self.device and not interpreted:
                return f"needs tensors on {self.device}, not on {tensor.device.type}"
            if tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                return f"does not take {tensor.dtype}"
        return self.limit(*tensors) if self.limit and tensors else ""


class BackendStatus(NamedTuple):
    """One line of :func:`backends`."""

    name: str
    usable: bool
    reason: str
    why: str
    """Why the implementation comes before those after it."""


def release_memory() -> None:
    """Free the memory that the C++ kernels keep for their next call.

    The kernels keep the latest 64 MiB of their panels and packed operands, because the page faults of new
    memory cost up to a fifth of an op. The system may take this memory back when it runs short; until then
    it counts as resident. For PyTorch's own memory on a GPU use ``torch.cuda.empty_cache``.
    """
    if not EXTENSION_ERROR:
        _C.release_memory()


_filled: set[tuple[str, str]] = set()


def _has_kernel(operator: str, key: str) -> bool:
    """Whether the operator has a kernel. A yes is cached: torch needs 3 us to answer, and most ops have two
    or three operators."""
    if (operator, key) not in _filled:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
            return False
        _filled.add((operator, key))
    return True


# torch.compiler.assume_constant_result sets this; the decorator itself would import dynamo and triton
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


BACKENDS: dict[str, tuple[Backend, ...]] = {}
"""Rows of every public op, best first."""

PREDICTED = "predicted, not measured"


def register(
    op: str,
    *,
    triton: bool = False,
    cuda: str = "",
    library_channels: int = 0,
    dtypes: tuple[torch.dtype, ...] = (*FLOATS, torch.float64),
    cpu_limit: Callable[..., str] | None = None,
    triton_limit: Callable[..., str] | None = None,
) -> None:
    """Add the rows of a public op: its fused implementations best-first, then the reference.

    The op's operators are those whose names begin with the op's name; an op without any has only the
    reference. ``dtypes`` are those of the C++ kernels. With ``triton`` the launchers of the same names in
    ``fastuda.kernels.<op>`` fill the overloads ``.triton``; their module is imported on the first call.
    With ``cuda`` the library of ``csrc/cuda`` has kernels of the op; the text says why they precede Triton's.
    ``cpu_limit`` and ``triton_limit`` say which tensors these implementations do not take. With
    ``library_channels`` the same launchers also fill the overloads ``.library``: for features with at least
    that many channels cuBLAS multiplies and a kernel reduces the panels.
    """
    operators = tuple(name for name in OPERATORS if name.startswith(f"{op}_"))
    rows = []
    if operators:
        why = "the only fused implementation for a CPU"
        rows.append(Backend(op, "cpu", "cpu", dtypes, why, operators, cpu_limit))
        if cuda:
            why = f"before triton: {cuda}; {PREDICTED}"
            rows.append(Backend(op, "cuda", "cuda", FLOATS, why, operators))
    if library_channels:
        why = (
            f"before triton from {library_channels} channels on: cuBLAS multiplies at 93 % of the peak, "
            f"tiles that wait for L2 at 55 to 60 %; {PREDICTED}"
        )
        limit = fewest_channels(library_channels)
        rows.append(Backend(op, "library", "cuda", FLOATS, why, operators, limit))
    if triton:
        others = ["cuda"] * bool(cuda) + ["library"] * bool(library_channels)
        why = f"before the reference: fused; {PREDICTED}"
        if others:
            why = f"where {' or '.join(others)} cannot run; {why}"
        rows.append(Backend(op, "triton", "cuda", FLOATS, why, operators, triton_limit))
        for operator in operators:
            for key in ("CUDA", "CPU"):
                library.impl(f"{operator}.triton", launcher(op, operator), key)
                if library_channels:
                    library.impl(f"{operator}.library", launcher(op, operator, library=True), key)
    rows.append(
        Backend(op, "reference", "any", (*FLOATS, torch.float64), "last: plain torch, which needs no kernel")
    )
    BACKENDS[op] = tuple(rows)


def launcher(op: str, operator: str, **options: Any) -> Callable[..., Any]:
    """A function that calls ``fastuda.kernels.<op>.<operator>``; the first call imports the module."""

    def launch(*args: Any, **more: Any) -> Any:
        module = importlib.import_module(f"fastuda.kernels.{op}")
        return getattr(module, operator)(*args, **options, **more)

    return launch


def fewest_channels(limit: int) -> Callable[..., str]:
    """The limit of kernels that are worth an extra pass over their panel only from ``limit`` channels on."""

    def refusal(x: Tensor, *_: Tensor) -> str:
        channels = x.shape[-1]
        return f"takes at least {limit} channels, not {channels}" if channels < limit else ""

    return refusal


def most_classes(limit: int) -> Callable[..., str]:
    """The limit of kernels that hold the classes, dimension 1 of the first tensor, in registers."""

    def refusal(x: Tensor, *_: Tensor) -> str:
        classes = x.shape[1] if x.dim() > 1 else 0
        return f"takes at most {limit} classes, not {classes}" if classes > limit else ""

    return refusal


def backends(op: str, *tensors: Tensor) -> list[BackendStatus]:
    """Every implementation of ``op``, best first: its name, whether it can run ``tensors``, why not, and why
    it comes before those after it.

    Without tensors it checks only what does not depend on them: that the implementation is built, and that
    its packages and a device are available.

    Raises:
        ValueError: no op has that name.
    """
    if op not in BACKENDS:
        raise ValueError(f"no op is named {op!r}; there are {', '.join(BACKENDS)}")
    rows = []
    for row in BACKENDS[op]:
        reason = row.refusal(*tensors, named=True)
        rows.append(BackendStatus(row.name, not reason, reason or "usable", row.why))
    return rows


def select(op: str, *tensors: Tensor, backend: str = "auto") -> str:
    """The name of the implementation to run.

    Raises:
        ValueError: the backend is unknown, or named and unable to run these tensors.
    """
    wanted = DEFAULT_BACKEND if backend == "auto" else backend
    rows = BACKENDS[op]
    if wanted == "auto":
        for row in rows:
            if not row.refusal(*tensors):
                _say_once(op, row.name, tensors)
                return row.name
    for row in rows:
        if row.name == wanted:
            reason = row.refusal(*tensors, named=True)
            if reason:
                raise ValueError(f"{op}: backend {wanted!r} cannot run: {reason}")
            return wanted
    raise ValueError(f"{op} has no backend {wanted!r}; it has auto, {', '.join(row.name for row in rows)}")


@contextlib.contextmanager
def default_backend(name: str) -> Iterator[None]:
    """In the block, ``backend="auto"`` means ``name``, as if ``FASTUDA_BACKEND`` were set to it."""
    global DEFAULT_BACKEND
    before, DEFAULT_BACKEND = DEFAULT_BACKEND, name
    try:
        yield
    finally:
        DEFAULT_BACKEND = before


_said: set[tuple[str, str]] = set()


def _say_once(op: str, name: str, tensors: tuple[Tensor, ...]) -> None:
    if torch.compiler.is_compiling() or (op, name) in _said:
        return
    _said.add((op, name))
    fused = any(row.device == x.device.type for row in BACKENDS[op][:-1] for x in tensors)
    if name == "reference" and fused and ("any", "reference") not in _said:
        _said.add(("any", "reference"))
        reasons = "; ".join(f"{row.name}: {row.refusal(*tensors)}" for row in BACKENDS[op][:-1])
        log.warning("%s runs on the reference implementation, which stores every matrix (%s)", op, reasons)
    else:
        log.info("%s runs on %s", op, name)


def overload(operator: str, name: str) -> Any:
    """``torch.ops.fastuda.<operator>.<name>``."""
    return getattr(getattr(torch.ops.fastuda, operator), name)
