"""Mix Transformer encoders, MiT-B0 to B5, through the ``transformers`` package."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.errors import UserError
from fastuda.models.mobile import DepthwiseConv2d

# widths of the four stages, blocks of each
SIZES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((32, 64, 160, 256), (2, 2, 2, 2)),
    ((64, 128, 320, 512), (2, 2, 2, 2)),
    ((64, 128, 320, 512), (3, 4, 6, 3)),
    ((64, 128, 320, 512), (3, 4, 18, 3)),
    ((64, 128, 320, 512), (3, 8, 27, 3)),
    ((64, 128, 320, 512), (3, 6, 40, 3)),
)


# the norms of the patch embeddings and of the reduced sequences keep 1e-5
PATCHES = re.compile(r"patch_embeddings|sequence_reduction")


class MiT(nn.Module):
    """SegFormer's encoder. Its output is all four stages at stride 4, concatenated.

    ``[B, 3, H, W] -> [B, sum(widths), H / 4, W / 4]``. The deeper stages are resized bilinearly
    (``align_corners=False``); from B1 on there are 1024 channels. SePiCo projects this map ("all-fusion");
    the DAFormer head splits it again.

    Args:
        size: 0 to 5.
        drop_path: stochastic depth of the last block, growing linearly from 0; published 0.1.

    Raises:
        UserError: ``transformers`` is not installed.

    Source: Xie et al., SegFormer, NeurIPS 2021.
    """

    stride = 4
    strides = (4, 8, 16, 32)
    least_size = 29
    """Smallest side of an image in pixels: the first stage, at stride 4, then fills its 8 x 8 attention
    windows."""
    no_decay = ("norm",)
    has_deepest = True

    def __init__(self, size: int, drop_path: float = 0.1):
        super().__init__()
        try:
            from transformers import SegformerConfig, SegformerModel
        except ImportError as error:
            raise UserError(
                f"mit_b{size} needs the transformers package ({error}): pip install 'fastuda[transformers]'"
            ) from error
        self.widths, depths = SIZES[size]
        self.channels = sum(self.widths)
        self.encoder = SegformerModel(
            SegformerConfig(hidden_sizes=self.widths, depths=depths, drop_path_rate=drop_path)
        )
        # the published weights were trained with 1e-6 in the blocks and after each stage
        for name, part in self.encoder.named_modules():
            if isinstance(part, nn.LayerNorm) and not PATCHES.search(name):
                part.eps = 1e-6
            if isinstance(part, nn.Conv2d) and part.groups == part.in_channels > 1:
                part.__class__ = DepthwiseConv2d  # the convolution of the Mix-FFN

    def init_scratch(self) -> None:
        """The published initialisation: truncated normal 0.02, and He by fan-out for convolutions."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                nn.init.ones_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_out))
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, deepest: bool = False) -> Any:
        """The concatenated stages; with ``deepest`` also the last stage at its own stride of 32."""
        maps = []
        for stage in self.encoder.stages:
            x = stage(x)
            maps.append(x)
        size = maps[0].shape[-2:]
        resized = [nnf.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:]]
        features = torch.cat([maps[0], *resized], 1)
        return (features, maps[-1]) if deepest else features
