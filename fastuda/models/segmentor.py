"""The segmentation network: a backbone, a head, and what its weights expect of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastuda.errors import UserError, nearest
from fastuda.models.backbones import BACKBONES, freeze_batch_norm, init_scratch
from fastuda.models.deeplab import ASPP
from fastuda.models.weights import Normalization, load_weights


@dataclass(frozen=True)
class ModelConfig:
    """Which network is built, and from which weights it starts."""

    backbone: str = "resnet101"
    """resnet18, resnet34, resnet50, resnet101, mobilenet_v2, vgg16, or small (to be trained from scratch)."""
    weights: str | None = None
    """Path of a .pth or .safetensors file (torchvision, Caffe-style DeepLab or AdaptSegNet keys), or none:
    from scratch."""
    caffe: bool = False
    """Caffe-style ResNet: stride in the first 1x1, ceil_mode pooling (PLCA, ASANet, WeakSegDA)."""
    aspp_branches: int = 4
    """4, or 2 for the head of AdaptSegNet's family (ASANet, WeakSegDA)."""
    aspp_bias: bool = False
    """Bias in the head: none in PLCA, present in FADA, ASANet and WeakSegDA."""
    aspp_init_std: float | None = None
    """Normal initialisation of the head (0.01 in FADA, ASANet, SePiCo); none is torch's default (PLCA)."""
    freeze_bn: str = "none"
    """none, affine (scale and shift fixed: ASANet, WeakSegDA) or frozen (statistics, too: FADA)."""
    align_corners: bool = False
    """How the logits are upsampled: False in PLCA and SePiCo, True in FADA, ASANet and WeakSegDA."""


class SegOutput(NamedTuple):
    """What a segmentor gives, at low resolution."""

    features: Tensor
    """[B, C, h, w]."""
    logits: Tensor
    """[B, K, h, w]."""


class Segmentor(nn.Module):
    """``images [B, 3, H, W] -> SegOutput`` at stride 8; nothing is upsampled inside."""

    stride = 8

    def __init__(self, backbone: nn.Module, head: nn.Module, num_classes: int, align_corners: bool):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_classes = num_classes
        self.feature_channels = int(backbone.channels)  # type: ignore[arg-type]
        self.align_corners = align_corners
        self.input = Normalization()

    def forward(self, images: Tensor) -> SegOutput:
        features = self.backbone(images)
        return SegOutput(features, self.head(features))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, K, h, w] of features [B, C, h, w]."""
        return self.head(features)

    def param_groups(self, lr: float, head_lr_mult: float = 1.0) -> list[dict[str, Any]]:
        """The trainable parameters, each once, with the head's learning rate multiplied."""
        groups = [
            {"params": [p for p in self.backbone.parameters() if p.requires_grad], "lr": lr},
            {"params": [p for p in self.head.parameters() if p.requires_grad], "lr": lr * head_lr_mult},
        ]
        return [group for group in groups if group["params"]]


def build_model(config: ModelConfig, num_classes: int) -> Segmentor:
    """The network of ``config`` for ``num_classes`` classes, with its weights loaded.

    Raises:
        UserError: the backbone is unknown, or the weights file is missing or does not fit.
    """
    if config.backbone not in BACKBONES:
        raise UserError(f"unknown backbone {config.backbone!r}{nearest(config.backbone, BACKBONES)}")
    if config.freeze_bn not in ("none", "affine", "frozen"):
        raise UserError(f"model.freeze_bn is {config.freeze_bn!r}: choose none, affine or frozen")
    if config.aspp_branches not in (1, 2, 3, 4):
        raise UserError(f"model.aspp_branches is {config.aspp_branches}: choose 1 to 4 (published: 4 or 2)")
    backbone = BACKBONES[config.backbone](config.caffe)
    init_scratch(backbone)
    head = ASPP(
        int(backbone.channels),  # type: ignore[arg-type]
        num_classes,
        config.aspp_branches,
        config.aspp_bias,
        config.aspp_init_std,
    )
    model = Segmentor(backbone, head, num_classes, config.align_corners)
    if config.weights:
        model.input = load_weights(model, config.weights)
    if config.freeze_bn != "none":
        freeze_batch_norm(backbone, config.freeze_bn)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
