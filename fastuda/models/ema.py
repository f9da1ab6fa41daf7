"""A teacher: the exponential moving average of a network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMATeacher(nn.Module):
    """A copy of a network whose parameters follow it: ``theta' <- a_t theta' + (1 - a_t) theta``.

    ``a_t = min(1 - 1 / (t + 1), decay)`` with t the updates so far, so that update 0 copies. Everything,
    the count too, is in the state dict, and parameters are averaged in their own precision: a resumed run
    goes on bit for bit.

    The teacher is no entry of ``Method.networks()``: it has no gradients and no optimiser.

    Args:
        student: the network, copied.
        decay: the cap of ``a_t``; published 0.999.
        buffers: what happens to the running statistics of batch norm: ``own`` (published in SePiCo:
            parameters only, the teacher in training mode gathers its own), ``copy`` (the student's), or
            ``average``.
        batch_statistics: in training, normalise with the statistics of the batch (published), or, if False,
            with the running ones. Dropout and stochastic depth are off either way.

    Source: Tarvainen and Valpola, Mean Teacher, NeurIPS 2017; constants of Xie et al., SePiCo, TPAMI 2022.
    """

    updates: Tensor

    def __init__(
        self, student: nn.Module, decay: float = 0.999, buffers: str = "own", batch_statistics: bool = True
    ):
        if buffers not in ("own", "copy", "average"):
            raise ValueError(f"buffers is {buffers!r}: choose own, copy or average")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}: choose it in [0, 1]")
        super().__init__()
        self.decay, self.buffers_mode, self.batch_statistics = decay, buffers, batch_statistics
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # the same number, known without asking the device for it
        self.count = 0

    def alpha(self, step: int) -> float:
        """The weight of the old teacher in the update of ``step``."""
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
        if self.buffers_mode != "own":
            for mine, other in zip(self.module.buffers(), student.buffers(), strict=True):
                if self.buffers_mode == "average" and mine.is_floating_point():
                    mine.lerp_(other, 1 - alpha)
                else:
                    mine.copy_(other)
        self.updates += 1
        self.count += 1

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.count = int(self.updates)

    def train(self, mode: bool = True) -> EMATeacher:
        """Training mode without dropout and stochastic depth."""
        super().train(mode and self.batch_statistics)
        self.training = mode
        for part in self.module.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) or type(part).__name__.endswith("DropPath"):
                part.training = False
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
