"""Weak labels of target images: which classes an image shows, and single labelled pixels.

JSON, as ``python -m fastuda.data index DOMAIN --weak FILE`` writes it::

    {"images": {"day/001.png": {"tags": ["road", "car"], "points": [[y, x, "car"]]}}}

or CSV with a header, a line per tag or point: ``image,class,y,x`` (``y`` and ``x`` empty for a tag). Images
are named relative to the domain's folder, or by file name where that is unique; points are pixels of the
upright image. A point's class is a tag, too. Classes of the data set that a run does not train are
ignored.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastuda.data.domains.decode import OTHERWISE
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.loading.transforms import Window
from fastuda.errors import UserError, nearest

log = logging.getLogger("fastuda")

Points = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class WeakLabels:
    """Of every image of a domain, in its order."""

    tags: Tensor
    """[N, K] bool."""
    points: tuple[Points, ...]
    """(y, x, class) each."""

    @property
    def most_points(self) -> int:
        """Of an image."""
        return max(map(len, self.points), default=0)

    def crop(
        self, index: int, size: tuple[int, int], window: Window, crop: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Tags [K] and points [P, 3] of a window of image ``index``; points outside it are class 255.

        Args:
            index: of the image.
            size: its height and width.
            window: what the loader drew.
            crop: the crop's height and width.
        """
        out = torch.zeros(self.most_points, 3, dtype=torch.int64)
        out[:, 2] = IGNORE
        height, width = min(crop[0], window.height), min(crop[1], window.width)
        for row, (y, x, label) in enumerate(self.points[index]):
            y = int((y + 0.5) * window.height / size[0]) - window.top
            x = int((x + 0.5) * window.width / size[1]) - window.left
            if window.flip:
                x = width - 1 - x
            if 0 <= y < height and 0 <= x < width:
                out[row] = torch.tensor([y, x, label])
        return self.tags[index], out


def read_weak_labels(path: str | Path, domain: Domain) -> WeakLabels:
    """The weak labels of a domain's images.

    Raises:
        UserError: the file cannot be read, names an unknown image or class, or lacks an image of the domain.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"data.weak_labels: no file {path}; python -m fastuda.data index DOMAIN --weak {path}"
        )
    names = {item.image.relative_to(domain.root).as_posix(): i for i, item in enumerate(domain.items)}
    short: dict[str, int | None] = {}
    for name, number in names.items():
        base = name.rpartition("/")[2]
        short[base] = None if base in short else number
    numbers = {name.lower(): number for name, number in domain.label_map.names.items()}
    tags = torch.zeros(len(names), len(domain.classes), dtype=torch.bool)
    points: list[list[tuple[int, int, int]]] = [[] for _ in names]
    found = set()
    for where, image, label, place in _entries(path):
        index = names.get(image, short.get(image))
        if index is None:
            continue  # of another split of the same data set
        found.add(index)
        if label is None:
            continue
        known = numbers.get(label.lower())
        if known is None:
            close = nearest(label, domain.label_map.names)
            raise UserError(f"{path}: {where}: unknown class {label!r}{close}")
        if known == IGNORE:
            continue  # a class of the data set that this run does not train
        tags[index, known] = True
        if place is not None:
            points[index].append((*place, known))
    if not found:
        raise UserError(f"{path} names no image of {domain.name}: names are relative to {domain.root}")
    missing = [name for name, number in names.items() if number not in found]
    if missing:
        raise UserError(
            f"{path} has nothing about {len(missing)} of the {len(names)} images of {domain.name}, e.g."
            f" {missing[0]}; an image without tags is an entry with none"
        )
    shown = int(tags.sum()), sum(map(len, points)), len(names)
    log.info("weak labels %s: %d tags and %d points of %d images", path, *shown)
    return WeakLabels(tags, tuple(tuple(p) for p in points))


Entry = tuple[str, str, str | None, tuple[int, int] | None]
"""Where it stands, image, class (None: only that the image is known), point."""


def _entries(path: Path) -> Iterator[Entry]:
    try:
        if path.suffix.lower() == ".csv":
            yield from _csv(path)
        else:
            yield from _json(path)
    except (*OTHERWISE, csv.Error) as error:
        raise UserError(f"{path} cannot be read as weak labels: {error}") from error


def _csv(path: Path) -> Iterator[Entry]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if not {"image", "class"} <= columns:
            raise ValueError(
                f"it has the columns {sorted(columns)}; image and class are needed, y and x for points"
            )
        for row in reader:
            place = (int(row["y"]), int(row["x"])) if row.get("y") and row.get("x") else None
            yield f"line {reader.line_num}", row["image"], row["class"] or None, place


def _json(path: Path) -> Iterator[Entry]:
    for image, said in json.loads(path.read_text(encoding="utf-8-sig"))["images"].items():
        yield image, image, None, None
        for name in said.get("tags", []):
            yield image, image, str(name), None
        for y, x, name in said.get("points", []):
            yield image, image, str(name), (int(y), int(x))
