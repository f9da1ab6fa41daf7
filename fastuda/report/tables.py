"""Tables as plain values; the macro ``table`` draws them."""

from __future__ import annotations

import math
from typing import NamedTuple

NONE = "\u2013"
"""Stands for a missing number."""


class Cell(NamedTuple):
    """Text, and how it is shown: good, bad, or c0, c1, ... for the key of a bar."""

    text: str
    kind: str = ""


class Row(NamedTuple):
    """One line of a table."""

    name: str
    cells: list[Cell]
    colour: tuple[int, int, int] | None = None
    bars: tuple[float, ...] = ()
    """Lengths in percent."""


class Table(NamedTuple):
    """A table, with a name for screen readers."""

    label: str
    heads: list[Cell]
    rows: list[Row]
    foot: Row | None = None


def number(value: float | None, spec: str) -> str:
    """A number, or :data:`NONE` for a missing one."""
    return NONE if value is None or math.isnan(value) else format(value, spec)


def difference(value: float, digits: int, sign: int) -> Cell:
    """A difference with its sign; it is good if ``sign`` times it is above zero."""
    if math.isnan(value):
        return Cell(NONE)
    value = round(value, digits) + 0.0  # avoids -0
    return Cell(f"{value:+.{digits}f}", "" if value == 0 else "good" if value * sign > 0 else "bad")
