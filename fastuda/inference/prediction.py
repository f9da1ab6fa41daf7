"""Writes label maps, pictures and probabilities of image and video files."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastuda.data.domains.decode import BadFile
from fastuda.data.labels import ClassSet
from fastuda.errors import UserError
from fastuda.inference.large import LargeImage, predict_large
from fastuda.inference.pictures import overlay, save_array, save_palette_png
from fastuda.inference.predictor import Predictor
from fastuda.inference.reading import File, count_images, is_video, read_ahead
from fastuda.inference.video import Video, new_video, opencv
from fastuda.system.files import written
from fastuda.system.yaml import to_yaml

log = logging.getLogger("fastuda")

KINDS = ("labels", "color", "overlay", "probabilities")
WRITERS = 4
"""Threads that encode and write files during prediction."""


@dataclass
class Outcome:
    """The result of :func:`predict_files`."""

    images: int = 0
    """Number of labelled images and frames."""
    seconds: float = 0.0
    bad: list[str] = field(default_factory=list)
    """An error message for every file that was skipped."""

    @property
    def rate(self) -> float:
        """Images per second, including reading and writing."""
        return self.images / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, object]:
        """The result as a dictionary for JSON."""
        return {
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.rate, 3),
            "bad": self.bad,
        }


def predict_files(
    predictor: Predictor,
    files: Sequence[File],
    out: Path,
    save: set[str],
    *,
    quiet: bool = False,
    strict: bool = False,
) -> Outcome:
    """Write the outputs in ``save`` (of :data:`KINDS`) for every file as ``out/<kind>/<name>``.

    For a video, ``color`` and ``overlay`` are MP4 files; ``labels`` and ``probabilities`` are folders with a
    file per frame. A file that cannot be read is reported and skipped.

    Args:
        strict: raise the error of the first file that cannot be read.

    Raises:
        UserError: no file could be read, OpenCV is missing for a video, or the folder cannot be written.
    """
    outcome = Outcome()
    for path, _ in files:
        if is_video(path):
            opencv(path)
    began = time.perf_counter()
    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    total = sum(count_images(path) for path, _ in files)
    with (
        tqdm(total=total, desc="predicting", unit=" images", disable=quiet, bar_format=shape) as bar,
        _Writers() as writers,
    ):
        for (path, name), image in read_ahead(files):
            try:
                if isinstance(image, BadFile):
                    raise image
                if isinstance(image, LargeImage):
                    _large(predictor, image, out, name.with_suffix(""), save, bar)
                    outcome.images += 1
                    bar.update()
                elif image is None:
                    _video(predictor, path, out, name, save, writers, outcome, bar)
                else:
                    _image(predictor, image, out, name.with_suffix(""), save, writers)
                    outcome.images += 1
                    bar.update()
            except BadFile as error:
                if strict:
                    raise
                log.warning("skipped: %s", error)
                outcome.bad.append(str(error))
                bar.update()
    if not outcome.images:
        raise UserError("no file could be read:\n  " + "\n  ".join(outcome.bad))
    outcome.seconds = time.perf_counter() - began
    return outcome


def describe(out: Path, classes: ClassSet, ids: tuple[int, ...] | None = None) -> None:
    """Write ``out/classes.yaml``, the meaning of the ids in ``labels`` in the format of a ``folder:``
    domain."""
    palette = [list(color) for color in classes.palette]
    values: dict[str, object] = {"names": list(classes.names), "palette": palette, "ignore": 255}
    if ids is not None:
        values["ids"] = list(ids)
    with written(out / "classes.yaml", fsync=True) as draft:
        draft.write_text(to_yaml(values), encoding="utf-8")


class _Writers:
    """Encodes and writes files in threads, with a bounded queue."""

    def __enter__(self) -> _Writers:
        self.pool = ThreadPoolExecutor(WRITERS)
        self.waiting: deque[Future[None]] = deque()
        return self

    def put(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill ``path``.

        Raises:
            UserError: this or an earlier file cannot be written.
        """
        self.waiting.append(self.pool.submit(_write, path, write))
        while len(self.waiting) > 2 * WRITERS:
            self.waiting.popleft().result()

    def __exit__(self, kind: object, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.waiting:
                future.result()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with written(path, fsync=True) as draft:
        write(draft)


def _large(predictor: Predictor, image: LargeImage, out: Path, name: Path, save: set[str], bar: Any) -> None:
    """Label an image that is read by windows.

    Raises:
        BadFile: no window is set, or the network's input is the whole image at another size.
    """

    def tell(done: int, windows: int) -> None:
        bar.set_description(f"predicting, window {done} of {windows}")

    try:
        if predictor.inference.window is None or predictor.size is not None:
            more = "" if predictor.size is None else ", and data.eval_size=null in place of a size"
            pixels = image.size[0] * image.size[1] / 1e6
            raise BadFile(
                image.path, f"has {pixels:.0f} million pixels: read it in parts by --window H W{more}"
            )
        predict_large(predictor, image, out, lambda kind, end: _place(out, kind, name, end), save, tell)
    finally:
        bar.set_description("predicting")
        image.close()


def _image(
    predictor: Predictor, image: np.ndarray, out: Path, name: Path, save: set[str], writers: _Writers
) -> np.ndarray:
    """Label one image and queue its files for writing. Returns its labels."""
    classes = predictor.classes
    labels, scores = predictor(image, "probabilities" in save)
    if "labels" in save:
        stored = labels if predictor.ids is None else np.array(predictor.ids, np.uint8)[labels]
        writers.put(_place(out, "labels", name, "png"), partial(_save_png, Image.fromarray(stored)))
    if "color" in save:
        put = partial(save_palette_png, labels=labels, classes=classes)
        writers.put(_place(out, "color", name, "png"), put)
    if "overlay" in save:
        picture = partial(_save_overlay, image=image, labels=labels, classes=classes)
        writers.put(_place(out, "overlay", name, "png"), picture)
    if scores is not None:
        writers.put(_place(out, "probabilities", name, "npy"), partial(save_array, array=scores))
    return labels


def _video(
    predictor: Predictor,
    path: Path,
    out: Path,
    name: Path,
    save: set[str],
    writers: _Writers,
    outcome: Outcome,
    bar: Any,
) -> None:
    """Label a video frame by frame.

    Raises:
        BadFile: the video cannot be read, or has no frame.
    """
    try:
        video = Video(path)
    except UserError as error:
        raise BadFile(path, str(error).removeprefix(f"{path} ")) from error
    name = name.with_suffix("")
    single = save & {"labels", "probabilities"}
    with contextlib.ExitStack() as files:
        files.callback(video.close)
        films = {
            kind: files.enter_context(new_video(_place(out, kind, name, "mp4"), video.fps))
            for kind in save & {"color", "overlay"}
        }
        number = -1
        for number, frame in enumerate(video):
            labels = _image(predictor, frame, out, name / f"{number:06d}", single, writers)
            if "color" in films:
                films["color"].write(predictor.classes.colorize(labels))
            if "overlay" in films:
                films["overlay"].write(overlay(frame, labels, predictor.classes))
            outcome.images += 1
            bar.update()
        if number < 0:
            raise BadFile(path, "holds no frame that can be read")
        if number + 1 < video.count:
            log.warning("%s: %d of its %d frames could be read", path, number + 1, video.count)


def _place(out: Path, kind: str, name: Path, suffix: str) -> Path:
    # not with_suffix: names may contain dots
    return out / kind / name.with_name(f"{name.name}.{suffix}")


def _save_png(picture: Image.Image, path: Path) -> None:
    picture.save(path, "PNG")


def _save_overlay(path: Path, image: np.ndarray, labels: np.ndarray, classes: ClassSet) -> None:
    Image.fromarray(overlay(image, labels, classes)).save(path, "PNG", compress_level=1)
