"""The DALI loader: the torch loader's batches, decoded and resampled by NVIDIA DALI.

What is drawn, and the labels, come from the same code as the torch loader's; DALI decodes the part of the
image that the crop shows and resamples it (with the GPU where there is one). Labels are read by Pillow in
DALI's worker processes, since DALI loses the ids of palette files. DALI itself is optional: ``pip install
nvidia-dali-cuda130``.

The GPU path (``mixed`` decoding; PNG is decoded on the CPU there too) shares all code but the device name. It
has not been run on a GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastuda.data.config import DataConfig
from fastuda.data.domains.decode import BadFile, open_rgb, orientation
from fastuda.data.domains.domain import Domain
from fastuda.data.loading.batch import Batch
from fastuda.data.loading.drawing import SOURCE, TARGET, Drawer
from fastuda.data.loading.torch_loader import TorchLoader
from fastuda.data.loading.transforms import Window
from fastuda.errors import UserError
from fastuda.models.normalization import Normalization

_LATE = re.compile(rb"eXIf|tiff:Orientation|Raw profile type")
"""What a PNG with an orientation has somewhere, after its pixels even."""
_NOTHING = np.zeros((1, 1), np.uint8)


def available() -> bool:
    """Whether DALI can be imported."""
    return (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    )


def _ends_whole(data: bytes) -> bool:
    """Whether a PNG or JPEG has its end marker, so that it was not cut off."""
    tail = data[-64:].rstrip(b"\0\r\n ")
    return (
        b"IEND" in tail if data[:4] == b"\x89PNG" else data[:2] == b"\xff\xd8" and tail.endswith(b"\xff\xd9")
    )


class Feed:
    """The call that DALI's workers make for every sample: encoded images, and what to cut from them."""

    def __init__(self, drawer: Drawer, start: int, size: int, rank: int, world: int):
        self.drawer, self.start, self.size, self.rank, self.world = drawer, start, size, rank, world

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]:
        """Sample ``info`` of the pipeline's endless epoch."""
        step, place = divmod(info.idx_in_epoch, self.size)
        k = ((self.start + step) * self.world + self.rank) * self.size + place
        bad: list[str] = []
        source, target = self._sample(SOURCE, k, bad), self._sample(TARGET, k, bad)
        said = {"bad": bad, "whole": source is not None and target is not None}
        parts = []
        for side, found in ((SOURCE, source), (TARGET, target)):
            data, window, label, file = found or _placeholder()
            said["source" if side == SOURCE else "target"] = file
            parts += [np.frombuffer(data, np.uint8), *self._cut(side, data, window)]
            if side == SOURCE:
                parts.append(_NOTHING if label is None else label)
        return (*parts, np.frombuffer(json.dumps(said).encode(), np.uint8))

    def _sample(
        self, side: int, k: int, bad: list[str]
    ) -> tuple[bytes, Window, np.ndarray | None, str] | None:
        domain = self.drawer.domains[side]
        for index, wanted, rng in self.drawer.candidates(side, k):
            path = domain.items[index].image
            try:
                data, height, width = _encoded(domain, index)
                label = None
                if side == SOURCE:
                    label = domain.fit(index, domain.read_label(index), (height, width))
            except BadFile as error:
                bad.append(str(error))
                continue
            window, cut = self.drawer.window(side, (height, width), label, wanted, rng)
            return data, window, cut, str(path)
        return None

    def _cut(self, side: int, data: bytes, window: Window) -> list[np.ndarray]:
        """Part to decode (start, shape), part of that to show (start, end), its size in the crop, and the
        flip."""
        crop = self.drawer.augment[side].crop
        reach = 2 if self.drawer.augment[side].resampling == "bicubic" else 1  # of the filter, in pixels
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        starts, shapes, shown, ends, sizes = [], [], [], [], []
        for full, scaled, first, wide in (
            (height, window.height, window.top, crop[0]),
            (width, window.width, window.left, crop[1]),
        ):
            out = min(wide, scaled)
            scale = full / scaled
            low, high = first * scale, min((first + out) * scale, full)
            margin = math.ceil(reach * max(scale, 1.0)) + 1
            start, end = max(0, math.floor(low) - margin), min(full, math.ceil(high) + margin)
            starts.append(start)
            shapes.append(end - start)
            shown.append(low - start)
            ends.append(high - start)
            sizes.append(out)
        return [
            np.array(starts, np.int64),
            np.array(shapes, np.int64),
            np.array(shown, np.float32),
            np.array(ends, np.float32),
            np.array(sizes, np.float32),
            np.array(int(window.flip), np.int32),
        ]


