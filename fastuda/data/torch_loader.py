"""The torch loader: endless, seeded, sharded by rank, and resumable to the sample.

Sample ``k`` of a domain is a pure function of (seed, k): which file, and how it is augmented. The only state
is therefore the number of batches that were handed out, however many more the workers have prefetched.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastuda.data.batch import Batch
from fastuda.data.config import DataConfig
from fastuda.data.domains import Domain
from fastuda.data.transforms import Augment, resize_image
from fastuda.errors import UserError
from fastuda.models.weights import Normalization

log = logging.getLogger("fastuda")

SOURCE, TARGET = 0, 1


@lru_cache(maxsize=8)
def _order(seed: int, side: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, side, epoch]).permutation(count)


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

    def __getitem__(self, k: int) -> tuple[Any, ...]:
        bad: list[str] = []
        image, label, source_file = self._sample(SOURCE, k, bad)
        target, _, target_file = self._sample(TARGET, k, bad)
        return image, label, target, source_file, target_file, bad

    def _sample(self, side: int, k: int, bad: list[str]) -> tuple[Tensor, Tensor | None, str]:
        domain = self.domains[side]
        count = len(domain)
        order = _order(self.seed, side, k // count, count)
        for step in range(min(count, self.max_bad + 1)):
            index = int(order[(k + step) % count])
            try:
                if side == SOURCE:
                    image, label = domain.read_pair(index)
                else:
                    image, label = domain.read_image(index), None
            except UserError as error:
                bad.append(str(error))
                continue
            rng = np.random.default_rng([self.seed, side, k])
            image, label = self.augment[side](image, label, rng)
            pixels = self.normalization.apply(torch.from_numpy(image.copy()).permute(2, 0, 1))
            classes = None if label is None else torch.from_numpy(label.astype(np.int64))
            return pixels, classes, str(domain.items[index][0])
        raise UserError("no readable file left to take its place:\n  " + "\n  ".join(bad))


def _collate(samples: list[tuple[Any, ...]]) -> tuple[Batch, list[str]]:
    images, labels, targets, source_files, target_files, bad = zip(*samples, strict=True)
    batch = Batch(
        torch.stack(images),
        torch.stack(labels),
        torch.stack(targets),
        tuple(source_files),
        tuple(target_files),
    )
    return batch, [message for messages in bad for message in messages]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


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
        self._batches: Iterator[tuple[Batch, list[str]]] | None = None

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
                    worker_init_fn=_one_thread,
                    # its own generator, so that making the loader never draws from the global stream
                    generator=torch.Generator().manual_seed(0),
                )
            )
        batch, bad = next(self._batches)
        for message in bad:
            if message not in self.bad:
                self.bad[message] = None
                log.warning("skipped: %s", message)
        if len(self.bad) > self.config.max_bad:
            raise UserError(
                f"{len(self.bad)} files could not be read (data.max_bad is {self.config.max_bad}):\n  "
                + "\n  ".join(self.bad)
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

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str]:
        index = self.indices[position]
        image, label = self.domain.read_image(index), self.domain.read_label(index)
        image = resize_image(image, self.config.eval_size)
        pixels = self.normalization.apply(torch.from_numpy(image.copy()).permute(2, 0, 1))
        return pixels[None], torch.from_numpy(label.astype(np.int64))[None], str(self.domain.items[index][0])


def eval_loader(
    domain: Domain, config: DataConfig, normalization: Normalization, *, rank: int = 0, world: int = 1
) -> DataLoader:
    """``(image [1, 3, H, W], label [1, H', W'], file)`` of every image once; the ranks share them out."""
    indices = list(range(rank, len(domain), world))
    samples = _Evaluation(domain, config, normalization, indices)
    return DataLoader(samples, batch_size=None, num_workers=config.workers, worker_init_fn=_one_thread)
