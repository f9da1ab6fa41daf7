"""The registry of methods that --method reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastuda.errors import UserError, nearest
from fastuda.methods.base import Method
from fastuda.system.imports import import_named

METHODS: dict[str, type[Method]] = {}
"""Name to class, in the order of registration."""
DEFAULT = "plca"
"""Default method of a run."""
BASELINE = "source_only"
"""Method with which adaptations are compared."""

M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator that registers a method under a name."""

    def add(cls: M) -> M:
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def get_method(name: str) -> type[Method]:
    """The class of a registered method, of ``package.module:Class``, or of several joined by ``+``.

    Raises:
        UserError: there is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    if "+" in name:
        from fastuda.methods.compose import compose

        parts = name.split("+")
        # the settings of package.module:Class are under Class
        own = tuple(part.rpartition(":")[2] for part in parts)
        return compose(own, tuple(get_method(part) for part in parts))
    module, colon, _ = name.partition(":")
    if not colon or not module or module.startswith("."):
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    method = import_named(name, "method")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"{name!r} is not a fastuda.methods.base.Method")
    if "__dataclass_fields__" not in vars(method.Config):
        raise UserError(
            f"{name!r} has a Config that is not a dataclass; decorate it with @dataclass(frozen=True)"
        )
    return method
