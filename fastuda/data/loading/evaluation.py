"""Evaluation loader: every image once, with its label at full size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.domain import Domain
from fastuda.data.loading.torch_loader import next_item, start_worker
from fastuda.data.loading.transforms import resize_image
from fastuda.errors import UserError
from fastuda.models.normalization import Normalization


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
        image = resize_image(image, self.config.eval_size, self.config.resampling)
        pixels = self.normalization.apply(torch.from_numpy(image.copy()).permute(2, 0, 1))
        file = str(self.domain.items[index].image)
        return pixels[None], torch.from_numpy(label.astype(np.int64))[None], file


class EvalLoader:
    """Iterator of ``(image [1, 3, H, W], label [1, H', W'], file)`` over the images of one rank.

    Raises (while iterating):
        UserError: a file cannot be used. No file is skipped, because that would change the score.
    """

    def __init__(self, samples: _Evaluation, workers: int):
        self.samples, self.workers = samples, workers

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, str]]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            # torch warns when the loader is created and again when it starts
            frames = iter(
                DataLoader(
                    self.samples,
                    batch_size=None,
                    num_workers=self.workers,
                    worker_init_fn=start_worker,
                    # without it, each evaluation would draw from the global generator
                    generator=torch.Generator().manual_seed(0),
                )
            )
        for _ in range(len(self)):
            frame = next_item(frames)
            if isinstance(frame, str):
                raise UserError(
                    f"evaluation needs every file: {frame}; repair it (--resume auto continues a training)"
                )
            yield frame


def eval_loader(
    domain: Domain, config: DataConfig, normalization: Normalization, *, rank: int = 0, world: int = 1
) -> EvalLoader:
    """Evaluation loader of one rank, with every ``world``-th image."""
    indices = list(range(rank, len(domain), world))
    return EvalLoader(_Evaluation(domain, config, normalization, indices), config.workers)
