"""Backbones at output stride 8: ResNet in two styles, MobileNetV2, VGG16 and a small one to train from
scratch.

Parameter names are torchvision's, so that its weight files load as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """A padded convolution without bias, batch norm and ReLU."""
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, dilation, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class BasicBlock(nn.Module):
    """The two-convolution block of ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module | None, caffe: bool
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(nn.Module):
    """The three-convolution block; the stride sits in the 3x3 (torchvision) or in the first 1x1 (Caffe)."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module | None, caffe: bool
    ):
        super().__init__()
        first, middle = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, middle, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class ResNet(nn.Module):
    """ResNet at output stride 8: the last two stages keep the stride and dilate by 2 and 4.

    ``caffe=True`` is the style of the published DeepLab-V2 models: stride in the first 1x1 convolution,
    ``ceil_mode`` in the max-pooling (a 730 crop gives 92 x 92), and the new dilation from a stage's first
    block on. ``False`` is torchvision's: stride in the 3x3, floor, and a first block that keeps the previous
    dilation.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: list[int], caffe: bool = False):
        super().__init__()
        self.inputs = 64
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=caffe)
        self.layer1 = self._stage(block, 64, layers[0], 1, (1, 1), caffe)
        self.layer2 = self._stage(block, 128, layers[1], 2, (1, 1), caffe)
        self.layer3 = self._stage(block, 256, layers[2], 1, (2 if caffe else 1, 2), caffe)
        self.layer4 = self._stage(block, 512, layers[3], 1, (4 if caffe else 2, 4), caffe)
        self.channels = 512 * block.expansion

    def _stage(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        width: int,
        count: int,
        stride: int,
        dilations: tuple[int, int],
        caffe: bool,
    ) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self.inputs != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(self.inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        blocks = [block(self.inputs, width, stride, dilations[0], downsample, caffe)]
        self.inputs = outputs
        blocks += [block(outputs, width, 1, dilations[1], None, caffe) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, dilation: int):
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(self._unit(inputs, hidden, 1))
        layers += [
            self._unit(hidden, hidden, 3, stride, dilation, groups=hidden),
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
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, pad, dilation, groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (width 1) at output stride 8, without the classifier; 1280 channels."""

    # expansion, channels, blocks, stride, dilation (torchvision's strides past 8 become dilations)
    STAGES = (
        (1, 16, 1, 1, 1),
        (6, 24, 2, 2, 1),
        (6, 32, 3, 2, 1),
        (6, 64, 4, 1, 2),
        (6, 96, 3, 1, 2),
        (6, 160, 3, 1, 4),
        (6, 320, 1, 1, 4),
    )
    channels = 1280

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [InvertedResidual._unit(3, 32, 3, 2)]
        inputs, previous = 32, 1
        for expand, outputs, count, stride, dilation in self.STAGES:
            for index in range(count):
                first = index == 0
                layers.append(
                    InvertedResidual(
                        inputs, outputs, stride if first else 1, expand, previous if first else dilation
                    )
                )
                inputs = outputs
            previous = dilation
        layers.append(InvertedResidual._unit(inputs, self.channels, 1))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class VGG16(nn.Module):
    """VGG16 as DeepLab uses it: pool4 and pool5 dropped, conv5 dilated by 2, fc6 and fc7 as 3x3 dilated by 4.

    ``features.*`` are torchvision's keys; fc6 and fc7 have no torchvision counterpart and start from scratch.
    Source: Wang et al., Classes Matter, ECCV 2020 (the authors' feature extractor).
    """

    channels = 1024
    fresh = ("fc6", "fc7")
    """Parts that no ImageNet file holds."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        plan: tuple[int | str, ...] = (
            64,
            64,
            "M",
            128,
            128,
            "M",
            256,
            256,
            256,
            "M",
            512,
            512,
            512,
            "-",
            512,
            512,
            512,
            "-",
        )
        for position, step in enumerate(plan):
            if step == "M":
                layers.append(nn.MaxPool2d(2, 2))
            elif step == "-":
                layers.append(nn.Identity())
            else:
                dilation = 2 if position > 13 else 1
                layers += [
                    nn.Conv2d(inputs, int(step), 3, padding=dilation, dilation=dilation),
                    nn.ReLU(inplace=True),
                ]
                inputs = int(step)
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=4, dilation=4)
        self.fc7 = nn.Conv2d(1024, 1024, 3, padding=4, dilation=4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc7(self.relu(self.fc6(self.features(x)))))


class SmallNet(nn.Module):
    """A small residual network at output stride 8, to be trained from scratch in minutes on a CPU."""

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


BACKBONES: dict[str, Callable[[bool], nn.Module]] = {
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
    "resnet101": _resnet(Bottleneck, 3, 4, 23, 3),
    "mobilenet_v2": lambda caffe: MobileNetV2(),
    "vgg16": lambda caffe: VGG16(),
    "small": lambda caffe: SmallNet(),
}


def init_scratch(module: nn.Module) -> None:
    """He initialisation of convolutions, ones and zeros for batch norm."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def freeze_batch_norm(module: nn.Module, mode: str) -> None:
    """``affine``: scale and shift stop learning; ``frozen``: the statistics stop moving, too."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.requires_grad_(False)
            part.bias.requires_grad_(False)
            if mode == "frozen":
                part.eval()
                part.train = lambda mode=True, part=part: part  # type: ignore[method-assign, misc]


__all__ = ["BACKBONES", "VGG16", "MobileNetV2", "ResNet", "SmallNet", "freeze_batch_norm", "init_scratch"]
