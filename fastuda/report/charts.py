"""Curves and bars as inline SVG: no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from fastuda.report.rendering import render

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 26
POINTS = 300
"""Largest number of points of a drawn curve; longer curves are drawn as means over neighbouring points."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    """(step, value), in order of the steps."""


def chart(title: str, curves: list[Curve]) -> Markup:
    """A figure with its title and, for several curves, a legend; empty if there is nothing to draw."""
    curves = [Curve(c.name, thin([p for p in c.points if math.isfinite(p[1])])) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup("")
    points = [point for curve in curves for point in curve.points]
    last = max(step for step, _ in points)
    ticks = nice_ticks(min(value for _, value in points), max(value for _, value in points))
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step / last if last else 0.0)
        return round(x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    return render(
        "chart.html",
        title=title,
        size=(WIDTH, HEIGHT),
        left=LEFT,
        right=WIDTH - RIGHT,
        ticks=[(place(0, tick)[1], f"{tick:.4g}") for tick in ticks],
        last=last,
        curves=curves,
        lines=[[place(*point) for point in curve.points] for curve in curves],
    )


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`POINTS` points: means over equally many neighbours, each at their last step."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to six round values (1, 2 or 5 times a power of ten apart) that enclose both."""
    span = high - low or abs(high) or 1.0
    raw = span / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Bar(NamedTuple):
    """One bar of a plot; bars of the same group are above its name."""

    group: str
    name: str
    mean: float
    values: tuple[float, ...]
    text: str
    """The mean as text."""


def plot(bars: Sequence[Bar]) -> Markup:
    """SVG with a bar for every mean and a dot for every value; it follows the reader's light or dark mode."""
    bars = [bar._replace(values=tuple(v for v in bar.values if not math.isnan(v))) for bar in bars]
    bars = [bar for bar in bars if not math.isnan(bar.mean)]
    longest = max((max(bar.mean, *bar.values) for bar in bars), default=1.0)
    groups = {bar.group: [b for b in bars if b.group == bar.group] for bar in bars}
    return render("plot.svg", groups=groups, bars=bars, scale=1 / max(longest, 1.0))
