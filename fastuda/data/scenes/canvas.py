"""Pinhole camera that paints polygons into three images at once: colour, class and nearness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fastuda.data.labels import CITYSCAPES

Color = tuple[float, float, float]
Point = tuple[float, float, float]

OVERSAMPLE = 2
CLASS = {name: index for index, name in enumerate(CITYSCAPES.names)}


def nearness(z: float) -> int:
    """Nearness from 0 (far) to 255 (at the lens), which decreases with the haze in between."""
    return int(255 * np.exp(-z / 60.0))


class Canvas:
    """Painted images. World coordinates are in metres: X right, Y up from the road, Z into the image."""

    def __init__(
        self, size: tuple[int, int], horizon: float, camera_height: float, focal: float, shift: float
    ):
        height, width = size
        self.height, self.width = height * OVERSAMPLE, width * OVERSAMPLE
        self.focal = focal * self.width
        self.center = self.width * (0.5 + shift)
        self.horizon = horizon * self.height
        self.camera_height = camera_height
        self.images = (
            Image.new("RGB", (self.width, self.height)),
            Image.new("L", (self.width, self.height), 255),
            Image.new("L", (self.width, self.height), 0),
        )
        self.brushes = [ImageDraw.Draw(image) for image in self.images]

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixel (u, v) of a point in front of the camera."""
        return (
            self.center + self.focal * x / z,
            self.horizon + self.focal * (self.camera_height - y) / z,
        )

    def pixels(self, metres: float, z: float) -> float:
        """Length in pixels of ``metres`` at depth ``z``."""
        return self.focal * metres / z

    def polygon(self, points: Sequence[Point], color: Color, name: str) -> None:
        """Fill a polygon of world points."""
        flat = [self.project(*point) for point in points]
        z = sum(point[2] for point in points) / len(points)
        self.flat_polygon(flat, color, name, z)

    def flat_polygon(self, points: Sequence[tuple[float, float]], color: Color, name: str, z: float) -> None:
        """Fill a polygon of pixels."""
        for brush, fill in zip(self.brushes, self._fills(color, name, z), strict=True):
            brush.polygon(list(points), fill=fill)

    def quad(self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, name: str) -> None:
        """Fill an upright rectangle that faces the camera."""
        self.polygon([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], color, name)

    def ellipse(self, x: float, y: float, z: float, rx: float, ry: float, color: Color, name: str) -> None:
        """Fill an upright ellipse that faces the camera, at least one pixel wide."""
        u, v = self.project(x, y, z)
        a, b = max(self.pixels(rx, z), 0.6), max(self.pixels(ry, z), 0.6)
        for brush, fill in zip(self.brushes, self._fills(color, name, z), strict=True):
            brush.ellipse((u - a, v - b, u + a, v + b), fill=fill)

    def ring(self, x: float, y: float, z: float, radius: float, color: Color, name: str) -> None:
        """Draw an upright ring that faces the camera, for a wheel."""
        u, v = self.project(x, y, z)
        r = max(self.pixels(radius, z), 1.0)
        thick = max(1, round(r * 0.28))
        for brush, fill in zip(self.brushes, self._fills(color, name, z), strict=True):
            brush.ellipse((u - r, v - r, u + r, v + r), outline=fill, width=thick)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours float32 [H, W, 3], train ids uint8 [H, W], nearness float32 [H, W] in 0..1."""
        color, label, near = self.images
        small = (self.width // OVERSAMPLE, self.height // OVERSAMPLE)
        return (
            np.asarray(color.reduce(OVERSAMPLE), np.float32),
            np.asarray(label.resize(small, Image.Resampling.NEAREST)),
            np.asarray(near.reduce(OVERSAMPLE), np.float32) / 255.0,
        )

    @staticmethod
    def _fills(color: Color, name: str, z: float) -> list[tuple[int, ...] | int]:
        r, g, b = (int(min(max(c, 0), 255)) for c in color)
        return [(r, g, b), CLASS[name], nearness(z)]
