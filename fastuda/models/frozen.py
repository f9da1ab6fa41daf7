"""Frozen batch norms, folded into the convolutions before them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from fastuda.models.mobile import DepthwiseConv2d


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode: its statistics, scale and shift are constants.

    With ``folded`` the preceding convolution applies them, and this layer is the identity.
    """

    folded: bool

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x if self.folded else super().forward(x)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """``(s, t)`` [C] with ``norm(x) = s x + t``."""
        assert self.running_mean is not None and self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale


class FoldedConv2d(nn.Conv2d):
    """A convolution and the frozen norm after it: ``conv(x, s W) + t``. This takes one pass over the features
    instead of two, forward and backward. The gradient of ``W`` is exact."""

    norm: tuple[FrozenBatchNorm2d]
    """In a tuple, so that its state stays under its own name."""

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm[0].scale_and_shift()
        if self.bias is not None:
            shift = shift + scale * self.bias
        return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)


class FoldedDepthwiseConv2d(FoldedConv2d, DepthwiseConv2d):
    """The same for a depthwise convolution."""


FOLDED: dict[type[nn.Module], type[FoldedConv2d]] = {
    nn.Conv2d: FoldedConv2d,
    DepthwiseConv2d: FoldedDepthwiseConv2d,
}


def freeze(module: nn.Module) -> None:
    """Make every batch norm of ``module`` constant, and fold it into the convolution that is registered just
    before it. The keys of the state do not change."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = FrozenBatchNorm2d
            assert isinstance(part, FrozenBatchNorm2d)
            part.folded = False
            part.requires_grad_(False).eval()
    for part in module.modules():
        for conv, norm in itertools.pairwise(part.children()):
            if isinstance(norm, FrozenBatchNorm2d) and type(conv) in FOLDED:
                conv.__class__ = FOLDED[type(conv)]
                assert isinstance(conv, FoldedConv2d)
                conv.norm, norm.folded = (norm,), True
