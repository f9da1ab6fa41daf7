"""Curves and lines: metrics.csv, TensorBoard, the log file and the progress bar."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import logging
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastuda.errors import UserError
from fastuda.system.distributed import World

log = logging.getLogger("fastuda")

HEADER = ("step", "name", "value")


class CsvLogger:
    """``metrics.csv``, one row per value: step, name, value.

    ``size()`` goes into a checkpoint; resuming cuts the file back to it, so that no row comes twice or is
    missing.
    """

    def __init__(self, path: Path, size: int | None = None):
        found = path.stat().st_size if path.is_file() else 0
        if size is None or found == 0:
            self.file = open(path, "w", newline="")  # noqa: SIM115
            csv.writer(self.file).writerow(HEADER)
            return
        if found < size:
            log.warning("%s is shorter than when the checkpoint was written: rows are missing", path)
        os.truncate(path, min(size, found))
        self.file = open(path, "a", newline="")  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        csv.writer(self.file).writerows((step, name, repr(value)) for name, value in values.items())
        self.file.flush()

    def size(self) -> int:
        """Bytes so far, all of them on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.path.getsize(self.file.name)

    def close(self) -> None:
        self.file.close()


class TensorBoardLogger:
    """Scalars under ``tb/``."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        # the resumed step's own points were written before its checkpoint
        purge = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Loggers:
    """All of them as one."""

    def __init__(self, *loggers: CsvLogger | TensorBoardLogger):
        self.loggers = loggers

    def log(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def size(self) -> int | None:
        """Bytes of metrics.csv, where this process writes it."""
        return next((logger.size() for logger in self.loggers if isinstance(logger, CsvLogger)), None)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class RunningMeans:
    """Means of logged values over the steps since they were last taken, and over all ranks."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, name: str, value: Tensor | float) -> None:
        """Count a value of the current step."""
        value = torch.as_tensor(value, dtype=torch.float32)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self) -> dict[str, float]:
        """The means; counting begins anew. A step, and a rank, without a value of a name counts as 0."""
        # a rank that sums other numbers than the others never meets them
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


def peak_memory(device: torch.device) -> float:
    """MiB: the most that was allocated on a CUDA device, or that this process held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class _ThroughTqdm(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(quiet: bool) -> None:
    """Lines of the ``fastuda`` logger to standard error: warnings only when quiet."""
    logger = logging.getLogger("fastuda")
    logger.handlers = [_ThroughTqdm()]
    logger.setLevel(logging.INFO)
    logger.handlers[0].setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


@contextmanager
def kept_lines() -> Iterator[list[logging.LogRecord]]:
    """The lines of the block: for a file that is opened after it, so that a run that cannot begin leaves
    none."""
    kept = BufferingHandler(1 << 20)
    log.addHandler(kept)
    try:
        yield kept.buffer
    finally:
        log.removeHandler(kept)


class _LogFile(logging.FileHandler):
    """Where a line cannot be written, that is raised; logging itself prints a traceback and goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        raise OSError(error.errno, error.strerror, self.baseFilename) from None

    def close(self) -> None:
        # every line is flushed by itself: one that is still held was refused, and that was said
        with contextlib.suppress(OSError):
            super().close()


@contextmanager
def log_file(path: Path, before: Iterable[logging.LogRecord] = ()) -> Iterator[None]:
    """The same lines, with their times, to a file as well, which no other process may do meanwhile.

    Args:
        path: the file; lines are added to its end.
        before: lines that come first, of :func:`kept_lines`.

    Raises:
        UserError: another process holds the file: it is training into the same folder.
        OSError: a line cannot be written, in the block as well.
    """
    handler = _LogFile(path)
    assert handler.stream is not None
    try:
        # a record lock ends with its process, however that ends, and loader processes do not inherit it
        fcntl.lockf(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handler.close()
            raise UserError(
                f"another process is training into {path.parent} (it holds {path.name});"
                " stop it, or choose another --out"
            ) from error
        log.warning("%s cannot be locked (%s): nothing keeps two runs apart", path, error.strerror)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        for record in before:
            handler.handle(record)
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def progress(total: int, start: int, title: str, quiet: bool, unit: str = "step") -> Any:
    """A bar with ETA on a terminal; elsewhere a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        unit=unit,
        disable=quiet,
        mininterval=0.2 if terminal else 15,
        dynamic_ncols=terminal,
        ascii=not terminal,
        file=sys.stderr,
    )
