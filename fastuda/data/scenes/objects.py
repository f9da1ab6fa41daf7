"""Objects of a street; each function paints one object at a given place."""

from __future__ import annotations

import numpy as np

from fastuda.data.scenes.canvas import Canvas, Color
from fastuda.data.scenes.style import Style, shade

Rng = np.random.Generator


def building(canvas: Canvas, style: Style, rng: Rng, side: int, x: float, z0: float, z1: float) -> None:
    """A box along the street with floors of windows on both visible faces."""
    tall = rng.uniform(6, 22)
    color = style.pick(rng, "building")
    flank = shade(color, rng.uniform(0.72, 0.95))
    back = x + side * rng.uniform(8, 14)
    canvas.quad(min(x, back), max(x, back), 0, tall, z0, color, "building")
    canvas.polygon([(x, 0, z0), (x, 0, z1), (x, tall, z1), (x, tall, z0)], flank, "building")
    glass = style.pick(rng, "glass")
    frame = shade(flank, 1.18)
    floor = rng.uniform(2.8, 3.6)
    if canvas.pixels(1.2, z0) < 3:
        return
    wide, gap = rng.uniform(1.0, 1.8), rng.uniform(2.4, 3.4)
    for level in range(int((tall - 1.5) / floor)):
        y = 1.0 + level * floor
        for start in np.arange(z0 + 0.8, z1 - wide, gap).tolist():
            if canvas.pixels(wide, start) < 1.5:
                break
            pane = shade(glass, 1.9 if rng.random() < 0.12 else rng.uniform(0.8, 1.1))
            _side_quad(canvas, x, y - 0.12, y + 1.62, start - 0.15, start + wide + 0.15, frame)
            _side_quad(canvas, x, y, y + 1.5, start, start + wide, pane)
        for step in np.arange(abs(x) + 0.8, abs(back) - wide, gap).tolist():
            left, right = sorted((side * step, side * (step + wide)))
            canvas.quad(left, right, y, y + 1.5, z0, shade(glass, rng.uniform(0.85, 1.1)), "building")
    roof = shade(color, 0.6)
    canvas.polygon([(x, tall - 0.4, z0), (x, tall - 0.4, z1), (x, tall, z1), (x, tall, z0)], roof, "building")


def _side_quad(canvas: Canvas, x: float, y0: float, y1: float, z0: float, z1: float, color: Color) -> None:
    canvas.polygon([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], color, "building")


def hedge(canvas: Canvas, style: Style, rng: Rng, side: int, x: float, z0: float, z1: float) -> None:
    """A row of bushes and trees, far ones first."""
    for z in np.sort(rng.uniform(z0, z1, max(3, int((z1 - z0) * 0.9))))[::-1].tolist():
        r = rng.uniform(1.2, 3.2)
        color = shade(style.pick(rng, "vegetation"), rng.uniform(0.75, 1.15))
        canvas.ellipse(
            x + side * rng.uniform(1, 5), r * rng.uniform(0.6, 1.3), z, r * 1.2, r, color, "vegetation"
        )


def barrier(
    canvas: Canvas, style: Style, rng: Rng, side: int, x: float, z0: float, z1: float, name: str
) -> None:
    """A wall with a coping, or a fence with bars."""
    tall = rng.uniform(1.8, 3.0) if name == "wall" else rng.uniform(1.2, 1.9)
    color = style.pick(rng, name)
    canvas.polygon([(x, 0, z0), (x, 0, z1), (x, tall, z1), (x, tall, z0)], color, name)
    if name == "wall":
        top = shade(color, 1.2)
        canvas.polygon([(x, tall - 0.2, z0), (x, tall - 0.2, z1), (x, tall, z1), (x, tall, z0)], top, name)
        return
    for z in np.arange(z0, z1, 0.55).tolist():
        if canvas.pixels(0.12, z) < 0.5:
            break
        bar = [(x, 0.0, z), (x, 0.0, z + 0.12), (x, tall, z + 0.12), (x, tall, z)]
        canvas.polygon(bar, shade(color, 0.6), name)


