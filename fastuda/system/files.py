"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastuda.errors import UserError, cannot_write


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
