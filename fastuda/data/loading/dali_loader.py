"""The DALI loader: the batches of the torch loader, decoded and resampled by NVIDIA DALI.

Draws and labels come from the same code as in the torch loader. DALI decodes the part of the image that the
crop shows and resamples it, on the GPU if there is one. Pillow reads the labels in DALI's worker processes,
because DALI loses the ids of palette files. DALI is optional: ``pip install nvidia-dali-cuda130``.

The GPU path (``mixed`` decoding, in which PNG is still decoded on the CPU) differs only in the device name.
It has not been run on a GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.loading.batch import Batch
from fastuda.data.loading.dali_feed import Feed
from fastuda.data.loading.sampling import SOURCE, TARGET
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.errors import UserError
from fastuda.models.normalization import Normalization


def available() -> bool:
    """Whether DALI can be imported."""
    return (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    )


class DaliLoader(TorchLoader):
    """Endless iterator of :class:`~fastuda.data.loading.batch.Batch`.

    It resumes from checkpoints of either loader.

    Raises:
        UserError: DALI is not installed.
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
        if not available():
            raise UserError(
                "data.loader=dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or -cuda120)"
            )
        super().__init__(source, target, config, normalization, seed=seed, rank=rank, world=world, pin=pin)
        self.normalization = normalization
        self._pipeline: Any = None

    def _start(self) -> Iterator[tuple[Batch | None, list[str]]]:
        self._pipeline = self._build()
        while True:
            try:
                outputs = self._pipeline.run()
            except RuntimeError as error:
                raise UserError(
                    f"DALI could not decode a batch: {str(error).strip().splitlines()[0]}"
                ) from error
            images, labels, targets, notes = outputs
            samples = [json.loads(bytes(np.asarray(notes.at(i)))) for i in range(len(notes))]
            bad = [message for sample in samples for message in sample["bad"]]
            if not all(sample["complete"] for sample in samples):
                yield None, bad
                continue
            yield (
                Batch(
                    self._tensor(images),
                    torch.from_numpy(labels.as_array().astype(np.int64)),
                    self._tensor(targets),
                    tuple(sample["source"] for sample in samples),
                    tuple(sample["target"] for sample in samples),
                ),
                bad,
            )

    def _tensor(self, images: Any) -> Tensor:
        """Copy of DALI's batch as float32 [B, 3, H, W]."""
        if hasattr(images, "as_array"):
            return torch.from_numpy(images.as_array().copy())
        plugin = importlib.import_module("nvidia.dali.plugin.pytorch")
        batch = images.as_tensor()
        out = torch.empty(batch.shape(), dtype=torch.float32, device="cuda")
        plugin.feed_ndarray(batch, out, cuda_stream=torch.cuda.current_stream())
        return out

    def _build(self) -> Any:
        dali, fn, types = (importlib.import_module(f"nvidia.dali{part}") for part in ("", ".fn", ".types"))
        config = self.config
        feed = Feed(self.samples.drawer, self.given, config.batch_size, self.rank, self.world)
        gpu = torch.cuda.is_available()
        workers = config.workers
        side_types = [types.UINT8, *[types.INT64] * 2, *[types.FLOAT] * 3, types.INT32]

        @dali.pipeline_def(
            batch_size=config.batch_size,
            num_threads=max(1, workers),
            device_id=torch.cuda.current_device() if gpu else None,
            py_num_workers=max(1, workers),
            py_start_method="spawn" if gpu and torch.cuda.is_initialized() else "fork",
            prefetch_queue_depth=2,
            seed=0,
        )
        def pipeline() -> Any:
            arrays = fn.external_source(
                source=feed,
                num_outputs=16,
                batch=False,
                parallel=workers > 0,
                prefetch_queue_depth=2 if workers > 0 else None,
                dtype=[*side_types, types.UINT8, *side_types, types.UINT8],
            )
            source, target = (
                self._decode(fn, types, arrays[8 * side : 8 * side + 7], side) for side in (SOURCE, TARGET)
            )
            return source, arrays[7], target, arrays[15]

        built = pipeline()
        if workers > 0:
            built.start_py_workers()
        built.build()
        return built

    def _decode(self, fn: Any, types: Any, arrays: Any, side: int) -> Any:
        """Decode a window of one side, resample, flip, pad and normalise it."""
        data, start, shape, low, high, size, flip = arrays
        image = fn.decoders.image_slice(
            data,
            start,
            shape,
            axes=(0, 1),
            device="mixed" if torch.cuda.is_available() else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        cubic = self.config.resampling == "bicubic"
        image = fn.resize(
            image,
            size=size,
            roi_start=low,
            roi_end=high,
            interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
            antialias=True,
        )
        image = fn.flip(image, horizontal=flip)
        image = fn.slice(
            image,
            start=(0, 0),
            shape=(side and self.config.target_crop) or self.config.crop,
            axes=(0, 1),
            out_of_bounds_policy="pad",
            fill_values=[0],
        )
        norm = self.normalization
        level = 255.0 / norm.scale
        if norm.channel_order == "bgr":
            image = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.BGR)
        return fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[mean * level for mean in norm.mean],
            std=[std * level for std in norm.std],
        )

    def close(self) -> None:
        """Stop the pipeline and its workers."""
        super().close()
        self._pipeline = None
