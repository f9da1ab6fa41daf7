"""Appearance of the two domains: palettes, and effects of light, air, lens and sensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from fastuda.data.labels import CITYSCAPES
from fastuda.data.scenes.canvas import Color

Rng = np.random.Generator


def shade(color: Color, factor: float) -> Color:
    """A colour made darker or lighter."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


@dataclass(frozen=True)
class Style:
    """Appearance of a domain; pairs are ranges to draw from."""

    palette: dict[str, tuple[Color, ...]]
    spread: float
    """Standard deviation of the colour of an object, in levels."""
    texture: tuple[float, float]
    """Relative amplitudes of fine and coarse surface texture."""
    horizon: tuple[float, float]
    camera_height: tuple[float, float]
    focal: tuple[float, float]
    haze: tuple[float, float]
    exposure: tuple[float, float]
    saturation: float
    warmth: tuple[float, float]
    """Range of the colour cast; negative is blue, positive is yellow."""
    blur: float
    """Largest radius of the lens blur, in pixels."""
    noise: float
    """Standard deviation of the sensor noise, in levels."""
    vignette: float

    def pick(self, rng: Rng, name: str) -> Color:
        """Draw a colour for an object."""
        options = self.palette[name]
        r, g, b = options[int(rng.integers(len(options)))]
        common, own = rng.normal(0, self.spread), rng.normal(0, self.spread * 0.4, 3)
        return (r + common + own[0], g + common + own[1], b + common + own[2])


_PAINT: tuple[Color, ...] = (
    (200, 30, 35),
    (235, 235, 240),
    (30, 60, 170),
    (25, 25, 30),
    (240, 190, 30),
    (60, 150, 70),
)
_DULL: tuple[Color, ...] = (
    (120, 122, 126),
    (38, 40, 44),
    (168, 170, 172),
    (86, 34, 34),
    (44, 58, 84),
    (196, 196, 192),
)

SYNTHETIC = Style(
    palette={
        "sky": ((70, 130, 225),),
        "skyline": ((170, 205, 245),),
        "road": ((82, 84, 92),),
        "marking": ((245, 245, 245),),
        "sidewalk": ((172, 168, 176),),
        "terrain": ((110, 170, 60),),
        "building": ((214, 160, 120), (200, 90, 75), (225, 210, 170), (150, 160, 190), (190, 140, 170)),
        "glass": ((60, 90, 130),),
        "wall": ((165, 150, 140), (140, 120, 115)),
        "fence": ((150, 110, 70), (90, 100, 110)),
        "vegetation": ((50, 140, 40), (80, 160, 50)),
        "trunk": ((100, 70, 45),),
        "pole": ((105, 108, 115),),
        "sign": ((30, 80, 200), (210, 30, 35), (240, 200, 40)),
        "car": _PAINT,
        "truck": ((235, 235, 235), (40, 90, 180), (210, 60, 40)),
        "bus": ((235, 190, 40), (200, 40, 50)),
        "train": ((220, 225, 230), (40, 130, 90)),
        "motorcycle": ((200, 40, 30), (30, 30, 35)),
        "bicycle": ((30, 130, 190), (200, 60, 50)),
        "cloth": ((220, 60, 60), (60, 90, 200), (240, 230, 220), (90, 180, 90), (40, 40, 45)),
        "trousers": ((40, 50, 90), (50, 50, 55), (120, 100, 80)),
        "skin": ((225, 180, 150), (150, 105, 80)),
    },
    spread=7,
    texture=(0.035, 0.02),
    horizon=(0.40, 0.48),
    camera_height=(1.7, 2.3),
    focal=(0.80, 0.95),
    haze=(0.0, 0.15),
    exposure=(0.95, 1.08),
    saturation=1.12,
    warmth=(-0.02, 0.03),
    blur=0.0,
    noise=1.5,
    vignette=0.0,
)

