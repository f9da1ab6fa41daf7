"""Pictures of the cycles that a method finds between one source and one target image."""

from __future__ import annotations

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE, ClassSet
from fastuda.data.loading.batch import Batch
from fastuda.data.loading.transforms import resize_image
from fastuda.methods.cycles import Cycles
from fastuda.models.normalization import Normalization
from fastuda.report.pictures import data_uri
from fastuda.report.rendering import render

AREA = 256 * 512
"""Pixels of the two images, as many as in a training crop of the demo, so that it takes about a second."""
COUNT = 60
"""Largest number of cycles to draw."""


def middle_pair(
    source: Domain, target: Domain, normalization: Normalization
) -> tuple[np.ndarray, np.ndarray, Batch]:
    """The middle image of each of two domains, at most :data:`AREA` pixels, uint8 [H, W, 3], and their batch.

    Raises:
        BadFile: one of them cannot be read.
    """
    image, label = source.read_pair(len(source) // 2)
    pictures = _fitted(image), _fitted(target.read_image(len(target) // 2))

    def tensor(picture: np.ndarray) -> Tensor:
        planes = normalization.apply(torch.from_numpy(picture.copy()).permute(2, 0, 1))[None]
        return planes.contiguous(memory_format=torch.channels_last)

    labels = torch.from_numpy(label.copy())[None].long()
    return *pictures, Batch(tensor(pictures[0]), labels, tensor(pictures[1]), (), ())


def _fitted(image: np.ndarray) -> np.ndarray:
    scale = min(1.0, (AREA / (image.shape[0] * image.shape[1])) ** 0.5)
    return resize_image(image, (max(8, round(image.shape[0] * scale)), max(8, round(image.shape[1] * scale))))


def covered_picture(cycles: Cycles, target: np.ndarray, classes: ClassSet) -> np.ndarray:
    """The target image, darkened, with each covered pixel in the colour of the class of its cycle."""
    ids = cycles.covered.reshape(cycles.target_grid)
    size = target.shape[1], target.shape[0]
    ids = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    dark = target.astype(np.float32) * 0.35
    mixed = dark * 0.3 + classes.colorize(ids).astype(np.float32) * 0.7
    return np.where((ids == IGNORE)[..., None], dark, mixed).round().astype(np.uint8)


def chosen(cycles: Cycles, count: int, closed: bool) -> list[int]:
    """``count`` source pixels to draw: the classes in turn, spread over the pixels of each class."""
    keep = cycles.closed if closed else cycles.valid & ~cycles.closed
    rng = np.random.default_rng(0)
    queues = []
    for c in np.unique(cycles.labels[keep]):
        pixels = rng.permutation(np.nonzero(keep & (cycles.labels == c))[0])
        # one cycle per target pixel, because thousands may pass through the same one
        _, first = np.unique(cycles.there[pixels], return_index=True)
        queues.append(pixels[np.sort(first)].tolist())
    out: list[int] = []
    while len(out) < count and any(queues):
        out += [queue.pop(0) for queue in queues if queue]
    return out[:count]


def drawing(cycles: Cycles, classes: ClassSet, source: np.ndarray, target: np.ndarray) -> Markup:
    """SVG with the source above the target: a line from each source pixel to its match, and a dashed line
    back."""
    width = max(source.shape[1], target.shape[1])
    below = source.shape[0] + width // 16

    def point(pixel: int, grid: tuple[int, int], picture: np.ndarray, top: int) -> tuple[float, float]:
        row, column = divmod(int(pixel), grid[1])
        x, y = (column + 0.5) * picture.shape[1] / grid[1], (row + 0.5) * picture.shape[0] / grid[0]
        return round(x, 1), round(top + y, 1)

    lines = [
        {
            "closed": closed,
            "number": number,
            "name": classes.names[cycles.labels[i]],
            "colour": classes.palette[cycles.labels[i]] if closed else (160, 160, 160),
            "start": point(i, cycles.source_grid, source, 0),
            "middle": point(cycles.there[i], cycles.target_grid, target, below),
            "end": point(cycles.back[i], cycles.source_grid, source, 0),
        }
        for closed in (True, False)
        for number, i in enumerate(chosen(cycles, COUNT if closed else COUNT // 3, closed))
    ]
    pictures = [
        {"uri": data_uri(picture, photo=True), "y": y, "width": picture.shape[1], "height": picture.shape[0]}
        for picture, y in ((source, 0), (target, below))
    ]
    size = width, below + target.shape[0]
    return render("cycles.svg", size=size, pictures=pictures, cycles=lines)
