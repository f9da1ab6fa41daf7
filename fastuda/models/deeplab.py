"""The DeepLab-V2 head: parallel dilated convolutions, summed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import fastuda.ops as F


class ASPP(nn.Module):
    """``logits = sum_r conv3x3(features, dilation r)`` with r in 6, 12, 18, 24.

    Args:
        channels: width of the features.
        num_classes: K.
        branches: 4, or 2 for the head that AdaptSegNet's family trained (its loop returned early, so that
            rates 18 and 24 never contributed).
        bias: whether there is a bias; PLCA has none, FADA has one.
        init_std: standard deviation of a zero-mean normal initialisation of the weights, or ``None`` for
            torch's default.
        zero_bias: the bias starts from zero, not from torch's default.

    Source: Chen et al., DeepLab, TPAMI 2018.
    """

    RATES = (6, 12, 18, 24)

    def __init__(
        self,
        channels: int,
        num_classes: int,
        branches: int,
        bias: bool,
        init_std: float | None,
        zero_bias: bool = False,
    ):
        super().__init__()
        self.dilations = self.RATES[:branches]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate, bias=bias)
            for rate in self.dilations
        )
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            if init_std is not None:
                nn.init.normal_(conv.weight, std=init_std)
            if conv.bias is not None and zero_bias:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        weights: list[Any] = [conv.weight for conv in self.convs]
        biases: list[Any] = [conv.bias for conv in self.convs if conv.bias is not None]
        return F.aspp(features, weights, dilations=self.dilations, biases=biases or None)
