"""Prints the rows of a bench and appends them to a CSV."""

from __future__ import annotations

import csv
import errno
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from fastuda.errors import UserError


def say(line: str) -> None:
    """Print a line above the progress bar and flush it."""
    tqdm.write(line)
    sys.stdout.flush()


def check_rows(path: Path, columns: Sequence[str]) -> None:
    """Check that rows can be appended to a CSV before hours of measuring.

    Raises:
        UserError: it cannot be written, or has other columns.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if os.access(path.parent, os.W_OK):
                return
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not path.is_file():
            raise UserError(f"cannot write {path}: it is not a file")
        with path.open("r+", newline="", encoding="utf-8") as stream:
            header = next(csv.reader(stream), None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if header is not None and tuple(header) != tuple(columns):
        raise UserError(f"{path} has other columns than this bench; choose another --csv")


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to a CSV.

    Raises:
        UserError: it cannot be written.
    """
    try:
        fresh = not path.exists() or not path.stat().st_size
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
