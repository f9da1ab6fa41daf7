"""Discriminators of the adversarial methods. They return logits; the losses apply the sigmoid."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from fastuda.errors import UserError


class FCDiscriminator(nn.Sequential):
    """Five 4x4 convolutions of stride 2, 64 to 512 channels and then one, LeakyReLU 0.2 between, no norm.

    ``[B, inputs, H, W] -> [B, 1, H // 32, W // 32]``, one logit per patch. ``inputs`` is K for class
    probabilities, and 8 K or 4 K for their affinities (see :func:`affinity_discriminator`).

    Raises (when called):
        UserError: H or W is below 32.

    Source: Tsai et al., AdaptSegNet, CVPR 2018; ASANet and WeakSegDA use it unchanged.
    """

    def __init__(self, inputs: int, width: int = 64):
        widths = [inputs, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 32:
            raise UserError(
                f"the discriminator halves its input five times, and the input is"
                f" {x.shape[2]} x {x.shape[3]}: raise data.crop and data.target_crop to 32 x 32 at least"
            )
        return super().forward(x)


def affinity_discriminator(num_classes: int, neighbours: int = 8, width: int = 64) -> FCDiscriminator:
    """ASANet's discriminator of affinity maps ``[B, neighbours K, H, W]``, channel ``direction * K + class``.

    Source: Zhou et al., Affinity Space Adaptation, TIP 2020, section on strategy 2.

    Raises:
        ValueError: ``neighbours`` is neither 4 nor 8.
    """
    if neighbours not in (4, 8):
        raise ValueError(f"neighbours is {neighbours}: choose 4 or 8")
    return FCDiscriminator(neighbours * num_classes, width)


class ClassDomainDiscriminator(nn.Module):
    """FADA's discriminator of features, with 2 K outputs for class and domain together.

    ``[B, C, h, w] -> [B, 2 K, h, w]``: channel c is "source and class c", K + c is "target and class c".
    Two 3x3 convolutions to ``width`` and ``width / 2`` channels, then one 3x3 for each domain; stride 1, no
    norm; nothing is upsampled here.

    Source: Wang et al., Classes Matter, ECCV 2020.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.source = nn.Conv2d(width // 2, num_classes, 3, padding=1)
        self.target = nn.Conv2d(width // 2, num_classes, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.trunk(features)
        return torch.cat([self.source(x), self.target(x)], 1)


class StackedLinear(nn.Module):
    """K linear layers of equal shape with stacked weights: ``y_k = x_k W_k + b_k`` in one batched product.

    ``weight`` is [K, inputs, outputs], ``bias`` [K, outputs]; initialised as ``nn.Linear``.
    """

    def __init__(self, count: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [K, B, inputs]."""
        return torch.baddbmm(self.bias[:, None], x, self.weight)


class CategoryDiscriminators(nn.Module):
    """WeakSegDA's K discriminators of pooled class features, one MLP ``C - C - C - 1`` for each class.

    They run as three batched products instead of 3 K small ones, and in float32 even under autocast. With one
    row per image, reading the weights takes all the time. A cast, or a copy that leaves out absent classes,
    would read them once more.

    Source: Paul et al., Domain Adaptive Semantic Segmentation Using Weak Labels, ECCV 2020.
    """

    def __init__(self, channels: int, num_classes: int, width: int | None = None):
        super().__init__()
        width = width or channels
        self.num_classes = num_classes
        self.layers = nn.ModuleList([
            StackedLinear(num_classes, channels, width),
            StackedLinear(num_classes, width, width),
            StackedLinear(num_classes, width, 1),
        ])  # fmt: skip

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits [B, K] of pooled features [B, C, K].

        Args:
            pooled: one feature vector per image and class.

        Raises:
            ValueError: ``pooled`` is not [B, C, K].
        """
        if pooled.ndim != 3 or pooled.shape[2] != self.num_classes:
            raise ValueError(f"pooled is {tuple(pooled.shape)}, expected [B, C, {self.num_classes}]")
        first, second, last = self.layers
        dtype = next(self.parameters()).dtype
        x = pooled.permute(2, 0, 1).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return last(torch.relu(second(torch.relu(first(x)))))[..., 0].t()
