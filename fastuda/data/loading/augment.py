"""Augmentation of whole batches on their device, for self-training: ClassMix, masks, colour jitter, blur.

Every draw is made for all images at once from the device's generator. There is no loop over images and no
device sync, and the random state of a checkpoint reproduces the draws.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastuda.data.config import DataConfig
from fastuda.data.loading.batch import Batch
from fastuda.models.normalization import Normalization

_LUMA = (0.299, 0.587, 0.114)
BLUR_RADIUS = 4


def class_mask(labels: Tensor, share: float = 0.5, ignore_index: int = 255) -> Tensor:
    """Pixels of a random half of the classes of each image: ``ceil(n share)`` of its n classes.

    Args:
        labels: [B, H, W] integer classes below 256.
        share: published 0.5.
        ignore_index: label that is no class; its pixels are never in the mask.

    Returns:
        [B, H, W] bool.

    Source: Olsson et al., ClassMix, WACV 2021.
    """
    present = torch.zeros(len(labels), 256, device=labels.device)
    present.scatter_(1, labels.flatten(1).long(), 1.0)
    present[:, ignore_index] = 0
    count = present.sum(1, keepdim=True)
    # absent classes draw below 0 and rank last
    rank = torch.where(present > 0, torch.rand_like(present), -1.0).argsort(1, descending=True).argsort(1)
    chosen = (rank < (count * share).ceil()) & (present > 0)
    return chosen.gather(1, labels.flatten(1).long()).view(labels.shape)


def paste(mask: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """``above`` where the mask [B, H, W] is true, else ``below``; images [B, C, H, W] or maps [B, H, W]."""
    return torch.where(mask[:, None] if above.dim() == 4 else mask, above, below)


def block_mask(images: Tensor, block: int, share: float) -> Tensor:
    """The images with random blocks set to 0, the mean colour, each with probability ``share``.

    The grid has ``round(H / block) x round(W / block)`` cells, so that a cell has ``block`` pixels only if
    ``block`` divides the side. All channels of an image share a mask.

    Args:
        images: normalised images [B, C, H, W].
        block: side of a cell in pixels; published 32 at half resolution, 64 at full resolution.
        share: published 0.7.

    Source: Hoyer et al., MIC, CVPR 2023, authors' masking_transforms.py.
    """
    height, width = images.shape[2:]
    rows, columns = max(round(height / block), 1), max(round(width / block), 1)
    keep = torch.rand(len(images), 1, rows, columns, device=images.device) > share
    return images * nnf.interpolate(keep.to(images.dtype), (height, width), mode="nearest")


@cache
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Tensor [C, 1, 1], cached because a copy from the host syncs the device."""
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


def _statistics(normalization: Normalization, x: Tensor) -> tuple[Tensor, Tensor]:
    mean = _channels(tuple(normalization.mean), x.device, x.dtype)
    std = _channels(tuple(normalization.std), x.device, x.dtype)
    return mean / normalization.scale, std / normalization.scale


def _per_image(x: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).uniform_(low, high)


def jitter_source(batch: Batch, config: DataConfig, normalization: Normalization) -> Batch:
    """The batch with its source images jittered by ``data.jitter`` and ``data.jitter_hue``."""
    if not config.jitter and not config.jitter_hue:
        return batch
    image = colour_jitter(batch.source_image, normalization, config.jitter, 1.0, config.jitter_hue, "pil")
    return dataclasses.replace(batch, source_image=image)


