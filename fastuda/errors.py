"""The exception that command lines report in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message names the file, key or shape and says what to do."""


def cannot_write(path: object, error: BaseException | str) -> UserError:
    """An error ``cannot write PATH: REASON``, with the system's reason, e.g. ``No space left on device``."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"cannot write {path}: {reason}")


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The end of an error message: the closest candidates, or all of them if none is close."""
    names = sorted(candidates)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(names)}"
