"""Pixel cycles between one source and one target image, for the report."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image

import fastuda.ops as F
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE, ClassSet
from fastuda.data.loading.transforms import resize_image
from fastuda.methods.base import Method
from fastuda.methods.plca import PLCA
from fastuda.methods.tensors import at_least_float32, pixel_major

AREA = 256 * 512
"""Pixels of the two images: what a training crop of the demo has, so that it takes a second anywhere."""


@dataclass(frozen=True)
class Cycles:
    """Both images at the size that the network saw, and where the cycles of the source's pixels go."""

    source: np.ndarray
    target: np.ndarray
    """uint8 [H, W, 3]."""
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    """Height and width of the feature maps; pixels are counted along their rows."""
    labels: np.ndarray
    """[N] train id of every source pixel, 255 = ignore."""
    there: np.ndarray
    """[N] target pixel that every source pixel is matched to."""
    back: np.ndarray
    """[N] source pixel in which its cycle ends."""

    @property
    def closed(self) -> np.ndarray:
        """[N] bool: the cycle ends in the class in which it began."""
        return (self.labels != IGNORE) & (self.labels == self.labels[self.back])

    @property
    def covered(self) -> np.ndarray:
        """[M] train id of a source pixel whose closed cycle passes through the target pixel; 255: none."""
        out = np.full(self.target_grid[0] * self.target_grid[1], IGNORE, np.uint8)
        out[self.there[self.closed]] = self.labels[self.closed]
        return out


def find_plca(method: Method) -> PLCA | None:
    """PLCA itself, or the one among a composition's parts."""
    return next((part for part in method.modules() if isinstance(part, PLCA)), None)


@torch.no_grad()
def cycles(plca: PLCA, source: Domain, target: Domain, device: torch.device) -> Cycles:
    """The cycles of the features (of the predictions, where only those are associated) as training makes
    them, between the middle images of the two domains.

    Raises:
        BadFile: one of them cannot be read.
    """
    image, label = source.read_pair(len(source) // 2)
    pictures = _fitted(image), _fitted(target.read_image(len(target) // 2))
    maps = []
    for picture in pictures:
        x = plca.model.input.apply(torch.from_numpy(picture.copy()).permute(2, 0, 1))[None]
        seen = plca.model(x.to(device, memory_format=torch.channels_last))
        cosine = plca.config.feature_association
        maps.append(seen.features if cosine else at_least_float32(seen.logits).softmax(1))
    similarity = "cosine" if plca.config.feature_association else "kl"
    rows = [pixel_major(x) for x in maps]
    if plca.config.aggregation:
        contrast = (
            plca.config.contrast if similarity == "cosine" else plca.config.prediction_aggregation_contrast
        )
        rows[1] = F.spatial_aggregate(
            rows[1], alpha=plca.config.aggregation_alpha, similarity=similarity, contrast=contrast
        )
    match = F.cycle_match(*rows, similarity=similarity)
    there = match.forward_index[0]
    small = nnf.interpolate(torch.from_numpy(label.copy())[None, None].float(), maps[0].shape[2:])
    first, second = ((x.shape[2], x.shape[3]) for x in maps)
    return Cycles(
        pictures[0],
        pictures[1],
        first,
        second,
        small.flatten().to(torch.uint8).numpy(),
        there.cpu().numpy(),
        match.backward_index[0][there].cpu().numpy(),
    )


def _fitted(image: np.ndarray) -> np.ndarray:
    scale = min(1.0, (AREA / (image.shape[0] * image.shape[1])) ** 0.5)
    return resize_image(image, (max(8, round(image.shape[0] * scale)), max(8, round(image.shape[1] * scale))))


def covered_picture(found: Cycles, classes: ClassSet) -> np.ndarray:
    """The target image, dark, with the covered pixels in the colour of the class that found them."""
    ids = found.covered.reshape(found.target_grid)
    size = found.target.shape[1], found.target.shape[0]
    ids = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    dark = found.target.astype(np.float32) * 0.35
    mixed = dark * 0.3 + classes.colorize(ids).astype(np.float32) * 0.7
    return np.where((ids == IGNORE)[..., None], dark, mixed).round().astype(np.uint8)


def chosen(found: Cycles, count: int, closed: bool) -> list[int]:
    """``count`` source pixels to draw, the classes in turn, each class's spread over its pixels."""
    keep = found.closed if closed else (found.labels != IGNORE) & ~found.closed
    rng = np.random.default_rng(0)
    queues = []
    for c in np.unique(found.labels[keep]):
        pixels = rng.permutation(np.nonzero(keep & (found.labels == c))[0])
        # one cycle per target pixel: thousands may meet in one
        _, first = np.unique(found.there[pixels], return_index=True)
        queues.append(pixels[np.sort(first)].tolist())
    out: list[int] = []
    while len(out) < count and any(queues):
        out += [queue.pop(0) for queue in queues if queue]
    return out[:count]


def drawing(found: Cycles, classes: ClassSet, source_uri: str, target_uri: str, count: int = 60) -> str:
    """SVG with the source above the target: a line from a source pixel to its match, a dashed one back."""
    width = max(found.source.shape[1], found.target.shape[1])
    gap = width // 16
    below = found.source.shape[0] + gap
    height = below + found.target.shape[0]
    parts = [
        f'<image href="{uri}" x="0" y="{y}" width="{picture.shape[1]}" height="{picture.shape[0]}"/>'
        for uri, y, picture in ((source_uri, 0, found.source), (target_uri, below, found.target))
    ]

    def point(pixel: int, grid: tuple[int, int], picture: np.ndarray, top: int) -> tuple[float, float]:
        row, column = divmod(int(pixel), grid[1])
        return (
            (column + 0.5) * picture.shape[1] / grid[1],
            top + (row + 0.5) * picture.shape[0] / grid[0],
        )

    for closed in (True, False):
        for number, i in enumerate(chosen(found, count if closed else count // 3, closed)):
            name = classes.names[found.labels[i]]
            r, g, b = classes.palette[found.labels[i]] if closed else (160, 160, 160)
            start = point(i, found.source_grid, found.source, 0)
            middle = point(found.there[i], found.target_grid, found.target, below)
            end = point(found.back[i], found.source_grid, found.source, 0)
            kind = "closed" if closed else "open"
            (x0, y0), (x1, y1), (x2, y2) = start, middle, end
            out, back = f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", f"L{x2:.1f} {y2:.1f}"
            colour = f"rgb({r},{g},{b})"
            parts.append(
                f'<g class="cycle {kind}" data-n="{number}" stroke="{colour}" fill="{colour}">'
                f'<title>{html.escape(name)}</title><path class="halo" d="{out}{back}"/><path d="{out}"/>'
                f'<path class="back" d="M{x1:.1f} {y1:.1f}{back}"/>'
                f'<circle cx="{x0:.1f}" cy="{y0:.1f}" r="{width / 160:.1f}"/>'
                f'<circle cx="{x1:.1f}" cy="{y1:.1f}" r="{width / 160:.1f}"/></g>'
            )
    return (
        f'<svg class="cycles" viewBox="0 0 {width} {height}" style="--w:{width / 400:.2f}" role="img"'
        f' aria-label="Pixel cycles from the source image (above) to the target image and back">'
        f"{''.join(parts)}</svg>"
    )
