"""Checkpoints: written whole or not at all, loadable without unpickling code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastuda.errors import UserError

FORMAT = 2


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
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        reason = str(error.__context__ or error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another --out") from error
    finally:
        draft.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what :func:`write_atomic` left behind when its process was killed."""
    for draft in folder.glob(".*.part"):
        draft.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomic(path, lambda draft: torch.save({"format": FORMAT, **state}, draft))


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
