"""Backbones of other libraries: measures their feature maps, and fits images of any size to them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.errors import UserError
from fastuda.models.mask_tokens import TokenMasks

MULTIPLES = (2, 4, 8, 14, 16, 28, 32, 64)
"""Candidates for the number that the sides of an image must be a multiple of. :func:`survey` first tries 1
and the stride of the coarsest map."""

Maps = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Geometry:
    """The geometry of a network's maps relative to its images."""

    widths: tuple[int, ...]
    """Channels of each map."""
    strides: tuple[float, ...]
    """Pixels between neighbouring cells of each map."""
    cell: tuple[int, int] = (1, 1)
    """The sides of an image are multiples of these."""
    windows: bool = False
    """Whether the network takes only images of size ``cell``."""

    def of(self, chosen: Sequence[int]) -> Geometry:
        """The geometry of some of the maps."""
        return replace(
            self,
            widths=tuple(self.widths[i] for i in chosen),
            strides=tuple(self.strides[i] for i in chosen),
        )


class ForeignBackbone(nn.Module):
    """``images [B, 3, H, W] -> features [B, C, h, w]`` of a network that returns one map or several.

    The maps are resized bilinearly (``align_corners=False``) to the grid of the finest one and concatenated,
    as :class:`~fastuda.models.mit.MiT` does. Before the network, the image is resized bilinearly:

    - to multiples of the network's cell, because a patch embedding ignores the pixels after the last whole
      patch and the features would not be aligned with their pixels;
    - for a network with a fixed image size, to a multiple of that size; the network then sees windows of its
      size.

    Args:
        network: the network.
        maps: returns the maps of an output of the network.
        geometry: see :func:`survey`.
        enlarge: factor of the image's sides before they are rounded.
    """

    def __init__(
        self,
        network: nn.Module,
        maps: Callable[[Any], Sequence[Tensor]],
        geometry: Geometry,
        enlarge: float = 1.0,
    ):
        super().__init__()
        self.network = network
        self.token_masks: TokenMasks | None = None
        """The hook of a ViT that has a mask token."""
        self.maps, self.cell, self.windows = maps, geometry.cell, geometry.windows
        self.permille = round(1000 * enlarge)
        self.no_decay = tuple(getattr(network, "no_decay", ()))
        self.widths, self.strides = list(geometry.widths), list(geometry.strides)
        self.channels = sum(self.widths)
        self.stride = max(1, round(min(geometry.strides) / enlarge))
        # half a cell is rounded up to a whole one
        cell = max(geometry.cell)
        self.least_size = math.ceil(max(geometry.strides)) if cell == 1 else -(-cell // 2)

    def fitted(self, side: Any, cell: int) -> Any:
        """Side of the image that the network sees, in pixels: ``enlarge * side``, rounded to cells."""
        return (2 * side * self.permille + 1000 * cell) // (2000 * cell) * cell

    def forward(self, images: Tensor) -> Tensor:
        if self.cell != (1, 1) or self.permille != 1000:
            size = [self.fitted(s, cell) for s, cell in zip(images.shape[2:], self.cell, strict=True)]
            images = nnf.interpolate(images, size, mode="bilinear", align_corners=False)
        if not self.windows:
            return concatenated(self.maps(self.network(images)))
        rows, columns = (side // cell for side, cell in zip(images.shape[2:], self.cell, strict=True))
        features = concatenated(self.maps(self.network(_cut(images, rows, columns))))
        return _joined(features, rows, columns)


def concatenated(maps: Sequence[Tensor]) -> Tensor:
    """The maps, resized to the finest one and concatenated along the channels."""
    finest = max((m.shape[-2:] for m in maps), key=lambda size: size[0]) if len(maps) > 1 else None
    resized = [
        m if finest is None or m.shape[-2:] == finest
        else nnf.interpolate(m, finest, mode="bilinear", align_corners=False)
        for m in maps
    ]  # fmt: skip
    return torch.cat(resized, 1) if len(resized) > 1 else resized[0]


def _cut(images: Tensor, rows: int, columns: int) -> Tensor:
    """Windows [B rows columns, C, h, w] of images [B, C, rows h, columns w]."""
    tall = images.unflatten(2, (rows, images.shape[2] // rows))
    cut = tall.unflatten(4, (columns, images.shape[3] // columns))  # [B, C, rows, h, columns, w]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _joined(features: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`_cut`."""
    batch = features.shape[0] // (rows * columns)
    apart = features.unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return apart.flatten(4, 5).flatten(2, 3)


def listed(output: Any) -> list[Tensor]:
    """The maps in the output of a backbone: a tensor, several tensors, a dictionary of them, or Hugging
    Face's ``feature_maps``."""
    output = getattr(output, "feature_maps", output)
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, Mapping) else output)


def size_of(owner: Any) -> tuple[int, int] | None:
    """Height and width of the ``image_size`` of a network or of its configuration, if there is one."""
    size = getattr(owner, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[-2]), int(size[-1])) if size else None


def survey(
    network: nn.Module,
    maps: Callable[[Any], Sequence[Tensor]],
    name: str,
    image_size: tuple[int, int] | None = None,
) -> Geometry:
    """Measure strides, channels, and the multiples that the sides of images must be.

    If a network fails on images of 448 and 896 pixels, ``image_size`` is taken as its only size. Otherwise
    the cell is the first of 1, the largest stride and :data:`MULTIPLES` at which no map leaves pixels out,
    that is, ``h * stride`` is not less than the side. A copy of the network runs on the meta device, which
    takes no time; if that fails, the network itself runs.

    Args:
        maps: returns the maps [B, C, h, w] of an output of the network.
        name: of the network, for messages.
        image_size: the size that the network was made for.

    Raises:
        UserError: the network cannot be run, or does not return maps.
    """
    try:
        bare, read = copy.deepcopy((network, maps))  # together: maps may refer to the network
        bare = bare.to("meta").eval()
        with torch.device("meta"):
            return _survey(lambda images: read(bare(images)), name, image_size)
    except Exception:
        if any(p.is_meta for p in network.parameters()):
            raise
    training = network.training
    try:
        return _survey(lambda images: maps(network.eval()(images)), name, image_size)
    finally:
        network.train(training)


def _survey(maps: Maps, name: str, image_size: tuple[int, int] | None) -> Geometry:
    try:
        small, large = _shapes(maps, (448, 448), name), _shapes(maps, (896, 896), name)
    except Exception as error:
        if image_size is None:
            raise _failure(name, error) from error
        return _fixed(maps, name, image_size)
    strides = tuple(448 / max(1, b[1] - a[1]) for a, b in zip(small, large, strict=True))
    widths = tuple(shape[0] for shape in small)
    if widths != tuple(shape[0] for shape in large):
        raise UserError(f"{name} has no usable feature map: its maps are [B, h, w, C], not [B, C, h, w]")
    for multiple in (1, round(max(strides)), *MULTIPLES):
        # odd multiples of a number are no multiples of twice that number; a network may take only squares
        height = multiple * (round(75 / multiple) | 1)
        width = height + 2 * multiple
        try:
            shapes = _shapes(maps, (height, width), name)
        except Exception:
            continue
        ends = [(h * s, w * s) for (_, h, w), s in zip(shapes, strides, strict=True)]
        if all(bottom >= height and right >= width for bottom, right in ends):
            return Geometry(widths, strides, (multiple, multiple))
    if image_size is not None:
        return _fixed(maps, name, image_size)
    raise UserError(f"{name} leaves pixels out at every size of an image: it has no usable feature map")


def _fixed(maps: Maps, name: str, size: tuple[int, int]) -> Geometry:
    try:
        shapes = _shapes(maps, size, name)
    except Exception as error:
        raise _failure(name, error) from error
    strides = tuple(size[0] / shape[1] for shape in shapes)
    return Geometry(tuple(shape[0] for shape in shapes), strides, size, True)


def _failure(name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{name} cannot be run on an image: {' '.join(str(error).split())[:200]}")


def _shapes(maps: Maps, size: tuple[int, int], name: str) -> list[tuple[int, int, int]]:
    with torch.no_grad():
        shapes = [tuple(m.shape) for m in maps(torch.zeros(1, 3, *size))]
    if not shapes or any(len(shape) != 4 for shape in shapes):
        raise UserError(f"{name} has no usable feature map: it gives {shapes}, not [B, C, h, w]")
    return [shape[1:] for shape in shapes]  # type: ignore[misc]
