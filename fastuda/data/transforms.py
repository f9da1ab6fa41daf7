"""Paired augmentation of an image and its label: resize, crop, flip, normalise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastuda.data.labels import IGNORE


@dataclass(frozen=True)
class Augment:
    """Random shorter edge (or an exact size), random crop, random flip; a pure function of the generator's
    state.

    Only the window that the crop shows is resampled: bilinear with antialiasing for the image, nearest for
    the label. Where the resized image is smaller than the crop, the rest is mean colour and ignored label,
    right and below.
    """

    crop: tuple[int, int]
    resize: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    flip: float = 0.5

    def __call__(
        self, image: np.ndarray, label: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """``uint8 [H, W, 3]`` and ``uint8 [H, W]`` to the crop's size."""
        height, width = image.shape[:2]
        if self.size is not None:
            new_h, new_w = self.size
        elif self.resize is not None:
            edge = int(rng.integers(self.resize[0], self.resize[1] + 1))
            scale = edge / min(height, width)
            new_h, new_w = round(height * scale), round(width * scale)
        else:
            new_h, new_w = height, width
        crop_h, crop_w = min(self.crop[0], new_h), min(self.crop[1], new_w)
        top = int(rng.integers(0, new_h - crop_h + 1))
        left = int(rng.integers(0, new_w - crop_w + 1))
        flip = rng.random() < self.flip

        box = (
            left * width / new_w,
            top * height / new_h,
            (left + crop_w) * width / new_w,
            (top + crop_h) * height / new_h,
        )
        image = self._window(image, box, (crop_w, crop_h), Image.Resampling.BILINEAR)
        if label is not None:
            label = self._window(label, box, (crop_w, crop_h), Image.Resampling.NEAREST)
        if flip:
            image = image[:, ::-1]
            label = None if label is None else label[:, ::-1]
        pad_h, pad_w = self.crop[0] - crop_h, self.crop[1] - crop_w
        if pad_h or pad_w:
            mean = image.reshape(-1, 3).mean(0).round().astype(np.uint8)
            padded = np.broadcast_to(mean, (*self.crop, 3)).copy()
            padded[:crop_h, :crop_w] = image
            image = padded
            if label is not None:
                label = np.pad(label, ((0, pad_h), (0, pad_w)), constant_values=IGNORE)
        return np.ascontiguousarray(image), None if label is None else np.ascontiguousarray(label)

    @staticmethod
    def _window(
        x: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], mode: Image.Resampling
    ) -> np.ndarray:
        if (box[2] - box[0], box[3] - box[1]) == size:
            left, top = round(box[0]), round(box[1])
            return x[top : top + size[1], left : left + size[0]]
        return np.asarray(Image.fromarray(x).resize(size, mode, box=box))


def resize_image(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """``uint8 [H, W, 3]`` bilinear with antialiasing to (height, width), or as it is."""
    if size is None or tuple(image.shape[:2]) == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
