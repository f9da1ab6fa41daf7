"""Heads for the single map of a ViT: a linear head, and the head of VFM-UDA."""

from __future__ import annotations

from torch import Tensor, nn


class LinearHead(nn.Sequential):
    """``batch norm -> 1x1 K``, the linear probe of DINOv2 (Oquab et al., TMLR 2024): logits at the stride of
    the features."""

    def __init__(self, channels: int, num_classes: int):
        classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
        super().__init__(nn.BatchNorm2d(channels), classifier)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LightHead(nn.Sequential):
    """Two transposed convolutions, then a 3x3 and a 1x1: logits [B, K, 4 h, 4 w] of features [B, C, h, w].

    ``ConvT 2x2 C/2, norm, GELU -> ConvT 2x2 C/4, norm -> 3x3 C/4, norm -> 1x1 K`` with layer norms over the
    channels and without biases; the last weight starts from N(0, 0.1).

    Source: Englert et al., VFM-UDA, CVPR workshops 2024 (the authors' ``vit`` segmentation head).
    """

    def __init__(self, channels: int, num_classes: int):
        half, quarter = channels // 2, channels // 4
        classifier = nn.Conv2d(quarter, num_classes, 1, bias=False)
        nn.init.normal_(classifier.weight, std=0.1)
        super().__init__(
            nn.ConvTranspose2d(channels, half, 2, 2, bias=False),
            ChannelNorm(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2, bias=False),
            ChannelNorm(quarter, eps=1e-6),
            nn.Conv2d(quarter, quarter, 3, padding=1, bias=False),
            ChannelNorm(quarter, eps=1e-6),
            classifier,
        )