def colour_jitter(
    x: Tensor,
    normalization: Normalization,
    strength: float,
    share: float,
    hue: float | None = None,
    style: str = "kornia",
) -> Tensor:
    """Change brightness, contrast, saturation and hue of a ``share`` of the images, with factors per image.

    Colours are in 0..1 and are clamped after every step. The factors b, c and s are uniform in
    ``1 - strength .. 1 + strength``, the hue is shifted in HSV by up to ``hue`` turns, and the order of the
    four steps is drawn per batch.
    ``kornia``: ``x + b - 1``, ``c x``, and the saturation of HSV times s. ``pil`` (torchvision on images):
    ``b x``, ``g + c (x - g)`` with the mean grey g of the image, and ``g + s (x - g)`` with the grey g of the
    pixel.

    Args:
        x: normalised images [B, 3, H, W].
        normalization: normalisation of ``x``.
        strength: published 0.2 (SePiCo), 0.5 (FADA).
        share: published 0.8 (SePiCo), 1 (FADA).
        hue: default ``strength``; published 0.2 (SePiCo, FADA).
        style: kornia (kornia 0.5, used by SePiCo and related methods) or pil (used by FADA).

    Raises:
        ValueError: the style is unknown.
    """
    if style not in ("kornia", "pil"):
        raise ValueError(f"style is {style!r}: choose kornia or pil")
    hue = strength if hue is None else hue
    mean, std = _statistics(normalization, x)
    rgb = x * std + mean
    if normalization.channel_order == "bgr":
        rgb = rgb.flip(1)
    original = rgb
    luma = _channels(_LUMA, x.device, x.dtype)
    b, c, s = (_per_image(x, 1 - strength, 1 + strength) for _ in range(3))
    turn = _per_image(x, -hue, hue)

    def blend(rgb: Tensor, grey: Tensor, factor: Tensor) -> Tensor:
        return grey + (rgb - grey) * factor

    def grey(rgb: Tensor) -> Tensor:
        return (rgb * luma).sum(1, keepdim=True)

    plain = style == "kornia"
    steps = (
        lambda rgb: rgb + (b - 1) if plain else rgb * b,
        lambda rgb: rgb * c if plain else blend(rgb, grey(rgb).mean((2, 3), keepdim=True), c),
        lambda rgb: _saturate(rgb, s) if plain else blend(rgb, grey(rgb), s),
        lambda rgb: _turn_hue(rgb, turn),
    )
    # drawn on the CPU to avoid a device sync
    for i in torch.randperm(len(steps)).tolist():
        rgb = steps[i](rgb).clamp(0, 1)
    rgb = torch.where(_per_image(x, 0, 1) < share, rgb, original)
    if normalization.channel_order == "bgr":
        rgb = rgb.flip(1)
    return (rgb - mean) / std


def _saturate(rgb: Tensor, factor: Tensor) -> Tensor:
    """Multiply the saturation of HSV by ``factor`` [B, 1, 1, 1], up to 1; hue and value stay."""
    value = rgb.amax(1, keepdim=True)
    chroma = value - rgb.amin(1, keepdim=True)
    return value - (value - rgb) * torch.minimum(factor, value / chroma.clamp(min=1e-8))


def _turn_hue(rgb: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue of HSV by ``turn`` turns [B, 1, 1, 1]; saturation and value stay."""
    value = rgb.amax(1, keepdim=True)
    chroma = value - rgb.amin(1, keepdim=True)
    r, g, b = ((rgb - value) / chroma.clamp(min=1e-8)).split(1, 1)
    # in sixths of a turn, counted from the largest channel
    hue = torch.where(r == 0, g - b, torch.where(g == 0, 2 + b - r, 4 + r - g)) + 6 * turn
    k = hue + _channels((5, 3, 1), rgb.device, rgb.dtype)
    k = k - 6 * (k / 6).floor()
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: tuple[float, float] = (0.15, 1.15), share: float = 0.5) -> Tensor:
    """Blur a ``share`` of the images by a Gaussian with a sigma per image, uniform in the given range.

    The kernel has 9 taps, which is over three times the largest published sigma to each side. Borders are
    reflected. The blur runs in the precision of the images, also under autocast.

    Args:
        x: images [B, C, H, W].
        sigma: range in pixels; published 0.15 to 1.15.
        share: published 0.5.
    """
    batch, channels, height, width = x.shape
    radius = min(BLUR_RADIUS, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    taps = (-0.5 * (offsets / _per_image(x, *sigma).view(batch, 1)) ** 2).exp()
    taps = taps / taps.sum(1, keepdim=True)
    taps = taps.repeat_interleave(channels, 0)[:, None]
    flat = nnf.pad(x.reshape(1, batch * channels, height, width), (radius,) * 4, mode="reflect")
    with torch.autocast(x.device.type, enabled=False):
        blurred = nnf.conv2d(flat, taps[:, :, None], groups=batch * channels)
        blurred = nnf.conv2d(blurred, taps[..., None], groups=batch * channels).view(x.shape)
    return torch.where(_per_image(x, 0, 1) < share, blurred, x)
