"""Inverted residual networks at output stride 8: MobileNetV2 and EfficientNet-Lite0."""

from __future__ import annotations

from torch import Tensor, nn

import fastuda.ops as F


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with as many groups as channels, a square kernel and zero padding, which calls
    :func:`fastuda.ops.depthwise_conv2d`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (stride, _), (dilation, _) = self.stride, self.dilation
        padding = int(self.padding[0])
        return F.depthwise_conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, dilation: int, kernel: int = 3):
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(self._unit(inputs, hidden, 1))
        layers += [
            self._unit(hidden, hidden, kernel, stride, dilation, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    @staticmethod
    def _unit(
        inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> nn.Sequential:
        pad = dilation * (kernel // 2)
        conv = DepthwiseConv2d if groups > 1 else nn.Conv2d
        return nn.Sequential(
            conv(inputs, outputs, kernel, stride, pad, dilation, groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (width 1) at output stride 8, without the classifier; 1280 channels.

    Source: Sandler et al., CVPR 2018.
    """

    # expansion, channels, blocks, stride, dilation, kernel (strides past 8 become dilations)
    STAGES: tuple[tuple[int, ...], ...] = (
        (1, 16, 1, 1, 1, 3),
        (6, 24, 2, 2, 1, 3),
        (6, 32, 3, 2, 1, 3),
        (6, 64, 4, 1, 2, 3),
        (6, 96, 3, 1, 2, 3),
        (6, 160, 3, 1, 4, 3),
        (6, 320, 1, 1, 4, 3),
    )
    channels = 1280

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [InvertedResidual._unit(3, 32, 3, 2)]
        inputs, previous = 32, 1
        for expand, outputs, count, stride, dilation, kernel in self.STAGES:
            for index in range(count):
                step, dilate = (stride, previous) if index == 0 else (1, dilation)
                layers.append(InvertedResidual(inputs, outputs, step, expand, dilate, kernel))
                inputs = outputs
            previous = dilation
        layers.append(InvertedResidual._unit(inputs, self.channels, 1))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class EfficientNetLite0(MobileNetV2):
    """EfficientNet-Lite0 at output stride 8: MobileNetV2's blocks with some 5x5 kernels; 1280 channels.

    Its weights expect images in -1..1 (``input = "half"``). Source: Tan and Le, ICML 2019; the Lite variant
    drops squeeze-and-excitation and uses ReLU6.
    """

    STAGES = (
        (1, 16, 1, 1, 1, 3),
        (6, 24, 2, 2, 1, 3),
        (6, 40, 2, 2, 1, 5),
        (6, 80, 3, 1, 2, 3),
        (6, 112, 3, 1, 2, 5),
        (6, 192, 4, 1, 4, 5),
        (6, 320, 1, 1, 4, 3),
    )
    input = "half"
