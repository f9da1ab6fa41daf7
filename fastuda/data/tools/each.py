"""Calls a function for every item of a domain, in several processes and with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from fastuda.data.domains.domain import Domain
from fastuda.errors import UserError
from fastuda.system.log import log_is_quiet

T = TypeVar("T")
_shared: tuple[Domain, Any] | None = None
"""Domain and settings, sent to a process once."""


def _start(domain: Domain, settings: Any) -> None:
    global _shared
    _shared = (domain, settings)


def _call(job: tuple[Callable[[Domain, int, Any], Any], int]) -> Any:
    assert _shared is not None
    function, index = job
    return function(_shared[0], index, _shared[1])


def each(
    function: Callable[[Domain, int, Any], T],
    domain: Domain,
    indices: Sequence[int],
    settings: Any = None,
    *,
    workers: int | None = None,
    title: str = "",
    quiet: bool = False,
) -> Iterator[tuple[int, T]]:
    """``(index, function(domain, index, settings))`` in order.

    Args:
        workers: number of processes; default one per core, 0 runs in this process.

    Raises:
        UserError: a process died.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    with tqdm(total=len(indices), desc=title, unit="file", disable=quiet or log_is_quiet()) as bar:
        if workers == 0 or len(indices) < 2:
            for index in indices:
                yield index, function(domain, index, settings)
                bar.update()
            return
        try:
            with ProcessPoolExecutor(workers, initializer=_start, initargs=(domain, settings)) as pool:
                results = pool.map(_call, ((function, index) for index in indices), chunksize=4)
                for index, result in zip(indices, results, strict=True):
                    yield index, result
                    bar.update()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process died while {title or 'reading'}; short of memory? Use --workers 0"
            ) from error
