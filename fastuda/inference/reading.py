"""Finds the images and videos to predict, and reads them ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fastuda.data.domains.decode import BadFile, open_rgb
from fastuda.data.domains.layouts import IMAGE_SUFFIXES
from fastuda.errors import UserError
from fastuda.inference.large import LargeImage
from fastuda.inference.video import VIDEO_SUFFIXES, Video

File = tuple[Path, Path]
"""A file, and its name below the output folder."""


def find_files(paths: Sequence[Path], out: Path) -> list[File]:
    """Image and video files in ``paths`` and in the folders among them, except those in ``out``.

    Raises:
        UserError: a path does not exist, there are no files, or two files would have the same output name.
    """
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    files: list[File] = []
    for path in paths:
        if path.is_dir():
            # skip hidden files: drafts, macOS's resource forks
            every = (f for f in path.rglob("*") if f.suffix.lower() in suffixes and f.name[0] != ".")
            below = sorted(f for f in every if f.is_file())
            files += [(f, f.relative_to(path)) for f in below if out.resolve() not in f.resolve().parents]
        elif path.is_file():
            files.append((path, Path(path.name)))
        else:
            raise UserError(f"no image, video or folder at {path}")
    if not paths:
        raise UserError("no image, video or folder is given")
    within = [path for path in paths if path.is_dir() and out.resolve() in (r := path.resolve(), *r.parents)]
    if not files and within:
        raise UserError(
            f"{within[0]} is --out or lies inside it, and outputs are not read; choose another --out"
        )
    if not files:
        raise UserError(f"no images in {', '.join(map(str, paths))} ({', '.join(suffixes)})")
    taken: dict[Path, Path] = {}
    for path, name in files:
        twin = taken.setdefault(name.with_suffix(""), path)
        if twin.resolve() != path.resolve():
            raise UserError(
                f"{twin} and {path} would have the same output name; use a separate --out for each"
            )
    return list({path.resolve(): (path, name) for path, name in files}.values())


def is_video(path: Path) -> bool:
    """Whether the suffix is a video's."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def count_images(path: Path) -> int:
    """Number of images in a file, as its header states."""
    if not is_video(path):
        return 1
    try:
        video = Video(path)
    except UserError:
        return 1
    video.close()
    return video.count


def read_ahead(files: Sequence[File]) -> Iterator[tuple[File, np.ndarray | LargeImage | BadFile | None]]:
    """Yield every file with its image (None for a video, the error for a file that cannot be read) while
    the next one is being read."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(_read, files[0][0])
        for file, after in zip(files, [*files[1:], None], strict=True):
            image = coming.result()
            if after is not None:
                coming = pool.submit(_read, after[0])
            yield file, image


def _read(path: Path) -> np.ndarray | LargeImage | BadFile | None:
    if is_video(path):
        return None
    try:
        return np.asarray(open_rgb(path))
    except BadFile as error:
        if not isinstance(error.__cause__, Image.DecompressionBombError):
            return error
    try:
        return LargeImage(path)
    except BadFile as error:
        return error
