"""Applies a method to an image: whole or in windows, at several scales, mirrored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastuda.errors import UserError
from fastuda.methods.base import Method, SegPrediction
from fastuda.methods.tensors import at_least_float32


@dataclass(frozen=True)
class Inference:
    """Computes the scores of one image; by default in one pass over the whole image.

    Otherwise averages the class probabilities over scales, mirrored images and overlapping windows: ``p =
    mean_s mean_f resize(mean_w softmax(upsample(logits)))``.

    Raises:
        UserError: a value is out of its range.
    """

    window: tuple[int, int] | None = None
    """Height and width of the windows; None: the whole image at once."""
    overlap: float = 1 / 3
    """Overlap of neighbouring windows as a share of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the network's input size."""
    flip: bool = False
    """Whether to average over the mirrored image as well."""
    amp: torch.dtype | None = None
    """Autocast's dtype, or None."""

    def __post_init__(self) -> None:
        if self.window is not None and min(self.window) < 8:
            raise UserError(f"--window is {self.window[0]} x {self.window[1]}; it needs at least 8 x 8")
        if not 0 <= self.overlap < 1:
            raise UserError(f"--overlap is {self.overlap:g}; it is a share from 0 to below 1")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise UserError(f"--scales is {' '.join(map(str, self.scales))}; every scale must be positive")

    @torch.no_grad()
    def __call__(self, method: Method, image: Tensor) -> SegPrediction:
        """The method's low-resolution scores [1, K, h, w] of a normalised image [1, 3, H, W] if nothing is
        averaged, else float32 probabilities [1, K, H, W]."""
        if self.window is None and self.scales == (1.0,) and not self.flip:
            return self._pass(method, image)
        size = (image.shape[2], image.shape[3])
        align = method.model.align_corners
        total: Tensor | float = 0.0
        for scale in self.scales:
            scaled = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
            seen = image
            if scaled != size:
                seen = nnf.interpolate(image, scaled, mode="bilinear", align_corners=False, antialias=True)
            for mirrored in (False, True)[: 1 + self.flip]:
                p = self._windows(method, seen.flip(3) if mirrored else seen)
                total = total + upsample(p.flip(3) if mirrored else p, size, align)
        assert isinstance(total, Tensor)
        return SegPrediction(total / (len(self.scales) * (1 + self.flip)), True)

    def _pass(self, method: Method, image: Tensor) -> SegPrediction:
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, dtype=self.amp, enabled=self.amp is not None):
            return method.segment(image)

    def _windows(self, method: Method, image: Tensor) -> Tensor:
        """Probabilities [1, K, H, W], averaged over overlapping windows."""
        size = (image.shape[2], image.shape[3])
        height, width = size
        if self.window is not None:
            height, width = min(self.window[0], height), min(self.window[1], width)
        align = method.model.align_corners
        if (height, width) == size:
            return probabilities(self._pass(method, image), size, align)
        total = image.new_zeros(1, method.num_classes, *size)
        count = image.new_zeros(size)
        for top in starts(size[0], height, self.overlap):
            for left in starts(size[1], width, self.overlap):
                place = (..., slice(top, top + height), slice(left, left + width))
                total[place] += probabilities(self._pass(method, image[place]), (height, width), align)
                count[place] += 1
        return total / count


def probabilities(prediction: SegPrediction, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Class probabilities ``[B, K, H, W]`` in float32: softmax of the upsampled logits, or the upsampled
    probabilities."""
    x = upsample(at_least_float32(prediction.scores), size, align_corners)
    return x if prediction.are_probabilities else x.softmax(1)


def upsample(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """``x`` resized bilinearly to ``size``, or ``x`` itself if it has that size."""
    if x.shape[-2:] == size:
        return x
    return nnf.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Start positions of windows that cover a length; the last window ends with it."""
    stride = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window]
