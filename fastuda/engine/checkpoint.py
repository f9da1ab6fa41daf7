"""Checkpoints: written atomically, and loaded without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastuda.errors import UserError
from fastuda.system.files import open_for_library, written

FORMAT = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: the file cannot be written; ``path`` is unchanged.
    """
    with written(path, fsync=True) as draft, open_for_library(draft) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that holds only tensors and plain types.

    Raises:
        UserError: the file is missing, truncated, of another format, or contains code.
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
