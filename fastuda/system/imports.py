"""Objects that users name as ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from fastuda.errors import UserError


def import_named(name: str, kind: str) -> Any:
    """Import the object ``package.module:attribute``; modules in the current folder are found as well.

    Args:
        name: ``package.module:attribute``.
        kind: the kind of object, for the message: method, model, backbone.

    Raises:
        UserError: the module cannot be imported or lacks the attribute.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # python -m adds it, the command fastuda does not
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kind} {name!r} cannot be imported: {error}") from error


def is_named(name: str) -> bool:
    """Whether the text has the form ``package.module:attribute``."""
    module, colon, attribute = name.partition(":")
    words = [*module.split("."), attribute]
    return bool(colon) and all(word.isidentifier() for word in words)
