"""Methods by name: what --method takes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from fastuda.errors import UserError, nearest
from fastuda.methods.base import Method

METHODS: dict[str, type[Method]] = {}
"""Name to class, in the order of registration."""
DEFAULT = "plca"
"""The method of a run that names none."""
BASELINE = "source_only"
"""The method that every adaptation is measured against."""

M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known to ``--method``."""

    def add(cls: M) -> M:
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def get_method(name: str) -> type[Method]:
    """The class of a registered method, of ``package.module:Class``, or of several joined by ``+``.

    Raises:
        UserError: no such method.
    """
    if name in METHODS:
        return METHODS[name]
    if "+" in name:
        from fastuda.methods.compose import compose

        parts = name.split("+")
        # settings of package.module:Class stand under Class
        own = tuple(part.rpartition(":")[2] for part in parts)
        return compose(own, tuple(get_method(part) for part in parts))
    module, colon, attribute = name.partition(":")
    if not colon or not module or module.startswith("."):
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # python -m has it, the command fastuda has not
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{name!r} is not a fastuda.methods.base.Method")
    if "__dataclass_fields__" not in vars(found.Config):
        raise UserError(f"{name!r} has a Config that is no dataclass; write @dataclass(frozen=True) over it")
    return found
