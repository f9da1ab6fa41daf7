"""Batch norms that compute their activation as well."""

from __future__ import annotations

import itertools
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import fastuda.ops as F

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and the activation after it, by :func:`fastuda.ops.batch_norm_act`."""

    activation: str
    """none, relu or relu6; the argument of :meth:`forward` overrides it."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        kind = activation or self.activation
        if not _is_usual(self):  # its dtype or momentum was changed after fuse_norms
            y = super().forward(x)
            return y if kind == "none" else getattr(nnf, kind)(y)
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
            activation=kind,
        )


def fuse_norms(module: nn.Module) -> None:
    """Make every ``nn.BatchNorm2d`` of ``module`` a :class:`BatchNormAct2d`; the keys of the state stay.

    When an ``nn.Sequential`` runs as a whole, its norms also compute the ReLU or ReLU6 after them. Its parts
    on their own still compute what they did. In the pairs ``norm_activations`` of its parent, a norm always
    computes the activation. A hook on the norm or on the activation keeps the two separate.
    """
    for part in module.modules():
        if type(part) is nn.BatchNorm2d and "forward" not in vars(part) and _is_usual(part):
            part.__class__ = BatchNormAct2d
            assert isinstance(part, BatchNormAct2d)
            part.activation = "none"
    for part in module.modules():
        for name, behind in getattr(part, "norm_activations", ()):
            norm, kind = getattr(part, name), _taken(getattr(part, name), getattr(part, behind))
            if kind:
                norm.activation = kind
                setattr(part, behind, nn.Identity())
        if (
            isinstance(part, nn.Sequential) and part.forward == MethodType(nn.Sequential.forward, part)
            and any(itertools.starmap(_taken, itertools.pairwise(part)))
        ):  # fmt: skip
            part.forward = MethodType(_FusedSequential.forward, part)  # type: ignore[method-assign]


class _FusedSequential(nn.Sequential):
    """Runs each norm together with the activation after it."""

    def forward(self, input: Any) -> Any:
        parts = list(self)
        while parts:
            part = parts.pop(0)
            kind = _taken(part, parts[0]) if parts else ""
            if kind:
                del parts[0]
            input = part(input, kind) if kind else part(input)
        return input


def _taken(norm: nn.Module, behind: nn.Module) -> str:
    """The activation ``behind`` if ``norm`` can compute it as well, or the empty string."""
    if not isinstance(norm, BatchNormAct2d) or norm.activation != "none":
        return ""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    watched = any(getattr(part, name) for part in (norm, behind) for name in hooks)
    return "" if watched or "forward" in vars(behind) else ACTIVATIONS.get(type(behind), "")


def _is_usual(norm: nn.BatchNorm2d) -> bool:
    """Whether it has float32 or float64 weights, and running statistics with a fixed momentum."""
    return (
        norm.affine and norm.track_running_stats and norm.momentum is not None
        and 0 <= norm.momentum <= 1 and norm.eps > 0
        and norm.weight.dtype in (torch.float32, torch.float64)
    )  # fmt: skip
