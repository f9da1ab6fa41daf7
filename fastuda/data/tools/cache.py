"""Smaller copies of a data set, which load faster than the original files.

The copy is a ``folder:`` data set with the same class names and relative paths. Its images are JPEG or PNG,
and its labels are PNGs of train ids. ``classes.yaml`` is written last: an incomplete copy cannot be opened.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.tools.each import each
from fastuda.errors import UserError, cannot_write
from fastuda.system.files import clean, written


class CacheSettings(NamedTuple):
    """Folder and format of the copies."""

    out: Path
    edge: int | None
    """Shorter edge of the copies; None keeps the size. Smaller images are not enlarged."""
    format: str
    """Format of the images, jpg or png."""
    quality: int
    """Quality of JPEG images, 1 to 100."""


class Copied(NamedTuple):
    """Result of copying an item: empty, or one of two faults."""

    unreadable: str = ""
    """The original cannot be read."""
    unwritable: str = ""
    """The copy cannot be written, so no further ones can."""


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write an image atomically."""
    encoded = io.BytesIO()  # on a full disk, Pillow's JPEG writer reports no error
    image.save(encoded, format="JPEG" if path.suffix == ".jpg" else "PNG", **options)
    with written(path) as draft:
        draft.write_bytes(encoded.getbuffer())


def _newer(copy: Path, original: Path) -> bool:
    try:
        return copy.stat().st_mtime_ns >= original.stat().st_mtime_ns
    except OSError:
        return False


def _copy(domain: Domain, index: int, settings: CacheSettings) -> Copied:
    """Copy an item unless its copies exist and are newer than the originals."""
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
        return Copied(unreadable=str(error))
    height, width = image.shape[:2]
    scale = 1.0 if settings.edge is None else min(1.0, settings.edge / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    options = {"quality": settings.quality} if settings.format == "jpg" else {"compress_level": 1}
    try:
        if label is not None:
            write_image(label_copy, Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        write_image(image_copy, Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), **options)
    except UserError as error:
        return Copied(unwritable=str(error))
    return Copied()


def build_cache(
    domain: Domain, settings: CacheSettings, *, workers: int | None = None, quiet: bool = False
) -> list[str]:
    """Copy a domain. Copies that exist and are newer than their originals stay.

    Returns:
        Messages of the files that could not be read and are left out.

    Raises:
        UserError: the folder holds another copy, or cannot be written.
    """
    manifest = {
        "domain": domain.name,
        "split": domain.split,
        "root": str(domain.root.resolve()),
        "edge": settings.edge,
        "format": settings.format,
        "quality": settings.quality if settings.format == "jpg" else None,
        "classes": list(domain.classes.names),
        "labels": _meaning(domain),
    }
    manifest_path, classes_path = settings.out / "cache.json", settings.out / "classes.yaml"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        if manifest_path.is_file():
            if _read_json(manifest_path) != manifest:
                raise UserError(
                    f"{settings.out} holds a copy with other settings ({manifest_path}); delete it or choose"
                    " another --out"
                )
        elif any(settings.out.iterdir()):
            raise UserError(f"{settings.out} is not empty and holds no copy; choose another --out")
        classes_path.unlink(missing_ok=True)
        clean(settings.out)
        for kind in ("images", "labels"):
            clean(settings.out / kind, recursive=True)
        with written(manifest_path) as draft:
            draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        raise cannot_write(settings.out, error) from error
    unreadable = []
    for _, copied in each(
        _copy, domain, range(len(domain)), settings, workers=workers, title="copying", quiet=quiet
    ):
        if copied.unwritable:
            raise UserError(f"{copied.unwritable}; the copies so far are kept, run it again")
        if copied.unreadable:
            unreadable.append(copied.unreadable)
    classes = {
        "names": list(domain.classes.names),
        "palette": np.array(domain.classes.palette).tolist(),
        "ignore": IGNORE,
        "images": f"images/{{path}}.{settings.format}",
        "labels": "labels/{path}.png",
    }
    with written(classes_path) as draft:
        draft.write_text(yaml.safe_dump(classes, sort_keys=False), encoding="utf-8")
    return unreadable


def _meaning(domain: Domain) -> str:
    """Hash of the label map: copies hold the train ids that it gave."""
    labels = domain.label_map
    maps = [sorted(entries.items()) for entries in (labels.ids, labels.colors, labels.names)]
    return hashlib.blake2b(json.dumps(maps).encode(), digest_size=8).hexdigest()


def _read_json(path: Path) -> Any:
    """Value of a JSON file; None if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
