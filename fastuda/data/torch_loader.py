"""The torch loader: endless, seeded, sharded by rank, and resumable to the sample.

Sample ``k`` of a domain is a pure function of (seed, k): which file, and how it is augmented. The only state
is therefore the number of batches that were handed out, however many more the workers have prefetched.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastuda.data.batch import Batch
from fastuda.data.config import DataConfig
from fastuda.data.decode import BadFile
from fastuda.data.domains import Domain
from fastuda.data.index import build_index
from fastuda.data.sampling import SAMPLINGS, ClassSampler, order
from fastuda.data.transforms import Augment, resize_image
from fastuda.errors import UserError, nearest
from fastuda.models.weights import Normalization

log = logging.getLogger("fastuda")

SOURCE, TARGET = 0, 1

Sample = tuple[tuple[Any, ...] | None, list[str]]
"""Source image and label, target image and the two files (None where no readable file is left); the bad files
met.
Faults travel as values: an exception in a worker would arrive with its traceback for a message."""


class _Samples(Dataset):
    """Item ``k``: the source sample ``k`` beside the target sample ``k``."""

    def __init__(
        self, source: Domain, target: Domain, config: DataConfig, normalization: Normalization, seed: int
    ):
        self.domains = (source, target)
        self.normalization = normalization
        self.seed = seed
        self.max_bad = config.max_bad
        self.augment = (
            Augment(config.crop, config.source_resize, config.source_size, config.flip),
            Augment(config.crop, config.target_resize, config.target_size, config.flip),
        )
        self.sampler = source_sampler(source, config)
        self.rare_pixels = config.rare_share * config.crop[0] * config.crop[1] / 2

    def __getitem__(self, k: int) -> Sample:
        bad: list[str] = []
        source, target = self._sample(SOURCE, k, bad), self._sample(TARGET, k, bad)
        if source is None or target is None:
            return None, bad
        return (source[0], source[1], target[0], source[2], target[2]), bad

    def _sample(self, side: int, k: int, bad: list[str]) -> tuple[Tensor, Tensor | None, str] | None:
        """Image, label and file; a bad file is noted and the next in order takes its place; None: none is
        left."""
        domain = self.domains[side]
        count = len(domain)
        in_turn = order(self.seed, side, k // count, count)
        rng = np.random.default_rng([self.seed, side, k])
        wanted = None
        for step in range(min(count, self.max_bad + 1)):
            index = int(in_turn[(k + step) % count])
            if side == SOURCE and self.sampler is not None:
                wanted, index = self.sampler.draw(rng)
            try:
                if side == SOURCE:
                    image, label = domain.read_pair(index)
                else:
                    image, label = domain.read_image(index), None
            except BadFile as error:
                bad.append(str(error))
                continue
            image, label = self._augment(side, image, label, wanted, rng)
            pixels = self.normalization.apply(
                torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)
            )
            classes = None if label is None else torch.from_numpy(label.astype(np.int64))
            return pixels, classes, str(domain.items[index][0])
        return None

    def _augment(
        self,
        side: int,
        image: np.ndarray,
        label: np.ndarray | None,
        wanted: int | None,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A random window; where a class is wanted, the first of ten that shows enough of it (DAFormer),
        or the last."""
        augment = self.augment[side]
        window = augment.draw(image.shape[0], image.shape[1], rng)
        if label is None:
            return augment.image(image, window), None
        cut = augment.label(label, window)
        for _ in range(9 if wanted is not None else 0):
            if np.count_nonzero(cut == wanted) > self.rare_pixels:
                break
            window = augment.draw(image.shape[0], image.shape[1], rng)
            cut = augment.label(label, window)
        return augment.image(image, window), cut


def source_sampler(source: Domain, config: DataConfig) -> ClassSampler | None:
    """The sampler that ``config.sampling`` names; None for uniform.

    Raises:
        UserError: no such sampling, or too many labels that cannot be read.
    """
    if config.sampling == "uniform":
        return None
    if config.sampling not in SAMPLINGS:
        raise UserError(f"data.sampling={config.sampling}{nearest(config.sampling, SAMPLINGS)}")
    index = build_index(source, workers=config.workers)
    if len(index.bad) > config.max_bad:
        raise UserError(
            f"{len(index.bad)} labels could not be read (data.max_bad is {config.max_bad}):\n  "
            + "\n  ".join(index.bad)
        )
    return ClassSampler.build(index, config.sampling, config.rare_temperature, config.rare_share)


