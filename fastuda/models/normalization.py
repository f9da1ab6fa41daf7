"""The image normalisation that weights expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """The image format of a set of weights: ``(x * scale / 255 - mean) / std`` in the given channel order."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"
    """rgb or bgr; also the order of mean and std."""
    scale: float = 1.0
    """1 for images in 0..1, 255 for images in 0..255."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Normalization:
        """The inverse of ``dataclasses.asdict``, also after a round trip through JSON or YAML."""
        mean, std = (tuple(values[key]) for key in ("mean", "std"))
        return cls(mean, std, values["channel_order"], values["scale"])

    def apply(self, image: Tensor) -> Tensor:
        """float32 ``[..., 3, H, W]`` from an RGB image in 0..255."""
        x = image.float() * (self.scale / 255.0)
        if self.channel_order == "bgr":
            x = x.flip(-3)
        mean = torch.tensor(self.mean)[:, None, None]
        return x.sub_(mean).div_(torch.tensor(self.std)[:, None, None])

    def invert(self, x: Tensor) -> Tensor:
        """uint8 RGB image from a normalised one, for pictures."""
        x = x.float().cpu() * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        if self.channel_order == "bgr":
            x = x.flip(-3)
        return (x * (255.0 / self.scale)).round().clamp(0, 255).to(torch.uint8)


IMAGENET = Normalization()


CAFFE = Normalization((104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0), "bgr", 255.0)


INPUTS: dict[str, Normalization] = {
    "imagenet": IMAGENET,
    "caffe": CAFFE,
    "caffe_vgg": Normalization((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), "bgr", 255.0),
    # ASANet subtracts the mean in RGB order from BGR data; its released weights need this
    "caffe_swapped": Normalization((122.67892, 116.66877, 104.00699), (1.0, 1.0, 1.0), "bgr", 255.0),
    "half": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Input formats by name."""
