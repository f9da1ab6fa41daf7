"""ResNet at output stride 8, in torchvision's style and in Caffe's."""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """The two-convolution block of ResNet-18 and -34."""

    expansion = 1
    norm_activations = (("bn1", "relu1"),)

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module | None, caffe: bool
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class Bottleneck(nn.Module):
    """The three-convolution block; the stride sits in the 3x3 (torchvision) or in the first 1x1 (Caffe)."""

    expansion = 4
    norm_activations = (("bn1", "relu1"), ("bn2", "relu2"))

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module | None, caffe: bool
    ):
        super().__init__()
        first, middle = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1: nn.Module = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, middle, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2: nn.Module = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class ResNet(nn.Module):
    """ResNet at output stride 8: the last two stages keep the stride and dilate by 2 and 4.

    ``caffe=True`` is the style of the published DeepLab-V2 models: stride in the first 1x1 convolution,
    ``ceil_mode`` in the max-pooling (a 730 crop gives 92 x 92), and the new dilation from a stage's first
    block on. ``False`` is torchvision's: stride in the 3x3, floor, and a first block that keeps the previous
    dilation.
    """

    norm_activations = (("bn1", "relu"),)

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: list[int], caffe: bool = False):
        super().__init__()
        self.caffe = caffe
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
