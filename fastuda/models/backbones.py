"""Backbones by name, the small backbone, initialisation, and frozen batch norm.

Parameters have torchvision's names, so that its weight files load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastuda.models.frozen import freeze
from fastuda.models.mobile import EfficientNetLite0, MobileNetV2
from fastuda.models.resnet import BasicBlock, Bottleneck, ResNet
from fastuda.models.vgg import VGG16


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """A padded convolution without bias, batch norm and ReLU."""
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, dilation, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class SmallNet(nn.Module):
    """A small residual network at output stride 8, which trains from scratch in minutes on a CPU."""

    channels = 128

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, 24, 3, 2), *conv_bn_relu(24, 48, 3, 2))
        self.stage2 = self._stage(48, 96, 2, 1)
        self.stage3 = self._stage(96, 128, 1, 2)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(
            BasicBlock(inputs, outputs, stride, dilation, shortcut, False),
            BasicBlock(outputs, outputs, 1, dilation, None, False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stage3(self.stage2(self.stem(x)))


def _resnet(block: type[BasicBlock] | type[Bottleneck], *layers: int) -> Callable[[bool], nn.Module]:
    return lambda caffe: ResNet(block, list(layers), caffe)


def _mit(size: int) -> Callable[[bool], nn.Module]:
    def build(caffe: bool) -> nn.Module:
        from fastuda.models.mit import MiT  # needs an optional package

        return MiT(size)

    return build


BACKBONES: dict[str, Callable[[bool], nn.Module]] = {
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
    "resnet101": _resnet(Bottleneck, 3, 4, 23, 3),
    "mobilenet_v2": lambda caffe: MobileNetV2(),
    "efficientnet_lite0": lambda caffe: EfficientNetLite0(),
    "vgg16": lambda caffe: VGG16(),
    "small": lambda caffe: SmallNet(),
    **{f"mit_b{size}": _mit(size) for size in range(6)},
}


def init_scratch(module: nn.Module) -> None:
    """He initialisation for convolutions, ones and zeros for batch norm, unless the backbone has its own.
    Modules in the backbone's ``fresh`` keep torch's default, as in their published training (VGG16's fc6
    and fc7 in FADA and ASANet)."""
    if hasattr(module, "init_scratch"):
        module.init_scratch()  # type: ignore[operator]
        return
    fresh = getattr(module, "fresh", ())
    for name, part in module.named_modules():
        if name in fresh:
            continue
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def freeze_batch_norm(module: nn.Module, mode: str) -> None:
    """``affine`` freezes scale and shift; ``frozen`` also freezes the statistics, and folds the norms into
    the convolutions before them (:mod:`fastuda.models.frozen`).

    The layers keep their eps of 1e-5; FADA's authors divide by ``sqrt(variance)`` (core/models/layers.py).
    """
    if mode == "frozen":
        freeze(module)
        return
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.requires_grad_(False)


__all__ = ["BACKBONES", "VGG16", "MobileNetV2", "ResNet", "SmallNet", "freeze_batch_norm", "init_scratch"]