def _collate(samples: list[Sample]) -> tuple[Batch | None, list[str]]:
    bad = [message for _, messages in samples for message in messages]
    found = [parts for parts, _ in samples if parts is not None]
    if len(found) < len(samples):
        return None, bad
    images, labels, targets, source_files, target_files = zip(*found, strict=True)
    batch = Batch(
        torch.stack(images),
        torch.stack(labels),
        torch.stack(targets),
        tuple(source_files),
        tuple(target_files),
    )
    return batch, bad


T = TypeVar("T")


def _next(batches: Iterator[T]) -> T:
    """The next of a DataLoader's items.

    Raises:
        UserError: a worker died.
    """
    try:
        return next(batches)
    except (RuntimeError, EOFError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"a loader process died ({said}); short of memory? Try fewer data.workers") from error


def _worker(worker: int) -> None:
    torch.set_num_threads(1)
    os.setpgrp()  # Ctrl-C and signals to the group are the trainer's to answer: it still needs its workers


class TorchLoader:
    """Endless iterator of :class:`Batch`; :meth:`state_dict` is the number of batches handed out.

    Raises (while iterating):
        UserError: more than ``max_bad`` files could not be read; the message lists them.
    """

    def __init__(
        self,
        source: Domain,
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

    def __iter__(self) -> TorchLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            workers = self.config.workers
            self._batches = iter(
                DataLoader(
                    self.samples,
                    batch_sampler=self._indices(),
                    num_workers=workers,
                    collate_fn=_collate,
                    pin_memory=self.pin,
                    worker_init_fn=_worker,
                    # its own generator, so that making the loader never draws from the global stream
                    generator=torch.Generator().manual_seed(0),
                )
            )
        batch, bad = _next(self._batches)
        for message in bad:
            if message not in self.bad:
                self.bad[message] = None
                log.warning("skipped: %s", message)
        if batch is None or len(self.bad) > self.config.max_bad:
            self.close()
            raise UserError(
                f"{len(self.bad)} files could not be read (data.max_bad is {self.config.max_bad}); "
                "mend or remove them:\n  " + "\n  ".join(self.bad)
            )
        self.given += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Position in the endless sequence."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from that position."""
        self.given = state["given"]
        self._batches = None

    def close(self) -> None:
        """End the workers."""
        self._batches = None


def build_loader(
    source: Domain,
    target: Domain,
    config: DataConfig,
    normalization: Normalization,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> TorchLoader:
    """The training loader that ``config.loader`` names.

    Raises:
        UserError: the loader is unknown, or the domains' classes differ.
    """
    if config.loader not in ("auto", "torch"):
        raise UserError(f"unknown loader {config.loader!r}: choose auto or torch")
    if source.classes.names != target.classes.names:
        raise UserError(
            f"{source.name} and {target.name} have different classes:"
            f" {', '.join(source.classes.names)} against {', '.join(target.classes.names)}"
        )
    return TorchLoader(source, target, config, normalization, seed=seed, rank=rank, world=world, pin=pin)


class _Evaluation(Dataset):
    def __init__(self, domain: Domain, config: DataConfig, normalization: Normalization, indices: list[int]):
        self.domain, self.config, self.normalization, self.indices = domain, config, normalization, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str] | str:
        index = self.indices[position]
        try:
            image, label = self.domain.read_pair(index)
        except BadFile as error:
            return str(error)
        image = resize_image(image, self.config.eval_size)
        pixels = self.normalization.apply(torch.from_numpy(image.copy()).permute(2, 0, 1))
        return pixels[None], torch.from_numpy(label.astype(np.int64))[None], str(self.domain.items[index][0])


class EvalLoader:
    """``(image [1, 3, H, W], label [1, H', W'], file)`` of every image of one rank once.

    Raises (while iterating):
        UserError: a file cannot be used. None is skipped: a score over a part of the split would be another
            score.
    """

    def __init__(self, samples: _Evaluation, workers: int):
        self.samples, self.workers = samples, workers

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, str]]:
        loader = DataLoader(self.samples, batch_size=None, num_workers=self.workers, worker_init_fn=_worker)
        frames = iter(loader)
        for _ in range(len(self)):
            frame = _next(frames)
            if isinstance(frame, str):
                raise UserError(f"evaluation needs every file: {frame}")
            yield frame


def eval_loader(
    domain: Domain, config: DataConfig, normalization: Normalization, *, rank: int = 0, world: int = 1
) -> EvalLoader:
    """The evaluation images of one rank; the ranks share them out."""
    indices = list(range(rank, len(domain), world))
    return EvalLoader(_Evaluation(domain, config, normalization, indices), config.workers)
