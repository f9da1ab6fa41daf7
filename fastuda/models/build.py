"""Builds the network of a configuration and loads its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import nn

from fastuda.errors import UserError, nearest
from fastuda.models.backbones import BACKBONES, freeze_batch_norm, init_scratch
from fastuda.models.daformer import DAFormerHead
from fastuda.models.deeplab import ASPP
from fastuda.models.foreign import ForeignBackbone, listed, size_of, survey
from fastuda.models.hf_folder import PREFIX, describe
from fastuda.models.hrda import HRSegmentor
from fastuda.models.huggingface import has_weights, hf_backbone, hf_model
from fastuda.models.light import LightHead, LinearHead
from fastuda.models.normalization import INPUTS, Normalization
from fastuda.models.published import NAMES, published
from fastuda.models.segmentor import Segmentor
from fastuda.models.upernet import UPerNetHead
from fastuda.models.weights import load_weights
from fastuda.models.whole import choose_classes, segmentor_of
from fastuda.system.imports import import_named, is_named
from fastuda.system.settings import Bounds, NonNegative, Size

M = TypeVar("M", bound=nn.Module)

PYRAMIDS = ("daformer", "upernet")
"""Heads that take several maps."""


@dataclass(frozen=True)
class ModelConfig:
    """The network and its initial weights."""

    backbone: str = "resnet101"
    """resnet18, resnet34, resnet50, resnet101, mobilenet_v2, efficientnet_lite0, vgg16, mit_b0 to mit_b5
    (these need the extra ``transformers``), or small (for training from scratch). hf:PATH takes a backbone of
    Hugging Face's transformers, package.module:function one of your own."""
    network: str | None = None
    """A whole network instead of backbone and head: hf:PATH (a semantic segmentation model of Hugging Face's
    transformers) or package.module:function."""
    weights: str | None = None
    """``imagenet`` for the published file of the backbone, which is downloaded once (``dinov2_vits14``,
    ``dinov2_vitb14`` and ``dinov2_vitl14`` likewise), a .pth or .safetensors file, or None to train from
    scratch. Known keys: torchvision, Caffe-style DeepLab, AdaptSegNet, FADA, timm, SegFormer
    (NVlabs, Hugging Face or mmsegmentation), DINOv2, and fastuda's own."""
    caffe: bool = False
    """Caffe-style ResNet: stride in the first 1x1, ceil_mode pooling (PLCA, ASANet, WeakSegDA)."""
    aspp_branches: Literal[1, 2, 3, 4] = 4
    """Branches of the head: 4, or 2 in AdaptSegNet's family (ASANet, WeakSegDA)."""
    aspp_bias: bool = False
    """Whether the head has a bias: no in PLCA; yes in FADA, ASANet, WeakSegDA and SePiCo."""
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
    head: Literal["auto", "deeplabv2", "daformer", "upernet", "linear", "light"] = "auto"
    """The head: deeplabv2, daformer or upernet (for a backbone with several maps, and for a ViT, whose maps
    after each quarter of its blocks they take), linear, light (VFM-UDA's), or auto. auto is daformer for
    several maps, light for a single map of hf:PATH that is coarser than stride 8, and deeplabv2 otherwise."""
    hrda: Size | None = None
    """HRDA: height and width of the detail crop at full resolution (published: 512 x 512, half of
    ``data.crop``); the whole crop is seen at half resolution. None: one scale."""
    enlarge: Annotated[float, Bounds(1, 4)] = 1.0
    """Factor by which images are enlarged before a backbone of hf:PATH (VFM-UDA: 1.1)."""
    align_corners: bool = False
    """align_corners of the logits' upsampling: False in PLCA and SePiCo, True in FADA, ASANet and
    WeakSegDA."""
    hf: dict[str, Any] = field(default_factory=dict, hash=False)
    """Written by the run: the configuration and the image normalisation of hf:PATH, so that a finished run
    does not need the folder."""


def described(config: ModelConfig) -> ModelConfig:
    """``config`` with everything that its network needs except the weights: the description of ``hf:PATH``,
    and its absolute path.

    Raises:
        UserError: see :func:`~fastuda.models.hf_folder.describe`.
    """
    spec = config.network or config.backbone
    if not spec.startswith(PREFIX):
        return replace(config, hf={}) if config.hf else config
    if spec == config.hf.get("spec"):
        return config
    about = describe(spec, whole=config.network is not None)
    place = {"network" if config.network else "backbone": about["spec"]}
    return replace(config, **place, hf=about)


def build_model(
    config: ModelConfig,
    num_classes: int,
    pretrained: bool = True,
    rows: Sequence[int | None] | None = None,
) -> Segmentor:
    """Build the network of ``config`` for ``num_classes`` classes and load its weights.

    Args:
        pretrained: False for a network whose state is loaded afterwards. Then the weights of ``hf:PATH`` are
            not read, and a user's function with a parameter ``pretrained`` gets False.
        rows: for each class its row in the classifier of a whole ``hf:PATH``, or None if it starts from
            scratch. By default the model's own order if the numbers of classes agree, and a new classifier
            otherwise.

    Raises:
        UserError: the backbone is unknown, the network cannot be used, or the weights file is missing or does
            not fit.
    """
    config = described(config)
    if config.network:
        model = _whole(config, num_classes, pretrained, rows)
    else:
        backbone = _backbone(config, pretrained)
        model = _of_parts(config, backbone, num_classes)
    if config.hf:
        model.input = Normalization.of(config.hf["input"])
        model.pretrained = pretrained and has_weights(config.hf["spec"])
    path = weights_path(config)
    if path is not None:
        model.input = load_weights(model, path, caffe=config.caffe, input=config.input).input
        model.pretrained = True
    elif config.input:
        model.input = INPUTS[config.input]
    if config.freeze_bn != "none":
        freeze_batch_norm(model.backbone, config.freeze_bn)
    return in_layout(model, torch.channels_last)


