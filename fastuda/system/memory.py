"""The C library's treatment of freed memory, and what is said where there is too little."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator

import torch

from fastuda.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep_freed_memory() -> bool:
    """From here on memory that this process frees stays with it, to be used again.

    By default glibc hands large tensors back to the system, which clears their pages when the next step asks
    for them: a third of the time of an ASANet step on a CPU. The process stays as large as it was at most,
    but for :func:`give_back_freed_memory`.

    Returns:
        Whether the C library is one that can be told so: glibc.
    """
    library = _glibc()
    return library is not None and bool(
        library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


def give_back_freed_memory() -> None:
    """Hands the system every page that is free now; nothing where the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def memory_suffices(device: torch.device, otherwise: str) -> Iterator[None]:
    """Raises:
    UserError: the block ran out of memory; ``otherwise`` is what to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # on the CPU torch reports a failed allocation as a plain RuntimeError
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "t allocate memory" in str(error):
            lines = str(error).splitlines() or ["no memory for Python's objects"]
            raise UserError(f"out of memory on {device}: {otherwise}. {lines[0]}") from error
        raise


def peak_memory(device: torch.device) -> float:
    """MiB: the most that was allocated on a CUDA device, or that this process held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
