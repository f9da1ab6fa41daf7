"""Predicts images that are too large to decode at once, window by window.

rasterio (the extra ``large``) reads the windows; of tiled TIFF files it reads only the tiles that it
needs. Memory holds one row of windows; labels, overlay and probabilities are built in files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastuda.data.domains.decode import BadFile, orientation
from fastuda.errors import cannot_write
from fastuda.inference.pictures import overlay, save_array
from fastuda.inference.predictor import Predictor
from fastuda.inference.windows import probabilities, starts
from fastuda.system.files import written


def most_pixels() -> float:
    """Number of pixels above which Pillow rejects an image."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf


class LargeImage:
    """An image file that is read by windows.

    Raises:
        BadFile: rasterio is missing, or the file cannot be read, is turned by its EXIF orientation, or is not
            8-bit RGB or grey.
    """

    def __init__(self, path: Path):
        try:
            import rasterio
            from rasterio.errors import NotGeoreferencedWarning, RasterioError
        except ImportError as error:
            raise BadFile(
                path,
                f"has over {most_pixels() / 1e6:.0f} million pixels, and reading it by windows needs"
                " rasterio: pip install 'fastuda[large]'",
            ) from error
        self.path = path
        self._window: Callable[..., Any] = rasterio.windows.Window
        self._failure: type[Exception] = RasterioError
        if _is_turned(path):
            raise BadFile(path, "is turned by its EXIF orientation; save it upright to read it by windows")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                self._file: Any = rasterio.open(path)
        except RasterioError as error:
            raise BadFile(path, f"cannot be read ({error})") from error
        self.size = (int(self._file.height), int(self._file.width))
        self._table: np.ndarray | None = None
        kinds = [kind.name for kind in self._file.colorinterp[:3]]
        if kinds == ["palette"]:
            colors = self._file.colormap(1)
            self._table = np.array([colors.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8)
        fits = kinds[0] in ("palette", "gray", "red", "undefined") and self._file.count <= 4
        if not fits or set(self._file.dtypes) != {"uint8"}:
            held = f"{self._file.count} channels of {self._file.dtypes[0]}"
            self._file.close()
            raise BadFile(path, f"has {held}, not 8-bit RGB")

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The window ``uint8 [height, width, 3]``.

        Raises:
            BadFile: it cannot be decoded.
        """
        bands = [1, 2, 3] if self._file.count >= 3 else [1, 1, 1]
        try:
            pixels = self._file.read(bands, window=self._window(left, top, width, height))
        except self._failure as error:
            raise BadFile(self.path, f"cannot be read ({error})") from error
        return pixels.transpose(1, 2, 0) if self._table is None else self._table[pixels[0]]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_turned(path: Path) -> bool:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:  # reads only the header
            return orientation(image) != 1
    except (OSError, SyntaxError, ValueError):
        return False
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def predict_large(
    predictor: Predictor,
    image: LargeImage,
    out: Path,
    place: Callable[[str, str], Path],
    save: set[str],
    tell: Callable[[int, int], None],
) -> None:
    """Label an image window by window and write what ``save`` names.

    Probabilities are averaged where windows overlap, as by :class:`~fastuda.inference.windows.Inference`.
    Scales and mirroring apply to each window. ``overlay`` is an RGBA picture.

    Args:
        out: the folder of all files; temporary files are created there.
        place: returns the path for a kind and a suffix.
        tell: called with the number of finished windows and their total.

    Raises:
        BadFile: a window cannot be read.
        UserError: a file cannot be written.
    """
    height, width = image.size
    classes = predictor.classes
    with contextlib.ExitStack() as files:
        labels = files.enter_context(_file_array(out, np.uint8, (height, width)))
        shown = scores = None
        if "overlay" in save:
            shown = files.enter_context(_file_array(out, np.uint8, (height, width, 4)))
        if "probabilities" in save:
            shape = (len(classes), height, width)
            scores = files.enter_context(_file_array(out, np.float16, shape))
        for rows, p in _rows(predictor, image, tell):
            predicted = p.argmax(0).to(torch.uint8).cpu().numpy()
            labels[rows] = predicted
            if scores is not None:
                scores[:, rows] = p.half().cpu().numpy()
            if shown is not None:
                pixels = image.read(rows.start, 0, rows.stop - rows.start, width)
                shown[rows, :, :3] = overlay(pixels, predicted, classes)
                shown[rows, :, 3] = 255
        if "color" in save:
            picture = Image.fromarray(labels)
            picture.putpalette(classes.flat_palette())
            _save(picture, place("color", "png"))
        if shown is not None:
            _save(Image.fromarray(shown), place("overlay", "png"))
        if scores is not None:
            with written(place("probabilities", "npy"), fsync=True) as draft:
                save_array(draft, scores)
        if "labels" in save:
            if predictor.ids is not None:
                table = np.array(predictor.ids, np.uint8)
                for top in range(0, height, 1024):
                    labels[top : top + 1024] = table[labels[top : top + 1024]]
            _save(Image.fromarray(labels), place("labels", "png"))


def _rows(
    predictor: Predictor, image: LargeImage, tell: Callable[[int, int], None]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the image from top to bottom, with their probabilities ``[K, rows, W]``."""
    how, model = predictor.inference, predictor.method.model
    assert how.window is not None
    height, width = min(how.window[0], image.size[0]), min(how.window[1], image.size[1])
    tops, lefts = (starts(*edges, how.overlap) for edges in zip(image.size, (height, width), strict=True))
    single = dataclasses.replace(how, window=None)
    total = torch.zeros(len(predictor.classes), height, image.size[1])
    count = torch.zeros(height, image.size[1])
    for number, (top, after) in enumerate(zip(tops, [*tops[1:], image.size[0]], strict=True)):
        for position, left in enumerate(lefts):
            pixels = np.ascontiguousarray(image.read(top, left, height, width).transpose(2, 0, 1))
            seen = model.input.apply(torch.from_numpy(pixels))[None].to(predictor.device)
            p = probabilities(single(predictor.method, seen), (height, width), model.align_corners)
            total[:, :, left : left + width] += p[0].float().cpu()
            count[:, left : left + width] += 1
            tell(number * len(lefts) + position + 1, len(tops) * len(lefts))
        done = after - top
        yield slice(top, after), total[:, :done].div_(count[:done])
        # rows that the next windows overlap move up
        for buffer in (total.unbind(0), (count,)):
            for plane in buffer:
                plane[: height - done] = plane[done:].clone()
                plane[height - done :] = 0


@contextlib.contextmanager
def _file_array(folder: Path, dtype: type, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """An array in an unnamed file in ``folder``.

    Raises:
        UserError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # allocated now: a mapped file on a full disk would kill the process later
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
            yield np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _save(picture: Image.Image, path: Path) -> None:
    with written(path, fsync=True) as draft:
        picture.save(draft, "PNG", compress_level=1)