REAL = Style(
    palette={
        "sky": ((147, 170, 207), (158, 178, 209), (122, 155, 202)),
        "skyline": ((199, 210, 221),),
        "road": ((105, 102, 101), (94, 93, 96), (114, 111, 109)),
        "marking": ((220, 218, 213),),
        "sidewalk": ((151, 143, 141), (158, 154, 153)),
        "terrain": ((109, 132, 69), (120, 132, 76)),
        "building": ((159, 132, 132), (145, 93, 80), (173, 150, 153), (138, 99, 94), (175, 142, 110)),
        "glass": ((59, 72, 88), (81, 95, 113)),
        "wall": ((131, 119, 112), (117, 106, 101)),
        "fence": ((94, 95, 93), (77, 83, 85)),
        "vegetation": ((58, 98, 45), (68, 104, 48), (53, 89, 44)),
        "trunk": ((83, 66, 51),),
        "pole": ((97, 98, 99), (115, 116, 116)),
        "sign": ((44, 76, 153), (171, 42, 41), (208, 174, 60)),
        "car": _DULL,
        "truck": ((203, 203, 201), (71, 94, 134), (153, 64, 49)),
        "bus": ((193, 158, 60), (157, 48, 51), (206, 190, 134)),
        "train": ((181, 183, 183), (112, 81, 63)),
        "motorcycle": ((39, 39, 42), (73, 36, 37)),
        "bicycle": ((43, 82, 107), (134, 60, 53)),
        "cloth": ((53, 53, 59), (95, 123, 89), (86, 56, 56), (60, 69, 86), (129, 158, 122)),
        "trousers": ((47, 49, 56), (60, 58, 57)),
        "skin": ((206, 167, 142), (133, 97, 76)),
    },
    spread=13,
    texture=(0.07, 0.08),
    horizon=(0.36, 0.52),
    camera_height=(1.15, 1.5),
    focal=(0.95, 1.25),
    haze=(0.1, 0.5),
    exposure=(0.8, 1.05),
    saturation=0.9,
    warmth=(-0.06, 0.08),
    blur=0.8,
    noise=4.0,
    vignette=0.25,
)

# relative strength of surface texture per class
_ROUGHNESS = np.array(
    [1.0, 1.1, 0.8, 1.1, 0.8, 0.4, 0.3, 0.2, 2.0, 1.8, 0.12, 0.6, 0.6, 0.35, 0.35, 0.3, 0.3, 0.4, 0.4],
    np.float32,
)


def develop(color: np.ndarray, labels: np.ndarray, near: np.ndarray, style: Style, rng: Rng) -> np.ndarray:
    """Apply texture, haze, light, lens and sensor to painted colours; uint8 [H, W, 3]."""
    height, width = labels.shape
    table = np.ones(256, np.float32)
    table[: len(CITYSCAPES)] = _ROUGHNESS
    rough = table[labels]
    fine = rng.standard_normal((height, width), np.float32)
    coarse = _cloud(rng, (height, width), 10) + 0.6 * _cloud(rng, (height, width), 24)
    gain = 1 + rough * (style.texture[0] * fine + style.texture[1] * coarse)
    image = color * gain[..., None]

    air = np.array(style.pick(rng, "skyline"), np.float32)
    thick = rng.uniform(*style.haze) * (1 - near[..., None]) * (labels != 10)[..., None]
    image += (air - image) * (thick * 0.75)

    grey = image.mean(-1, keepdims=True)
    image = grey + (image - grey) * style.saturation
    cast = rng.uniform(*style.warmth)
    sun = (
        1
        + 0.25
        * rng.uniform(-1, 1)
        * style.vignette
        * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    )
    image *= np.array([1 + cast, 1.0, 1 - cast], np.float32) * rng.uniform(*style.exposure) * sun
    if style.vignette:
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        image *= (1 - style.vignette * rng.uniform(0.3, 1) * (0.5 * x * x + 0.5 * y * y) ** 1.2)[..., None]
    if style.blur:
        picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        image = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, style.blur))), np.float32)
    image = image + rng.standard_normal(image.shape, np.float32) * style.noise
    return image.clip(0, 255).astype(np.uint8)


def _cloud(rng: Rng, size: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise of about unit variance with ``cells`` cells along the width."""
    small = rng.standard_normal((max(2, cells * size[0] // size[1]), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC))
