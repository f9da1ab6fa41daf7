"""The one exception that a command line turns into a single clear line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message names the file, key or shape, and says what to do."""
