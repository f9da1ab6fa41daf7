"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastuda.errors import UserError


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Another name beside ``path`` to write to, renamed to it where the block succeeds."""
    name = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield name
        name.replace(path)
    finally:
        name.unlink(missing_ok=True)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The same for a file that the user asked for, in a folder that is made where it is missing.

    Raises:
        UserError: it cannot be written; ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror}") from error
    try:
        with draft(path) as name:
            yield name
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
