"""Losses that are not finite: found without waiting for the device at every step, and named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError
from fastuda.system.files import written

DUMP = "not_finite.json"
SMALLEST_SCALE = 1.0
"""Of fp16's losses: it starts at 65536, and every overflow halves it."""


class LossGuard:
    """Holds the losses of the last steps until :meth:`check` looks at them.

    On the CPU each is looked at as it comes, before its backward; elsewhere the trainer checks before every
    row of curves and every checkpoint, so that no checkpoint is written after a broken step.

    Args:
        out: folder for a small dump of what was found.
        eager: look at once.
        scaler: of the losses, where there is one.
    """

    def __init__(self, out: Path, eager: bool, scaler: torch.amp.GradScaler | None = None):
        self.out, self.eager, self.scaler = out, eager, scaler
        self.waiting: list[tuple[int, tuple[str, ...], Tensor, tuple[Sequence[str], Sequence[str]]]] = []

    def watch(self, step: int, losses: dict[str, Tensor], batch: Batch) -> None:
        """Take note of the losses of one phase."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.waiting.append((step, tuple(losses), values, (batch.source_files, batch.target_files)))
        if self.eager:
            self.check()

    def check(self) -> None:
        """Look at everything noted since the last look.

        Raises:
            UserError: a loss is not finite; step, term and files are named and left in ``not_finite.json``.
                Or the gradients overflow float16 however small the losses are scaled.
        """
        waiting, self.waiting = self.waiting, []
        if waiting and self.scaler is not None and self.scaler.get_scale() < SMALLEST_SCALE:
            raise UserError(
                f"step {waiting[-1][0]}: the gradients overflow float16 with the losses scaled by less than"
                f" {SMALLEST_SCALE:g}, and every step is skipped; use --amp bf16, or lower optim.lr"
            )
        if not waiting or bool(torch.isfinite(torch.cat([entry[2] for entry in waiting])).all()):
            return
        for step, names, values, files in waiting:
            terms = dict(zip(names, values.tolist(), strict=True))
            broken = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
            if broken:
                self._dump({
                    "step": step,
                    "losses": {name: str(value) for name, value in terms.items()},
                    "source_files": list(files[0]),
                    "target_files": list(files[1]),
                })  # fmt: skip
                names_of_files = "\n  ".join([*files[0], *files[1]])
                raise UserError(
                    f"step {step}: the loss is not finite ({', '.join(broken)});"
                    f" lower optim.lr or use --amp off. The last checkpoint is untouched."
                    f" The batch:\n  {names_of_files}"
                )

    def check_weights(self, step: int, networks: dict[str, nn.Module]) -> None:
        """Look at what the last steps have made of the networks; it waits for the device.

        Raises:
            UserError: a weight is not finite. It may be so while every loss was: a gradient overflows alone.
        """
        for name, network in networks.items():
            finite = [torch.isfinite(p.detach()).all() for p in network.parameters()]
            if finite and not bool(torch.stack(finite).all()):
                raise UserError(
                    f"step {step}: the weights of {name} are not finite, though the losses were;"
                    " lower optim.lr or use --amp off. The last checkpoint is untouched"
                )

    def _dump(self, report: dict[str, Any]) -> None:
        if self.out.is_dir():
            with written(self.out / DUMP, fsync=True) as draft:
                draft.write_text(json.dumps(report, indent=1), encoding="utf-8")
