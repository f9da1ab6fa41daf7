"""Reads files with errors that name them, and writes files atomically."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastuda.errors import UserError, cannot_write

_DRAFT = re.compile(r"\..+\.(\d{1,9})\.draft(\.[^.]*)?")

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    csv.Error,
)
"""Raised for JSON or CSV that is missing, truncated, nested too deeply or of another structure."""


def _named(path: Path, reason: str) -> UserError:
    return UserError(f"{path} {reason}")


@contextlib.contextmanager
def reading(path: Path, as_: str, error: Callable[[Path, str], UserError] = _named) -> Iterator[None]:
    """Name the file in the errors of the block that reads and parses it.

    Args:
        as_: what the file holds, for the message.
        error: makes the exception from the path and the reason.

    Raises:
        UserError: ``PATH cannot be read as AS_: REASON``.
    """
    try:
        yield
    except _UNREADABLE as fault:
        reason = (
            f"no key {fault}" if isinstance(fault, KeyError) else getattr(fault, "strerror", None) or fault
        )
        raise error(path, f"cannot be read as {as_}: {reason}") from fault


@contextlib.contextmanager
def written(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yield a draft beside ``path`` to write to, and rename it to ``path`` if the block succeeds.

    The draft has the same suffix as ``path``. The folder is created if it is missing. Devices and pipes are
    written to directly.

    Args:
        path: the file to write.
        fsync: flush the file and its folder to the disk, so that it survives a power failure.

    Raises:
        UserError: the file cannot be written; ``path`` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        if path.is_dir():
            raise UserError(f"cannot write {path}: Is a directory")
        # renaming would replace the device by a file, also where /dev/stdout is redirected to a file
        if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
            yield path
            return
        draft = path.with_name(f".{path.stem}.{os.getpid()}.draft{path.suffix}")
        try:
            yield draft
            _move(draft, path, fsync)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _move(draft: Path, path: Path, fsync: bool) -> None:
    if fsync:
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(draft, path)
    if fsync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def clean(folder: Path, *, recursive: bool = False) -> None:
    """Remove the drafts of :func:`written` whose process was killed. Drafts of other live processes stay."""
    for place, folders, files in os.walk(folder):
        for name in files:
            match = _DRAFT.fullmatch(name)
            if match and not _is_alive(int(match[1])):
                Path(place, name).unlink(missing_ok=True)
        if not recursive:
            folders.clear()


def _is_alive(process: int) -> bool:
    """Whether another process has this id. Containers often give a restarted process the same id again."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _KeepsErrors(io.RawIOBase):
    """Writes to a file, accepts everything, and keeps the first error."""

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
    """Open a file for a library's own writer. A failed write is raised after the block.

    torch's writer hides the error, or ends the process if it occurs in a destructor. NumPy only reports the
    number of missing bytes.

    Raises:
        OSError: a write failed.
    """
    with path.open("wb") as file:
        kept = _KeepsErrors(file)
        yield kept
        if kept.error is not None:
            raise kept.error