def _encoded(domain: Domain, index: int) -> tuple[bytes, int, int]:
    """The bytes of an image that DALI can decode whole, its height and width.

    Raises:
        BadFile: as the torch loader, which decodes the whole file; what is no complete 8-bit PNG or JPEG, or
            is to be turned upright, is decoded here.
    """
    path = domain.items[index].image
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            upright = orientation(image) == 1 and not (image.format == "PNG" and _LATE.search(data))
            if image.mode in ("RGB", "L") and upright and _ends_whole(data):
                return data, image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    decoded = open_rgb(path)
    out = io.BytesIO()
    decoded.save(out, "PNG", compress_level=1)
    return out.getvalue(), decoded.height, decoded.width


def _placeholder() -> tuple[bytes, Window, None, str]:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue(), Window(8, 8, 0, 0, False), None, ""


class DaliLoader(TorchLoader):
    """Endless iterator of :class:`~fastuda.data.loading.batch.Batch`, resumable like the torch loader and
    from its checkpoints.

    Raises:
        UserError: DALI is not installed.
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
            told = [json.loads(bytes(np.asarray(notes.at(i)))) for i in range(len(notes))]
            bad = [message for said in told for message in said["bad"]]
            if not all(said["whole"] for said in told):
                yield None, bad
                continue
            yield (
                Batch(
                    self._tensor(images),
                    torch.from_numpy(labels.as_array().astype(np.int64)),
                    self._tensor(targets),
                    tuple(said["source"] for said in told),
                    tuple(said["target"] for said in told),
                ),
                bad,
            )

    def _tensor(self, images: Any) -> Tensor:
        """float32 [B, 3, H, W] of DALI's batch, in memory of its own."""
        if hasattr(images, "as_array"):
            return torch.from_numpy(images.as_array().copy())
        plugin = importlib.import_module("nvidia.dali.plugin.pytorch")
        whole = images.as_tensor()
        out = torch.empty(whole.shape(), dtype=torch.float32, device="cuda")
        plugin.feed_ndarray(whole, out, cuda_stream=torch.cuda.current_stream())
        return out

    def _build(self) -> Any:
        dali, fn, types = (importlib.import_module(f"nvidia.dali{part}") for part in ("", ".fn", ".types"))
        config = self.config
        feed = Feed(self.samples.drawer, self.given, config.batch_size, self.rank, self.world)
        gpu = torch.cuda.is_available()
        norm = self.normalization
        level = 255.0 / norm.scale
        workers = config.workers

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
            parts = fn.external_source(
                source=feed,
                num_outputs=16,
                batch=False,
                parallel=workers > 0,
                prefetch_queue_depth=2 if workers > 0 else None,
                dtype=[*_SIDE, types.UINT8, *_SIDE, types.UINT8],
            )
            images = [
                self._decode(fn, types, parts[8 * side : 8 * side + 7], gpu, level, norm, side)
                for side in (0, 1)
            ]
            return images[0], parts[7], images[1], parts[15]

        _SIDE = [types.UINT8, types.INT64, types.INT64, types.FLOAT, types.FLOAT, types.FLOAT, types.INT32]
        built = pipeline()
        if workers > 0:
            built.start_py_workers()
        built.build()
        return built

    def _decode(
        self, fn: Any, types: Any, parts: Any, gpu: bool, level: float, norm: Normalization, side: int
    ) -> Any:
        """DALI's part of one side: decode a window, resample, flip, pad, normalise."""
        data, start, shape, low, high, size, flip = parts
        image = fn.decoders.image_slice(
            data,
            start,
            shape,
            axes=(0, 1),
            device="mixed" if gpu else "cpu",
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
        bgr = norm.channel_order == "bgr"
        if bgr:
            image = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.BGR)
        return fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[mean * level for mean in norm.mean],
            std=[std * level for std in norm.std],
        )

    def close(self) -> None:
        """End the pipeline and its workers."""
        super().close()
        self._pipeline = None
