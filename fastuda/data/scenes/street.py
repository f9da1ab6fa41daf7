"""Street scenes: places the objects and paints them from far to near."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fastuda.data.scenes import objects
from fastuda.data.scenes.canvas import Canvas
from fastuda.data.scenes.style import REAL, SYNTHETIC, Style, develop, shade

Rng = np.random.Generator

STYLES: dict[str, Style] = {"synthetic": SYNTHETIC, "real": REAL}
FAR = 130.0

Things = list[tuple[float, Callable[[], None]]]
"""Depth of every object, and the function that paints it."""


def draw_scene(domain: str, seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Image ``uint8 [H, W, 3]`` and train ids ``uint8 [H, W]``; a pure function of the arguments."""
    style = STYLES[domain]
    rng = np.random.default_rng([seed, sorted(STYLES).index(domain), index])
    canvas = Canvas(
        size,
        horizon=rng.uniform(*style.horizon),
        camera_height=rng.uniform(*style.camera_height),
        focal=rng.uniform(*style.focal),
        shift=rng.uniform(-0.12, 0.12),
    )
    left, right = -rng.uniform(4.0, 6.5), rng.uniform(3.2, 5.5)
    _ground(canvas, style, rng, left, right)
    things: Things = []
    for side, edge in ((-1, left), (1, right)):
        _frontage(things, canvas, style, rng, side, edge)
        _pavement_life(things, canvas, style, rng, side, edge)
    _traffic(things, canvas, style, rng, left, right)
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()
    color, labels, near = canvas.finish()
    return develop(color, labels, near, style, rng), labels


def _ground(canvas: Canvas, style: Style, rng: Rng, left: float, right: float) -> None:
    width, height, horizon = canvas.width, canvas.height, canvas.horizon
    zenith, low = np.array(style.pick(rng, "sky")), np.array(style.pick(rng, "skyline"))
    bands = 24
    for band in range(bands):
        top, bottom = horizon * band / bands, horizon * (band + 1) / bands + 1
        mix = (band / (bands - 1)) ** 1.5
        tone = zenith * (1 - mix) + low * mix
        corners = [(0, top), (width, top), (width, bottom), (0, bottom)]
        canvas.flat_polygon(corners, (tone[0], tone[1], tone[2]), "sky", FAR)
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.uniform(0, width), rng.uniform(0, horizon * 0.7)
        for _ in range(5):
            a, b = rng.uniform(12, 40) * width / 512, rng.uniform(3, 9) * width / 512
            u, v = x + rng.normal(0, 24), y + rng.normal(0, 4)
            puff = low * rng.uniform(1.0, 1.08)
            turn = np.linspace(0, 2 * np.pi, 12)
            blob = [(u + a * np.cos(t), v + b * np.sin(t)) for t in turn]
            canvas.flat_polygon(blob, (puff[0], puff[1], puff[2]), "sky", FAR)
    grass = style.pick(rng, "terrain")
    canvas.flat_polygon([(0, horizon), (width, horizon), (width, height), (0, height)], grass, "terrain", 30)
    _skyline(canvas, style, rng)

    near = 0.6
    stone, pave = style.pick(rng, "road"), style.pick(rng, "sidewalk")
    walk = rng.uniform(2.0, 3.6)
    for side, edge in ((-1, left), (1, right)):
        outer = edge + side * walk
        canvas.polygon([(edge, 0, near), (outer, 0, near), (outer, 0, FAR), (edge, 0, FAR)], pave, "sidewalk")
        curb = edge + side * 0.22
        canvas.polygon(
            [(edge, 0, near), (curb, 0, near), (curb, 0, FAR), (edge, 0, FAR)], shade(pave, 1.16), "sidewalk"
        )
    canvas.polygon([(left, 0, near), (right, 0, near), (right, 0, FAR), (left, 0, FAR)], stone, "road")
    paint = style.pick(rng, "marking")
    middle = (left + right) / 2 + rng.uniform(-0.5, 0.5)
    for z in np.arange(rng.uniform(1, 5), 70, 6.0).tolist():
        _stripe(canvas, middle - 0.08, middle + 0.08, z, z + 3.0, paint)
    for edge in (left + 0.35, right - 0.35):
        _stripe(canvas, edge - 0.06, edge + 0.06, near, 80, paint)
    if rng.random() < 0.3:
        z = rng.uniform(7, 22)
        for x in np.arange(left + 0.6, right - 0.6, 1.1).tolist():
            _stripe(canvas, x, x + 0.55, z, z + 2.6, paint)


