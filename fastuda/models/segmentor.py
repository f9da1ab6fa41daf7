"""The segmentation network: backbone, head and image normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.models.layers import layer_factors
from fastuda.models.normalization import Normalization


class Detail(NamedTuple):
    """A crop at full resolution that HRDA sees in addition to the whole image."""

    logits: Tensor
    """[B, K, h, w] of the crop alone."""
    box: tuple[int, int, int, int]
    """First and last row (exclusive), first and last column of the crop in the image."""
    weight: float
    """Share of the crop's loss."""


class SegOutput(NamedTuple):
    """A segmentor's output, at low resolution."""

    features: Tensor
    """[B, C, h, w]."""
    logits: Tensor
    """[B, K, h, w]."""
    deepest: Tensor | None = None
    """[B, C', h', w']: the backbone's last stage if the features are several stages; otherwise None."""
    detail: Detail | None = None
    """HRDA's detail crop, in training."""


class Segmentor(nn.Module):
    """``images [B, 3, H, W] -> SegOutput`` at ``stride``, without upsampling.

    Images smaller than the backbone's minimum are padded on the right and at the bottom with their last
    pixels; the features are cropped accordingly.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, num_classes: int, align_corners: bool):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_classes = num_classes
        self.feature_channels = int(backbone.channels)  # type: ignore[arg-type]
        self.stride = int(getattr(backbone, "stride", 8))
        self.least_size = int(getattr(backbone, "least_size", 1))
        self.align_corners = align_corners
        self.input = Normalization()
        self.pretrained = False
        """Whether the backbone's weights were loaded from a file or a folder."""

    def forward(self, images: Tensor) -> SegOutput:
        features, deepest = self.encode(images)
        return SegOutput(features, self.head(features), deepest)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features and the deepest map of :class:`SegOutput`, without the head."""
        height, width = images.shape[2:]
        below, right = max(0, self.least_size - height), max(0, self.least_size - width)
        if below or right:
            images = nnf.pad(images, (0, right, 0, below), mode="replicate")
        if getattr(self.backbone, "has_deepest", False):
            features, deepest = self.backbone(images, deepest=True)
        else:
            features, deepest = self.backbone(images), None
        if below or right:
            features = features[:, :, : -(-height // self.stride), : -(-width // self.stride)]
        return features, deepest

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, K, h, w] of features [B, C, h, w]."""
        return self.head(features)

    def refined(self, images: Tensor, refine: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of images whose features pass through ``refine`` [B, C, h, w] before the head."""
        return self.classify(refine(self(images).features))

    def param_groups(
        self, lr: float, head_lr_mult: float = 1.0, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """The trainable parameters, each once, with the head's learning rate multiplied.

        Parameters whose name contains a word of the backbone's ``no_decay`` get no weight decay: a MiT's
        norms, as published. The decoder of a whole network has the head's learning rate. With ``layer_decay``
        d below 1, a backbone block followed by k blocks has ``lr * d ** k``.

        Raises:
            UserError: ``layer_decay`` is below 1, and the backbone has no blocks.
        """
        backbone = dict(self.backbone.named_parameters())
        plain = getattr(self.backbone, "no_decay", ())
        spared = {id(p) for name, p in backbone.items() if any(part in name for part in plain)}
        decoder: list[nn.Parameter] = getattr(self.backbone, "decoder_parameters", list)()
        behind = {id(p) for p in decoder}
        factors = layer_factors(self.backbone, layer_decay, behind)
        groups: list[dict[str, Any]] = [
            {
                "params": [
                    p for name, p in backbone.items()
                    if factors[name] == factor and id(p) not in behind | spared
                ],
                "lr": lr * factor,
            }
            for factor in sorted(set(factors.values()), reverse=True)
        ]  # fmt: skip
        head = [p for p in decoder if id(p) not in spared] + list(self.head.parameters())
        groups.append({"params": head, "lr": lr * head_lr_mult})
        for factor in sorted(set(factors.values()), reverse=True):
            own = [p for name, p in backbone.items() if factors[name] == factor and id(p) in spared]
            groups.append({"params": own, "lr": lr * factor, "weight_decay": 0.0})
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return [group for group in groups if group["params"]]
