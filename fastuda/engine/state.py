"""The state of a run at one step, and its checkpoint."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastuda.config.schema import RunConfig
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.engine import checkpoint
from fastuda.engine.curves import RunningMeans
from fastuda.errors import UserError
from fastuda.methods import Method
from fastuda.system.ddp import bare_state
from fastuda.system.distributed import World
from fastuda.system.random import rng_state, set_rng_state

log = logging.getLogger("fastuda")

LAST, BEST = "last.pt", "best.pt"


@dataclass
class RunState:
    """The step, the best score so far, and all objects whose state a resumed run needs."""

    config: RunConfig
    world: World
    method: Method
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    loader: TorchLoader
    means: RunningMeans
    asked_amp: str = "off"
    """``train.amp`` as the user set it. The configuration holds the precision that the run uses."""
    step: int = 0
    best: float = -math.inf
    owed: bool = False
    """Whether the step still has to be evaluated, because a signal came first."""
    curves: int | None = None
    """Size of metrics.csv in bytes when the checkpoint was written."""

    def save(self, folder: Path, name: str, curves: int | None) -> None:
        """Write the checkpoint ``name``. Every rank contributes its state; the first one writes."""
        ranks = self.world.gather({"rng": rng_state(), "means": self.means.state_dict()})
        if not self.world.first:
            return
        state = {
            "step": self.step,
            "best": self.best,
            "owed": self.owed,
            "curves": curves,
            "config": self.config.plain(),
            "asked_amp": self.asked_amp,
            "method": bare_state(self.method),
            "optimizers": {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "ranks": ranks,
        }
        keep = self.config.checkpoint.keep
        if name == LAST and keep:
            checkpoint.save(folder / f"step_{self.step:07d}.pt", state)
            for old in numbered(folder)[keep:]:
                old.unlink()
        checkpoint.save(folder / name, state)

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint, which was read from ``path``.

        Raises:
            UserError: another method, network or number of processes wrote the checkpoint.
        """
        try:
            method, ranks = state["config"]["method"]["name"], state["ranks"]
            if method != self.config.method["name"]:
                raise UserError(f"{path} is of method {method!r}, this run is {self.config.method['name']!r}")
            if len(ranks) != self.world.size:
                raise UserError(
                    f"{path} was written by {len(ranks)} processes and this run has {self.world.size};"
                    " resume with as many: samples and random numbers are distributed by rank"
                )
            self.method.load_state_dict(state["method"])
            for name, optimizer in self.optimizers.items():
                excluded = ("params", "lr")  # the trainer sets lr from initial_lr at every step
                current = [{k: v for k, v in g.items() if k not in excluded} for g in optimizer.param_groups]
                optimizer.load_state_dict(state["optimizers"][name])
                # the moments come from the checkpoint, learning rates and the like from the current settings
                for group, own in zip(optimizer.param_groups, current, strict=True):
                    group.update(own)
            self.scaler.load_state_dict(state["scaler"])
            self.loader.load_state_dict(state["loader"])
            self.step, self.best, self.curves = int(state["step"]), float(state["best"]), state["curves"]
            self.owed = state.get("owed", False)
            self.means.load_state_dict(ranks[self.world.rank]["means"])
            set_rng_state(ranks[self.world.rank]["rng"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit this configuration: {first}") from error
        log.info("resumed from %s at step %d", path, self.step)


def numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints of ``checkpoint.keep``, newest first."""
    paths = [path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name)]
    return sorted(paths, key=lambda path: int(path.stem.removeprefix("step_")), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest readable checkpoint of a run, or None if there is none.

    Raises:
        UserError: none of the existing ones can be read.
    """
    paths = [path for path in [folder / LAST, *numbered(folder)] if path.is_file()]
    problems = []
    for path in paths:
        try:
            checkpoint.load(path)
            return path
        except UserError as error:
            problems.append(str(error))
            log.warning("%s", error)
    if problems:
        best = folder / BEST
        way = (
            f"continue from the best with --resume {best}"
            if best.is_file()
            else f"start again without {folder}"
        )
        raise UserError(f"{problems[0]}; {way}")
    return None
