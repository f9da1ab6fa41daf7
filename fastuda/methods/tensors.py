"""Layout and precision of feature maps in the methods' losses."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def pixel_major(x: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h w, C]; no copy for a channels-last map."""
    return x.flatten(2).transpose(1, 2)


def channel_major(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h w, C] to [B, C, h, w]."""
    return x.transpose(1, 2).unflatten(2, size)


def upsampled(logits: Tensor, images: Tensor, align_corners: bool) -> Tensor:
    """Logits [B, K, h, w] upsampled bilinearly to the size of the images, in float32 or float64.
    Contiguous planes: interpolation and softmax over K are three times as fast as on channels-last pixels."""
    planes = at_least_float32(logits).contiguous()
    return nnf.interpolate(planes, images.shape[2:], mode="bilinear", align_corners=align_corners)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
