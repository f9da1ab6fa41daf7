"""Detects losses that are not finite, without a device sync at every step."""

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
"""Smallest scale of fp16 losses. The scaler starts at 65536 and halves at every overflow."""


class LossGuard:
    """Stores the losses of recent steps until :meth:`check` examines them.

    On the CPU each loss is checked before its backward pass. On other devices the trainer checks before every
    row of curves and every checkpoint, so that no checkpoint is written after a broken step.

    Args:
        out: folder for a report of losses that are not finite.
        eager: check each loss when it is stored.
        scaler: the losses' scaler, if any.
    """

    def __init__(self, out: Path, eager: bool, scaler: torch.amp.GradScaler | None = None):
        self.out, self.eager, self.scaler = out, eager, scaler
        self.waiting: list[tuple[int, tuple[str, ...], Tensor, tuple[Sequence[str], Sequence[str]]]] = []

    def watch(self, step: int, losses: dict[str, Tensor], batch: Batch) -> None:
        """Store the losses of one phase."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.waiting.append((step, tuple(losses), values, (batch.source_files, batch.target_files)))
        if self.eager:
            self.check()

    def check(self) -> None:
        """Check all stored losses.

        Raises:
            UserError: a loss is not finite; ``not_finite.json`` names the step, the term and the files. Or
                the gradients overflow float16 at every scale of the losses.
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
        """Check the networks' weights; this waits for the device.

        Raises:
            UserError: a weight is not finite. Gradients can overflow while every loss is finite.
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
