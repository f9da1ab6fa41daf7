"""The DAFormer head: four stages of features, fused with context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastuda.models.mobile import DepthwiseConv2d


def unit(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU, padded to keep the size."""
    conv = (DepthwiseConv2d if groups > 1 else nn.Conv2d)(
        inputs, outputs, kernel, 1, dilation * (kernel // 2), dilation, groups=groups, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class DAFormerHead(nn.Module):
    """``linear 256 per stage, concat -> depth-separable ASPP (1, 6, 12, 18) -> 3x3 256 -> dropout -> 1x1 K``.

    The input is the four stages concatenated at stride 4, as :class:`~fastuda.models.mit.MiT` returns them.
    The paper applies the linear layers before the resizing; the two commute, since bilinear weights sum to
    one.

    Source: Hoyer et al., DAFormer, CVPR 2022, as used by SePiCo.

    Args:
        widths: channels of each stage.
        num_classes: K.
        width: channels of the embeddings and of every fused map.
        dropout: rate before the classifier; published 0.1.
        context: fuse the embeddings by the ASPP and a 3x3; otherwise by a 1x1 only (HRDA's attention).
    """

    RATES = (1, 6, 12, 18)

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        width: int = 256,
        dropout: float = 0.1,
        context: bool = True,
    ):
        super().__init__()
        self.widths = list(widths)
        self.embed = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in self.widths)
        inputs = width * len(self.widths)
        self.context = nn.ModuleList(
            unit(inputs, width)
            if rate == 1
            else nn.Sequential(unit(inputs, inputs, 3, rate, groups=inputs), unit(inputs, width))
            for rate in (self.RATES if context else ())
        )
        self.fuse = unit(width * len(self.RATES), width, 3) if context else unit(inputs, width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        stages = features.split(self.widths, 1)
        x = torch.cat([embed(stage) for embed, stage in zip(self.embed, stages, strict=True)], 1)
        if len(self.context):
            x = torch.cat([branch(x) for branch in self.context], 1)
        return self.classifier(self.dropout(self.fuse(x)))
