"""VGG16 as DeepLab uses it."""

from __future__ import annotations

from torch import Tensor, nn


class VGG16(nn.Module):
    """VGG16 as DeepLab uses it: pool4 and pool5 dropped, conv5 dilated by 2, fc6 and fc7 as 3x3 dilated by 4.

    ``features.*`` are torchvision's keys; fc6 and fc7 have no torchvision counterpart and start from scratch.
    Source: Wang et al., Classes Matter, ECCV 2020 (the authors' feature extractor).
    """

    channels = 1024
    least_size = 8
    """Smallest side of an image in pixels, which three poolings reduce to one."""
    fresh = ("fc6", "fc7")
    """Modules that ImageNet files do not contain."""

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
