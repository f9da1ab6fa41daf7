"""The teacher: an exponential moving average of a network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMATeacher(nn.Module):
    """A copy of a network whose parameters follow it: ``theta' <- a_t theta' + (1 - a_t) theta``.

    ``a_t = min(1 - 1 / (t + 1), decay)``, where t counts the updates, so that update 0 copies. The state dict
    contains everything including the count, and parameters are averaged in their own precision, so that a
    resumed run continues bit for bit.

    The teacher has no gradients and no optimiser, so it is not in ``Method.networks()``. As published in
    SePiCo, only parameters are averaged: in training mode the teacher uses the statistics of its batch,
    collects its own running statistics, and has no dropout and no stochastic depth.

    Args:
        student: the network, copied.
        decay: the cap of ``a_t``; published 0.999.

    Source: Tarvainen and Valpola, Mean Teacher, NeurIPS 2017; constants of Xie et al., SePiCo, TPAMI 2022.
    """

    updates: Tensor

    def __init__(self, student: nn.Module, decay: float = 0.999):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}: choose it in [0, 1]")
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # the same count on the host, which needs no device sync
        self.count = 0

    def alpha(self, step: int) -> float:
        """Weight of the old teacher in the update of ``step``."""
        return min(1 - 1 / (step + 1), self.decay)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards ``student``."""
        alpha = self.alpha(self.count)
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(student.parameters())
        if [p.shape for p in ours] != [p.shape for p in theirs]:
            raise ValueError("the student is not the network that the teacher was copied from")
        if alpha == 0:
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
        else:
            torch._foreach_lerp_(ours, theirs, 1 - alpha)
        self.updates += 1
        self.count += 1

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.count = int(self.updates)

    def train(self, mode: bool = True) -> EMATeacher:
        """Set training mode without dropout and stochastic depth."""
        super().train(mode)
        for part in self.module.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) or type(part).__name__.endswith("DropPath"):
                part.training = False
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
