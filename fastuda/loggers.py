"""Curves and lines: metrics.csv, TensorBoard, the log file and the progress bar."""

from __future__ import annotations

import csv
import io
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastuda.checkpoint import write_atomic

HEADER = ("step", "name", "value")


class CsvLogger:
    """``metrics.csv``, one row per value: step, name, value. Resuming drops the rows after the checkpoint."""

    def __init__(self, path: Path, resume_step: int | None = None):
        if resume_step is not None and path.is_file():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
            kept = io.StringIO()
            csv.writer(kept).writerows([HEADER, *(row for row in rows if int(row[0]) <= resume_step)])
            write_atomic(path, lambda draft: draft.write_text(kept.getvalue(), newline=""))
            self.file = open(path, "a", newline="")  # noqa: SIM115
        else:
            self.file = open(path, "w", newline="")  # noqa: SIM115
            csv.writer(self.file).writerow(HEADER)

    def log(self, step: int, values: dict[str, float]) -> None:
        csv.writer(self.file).writerows((step, name, repr(value)) for name, value in values.items())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoardLogger:
    """Scalars under ``tb/``."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=resume_step)

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

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


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


def add_log_file(path: Path) -> logging.Handler:
    """The same lines, with their times, to a file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("fastuda").addHandler(handler)
    return handler


def progress(total: int, start: int, title: str, quiet: bool) -> Any:
    """A bar with ETA on a terminal; elsewhere a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        unit="step",
        disable=quiet,
        mininterval=0.2 if terminal else 15,
        dynamic_ncols=terminal,
        ascii=not terminal,
        file=sys.stderr,
    )
