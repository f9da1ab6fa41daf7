"""Joint augmentation of an image and its label: resize, crop, flip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastuda.data.labels import IGNORE


class Window(NamedTuple):
    """A drawn augmentation: resize to ``height`` x ``width``, crop at (``top``, ``left``), flip."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Augment:
    """Random shorter edge (or an exact size), random crop, random flip.

    Drawing (:meth:`draw`) is separate from applying, so every loader can apply the same window. Only the part
    that the crop shows is resampled, images by one of :data:`FILTERS` with antialiasing, labels by nearest
    neighbour. A resized image that is smaller than the crop is padded on the right and below, by black in the
    image and 255 in the label (PLCA, data/transforms.py).
    """

    crop: tuple[int, int]
    resize: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    flip: float = 0.5
    resampling: str = "bilinear"

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Window:
        """Draw a window of an image of this size; a pure function of the state of the generator."""
        new_h, new_w = height, width
        if self.size is not None:
            new_h, new_w = self.size
        elif self.resize is not None:
            edge = int(rng.integers(self.resize[0], self.resize[1] + 1))
            scale = edge / min(height, width)
            new_h, new_w = round(height * scale), round(width * scale)
        top = int(rng.integers(0, max(new_h - self.crop[0], 0) + 1))
        left = int(rng.integers(0, max(new_w - self.crop[1], 0) + 1))
        return Window(new_h, new_w, top, left, bool(rng.random() < self.flip))

    def image(self, image: np.ndarray, window: Window) -> np.ndarray:
        """Window of an image ``uint8 [H, W, 3]``, at the size of the crop."""
        return self._finish(self._cut(image, window, FILTERS[self.resampling]), window, 0)

    def label(self, label: np.ndarray, window: Window) -> np.ndarray:
        """Window of a label ``uint8 [H, W]``, at the size of the crop."""
        return self._finish(self._cut(label, window, Image.Resampling.NEAREST), window, IGNORE)

    def _cut(self, x: np.ndarray, window: Window, mode: Image.Resampling) -> np.ndarray:
        """Part of the resized image that the crop shows."""
        height, width = x.shape[:2]
        crop_h, crop_w = min(self.crop[0], window.height), min(self.crop[1], window.width)
        if (height, width) == (window.height, window.width):
            return x[window.top : window.top + crop_h, window.left : window.left + crop_w]
        sy, sx = height / window.height, width / window.width
        box = (
            window.left * sx,
            window.top * sy,
            min((window.left + crop_w) * sx, width),
            min((window.top + crop_h) * sy, height),
        )
        return np.asarray(Image.fromarray(x).resize((crop_w, crop_h), mode, box=box))

    def _finish(self, x: np.ndarray, window: Window, fill: int) -> np.ndarray:
        if window.flip:
            x = x[:, ::-1]
        if x.shape[:2] == self.crop:
            return np.array(x, order="C")
        out = np.full((*self.crop, *x.shape[2:]), fill, x.dtype)
        out[: x.shape[0], : x.shape[1]] = x
        return out


def resize_image(image: np.ndarray, size: tuple[int, int] | None, resampling: str = "bilinear") -> np.ndarray:
    """Image ``uint8 [H, W, 3]`` resized with antialiasing to ``size`` (height, width), if there is one."""
    if size is None or tuple(image.shape[:2]) == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), FILTERS[resampling]))
