"""The network of a configuration, with its weights loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastuda.errors import UserError, nearest
from fastuda.models.backbones import BACKBONES, freeze_batch_norm, init_scratch
from fastuda.models.daformer import DAFormerHead
from fastuda.models.deeplab import ASPP
from fastuda.models.normalization import INPUTS
from fastuda.models.segmentor import Segmentor
from fastuda.models.weights import load_weights
from fastuda.system.settings import NonNegative


@dataclass(frozen=True)
class ModelConfig:
    """Which network is built, and from which weights it starts."""

    backbone: str = "resnet101"
    """resnet18, resnet34, resnet50, resnet101, mobilenet_v2, efficientnet_lite0, vgg16,
    mit_b0 to mit_b5 (these need the ``transformers`` extra), or small (to be trained from scratch)."""
    weights: str | None = None
    """Path of a .pth or .safetensors file (torchvision, Caffe-style DeepLab, AdaptSegNet, FADA, timm or
    SegFormer keys, the latter of NVlabs, Hugging Face or mmsegmentation, or ours), or none: from scratch."""
    caffe: bool = False
    """Caffe-style ResNet: stride in the first 1x1, ceil_mode pooling (PLCA, ASANet, WeakSegDA)."""
    aspp_branches: Literal[1, 2, 3, 4] = 4
    """4, or 2 for the head of AdaptSegNet's family (ASANet, WeakSegDA)."""
    aspp_bias: bool = False
    """Bias in the head: none in PLCA, present in FADA, ASANet, WeakSegDA and SePiCo."""
    aspp_zero_bias: bool = False
    """The bias starts from zero (SePiCo, by mmcv), not from torch's default (FADA, ASANet, WeakSegDA)."""
    aspp_init_std: NonNegative | None = None
    """Normal initialisation of the head (0.01 in FADA, ASANet, SePiCo); none is torch's default (PLCA)."""
    freeze_bn: Literal["none", "affine", "frozen"] = "none"
    """none, affine (scale and shift fixed: ASANet, WeakSegDA) or frozen (statistics, too: FADA)."""
    input: Literal["imagenet", "caffe", "caffe_vgg", "caffe_swapped", "half"] | None = None
    """What the images must look like: imagenet, caffe, caffe_vgg (FADA's VGG16), caffe_swapped (ASANet) or
    half; none: what the weights file says by its layout. Needed where the layout does not tell, as for VGG16
    files converted from Caffe."""
    head: Literal["auto", "deeplabv2", "daformer"] = "auto"
    """deeplabv2, daformer (on mit_b0 to mit_b5 only), or auto: daformer on mit, deeplabv2 elsewhere."""
    align_corners: bool = False
    """How the logits are upsampled: False in PLCA and SePiCo, True in FADA, ASANet and WeakSegDA."""


def build_model(config: ModelConfig, num_classes: int) -> Segmentor:
    """The network of ``config`` for ``num_classes`` classes, with its weights loaded.

    Raises:
        UserError: the backbone is unknown, or the weights file is missing or does not fit.
    """
    if config.backbone not in BACKBONES:
        raise UserError(f"unknown backbone {config.backbone!r}{nearest(config.backbone, BACKBONES)}")
    backbone = BACKBONES[config.backbone](config.caffe)
    init_scratch(backbone)
    model = Segmentor(backbone, _head(config, backbone, num_classes), num_classes, config.align_corners)
    if config.weights is not None:
        model.input = load_weights(model, config.weights, caffe=config.caffe, input=config.input).input
    elif config.input:
        model.input = INPUTS[config.input]
    if config.freeze_bn != "none":
        freeze_batch_norm(backbone, config.freeze_bn)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _head(config: ModelConfig, backbone: nn.Module, num_classes: int) -> nn.Module:
    widths = getattr(backbone, "widths", None)
    kind = config.head if config.head != "auto" else "daformer" if widths else "deeplabv2"
    if kind == "daformer":
        if not widths:
            raise UserError(f"model.head daformer needs a mit backbone, not {config.backbone}")
        return DAFormerHead(widths, num_classes)
    return ASPP(
        int(backbone.channels),  # type: ignore[arg-type]
        num_classes,
        config.aspp_branches,
        config.aspp_bias,
        config.aspp_init_std,
        config.aspp_zero_bias,
    )
