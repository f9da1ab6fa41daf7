"""Weak labels of target images: tags, which are the classes that an image shows, and single labelled pixels.

The file is JSON, as written by ``python -m fastuda.data index DOMAIN --weak FILE``::

    {"images": {"day/001.png": {"tags": ["road", "car"], "points": [[y, x, "car"]]}}}

or CSV with the header ``image,class,y,x`` and a line per tag or point (``y`` and ``x`` are empty for a tag).
Image names are relative to the folder of the domain, or file names if those are unique. Points are pixels of
the upright image, and the class of a point is also a tag. Classes that a run does not train are ignored.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.loading.transforms import Window
from fastuda.data.tools.index import Index
from fastuda.errors import UserError, nearest
from fastuda.system.files import reading, written

log = logging.getLogger("fastuda")

Points = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class WeakLabels:
    """Weak labels of every image of a domain, in the order of its images."""

    tags: Tensor
    """[N, K] bool."""
    points: tuple[Points, ...]
    """Points (y, x, class) of every image."""

    @property
    def most_points(self) -> int:
        """Largest number of points of an image."""
        return max(map(len, self.points), default=0)

    def crop(
        self, index: int, size: tuple[int, int], window: Window, crop: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Tags [K] and points [P, 3] in a window of image ``index``; points outside it have class 255.

        Args:
            size: height and width of the image.
            window: window that the loader drew.
            crop: height and width of the crop.
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
    """Read the weak labels of the images of a domain.

    Raises:
        UserError: the file cannot be read, names an unknown image or class, or lacks an image of the domain.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"data.weak_labels: no file {path}; python -m fastuda.data index DOMAIN --weak {path}"
        )
    names = {item.image.relative_to(domain.root).as_posix(): i for i, item in enumerate(domain.items)}
    by_file_name: dict[str, int | None] = {}
    for name, index in names.items():
        file_name = name.rpartition("/")[2]
        by_file_name[file_name] = None if file_name in by_file_name else index
    class_ids = {name.lower(): number for name, number in domain.label_map.names.items()}
    tags = torch.zeros(len(names), len(domain.classes), dtype=torch.bool)
    points: list[list[tuple[int, int, int]]] = [[] for _ in names]
    present = set()
    for where, image, class_name, point in _entries(path):
        image_index = names.get(image, by_file_name.get(image))
        if image_index is None:
            continue  # in another split of the data set
        present.add(image_index)
        if class_name is None:
            continue
        class_id = class_ids.get(class_name.lower())
        if class_id is None:
            close = nearest(class_name, domain.label_map.names)
            raise UserError(f"{path}: {where}: unknown class {class_name!r}{close}")
        if class_id == IGNORE:
            continue  # not trained in this run
        tags[image_index, class_id] = True
        if point is not None:
            points[image_index].append((*point, class_id))
    if not present:
        raise UserError(f"{path} names no image of {domain.name}: names are relative to {domain.root}")
    missing = [name for name, index in names.items() if index not in present]
    if missing:
        raise UserError(
            f"{path} has no entry for {len(missing)} of the {len(names)} images of {domain.name}, e.g."
            f" {missing[0]}; give an image without tags an empty entry"
        )
    counts = int(tags.sum()), sum(map(len, points)), len(names)
    log.info("weak labels %s: %d tags and %d points of %d images", path, *counts)
    return WeakLabels(tags, tuple(map(tuple, points)))


Entry = tuple[str, str, str | None, tuple[int, int] | None]
"""Place in the file, image, class (None only lists the image), point (None for a tag)."""


def _entries(path: Path) -> Iterator[Entry]:
    with reading(path, "weak labels"):
        yield from _csv(path) if path.suffix.lower() == ".csv" else _json(path)


def _csv(path: Path) -> Iterator[Entry]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if not {"image", "class"} <= columns:
            raise ValueError(
                f"it has the columns {sorted(columns)}; image and class are needed, y and x for points"
            )
        for row in reader:
            point = (int(row["y"]), int(row["x"])) if row.get("y") and row.get("x") else None
            yield f"line {reader.line_num}", row["image"], row["class"] or None, point


def _json(path: Path) -> Iterator[Entry]:
    for image, labels in json.loads(path.read_text(encoding="utf-8-sig"))["images"].items():
        yield image, image, None, None
        for name in labels.get("tags", []):
            yield image, image, str(name), None
        for y, x, name in labels.get("points", []):
            yield image, image, str(name), (int(y), int(x))


def write_weak_labels(path: Path, domain: Domain, index: Index, tags: np.ndarray, points: int) -> None:
    """Write the weak labels of a domain as JSON.

    Args:
        index: index of the domain.
        tags: bool [N, K], classes of every image.
        points: points per class and image.

    Raises:
        UserError: the file cannot be written.
    """
    names = domain.classes.names
    images: dict[str, Any] = {
        item.image.relative_to(domain.root).as_posix(): {
            "tags": [names[c] for c in tags[i].nonzero()[0]],
            "points": [[y, x, names[c]] for y, x, c in index.first_points(i, points) if tags[i, c]],
        }
        for i, item in enumerate(domain.items)
    }
    with written(path) as draft:
        draft.write_text(json.dumps({"classes": names, "images": images}, indent=1), encoding="utf-8")
