"""The torch loader: endless, seeded, sharded by rank, and resumable to the sample.

The file and augmentation of sample ``k`` are a pure function of (seed, k). The only state is therefore the
number of batches that were returned, no matter how many the workers have prefetched.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import BadFile, open_rgb
from fastuda.data.domains.domain import Domain
from fastuda.data.loading.batch import Batch
from fastuda.data.loading.drawing import Drawer
from fastuda.data.loading.pairs import read_pairs
from fastuda.data.loading.sampling import SOURCE, TARGET
from fastuda.data.loading.transforms import Augment, Window
from fastuda.data.loading.weak_labels import read_weak_labels
from fastuda.errors import UserError
from fastuda.models.normalization import Normalization

log = logging.getLogger("fastuda")


Sample = tuple[tuple[Any, ...] | None, list[str]]
"""Source image and label, target image, the two files, weak labels or None, matched image or None; or None if
no file is readable. Then the messages of unreadable files: as exceptions of a worker they would reach the
main process with a traceback."""


class _Samples(Dataset):
    """Item ``k`` holds source sample ``k`` and target sample ``k``."""

    def __init__(
        self,
        source: Domain | Sequence[Domain],
        target: Domain,
        config: DataConfig,
        normalization: Normalization,
        seed: int,
    ):
        self.drawer = Drawer(source, target, config, seed)
        self.normalization = normalization
        self.weak = read_weak_labels(config.weak_labels, target) if config.weak_labels else None
        self.pairs = read_pairs(config.pairs, target) if config.pairs else None

    def __getitem__(self, k: int) -> Sample:
        bad: list[str] = []
        source, target = self._sample(SOURCE, k, bad), self._sample(TARGET, k, bad)
        if source is None or target is None:
            return None, bad
        return (source[0], source[1], target[0], source[2], target[2], target[1], target[3]), bad

    def _sample(self, side: int, k: int, bad: list[str]) -> tuple[Tensor, Any, str, Tensor | None] | None:
        """Image, label (weak labels in the target), file and matched image of sample ``k``.

        An unreadable file is added to ``bad`` and replaced by the next one. None if no file is readable.
        """
        for candidate in self.drawer.candidates(side, k):
            domain, index, augment, *_ = candidate
            try:
                if side == SOURCE:
                    image, label = domain.read_pair(index)
                else:
                    image, label = domain.read_image(index), None
                match = None
                if side == TARGET and self.pairs is not None:
                    match = np.asarray(open_rgb(self.pairs[index]))
            except BadFile as error:
                bad.append(str(error))
                continue
            window, cut = self.drawer.window(candidate, (image.shape[0], image.shape[1]), label)
            pixels = self._pixels(augment, image, window)
            matched = None if match is None else self._pixels(augment, match, window)
            annotation: Any = None if cut is None else torch.from_numpy(cut.astype(np.int64))
            if side == TARGET and self.weak is not None:
                annotation = self.weak.crop(index, (image.shape[0], image.shape[1]), window, augment.crop)
            return pixels, annotation, str(domain.items[index].image), matched
        return None

    def _pixels(self, augment: Augment, image: np.ndarray, window: Window) -> Tensor:
        cut = torch.from_numpy(augment.image(image, window))
        return self.normalization.apply(cut.permute(2, 0, 1))


def _collate(samples: list[Sample]) -> tuple[Batch | None, list[str]]:
    bad = [message for _, messages in samples for message in messages]
    readable = [parts for parts, _ in samples if parts is not None]
    if len(readable) < len(samples):
        return None, bad
    images, labels, targets, source_files, target_files, weak, matches = zip(*readable, strict=True)
    tags, points = (None, None) if weak[0] is None else map(torch.stack, zip(*weak, strict=True))
    if points is not None and not points.shape[1]:
        points = None  # the file has only tags
    batch = Batch(
        torch.stack(images),
        torch.stack(labels),
        torch.stack(targets),
        tuple(source_files),
        tuple(target_files),
        tags,
        points,
        None if matches[0] is None else torch.stack(matches),
    )
    return batch, bad


T = TypeVar("T")


def _died(error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"a loader process died ({reason}); short of memory? Try fewer data.workers")


@contextlib.contextmanager
def workers_alive() -> Iterator[None]:
    """Report the death of a DataLoader worker, which torch raises anywhere in the main thread.

    Raises:
        UserError: a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _died(error) from error


def next_item(batches: Iterator[T]) -> T:
    """Next item of a DataLoader.

    Raises:
        UserError: a worker died.
    """
    try:
        with workers_alive():
            return next(batches)
    except (EOFError, ConnectionError) as error:
        raise _died(error) from error


def start_worker(worker: int) -> None:
    """Set up a worker process: one thread, and no signals of the terminal."""
    torch.set_num_threads(1)
    os.setpgrp()  # on Ctrl-C the trainer still needs its workers


class TorchLoader:
    """Endless iterator of :class:`Batch`; its state is the number of batches returned.

    Raises (while iterating):
        UserError: more than ``max_bad`` files, listed in the message, could not be read.
    """

    def __init__(
        self,
        source: Domain | Sequence[Domain],
        target: Domain,
        config: DataConfig,
        normalization: Normalization,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ):
        self.samples = _Samples(source, target, config, normalization, seed)
        self.config, self.rank, self.world, self.pin = config, rank, world, pin
        self.given = 0
        self.bad: dict[str, None] = {}
        self._batches: Iterator[tuple[Batch | None, list[str]]] | None = None

    def _indices(self) -> Iterator[list[int]]:
        size = self.config.batch_size
        for step in itertools.count(self.given):
            first = (step * self.world + self.rank) * size
            yield list(range(first, first + size))

    def _start(self) -> Iterator[tuple[Batch | None, list[str]]]:
        """Batches from ``given`` on (None if no file is readable), each with its unreadable files."""
        with warnings.catch_warnings():
            # the user sets the number of processes by data.workers
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            return iter(
                DataLoader(
                    self.samples,
                    batch_sampler=self._indices(),
                    num_workers=self.config.workers,
                    collate_fn=_collate,
                    pin_memory=self.pin,
                    worker_init_fn=start_worker,
                    # without it, creating the loader would draw from the global generator
                    generator=torch.Generator().manual_seed(0),
                )
            )

    def __iter__(self) -> TorchLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch, bad = next_item(self._batches)
        for message in bad:
            if message not in self.bad:
                self.bad[message] = None
                log.warning("skipped: %s", message)
        if batch is None or len(self.bad) > self.config.max_bad:
            self.close()
            raise UserError(
                f"{len(self.bad)} files could not be read (data.max_bad is {self.config.max_bad}); "
                "repair or remove them:\n  " + "\n  ".join(self.bad)
            )
        self.given += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Position in the endless sequence."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from that position."""
        self.given = state["given"]
        self._batches = None

    def close(self) -> None:
        """Stop the workers."""
        self._batches = None
