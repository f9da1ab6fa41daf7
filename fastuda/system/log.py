"""Lines of the log: on standard error, kept, in a file; and the progress bar."""

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


def log_is_quiet() -> bool:
    """Whether --quiet has silenced the log, and so the bars of what a run reads before it trains."""
    levels = [handler.level for handler in log.handlers if handler.level]
    return min(levels, default=logging.INFO) > logging.INFO
