"""How the process keeps freed memory, and the error if memory runs out."""

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
    """Keep the memory that this process frees, for reuse.

    By default glibc returns large tensors to the system, which clears their pages when the next step
    allocates them: a third of the time of an ASANet step on a CPU. The process then stays at its peak size
    until :func:`give_back_freed_memory`.

    Returns:
        Whether the C library supports this: glibc.
    """
    library = _glibc()
    return library is not None and bool(
        library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


def give_back_freed_memory() -> None:
    """Return all free pages to the system. Does nothing if the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def memory_suffices(device: torch.device, otherwise: str) -> Iterator[None]:
    """Raises:
    UserError: the block ran out of memory; ``otherwise`` says what to do.
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
    """Peak memory in MiB: allocated on a CUDA device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