def tree(canvas: Canvas, style: Style, rng: Rng, x: float, z: float) -> None:
    """A trunk and a crown of overlapping leaves."""
    tall, crown = rng.uniform(4.5, 8.0), rng.uniform(1.3, 2.4)
    canvas.quad(x - 0.16, x + 0.16, 0, tall - crown, z, style.pick(rng, "trunk"), "vegetation")
    base = style.pick(rng, "vegetation")
    for _ in range(9):
        dx, dy = rng.normal(0, crown * 0.5, 2)
        r = crown * rng.uniform(0.45, 0.8)
        canvas.ellipse(x + dx, tall - crown * 0.4 + dy, z, r, r, shade(base, 0.9 + 0.12 * dy), "vegetation")


def pole(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, kind: str) -> None:
    """A lamp post, or a post that carries a sign or a traffic light."""
    color = style.pick(rng, "pole")
    tall = {"lamp": rng.uniform(6, 8), "sign": rng.uniform(2.4, 3.2), "light": rng.uniform(3.2, 4.2)}[kind]
    half = max(0.07, 0.7 * z / canvas.focal)
    canvas.quad(x - half, x + half, 0, tall, z, color, "pole")
    if kind == "lamp":
        arm = -np.sign(x) * rng.uniform(0.9, 1.6)
        canvas.quad(min(x, x + arm), max(x, x + arm), tall - 0.15, tall, z, color, "pole")
    elif kind == "sign":
        ink = style.pick(rng, "sign")
        if rng.random() < 0.5:
            canvas.ellipse(x, tall, z, 0.42, 0.42, (235, 235, 235), "traffic sign")
            canvas.ellipse(x, tall, z, 0.32, 0.32, ink, "traffic sign")
        else:
            canvas.quad(x - 0.45, x + 0.45, tall - 0.35, tall + 0.35, z, ink, "traffic sign")
            canvas.quad(x - 0.3, x + 0.3, tall - 0.08, tall + 0.08, z, (240, 240, 240), "traffic sign")
    else:
        canvas.quad(x - 0.24, x + 0.24, tall - 0.2, tall + 0.9, z, (30, 32, 30), "traffic light")
        lit = int(rng.integers(3))
        for lamp, on in enumerate(((70, 220, 90), (250, 190, 40), (250, 50, 40))):
            color = on if lamp == lit else (50, 50, 48)
            canvas.ellipse(x, tall + 0.02 + 0.33 * lamp, z, 0.13, 0.13, color, "traffic light")


