"""Reading files with the fault named, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastuda.errors import UserError, cannot_write

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
"""Raised by JSON or CSV that is missing, cut off, nested too deep or of another structure."""


def _named(path: Path, reason: str) -> UserError:
    return UserError(f"{path} {reason}")


@contextlib.contextmanager
def reading(path: Path, as_: str, error: Callable[[Path, str], UserError] = _named) -> Iterator[None]:
    """Name the file in the errors of the block that reads and parses it.

    Args:
        as_: what the file holds, for the message.
        error: makes the exception of the path and the reason.

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
def draft(path: Path) -> Iterator[Path]:
    """Another name beside ``path`` to write to, renamed to it where the block succeeds."""
    name = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield name
        name.replace(path)
    finally:
        name.unlink(missing_ok=True)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """The same for a file that the user asked for, in a folder that is made where it is missing; a device or
    pipe is written to as it is.

    Raises:
        UserError: it cannot be written; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        # a device would be replaced by a file, and so would /dev/stdout where it leads to one
        as_it_is = path.parent == Path("/dev") or (path.exists() and not path.is_file())
        if path.is_dir():
            raise UserError(f"cannot write {path}: Is a directory")
        with contextlib.nullcontext(path) if as_it_is else draft(path) as name:
            yield name
    except OSError as error:
        raise cannot_write(path, error) from error
