"""The projection head for contrastive losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class UnitVectors(torch.autograd.Function):
    """``y = x / max(|x|, 1e-12)`` over dimension 1, as ``nnf.normalize``, with a third of its memory passes.
    ``dx = (g - <g, y> y) / max(|x|, 1e-12)``; where ``|x|`` is clamped, without the inner product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        inverse = norm.clamp_min(1e-12).reciprocal()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = (grad * y).sum(1, keepdim=True) * (inverse < 1e12)
        return torch.addcmul(grad, along, y, value=-1).mul_(inverse)


class ProjectionHead(nn.Module):
    """Two 1x1 convolutions, each with batch norm and ReLU (also the last), then L2 normalisation.

    ``[B, C, h, w] -> [B, width, h, w]`` in float32 or float64: non-negative unit vectors over the channels.
    Published widths: 2048 - 2048 - 512 on ResNet-101, 1024 - 256 - 512 on MiT-B5. Not used at test time.

    Source: Xie et al., SePiCo, TPAMI 2022 (the authors' ``proj_head``).

    Args:
        channels: width of the features.
        hidden: width between the convolutions; published 2048 for ResNet, 256 for MiT.
        width: of the embedding.
    """

    def __init__(self, channels: int, hidden: int | None = None, width: int = 512):
        super().__init__()
        hidden = hidden or channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        for part in self.layers:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        x = self.layers(features)
        unit: Tensor = UnitVectors.apply(x if x.element_size() >= 4 else x.float())
        return unit