def vehicle(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, name: str) -> None:
    """A car, truck, bus or tram seen from behind and from the side that faces the camera."""
    wide, long, tall, waist = {
        "car": (1.8, 4.2, 1.5, 0.85),
        "truck": (2.4, 7.0, 3.2, 1.1),
        "bus": (2.5, 10.0, 3.1, 1.2),
        "train": (2.7, 24.0, 3.5, 1.3),
    }[name]
    color = style.pick(rng, name)
    glass = style.pick(rng, "glass")
    left, right, far = x - wide / 2, x + wide / 2, z + long
    flank = right if x < 0 else left
    ground = 0.25
    canvas.polygon(
        [(left - 0.1, 0.02, z), (right + 0.1, 0.02, z), (right + 0.1, 0.02, far), (left - 0.1, 0.02, far)],
        (26, 26, 28),
        name,
    )
    dark = shade(color, 0.72)
    if name == "car":
        hood = [(flank, ground, z), (flank, ground, far), (flank, waist, far), (flank, waist + 0.1, z)]
        canvas.polygon(hood, dark, name)
        cabin = [
            (flank, waist, z + 0.2),
            (flank, waist, far - 1.0),
            (flank, tall, far - 1.8),
            (flank, tall, z + 0.7),
        ]
        canvas.polygon(cabin, shade(glass, 0.9), name)
        canvas.quad(left + 0.18, right - 0.18, waist, tall, z + 0.7, color, name)
        canvas.quad(left + 0.3, right - 0.3, waist + 0.05, tall - 0.12, z + 0.6, glass, name)
        canvas.quad(left, right, ground, waist + 0.1, z, color, name)
    else:
        canvas.polygon(
            [(flank, ground, z), (flank, ground, far), (flank, tall, far), (flank, tall, z)], dark, name
        )
        canvas.quad(left, right, ground, tall, z, color, name)
        if name == "truck":
            canvas.quad(left + 0.15, right - 0.15, waist, tall - 0.2, z, shade(color, 1.15), name)
        else:
            canvas.quad(left + 0.2, right - 0.2, tall * 0.5, tall - 0.35, z, glass, name)
            for start in np.arange(z + 0.6, far - 1.2, 1.9).tolist():
                pane = [(flank, tall * 0.5, start), (flank, tall * 0.5, start + 1.4)]
                pane += [(flank, tall - 0.5, start + 1.4), (flank, tall - 0.5, start)]
                canvas.polygon(pane, glass, name)
    for side in (-1, 1):
        wheel = x + side * (wide / 2 - 0.25)
        canvas.quad(wheel - 0.16, wheel + 0.16, 0.0, 0.42, z, (22, 22, 24), name)
        lamp = x + side * (wide / 2 - 0.2)
        canvas.quad(lamp - 0.14, lamp + 0.14, waist - 0.2, waist - 0.02, z, (215, 35, 30), name)


def person(
    canvas: Canvas, style: Style, rng: Rng, x: float, z: float, name: str = "person", lift: float = 0.0
) -> None:
    """A person with legs, torso, arms and head."""
    tall = rng.uniform(1.55, 1.85)
    shirt, legs, skin = style.pick(rng, "cloth"), style.pick(rng, "trousers"), style.pick(rng, "skin")
    step = rng.uniform(0.02, 0.2)
    for side in (-1, 1):
        foot = x + side * step
        hip = [
            (x + side * 0.02, 0.5 * tall),
            (x + side * 0.17, 0.5 * tall),
            (foot + 0.07, 0),
            (foot - 0.07, 0),
        ]
        canvas.polygon([(px, py + lift, z) for px, py in hip], legs, name)
        canvas.quad(x + side * 0.27 - 0.06, x + side * 0.27 + 0.06, 0.45 * tall + lift, 0.8 * tall + lift, z,
                    shade(shirt, 0.85), name)  # fmt: skip
    canvas.quad(x - 0.22, x + 0.22, 0.46 * tall + lift, 0.83 * tall + lift, z, shirt, name)
    canvas.ellipse(x, 0.92 * tall + lift, z, 0.12, 0.14, skin, name)


def two_wheeler(canvas: Canvas, style: Style, rng: Rng, x: float, z: float, name: str, ridden: bool) -> None:
    """A bicycle or a motorcycle, side on, with or without a rider."""
    color = style.pick(rng, name)
    for side in (-1, 1):
        canvas.ring(x + side * 0.5, 0.33, z, 0.33, (28, 28, 30), name)
    if name == "motorcycle":
        canvas.quad(x - 0.55, x + 0.5, 0.35, 0.8, z, color, name)
        canvas.quad(x - 0.35, x + 0.2, 0.8, 0.95, z, (30, 30, 32), name)
    else:
        frame = [(x - 0.5, 0.33, z), (x - 0.1, 0.85, z), (x + 0.35, 0.85, z), (x + 0.5, 0.33, z), (x, 0.4, z)]
        canvas.polygon(frame, color, name)
    if ridden:
        person(canvas, style, rng, x, z, "rider", lift=0.35)
