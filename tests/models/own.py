"""Networks as users write them, for ``--model`` and ``--backbone package.module:function``."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.models import Segmentor
from fastuda.models.backbones import SmallNet
from fastuda.models.light import LinearHead

BUILT: list[bool] = []
"""What the functions with a parameter ``pretrained`` got."""


class Plain(nn.Module):
    """``images -> logits`` at the images' size, as most libraries give."""

    def __init__(self, num_classes: int, align_corners: bool = True):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.auxiliary = nn.Conv2d(8, num_classes, 1)
        self.segmentation_head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(12, num_classes, 1))
        self.align = align_corners

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        logits = self.segmentation_head(self.decoder(features))
        size = images.shape[2:]
        out = nnf.interpolate(logits, size, mode="bilinear", align_corners=self.align)
        return {"out": out, "aux": self.auxiliary(features)}


class Fixed(Plain):
    """Takes images of 32 x 32 alone, as a ViT without interpolated positions."""

    image_size = 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape[2:] == (32, 32), "this network takes 32 x 32"
        return super().forward(images)


class Contract(nn.Module):
    """Says everything itself: its classes are products with learnt vectors."""

    input = "half"
    stride = 4
    align_corners = True

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 4, 4)
        self.queries = nn.Parameter(torch.randn(num_classes, 8))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images).relu()
        return features, self.classify(features)

    def classify(self, features: Tensor) -> Tensor:
        return torch.einsum("bchw,kc->bkhw", features, self.queries)

    def param_groups(self, lr: float, head_lr_mult: float) -> list[dict]:
        return [
            {"params": list(self.body.parameters()), "lr": lr},
            {"params": [self.queries], "lr": lr * head_lr_mult},
        ]


class Sharpened(Plain):
    """Does more to its logits than resizing them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)["out"].softmax(1)


class Wordless(nn.Module):
    """Returns no logits."""

    def forward(self, images: Tensor) -> str:
        return "road"


class TwoMaps(nn.Module):
    """A backbone of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 16, 2, 2)

    def forward(self, images: Tensor) -> list[Tensor]:
        finer = self.first(images)
        return [finer, self.second(finer)]


def plain(num_classes: int) -> nn.Module:
    """A network without a word on where its weights are from."""
    return Plain(num_classes)


def fixed(num_classes: int) -> nn.Module:
    """A network of one image size."""
    return Fixed(num_classes)


def contract(num_classes: int, pretrained: bool = True) -> nn.Module:
    """A network that knows whether its weights are read afterwards."""
    BUILT.append(pretrained)
    return Contract(num_classes)


def segmentor(num_classes: int) -> nn.Module:
    """Our own class."""
    backbone = SmallNet()
    return Segmentor(backbone, LinearHead(backbone.channels, num_classes), num_classes, False)


def sharpened(num_classes: int) -> nn.Module:
    """Cannot be taken apart."""
    return Sharpened(num_classes)


def wordless(num_classes: int) -> nn.Module:
    """Gives no logits."""
    return Wordless()


def others(num_classes: int) -> nn.Module:
    """Another number of classes."""
    return Plain(num_classes + 1)


def nothing(num_classes: int) -> None:
    """Forgets to return."""


class Shared(Plain):
    """Has a norm under two names, and a weight."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.again = self.encoder[1]
        self.tied = nn.Parameter(self.decoder[1].weight.detach())
        self.decoder[1].weight = self.tied


def shared(num_classes: int) -> nn.Module:
    return Shared(num_classes)


class Deep(Plain):
    """Has a weight of five dimensions."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.along = nn.Conv3d(1, 1, 3, padding=1)
        self.encoder.append(nn.Unflatten(1, (1, 8))).append(self.along).append(nn.Flatten(1, 2))


def deep(num_classes: int) -> nn.Module:
    return Deep(num_classes)


def unasked() -> nn.Module:
    """Wants no number of classes."""
    return Plain(5)


def two_maps() -> nn.Module:
    """A backbone for our heads."""
    return TwoMaps()
