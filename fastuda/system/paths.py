"""Paths as the user types them."""

from __future__ import annotations

import os
import re

_HOME = re.compile(r"(\w+:)?(~[^/\\]*)(?=[/\\]|$)")


def at_home(text: str) -> str:
    """``~`` and ``~user`` at the start of a path, or after the name of a domain (``cityscapes:~/data``),
    replaced by the home folder: shells leave them alone in ``--out=~/x`` and in ``key=~/x``."""
    match = _HOME.match(text)
    return (match[1] or "") + os.path.expanduser(match[2]) + text[match.end() :] if match else text
