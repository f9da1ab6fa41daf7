"""Reading settings: dictionaries, YAML and ``key=value`` into frozen dataclasses, checked key by key."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any

from fastuda.errors import UserError, nearest
from fastuda.paths import at_home
from fastuda.system.yaml import read_yaml


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A frozen dataclass from a dictionary, each key and type checked.

    Raises:
        UserError: an unknown key (with the nearest ones), a value of the wrong type or outside of the class's
            ``RANGES``, named by its dotted key.
    """
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    out = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise UserError(f"unknown setting {dotted!r}{nearest(str(key), names)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{dotted} must be a section of settings, got {reprlib.repr(value)}")
            out[key] = build(hint, value, dotted)  # type: ignore[arg-type]
        else:
            out[key] = convert(value, hint, dotted)
    for key, (least, most) in getattr(cls, "RANGES", {}).items():
        if key in out and not least <= out[key] <= most:
            raise UserError(f"{where}.{key} is {out[key]}; it must be {_between(least, most)}")
    return cls(**out)


def _between(least: float, most: float) -> str:
    return f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint``, without surprising conversions.

    Raises:
        UserError: it is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            return tuple(convert(item, args[0], where) for item in value)
        if len(args) == len(value):
            return tuple(convert(item, arg, where) for item, arg in zip(value, args, strict=True))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif hint is str and isinstance(value, str):
        return at_home(value)  # only paths and domains begin with ~
    elif hint is str and isinstance(value, bool):
        return "on" if value else "off"  # YAML reads a bare on and off as booleans
    elif (
        ((origin is dict or hint is dict) and isinstance(value, dict))
        or hint is Any
        or (isinstance(hint, type) and type(value) is hint)
    ):
        return value
    if origin is tuple:
        kinds = ["..." if arg is Ellipsis else getattr(arg, "__name__", str(arg)) for arg in args]
        raise UserError(f"{where} must be a list [{', '.join(kinds)}], got {reprlib.repr(value)}")
    if dict in (origin, hint):
        raise UserError(f"{where} must be a section of settings, got {reprlib.repr(value)}")
    wanted = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise UserError(f"{where} must be {wanted}, got {reprlib.repr(value)}")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the leaves of ``over`` put in; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def without(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` less the leaves that ``over`` has as well; neither is changed."""
    out = {}
    for key, value in base.items():
        if key not in over:
            out[key] = value
        elif isinstance(value, dict) and isinstance(over[key], dict):
            out[key] = without(value, over[key])
    return out


def nest(dotted: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` to ``{"a": {"b": 1}}``; where ``{"a": {"c": 2}}`` is given as well, both are in it."""
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *path, leaf = key.split(".")
        node = out
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{key} is given within {part}, which is given a value of its own")
        both = isinstance(value, dict) and isinstance(node.get(leaf), dict)
        node[leaf] = merge(node[leaf], value) if both else value
    return out


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """``["optim.lr=0.1"]`` to a nested dictionary, values read as YAML.

    Raises:
        UserError: no ``=``, or a value that is not YAML.
    """
    dotted = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item!r} is neither a flag nor key=value; see --help")
        dotted[key] = read_yaml(text, f"the value of {key}")
    return nest(dotted)


def plain(value: Any) -> Any:
    """Dataclass values as YAML and checkpoints hold them: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
