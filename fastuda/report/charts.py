"""Curves as inline SVG: no script, no network, colours from the page that they stand in."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 26
POINTS = 300
"""A curve with more is drawn as means over its neighbours."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    """(step, value), in order of the steps."""


def chart(title: str, curves: list[Curve]) -> str:
    """A figure with its title and, with several curves, a legend; empty where there is nothing to draw."""
    curves = [Curve(c.name, thin([p for p in c.points if math.isfinite(p[1])])) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    points = [point for curve in curves for point in curve.points]
    last = max(step for step, _ in points)
    ticks = nice_ticks(min(value for _, value in points), max(value for _, value in points))
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step / last if last else 0.0)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for step in (0.0, last):
        anchor = "start" if step == 0 else "end"
        parts.append(
            f'<text x="{place(step, low)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:.0f}</text>'
        )
    for number, curve in enumerate(curves):
        placed = [place(*point) for point in curve.points]
        if len(placed) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="c{number}" points="{line}"/>')
        if len(placed) <= 12:
            parts += [f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in placed]
    said = "; ".join(
        f"{c.name} from {c.points[0][1]:.4g} at step {c.points[0][0]:.0f} to {c.points[-1][1]:.4g}"
        f" at step {c.points[-1][0]:.0f}"
        for c in curves
    )
    legend = "".join(
        f'<span><i class="c{n}"></i>{html.escape(c.name)} <b>{c.points[-1][1]:.4g}</b></span>'
        for n, c in enumerate(curves)
    )
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{name}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}: {html.escape(said)}">'
        f'{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`POINTS` points: means over equally many neighbours, each at the last of their steps."""
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
