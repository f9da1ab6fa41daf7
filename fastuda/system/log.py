"""The log on standard error and in a file, and the progress bar."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastuda.errors import UserError

log = logging.getLogger("fastuda")


class _ThroughTqdm(logging.Handler):
    """Writes log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(quiet: bool) -> None:
    """Send the ``fastuda`` logger to standard error; only warnings if ``quiet``."""
    logger = logging.getLogger("fastuda")
    logger.handlers = [_ThroughTqdm()]
    logger.setLevel(logging.INFO)
    logger.handlers[0].setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


@contextmanager
def kept_lines() -> Iterator[list[logging.LogRecord]]:
    """Collect the block's log lines for a file that is opened later, so that a run that cannot start
    leaves no file."""
    kept = BufferingHandler(1 << 20)
    log.addHandler(kept)
    try:
        yield kept.buffer
    finally:
        log.removeHandler(kept)


class _LogFile(logging.FileHandler):
    """Raises errors of writing; logging itself prints a traceback and continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        raise OSError(error.errno, error.strerror, self.baseFilename) from None

    def close(self) -> None:
        # every line is flushed on its own; one that is still buffered has failed and was reported
        with contextlib.suppress(OSError):
            super().close()


@contextmanager
def log_file(path: Path, before: Iterable[logging.LogRecord] = ()) -> Iterator[None]:
    """Write log lines with their times to a file as well, and lock the file for this process.

    Args:
        path: the file; lines are appended.
        before: lines of :func:`kept_lines` to write first.

    Raises:
        UserError: another process has locked the file: it trains into the same folder.
        OSError: a line cannot be written; also raised inside the block.
    """
    handler = _LogFile(path, encoding="utf-8")
    assert handler.stream is not None
    try:
        # a record lock ends with its process; filelock's flock would live on in forked loader processes
        fcntl.lockf(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handler.close()
            raise UserError(
                f"another process is training into {path.parent} (it holds {path.name});"
                " stop it, or choose another --out"
            ) from error
        log.warning(
            "%s cannot be locked (%s): two runs into one folder would not be noticed", path, error.strerror
        )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        for record in before:
            handler.handle(record)
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def progress(total: int | None, start: int, title: str, quiet: bool, unit: str = "step") -> Any:
    """A progress bar with ETA on a terminal, an occasional line elsewhere. Bytes (``B``) get prefixes."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        disable=quiet,
        mininterval=0.2 if terminal else 15,
        dynamic_ncols=terminal,
        ascii=not terminal,
        file=sys.stderr,
    )


def log_is_quiet() -> bool:
    """Whether --quiet has silenced the log, and so the progress bars before the training."""
    levels = [handler.level for handler in log.handlers if handler.level]
    return min(levels, default=logging.INFO) > logging.INFO
