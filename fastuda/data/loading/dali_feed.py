"""Samples for DALI: encoded images and the parts to cut from them, drawn as by the torch loader."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from fastuda.data.domains.decode import BadFile, open_rgb, orientation
from fastuda.data.domains.domain import Domain
from fastuda.data.loading.drawing import Drawer
from fastuda.data.loading.sampling import SOURCE, TARGET
from fastuda.data.loading.transforms import Window

_ORIENTATION = re.compile(rb"eXIf|tiff:Orientation|Raw profile type")
"""Occurs in a PNG with an orientation, possibly after its pixels."""
_NO_LABEL = np.zeros((1, 1), np.uint8)


def has_end_marker(data: bytes) -> bool:
    """Whether a PNG or JPEG has its end marker, so it is not truncated."""
    tail = data[-64:].rstrip(b"\0\r\n ")
    return (
        b"IEND" in tail if data[:4] == b"\x89PNG" else data[:2] == b"\xff\xd8" and tail.endswith(b"\xff\xd9")
    )


class Feed:
    """Callable that DALI's workers run for every sample: encoded images, and the part to cut from each."""

    def __init__(self, drawer: Drawer, start: int, size: int, rank: int, world: int):
        self.drawer, self.start, self.size, self.rank, self.world = drawer, start, size, rank, world

    def __call__(self, info: Any) -> tuple[np.ndarray, ...]:
        """Arrays of sample ``info`` of the endless epoch.

        Per side: the encoded image, the six arrays of :meth:`_cut`, and in the source the label. The last
        array is JSON with the two files, the faults, and whether both sides are complete.
        """
        step, place = divmod(info.idx_in_epoch, self.size)
        k = ((self.start + step) * self.world + self.rank) * self.size + place
        bad: list[str] = []
        samples = [self._sample(side, k, bad) for side in (SOURCE, TARGET)]
        arrays: list[np.ndarray] = []
        for side, sample in enumerate(samples):
            data, window, label, _ = sample or _placeholder()
            arrays += [np.frombuffer(data, np.uint8), *self._cut(side, data, window)]
            if side == SOURCE:
                arrays.append(_NO_LABEL if label is None else label)
        source, target = (sample and sample[3] for sample in samples)
        notes = {"bad": bad, "complete": None not in samples, "source": source, "target": target}
        return (*arrays, np.frombuffer(json.dumps(notes).encode(), np.uint8))

    def _sample(
        self, side: int, k: int, bad: list[str]
    ) -> tuple[bytes, Window, np.ndarray | None, str] | None:
        """Encoded image, window, label in the window and file of sample ``k``; None if no file is readable.

        Unreadable files are added to ``bad``.
        """
        for candidate in self.drawer.candidates(side, k):
            domain, index, *_ = candidate
            try:
                data, height, width = encoded_image(domain, index)
                label = None
                if side == SOURCE:
                    label = domain.fit(index, domain.read_label(index), (height, width))
            except BadFile as error:
                bad.append(str(error))
                continue
            window, cut = self.drawer.window(candidate, (height, width), label)
            return data, window, cut, str(domain.items[index].image)
        return None

    def _cut(self, side: int, data: bytes, window: Window) -> list[np.ndarray]:
        """Part to decode (start, shape), part of it to show (start, end), its size in the crop, and the
        flip."""
        augment = self.drawer.augment[side]
        with Image.open(io.BytesIO(data)) as image:
            full = np.array([image.height, image.width])
        resized, first = np.array([window.height, window.width]), np.array([window.top, window.left])
        size = np.minimum(augment.crop, resized)
        scale = full / resized
        low, high = first * scale, np.minimum((first + size) * scale, full)
        radius = 2 if augment.resampling == "bicubic" else 1  # of the filter, in pixels
        margin = np.ceil(radius * np.maximum(scale, 1)) + 1
        start, end = np.maximum(np.floor(low) - margin, 0), np.minimum(np.ceil(high) + margin, full)
        return [
            start.astype(np.int64),
            (end - start).astype(np.int64),
            (low - start).astype(np.float32),
            (high - start).astype(np.float32),
            size.astype(np.float32),
            np.array(int(window.flip), np.int32),
        ]


def encoded_image(domain: Domain, index: int) -> tuple[bytes, int, int]:
    """Bytes of an image that DALI can decode, its height and its width.

    A complete 8-bit PNG or JPEG that is stored upright is returned as it is. Any other file is decoded here,
    to find the same faults as the torch loader, and encoded as PNG.

    Raises:
        BadFile: the file cannot be read.
    """
    path = domain.items[index].image
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            upright = orientation(image) == 1 and not (image.format == "PNG" and _ORIENTATION.search(data))
            if image.mode in ("RGB", "L") and upright and has_end_marker(data):
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
