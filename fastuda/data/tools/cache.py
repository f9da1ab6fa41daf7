"""Smaller copies of a data set, so that a large PNG is decoded once and not once an epoch.

The copy is a data set of the kind ``folder:`` with the same class names: images as JPEG (or PNG), labels as
PNGs of train ids, below the same relative paths. Its ``classes.yaml`` is written last, so that half a copy
cannot be opened.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.domain import Domain
from fastuda.data.tools.each import each
from fastuda.errors import UserError
from fastuda.system.files import clean, written


class CacheSettings(NamedTuple):
    """How the copies are made."""

    out: Path
    edge: int | None
    """Shorter edge of the copies, aspect kept; None keeps the size. Smaller images are not enlarged."""
    format: str
    """jpg or png."""
    quality: int
    """Of the JPEG."""


class Copied(NamedTuple):
    """What became of one item."""

    bad: str = ""
    full: str = ""
    """Why no more files can be written."""


def _save(path: Path, image: Image.Image, **options: Any) -> None:
    encoded = io.BytesIO()  # Pillow's JPEG writer takes a file that a full disk has cut short for written
    image.save(encoded, format="JPEG" if path.suffix == ".jpg" else "PNG", **options)
    with written(path) as draft:
        draft.write_bytes(encoded.getbuffer())


def _newer(copy: Path, original: Path) -> bool:
    try:
        return copy.stat().st_mtime_ns >= original.stat().st_mtime_ns
    except OSError:
        return False


def _copy(domain: Domain, index: int, settings: CacheSettings) -> Copied:
    """Write both copies of an item, unless they are there and newer than the originals."""
    image_path, label_path = domain.items[index]
    stem = domain.own_path(index)
    image_copy = settings.out / "images" / f"{stem}.{settings.format}"
    label_copy = settings.out / "labels" / f"{stem}.png"
    if _newer(image_copy, image_path) and (label_path is None or _newer(label_copy, label_path)):
        return Copied()
    try:
        if label_path is None:
            image, label = domain.read_image(index), None
        else:
            image, label = domain.read_pair(index)
    except BadFile as error:
        return Copied(bad=str(error))
    height, width = image.shape[:2]
    scale = 1.0 if settings.edge is None else min(1.0, settings.edge / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    options = {"quality": settings.quality} if settings.format == "jpg" else {"compress_level": 1}
    try:
        if label is not None:
            _save(label_copy, Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        _save(image_copy, Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), **options)
    except UserError as error:
        return Copied(full=str(error))
    return Copied()


def build_cache(
    domain: Domain, settings: CacheSettings, *, workers: int | None = None, quiet: bool = False
) -> list[str]:
    """Copy a domain; what is there already and newer than its original stays.

    Returns:
        The files that could not be read, with the reason; they are left out.

    Raises:
        UserError: the folder holds another copy, or cannot be written (full disk).
    """
    said = {
        "domain": domain.name,
        "split": domain.split,
        "root": str(domain.root.resolve()),
        "edge": settings.edge,
        "format": settings.format,
        "quality": settings.quality if settings.format == "jpg" else None,
        "classes": list(domain.classes.names),
    }
    manifest, classes = settings.out / "cache.json", settings.out / "classes.yaml"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        if manifest.is_file():
            if json.loads(manifest.read_text(encoding="utf-8")) != said:
                raise UserError(
                    f"{settings.out} holds a copy made otherwise ({manifest}); choose another --out"
                )
        elif any(settings.out.iterdir()):
            raise UserError(f"{settings.out} is not empty and holds no copy; choose another --out")
        classes.unlink(missing_ok=True)
        clean(settings.out)
        for kind in ("images", "labels"):
            clean(settings.out / kind, recursive=True)
        with written(manifest) as draft:
            draft.write_text(json.dumps(said, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {settings.out}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(
            f"{manifest} cannot be read ({error}); delete {settings.out}, or choose another --out"
        ) from error
    bad = []
    for _, copied in each(
        _copy, domain, range(len(domain)), settings, workers=workers, title="copying", quiet=quiet
    ):
        if copied.full:
            raise UserError(f"{copied.full}; the copies so far are kept, run it again")
        if copied.bad:
            bad.append(copied.bad)
    said_classes = {
        "names": list(domain.classes.names),
        "palette": np.array(domain.classes.palette).tolist(),
        "images": f"images/{{path}}.{settings.format}",
        "labels": "labels/{path}.png",
    }
    with written(classes) as draft:
        draft.write_text(yaml.safe_dump(said_classes, sort_keys=False), encoding="utf-8")
    return bad
