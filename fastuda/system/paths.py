"""Paths that users type."""

from __future__ import annotations

import os
import re

_HOME = re.compile(r"(\w+:)?(~[^/\\]*)(?=[/\\]|$)")


def at_home(text: str) -> str:
    """Replace ``~`` and ``~user`` by the home folder at the start of a path, or after the name of a domain
    (``cityscapes:~/data``). Shells do not expand them in ``--out=~/x`` and ``key=~/x``."""
    match = _HOME.match(text)
    return (match[1] or "") + os.path.expanduser(match[2]) + text[match.end() :] if match else text
