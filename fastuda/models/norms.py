"""Batch norms that compute their activation as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastuda.ops as F

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and the activation behind it, on :func:`fastuda.ops.batch_norm_act`."""

    activation: str
    """none, relu or relu6."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return F.batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
        )


def fuse_norms(module: nn.Module) -> None:
    """Make every ``nn.BatchNorm2d`` of ``module`` a :class:`BatchNormAct2d`. One that a ReLU or ReLU6 follows
    in an ``nn.Sequential`` takes its activation. Names of the state stay."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d and _is_usual(part):
            part.__class__ = BatchNormAct2d
            assert isinstance(part, BatchNormAct2d)
            part.activation = "none"
    for part in module.modules():
        if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
            for place in range(1, len(part)):
                norm, kind = part[place - 1], ACTIVATIONS.get(type(part[place]))
                if isinstance(norm, BatchNormAct2d) and kind is not None:
                    norm.activation, part[place] = kind, nn.Identity()


def _is_usual(norm: nn.BatchNorm2d) -> bool:
    """With weights and running statistics in float32, which move by a fixed share."""
    return (
        norm.affine and norm.track_running_stats and norm.momentum is not None
        and norm.weight.dtype == torch.float32
    )  # fmt: skip
