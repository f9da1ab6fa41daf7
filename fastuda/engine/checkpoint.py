"""Checkpoints: written whole or not at all, loadable without unpickling code."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastuda.errors import UserError, cannot_write

FORMAT = 2


class _KeepsErrors(io.RawIOBase):
    """Writes to a file, takes everything, and keeps the first error."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextlib.contextmanager
def open_for_library(path: Path) -> Iterator[Any]:
    """A file for a library's own writer, open for writing. Where a write fails, the block goes on, and then
    the system's error is raised.

    torch's writer hides that error, or ends the process where it appears in a destructor; NumPy only counts
    the bytes that are missing.

    Raises:
        OSError: a write failed.
    """
    with path.open("wb") as file:
        kept = _KeepsErrors(file)
        yield kept
        if kept.error is not None:
            raise kept.error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it to the disk, and rename it into place; a device or
    pipe is written to as it is.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            write(path)  # a device would be replaced by a file
            return
        write(draft)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what :func:`write_atomic` left behind when its process was killed."""
    for draft in folder.glob(".*.part"):
        draft.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""

    def write(draft: Path) -> None:
        with open_for_library(draft) as file:
            torch.save({"format": FORMAT, **state}, file)

    write_atomic(path, write)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain types only.

    Raises:
        UserError: it is missing, truncated, of another format, or holds code.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or ["it is empty"])[0].partition(". ")[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {first}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of fastuda")
    return state
