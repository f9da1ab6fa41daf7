"""Augmentation of whole batches on their device, for self-training: ClassMix, colour jitter, blur.

Every draw is made for all images at once from torch's generator of the device: no loop over images, no wait
for the device, and a checkpoint's random state reproduces it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastuda.data.batch import Batch
from fastuda.data.config import DataConfig
from fastuda.models.weights import Normalization

# rotation of the chroma plane of YIQ
_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
BLUR_RADIUS = 4


def class_mask(labels: Tensor, share: float = 0.5, ignore_index: int = 255) -> Tensor:
    """Pixels of half of each image's classes, drawn at random: ``ceil(n share)`` of the n that it shows.

    Args:
        labels: [B, H, W] integer classes below 256.
        share: published 0.5.
        ignore_index: belongs to no class, and is in no mask.

    Returns:
        [B, H, W] bool. Source: Olsson et al., ClassMix, WACV 2021.
    """
    present = torch.zeros(len(labels), 256, device=labels.device)
    present.scatter_(1, labels.flatten(1).long(), 1.0)
    present[:, ignore_index] = 0
    count = present.sum(1, keepdim=True)
    # absent classes draw below 0, so that the present ones come first
    rank = torch.where(present > 0, torch.rand_like(present), -1.0).argsort(1, descending=True).argsort(1)
    chosen = (rank < (count * share).ceil()) & (present > 0)
    return chosen.gather(1, labels.flatten(1).long()).view(labels.shape)


def paste(mask: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """``above`` under the mask [B, H, W], ``below`` elsewhere; images [B, C, H, W] or maps [B, H, W]."""
    return torch.where(mask[:, None] if above.dim() == 4 else mask, above, below)


def _statistics(normalization: Normalization, x: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(normalization.mean, device=x.device, dtype=x.dtype)[:, None, None]
    std = torch.tensor(normalization.std, device=x.device, dtype=x.dtype)[:, None, None]
    return mean / normalization.scale, std / normalization.scale


def _per_image(x: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).uniform_(low, high)


def jitter_source(batch: Batch, config: DataConfig, normalization: Normalization) -> Batch:
    """The batch with the colours of its source images jittered as ``data.jitter`` and ``data.jitter_hue``
    say."""
    if not config.jitter and not config.jitter_hue:
        return batch
    image = colour_jitter(batch.source_image, normalization, config.jitter, 1.0, config.jitter_hue)
    return dataclasses.replace(batch, source_image=image)


def colour_jitter(
    x: Tensor, normalization: Normalization, strength: float, share: float, hue: float | None = None
) -> Tensor:
    """Brightness, contrast, saturation and hue of a ``share`` of the images, each with its own factors.

    Brightness, contrast and saturation factors are uniform in ``1 - strength .. 1 + strength``, the hue turns
    by up to ``hue`` circles; applied in this order to colours in 0..1, clamped at the end.

    Args:
        x: normalised images [B, 3, H, W].
        normalization: what they are normalised by.
        strength: published 0.2.
        share: published 0.8.
        hue: none: half the strength.
    """
    hue = strength / 2 if hue is None else hue
    mean, std = _statistics(normalization, x)
    rgb = x * std + mean
    if normalization.channel_order == "bgr":
        rgb = rgb.flip(1)
    original = rgb
    weight = torch.tensor(_TO_YIQ[0], device=x.device, dtype=x.dtype)[:, None, None]
    rgb = rgb * _per_image(x, 1 - strength, 1 + strength)
    grey = (rgb * weight).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    rgb = grey + (rgb - grey) * _per_image(x, 1 - strength, 1 + strength)
    grey = (rgb * weight).sum(1, keepdim=True)
    rgb = grey + (rgb - grey) * _per_image(x, 1 - strength, 1 + strength)
    rgb = _turn_hue(rgb, _per_image(x, -hue, hue).flatten() * (2 * torch.pi)).clamp(0, 1)
    rgb = torch.where(_per_image(x, 0, 1) < share, rgb, original)
    if normalization.channel_order == "bgr":
        rgb = rgb.flip(1)
    return (rgb - mean) / std


def _turn_hue(rgb: Tensor, angle: Tensor) -> Tensor:
    to_yiq = torch.tensor(_TO_YIQ, device=rgb.device, dtype=torch.float32)
    turn = torch.zeros(len(rgb), 3, 3, device=rgb.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.float().cos()
    turn[:, 2, 1] = angle.float().sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return torch.einsum("bij,bjhw->bihw", matrix.to(rgb.dtype), rgb)


def gaussian_blur(x: Tensor, sigma: tuple[float, float] = (0.15, 1.15), share: float = 0.5) -> Tensor:
    """A Gaussian blur of a ``share`` of the images, each with its own sigma, uniform in the range given.

    The kernel has 9 taps, over three times the largest published sigma to each side. Borders are reflected.

    Args:
        x: images [B, C, H, W].
        sigma: in pixels; published 0.15 to 1.15.
        share: published 0.5.
    """
    batch, channels, height, width = x.shape
    radius = min(BLUR_RADIUS, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    taps = (-0.5 * (offsets / _per_image(x, *sigma).view(batch, 1)) ** 2).exp()
    taps = taps / taps.sum(1, keepdim=True)
    taps = taps.repeat_interleave(channels, 0)[:, None]
    flat = nnf.pad(x.reshape(1, batch * channels, height, width), (radius,) * 4, mode="reflect")
    blurred = nnf.conv2d(flat, taps[:, :, None], groups=batch * channels)
    blurred = nnf.conv2d(blurred, taps[..., None], groups=batch * channels).view(x.shape)
    return torch.where(_per_image(x, 0, 1) < share, blurred, x)
