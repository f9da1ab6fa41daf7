"""Curves of a run: metrics.csv and TensorBoard."""

from __future__ import annotations

import csv
import logging
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastuda.system.distributed import World

log = logging.getLogger("fastuda")

HEADER = ("step", "name", "value")


class CsvLogger:
    """``metrics.csv``, one row per value: step, name, value.

    A checkpoint stores ``size()``. Resuming truncates the file to it, so that no row is repeated or lost.
    """

    def __init__(self, path: Path, size: int | None = None):
        present = path.stat().st_size if path.is_file() else 0
        if size is None or present == 0:
            self.file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115
            csv.writer(self.file).writerow(HEADER)
            return
        if present < size:
            log.warning("%s is shorter than when the checkpoint was written: rows are missing", path)
        os.truncate(path, min(size, present))
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        csv.writer(self.file).writerows((step, name, repr(value)) for name, value in values.items())
        self.file.flush()

    def size(self) -> int:
        """Bytes written so far, all of them on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.path.getsize(self.file.name)

    def close(self) -> None:
        self.file.close()


class TensorBoardLogger:
    """Scalars under ``tb/``."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.hook, threading.excepthook = threading.excepthook, self._thread_failed
        # the points of the resumed step were written before its checkpoint
        purge = None if resume_step is None else resume_step + 1
        try:
            self.writer = SummaryWriter(str(folder), purge_step=purge)
        except OSError:
            threading.excepthook = self.hook
            raise

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            self.writer.close()
        finally:
            threading.excepthook = self.hook

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Raises an error of TensorBoard's writing thread at the next call."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self.hook(failure)


class Loggers:
    """Several loggers as one."""

    def __init__(self, *loggers: CsvLogger | TensorBoardLogger):
        self.loggers = loggers

    def log(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def size(self) -> int | None:
        """Bytes of metrics.csv if this process writes it."""
        return next((logger.size() for logger in self.loggers if isinstance(logger, CsvLogger)), None)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class RunningMeans:
    """Means of logged values over the steps since the last :meth:`take`, and over all ranks."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a value of the current step."""
        value = torch.as_tensor(value, dtype=torch.float32)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self) -> dict[str, float]:
        """The means; the sums start again from zero. A step or rank without a value of a name counts as 0."""
        # all ranks must reduce the same values in the same order, or they wait for each other
        names = sorted(set().union(*self.world.gather(list(self.sums))))
        none = torch.zeros(())
        stacked = torch.stack([self.sums.get(name, none).to(self.world.device) for name in names])
        means = self.world.sum(stacked) / (self.world.size * self.steps)
        self.sums, self.steps = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": {name: value.cpu() for name, value in self.sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.sums = {
            name: value if name.startswith("perf/") else value.to(self.world.device)
            for name, value in state["sums"].items()
        }
