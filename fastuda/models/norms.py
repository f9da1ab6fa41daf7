"""Batch norms that compute their activation as well."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

import fastuda.ops as F

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and the activation after it, by :func:`fastuda.ops.batch_norm_act`."""

    activation: str
    """none, relu or relu6."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
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
    """Make every ``nn.BatchNorm2d`` of ``module`` a :class:`BatchNormAct2d`; the keys of the state stay.

    A norm takes over the ReLU or ReLU6 that follows it in an ``nn.Sequential``, or that is paired with it in
    ``norm_activations`` of its parent.
    """
    for part in module.modules():
        if type(part) is nn.BatchNorm2d and _is_usual(part):
            part.__class__ = BatchNormAct2d
            assert isinstance(part, BatchNormAct2d)
            part.activation = "none"
    for part in module.modules():
        for name, behind in _activations(part):
            norm, kind = getattr(part, name), ACTIVATIONS.get(type(getattr(part, behind)))
            if isinstance(norm, BatchNormAct2d) and kind is not None:
                norm.activation = kind
                setattr(part, behind, nn.Identity())


def _activations(part: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of parts that always run directly one after the other."""
    if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
        return list(itertools.pairwise(name for name, _ in part.named_children()))
    return list(getattr(part, "norm_activations", ()))


def _is_usual(norm: nn.BatchNorm2d) -> bool:
    """Whether it has float32 weights and running statistics with a fixed momentum."""
    return (
        norm.affine and norm.track_running_stats and norm.momentum is not None
        and norm.weight.dtype == torch.float32
    )  # fmt: skip
