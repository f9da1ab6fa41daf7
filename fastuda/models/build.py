"""Builds the network of a configuration and loads its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastuda.errors import UserError, nearest
from fastuda.models.backbones import BACKBONES, freeze_batch_norm, init_scratch
from fastuda.models.daformer import DAFormerHead
from fastuda.models.deeplab import ASPP
from fastuda.models.hrda import HRSegmentor
from fastuda.models.normalization import INPUTS
from fastuda.models.published import NAMES, published
from fastuda.models.segmentor import Segmentor
from fastuda.models.weights import load_weights
from fastuda.system.settings import NonNegative, Size


@dataclass(frozen=True)
class ModelConfig:
    """The network and its initial weights."""

    backbone: str = "resnet101"
    """resnet18, resnet34, resnet50, resnet101, mobilenet_v2, efficientnet_lite0, vgg16, mit_b0 to mit_b5
    (these need the extra ``transformers``), or small (for training from scratch)."""
    weights: str | None = None
    """``imagenet``, the published file of the backbone, which is downloaded once (likewise
    ``dinov2_vits14``, ``dinov2_vitb14`` and ``dinov2_vitl14``); or a .pth or .safetensors file; or None to
    train from scratch. Known keys: torchvision, Caffe-style DeepLab, AdaptSegNet, FADA, timm, SegFormer
    (NVlabs, Hugging Face or mmsegmentation), DINOv2, and fastuda's own."""
    caffe: bool = False
    """Caffe-style ResNet: stride in the first 1x1, ceil_mode pooling (PLCA, ASANet, WeakSegDA)."""
    aspp_branches: Literal[1, 2, 3, 4] = 4
    """Branches of the head: 4, or 2 in AdaptSegNet's family (ASANet, WeakSegDA)."""
    aspp_bias: bool = False
    """Whether the head has a bias: not in PLCA; in FADA, ASANet, WeakSegDA and SePiCo."""
    aspp_zero_bias: bool = False
    """Whether the bias starts from zero (SePiCo, by mmcv) instead of torch's default (FADA, ASANet,
    WeakSegDA)."""
    aspp_init_std: NonNegative | None = None
    """Standard deviation of the head's initial weights (0.01 in FADA, ASANet, SePiCo); None: torch's
    default (PLCA)."""
    freeze_bn: Literal["none", "affine", "frozen"] = "none"
    """Batch norm to freeze: none, affine (scale and shift: ASANet, WeakSegDA) or frozen (also the
    statistics: FADA)."""
    input: Literal["imagenet", "caffe", "caffe_vgg", "caffe_swapped", "half"] | None = None
    """Normalisation of the images: imagenet, caffe, caffe_vgg (FADA's VGG16), caffe_swapped (ASANet) or
    half. None: detected from the layout of the weights file, which is not possible for VGG16 files
    converted from Caffe."""
    head: Literal["auto", "deeplabv2", "daformer"] = "auto"
    """The head: deeplabv2, daformer (only on mit_b0 to mit_b5), or auto: daformer on mit, deeplabv2
    otherwise."""
    hrda: Size | None = None
    """HRDA: height and width of the detail crop at full resolution (published: 512 x 512, half of
    ``data.crop``), beside the whole crop at half resolution. None: one scale."""
    align_corners: bool = False
    """align_corners of the logits' upsampling: False in PLCA and SePiCo, True in FADA, ASANet and
    WeakSegDA."""


def build_model(config: ModelConfig, num_classes: int) -> Segmentor:
    """Build the network of ``config`` for ``num_classes`` classes and load its weights.

    Raises:
        UserError: the backbone is unknown, or the weights file is missing or does not fit.
    """
    if config.backbone not in BACKBONES:
        raise UserError(f"unknown backbone {config.backbone!r}{nearest(config.backbone, BACKBONES)}")
    backbone = BACKBONES[config.backbone](config.caffe)
    init_scratch(backbone)
    head = _head(config, backbone, num_classes)
    if config.hrda is None:
        model = Segmentor(backbone, head, num_classes, config.align_corners)
    else:
        attention = _head(config, backbone, num_classes, context=False)
        model = HRSegmentor(backbone, head, attention, num_classes, config.align_corners, config.hrda)
    path = weights_path(config)
    if path is not None:
        model.input = load_weights(model, path, caffe=config.caffe, input=config.input).input
        model.pretrained = True
    elif config.input:
        model.input = INPUTS[config.input]
    if config.freeze_bn != "none":
        freeze_batch_norm(backbone, config.freeze_bn)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def weights_path(config: ModelConfig) -> Path | None:
    """The file of ``config.weights``, downloaded if it is a published one that is not in the cache yet.

    Raises:
        UserError: see :func:`~fastuda.models.published.published` and
            :meth:`~fastuda.models.published.WeightsFile.fetch`.
    """
    if config.weights is None:
        return None
    caffe = config.caffe and config.backbone.startswith("resnet")
    file = published(config.weights, config.backbone, caffe=caffe, input=config.input)
    if file is not None:
        return file.fetch()
    path = Path(config.weights)
    if path.name and not path.suffix and not path.exists():  # more likely a misspelt name than a path
        raise UserError(f"no weights file at {path}{nearest(config.weights, NAMES)}")
    return path


def _head(config: ModelConfig, backbone: nn.Module, num_classes: int, context: bool = True) -> nn.Module:
    """The segmentation head, or HRDA's attention head, which in DAFormer is without ``context``."""
    widths = getattr(backbone, "widths", None)
    kind = config.head if config.head != "auto" else "daformer" if widths else "deeplabv2"
    if kind == "daformer":
        if not widths:
            raise UserError(f"model.head daformer needs a mit backbone, not {config.backbone}")
        return DAFormerHead(widths, num_classes, context=context)
    return ASPP(
        int(backbone.channels),  # type: ignore[arg-type]
        num_classes,
        config.aspp_branches,
        config.aspp_bias,
        config.aspp_init_std,
        config.aspp_zero_bias,
    )