def in_layout(module: M, layout: torch.memory_format) -> M:
    """``module`` with what has four dimensions in the layout; ``Module.to`` fails at five."""
    for held in (*module.parameters(), *module.buffers()):
        if held.dim() == 4:
            held.data = held.data.to(memory_format=layout)
    return module


def weights_path(config: ModelConfig) -> Path | None:
    """The file of ``config.weights``, downloaded if it is a published one that is not in the cache yet.

    Raises:
        UserError: see :func:`~fastuda.models.published.published` and
            :meth:`~fastuda.models.published.WeightsFile.fetch`.
    """
    if config.weights is None:
        return None
    caffe = config.caffe and config.backbone.startswith("resnet")
    network = config.network or config.backbone
    file = published(config.weights, network, caffe=caffe, input=config.input)
    if file is not None:
        return file.fetch()
    path = Path(config.weights)
    if path.name and not path.suffix and not path.exists():  # more likely a misspelt name than a path
        raise UserError(f"no weights file at {path}{nearest(config.weights, NAMES)}")
    return path


def _backbone(config: ModelConfig, pretrained: bool) -> nn.Module:
    name = config.backbone
    if name.startswith(PREFIX):
        return hf_backbone(config.hf, pretrained, config.head in PYRAMIDS, config.enlarge)
    if is_named(name):
        network = _called(name, "backbone", pretrained)
        if not isinstance(network, nn.Module):
            raise UserError(f"{name} gave a {type(network).__name__}, not a torch.nn.Module")
        geometry = survey(network, listed, name, size_of(network))
        return ForeignBackbone(network, listed, geometry, config.enlarge)
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}{nearest(name, BACKBONES)}")
    backbone = BACKBONES[name](config.caffe)
    init_scratch(backbone)
    return backbone


def _whole(
    config: ModelConfig, num_classes: int, pretrained: bool, rows: Sequence[int | None] | None
) -> Segmentor:
    name = str(config.network)
    if config.hrda is not None:
        raise UserError(
            f"model.hrda needs a backbone and a head, and {name} is a whole network; set it to null"
        )
    if name.startswith(PREFIX):
        own = len(config.hf.get("classes") or range(num_classes))
        network = hf_model(config.hf, own, pretrained)
        model = segmentor_of(network, name, own, size_of(network.config))
        choose_classes(model, rows or (range(own) if own == num_classes else [None] * num_classes))
        return model
    if not is_named(name):
        raise UserError(f"model.network is {name!r}: give hf:PATH or package.module:function")
    network = _called(name, "model", pretrained, num_classes)
    return segmentor_of(network, name, num_classes, size_of(network))


def _called(name: str, kind: str, pretrained: bool, *arguments: Any) -> Any:
    """What a user's function returns; it gets ``pretrained`` if it has a parameter of that name."""
    function: Callable[..., Any] = import_named(name, kind)
    if not callable(function):
        raise UserError(f"{name} is a {type(function).__name__}, not a function that returns a network")
    given: dict[str, Any] = {}
    try:
        signature = inspect.signature(function)
        if "pretrained" in signature.parameters:
            given["pretrained"] = pretrained
        signature.bind(*arguments, **given)
    except (TypeError, ValueError) as error:
        what = "the number of classes" if arguments else "no arguments"
        raise UserError(f"{name} cannot be called with {what} (docs/own-network.md): {error}") from error
    return function(*arguments, **given)


def _of_parts(config: ModelConfig, backbone: nn.Module, num_classes: int) -> Segmentor:
    """The backbone with its head; with HRDA, also its attention head."""
    head = _head(config, backbone, num_classes)
    if config.hrda is None:
        return Segmentor(backbone, head, num_classes, config.align_corners)
    attention = _head(config, backbone, num_classes, context=False)
    return HRSegmentor(backbone, head, attention, num_classes, config.align_corners, config.hrda)


def _head(config: ModelConfig, backbone: nn.Module, num_classes: int, context: bool = True) -> nn.Module:
    """The segmentation head, or HRDA's attention head, which for a pyramid is DAFormer's without
    ``context``."""
    widths = getattr(backbone, "widths", ())
    channels = int(backbone.channels)  # type: ignore[arg-type]
    kind = config.head
    if kind == "auto":
        coarse = isinstance(backbone, ForeignBackbone) and backbone.stride > 8
        kind = "daformer" if len(widths) > 1 else "light" if coarse else "deeplabv2"
    if kind in PYRAMIDS and not widths:
        raise UserError(f"model.head {kind} needs a mit or hf: backbone, not {config.backbone}")
    if kind == "upernet" and context:
        return UPerNetHead(widths, backbone.strides, num_classes)  # type: ignore[arg-type]
    if kind in PYRAMIDS:
        return DAFormerHead(widths, num_classes, context=context)
    if kind in ("linear", "light"):
        return (LinearHead if kind == "linear" else LightHead)(channels, num_classes)
    return ASPP(
        channels,
        num_classes,
        config.aspp_branches,
        config.aspp_bias,
        config.aspp_init_std,
        config.aspp_zero_bias,
    )