def _stripe(
    canvas: Canvas, x0: float, x1: float, z0: float, z1: float, color: tuple[float, float, float]
) -> None:
    canvas.polygon([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], color, "road")


def _skyline(canvas: Canvas, style: Style, rng: Rng) -> None:
    x = -160.0
    while x < 160:
        wide = rng.uniform(8, 24)
        if rng.random() < 0.6:
            canvas.quad(x, x + wide, 0, rng.uniform(5, 20), FAR, style.pick(rng, "building"), "building")
        else:
            color = style.pick(rng, "vegetation")
            canvas.ellipse(x + wide / 2, 1.5, FAR, wide * 0.7, rng.uniform(4, 8), color, "vegetation")
        x += wide * rng.uniform(0.8, 1.1)


def _frontage(
    things: Things,
    canvas: Canvas,
    style: Style,
    rng: Rng,
    side: int,
    edge: float,
) -> None:
    """Buildings, hedges, walls, fences and gaps along one side."""
    z, setback = rng.uniform(1.5, 5), rng.uniform(2.6, 5.0)
    while z < 100:
        long = rng.uniform(7, 20)
        x = edge + side * (setback + rng.uniform(0, 0.8))
        kind = rng.choice(["building", "hedge", "wall", "fence", "gap"], p=[0.52, 0.2, 0.1, 0.1, 0.08])
        z0, z1 = z, z + long
        if kind == "building":
            things.append((z1, partial(objects.building, canvas, style, rng, side, x, z0, z1)))
        elif kind == "hedge":
            things.append((z1, partial(objects.hedge, canvas, style, rng, side, x, z0, z1)))
        elif kind in ("wall", "fence"):
            things.append((z1 + 1, partial(objects.hedge, canvas, style, rng, side, x + side, z0, z1)))
            things.append((z1, partial(objects.barrier, canvas, style, rng, side, x, z0, z1, str(kind))))
        z = z1 + rng.uniform(0, 1.5)


def _pavement_life(
    things: Things,
    canvas: Canvas,
    style: Style,
    rng: Rng,
    side: int,
    edge: float,
) -> None:
    """Trees, posts, pedestrians and parked two-wheelers on one pavement."""
    for _ in range(int(rng.integers(1, 5))):
        x, z = edge + side * rng.uniform(0.5, 1.0), rng.uniform(6, 60)
        if rng.random() < 0.55:
            things.append((z, partial(objects.tree, canvas, style, rng, x, z)))
    for _ in range(int(rng.integers(2, 6))):
        x, z = edge + side * rng.uniform(0.3, 0.7), rng.uniform(5, 45)
        kind = str(rng.choice(["lamp", "sign", "light"], p=[0.35, 0.38, 0.27]))
        things.append((z, partial(objects.pole, canvas, style, rng, x, z, kind)))
    for _ in range(int(rng.poisson(2.2))):
        x, z = edge + side * rng.uniform(0.6, 2.2), rng.uniform(4.5, 30)
        things.append((z, partial(objects.person, canvas, style, rng, x, z)))
    if rng.random() < 0.35:
        x, z = edge + side * rng.uniform(0.5, 1.4), rng.uniform(5, 16)
        name = str(rng.choice(["bicycle", "motorcycle"]))
        things.append((z, partial(objects.two_wheeler, canvas, style, rng, x, z, name, False)))


def _traffic(
    things: Things,
    canvas: Canvas,
    style: Style,
    rng: Rng,
    left: float,
    right: float,
) -> None:
    """Parked and moving vehicles, and riders on the road."""
    for edge, side in ((left, 1), (right, -1)):
        z = rng.uniform(5, 14)
        while z < 60 and rng.random() < 0.8:
            x = edge + side * 1.1
            things.append((z, partial(objects.vehicle, canvas, style, rng, x, z, "car")))
            z += rng.uniform(6, 16)
    names = ["car", "truck", "bus", "train"]
    for _ in range(int(rng.integers(1, 4))):
        name = str(rng.choice(names, p=[0.5, 0.2, 0.18, 0.12]))
        x, z = rng.uniform(left * 0.45, right * 0.45), rng.uniform(9, 50)
        things.append((z, partial(objects.vehicle, canvas, style, rng, x, z, name)))
    for _ in range(int(rng.poisson(0.9))):
        name = str(rng.choice(["bicycle", "motorcycle"]))
        x, z = rng.uniform(left * 0.75, right * 0.75), rng.uniform(5, 20)
        things.append((z, partial(objects.two_wheeler, canvas, style, rng, x, z, name, True)))
