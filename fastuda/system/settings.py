"""Settings from dictionaries, YAML and ``key=value`` as frozen dataclasses, with checked types and bounds."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from typing import Annotated, Any, Literal

from fastuda.errors import UserError, nearest
from fastuda.system.paths import at_home
from fastuda.system.yaml import read_yaml


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Metadata of ``Annotated``: the smallest and largest value of a number, or of each number of a list."""

    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    """Whether ``least`` itself is excluded."""
    open_above: bool = False
    """Whether ``most`` itself is excluded."""

    def holds(self, value: float) -> bool:
        """Whether the number is within the bounds; False for NaN."""
        low = value > self.least if self.open_below else value >= self.least
        return low and (value < self.most if self.open_above else value <= self.most)

    def __str__(self) -> str:
        above, below = "above" if self.open_below else "at least", "below" if self.open_above else "at most"
        if self.most == math.inf:
            return f"{above} {self.least:g}"
        if self.open_below or self.open_above:
            return f"{above} {self.least:g} and {below} {self.most:g}"
        return f"from {self.least:g} to {self.most:g}"


@dataclasses.dataclass(frozen=True)
class Ascending:
    """Metadata of ``Annotated``: the numbers of a list must not decrease."""


Count = Annotated[int, Bounds(1)]
Natural = Annotated[int, Bounds(0)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_below=True)]
Share = Annotated[float, Bounds(0, 1)]
Size = Annotated[tuple[int, int], Bounds(1)]


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """Build a frozen dataclass from a dictionary, and check every key, type and bound.

    The types declare the allowed values: ``Literal["sgd", "adam"]``, ``Annotated[float, Bounds(0, 1)]``.

    Raises:
        UserError: an unknown key (with the nearest ones), or a value that its type does not allow, named by
            its dotted key.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    names = {f.name for f in dataclasses.fields(cls)}
    out = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise UserError(f"unknown setting {dotted!r}{nearest(str(key), names)}")
        out[key] = convert(value, hints[key], dotted)
    return cls(**out)


def check(config: Any, where: str) -> None:
    """Check a dataclass instance made in code as :func:`build` checks a file.

    Raises:
        UserError: a value is not allowed by its type.
    """
    build(type(config), {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, where)


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint``, without surprising conversions.

    Raises:
        UserError: the type does not allow it.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded(convert(value, args[0], where), args[1:], where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(value, next(a for a in args if a is not type(None)), where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            check(value, where)
            return value
        if isinstance(value, dict):
            return build(hint, value, where)  # type: ignore[arg-type]
        raise UserError(f"{where} must be a section of settings, got {reprlib.repr(value)}")
    if isinstance(value, bool) and hint is not bool and (hint is str or "off" in args):
        value = "on" if value else "off"  # YAML reads a bare on and off as booleans
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        *others, last = map(str, args)
        raise UserError(f"{where} is {value!r}: choose {', '.join(others)} or {last}")
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            return tuple(convert(item, args[0], where) for item in value)
        if len(args) == len(value):
            return tuple(convert(item, arg, where) for item, arg in zip(value, args, strict=True))
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
        else:
            return _finite(number, where)
    elif (origin is dict or hint is dict) and isinstance(value, dict):
        return {key: _finite(item, f"{where}.{key}") for key, item in value.items()}
    elif hint is str and isinstance(value, str):
        return at_home(value)  # only paths and domains begin with ~
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    if origin is tuple:
        kinds = ["..." if arg is Ellipsis else getattr(arg, "__name__", str(arg)) for arg in args]
        raise UserError(f"{where} must be a list [{', '.join(kinds)}], got {reprlib.repr(value)}")
    if dict in (origin, hint):
        raise UserError(f"{where} must be a section of settings, got {reprlib.repr(value)}")
    raise UserError(f"{where} must be {getattr(hint, '__name__', hint)}, got {reprlib.repr(value)}")


def _finite(value: Any, where: str) -> Any:
    """The value, if it and every number in it is finite."""
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}; it must be a finite number")
    return value


def _bounded(value: Any, metadata: tuple[Any, ...], where: str) -> Any:
    several = isinstance(value, tuple)
    numbers = value if several else (value,)
    shown = list(value) if several else value
    for rule in metadata:
        if isinstance(rule, Bounds) and not all(rule.holds(number) for number in numbers):
            raise UserError(f"{where} is {shown}; {'each number' if several else 'it'} must be {rule}")
        if isinstance(rule, Ascending) and list(numbers) != sorted(numbers):
            raise UserError(f"{where} is {shown}; the smaller number comes first")
    return value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` updated with the leaves of ``over``; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def without(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` without the leaves that ``over`` has as well; neither is changed."""
    out = {}
    for key, value in base.items():
        if key not in over:
            out[key] = value
        elif isinstance(value, dict) and isinstance(over[key], dict):
            out[key] = without(value, over[key])
    return out


def nest(dotted: dict[str, Any]) -> dict[str, Any]:
    """Nest dotted keys: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}`` and is merged with ``{"a": {"c": 2}}``."""
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *path, leaf = key.split(".")
        node = out
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{key} is a part of {part}, which is set as well")
        both = isinstance(value, dict) and isinstance(node.get(leaf), dict)
        node[leaf] = merge(node[leaf], value) if both else value
    return out


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Parse ``["optim.lr=0.1"]`` into a nested dictionary, with values read as YAML.

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
    """Dataclass values as YAML and checkpoints store them: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
