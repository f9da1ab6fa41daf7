"""Index of the classes in the labels of a domain, for sampling, class statistics and weak labels.

The index file has a line of JSON per label, appended as soon as the label is read. An interrupted build
continues where it stopped, and reads a truncated line again. A label is read again only if its bytes changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.tools.each import each
from fastuda.errors import UserError

VERSION = 3


def cache_folder() -> Path:
    """Folder of the index files: ``FASTUDA_CACHE``, or ``~/.cache/fastuda``."""
    return Path(os.environ.get("FASTUDA_CACHE") or "~/.cache/fastuda").expanduser()


POINTS = 5
"""Pixels drawn per class of a label, for weak labels."""


@dataclass(frozen=True)
class Index:
    """Classes in the labels of a domain."""

    counts: np.ndarray
    """int64 [N, K]: pixels of every class in every label; zeros for an unreadable label."""
    pixels: np.ndarray
    """int64 [N]: pixels of every label, including ignored ones."""
    points: tuple[tuple[tuple[int, int, int], ...], ...]
    """Up to 5 pixels (y, x, class) per class of every label, drawn uniformly and seeded by its content."""
    bad: tuple[str, ...]
    """Messages of the labels that cannot be read."""

    @property
    def frequency(self) -> np.ndarray:
        """float64 [K]: share of every class among the labelled pixels."""
        return self.counts.sum(0) / max(int(self.counts.sum()), 1)

    def first_points(self, row: int, per_class: int) -> list[tuple[int, int, int]]:
        """First ``per_class`` points of every class of a label."""
        drawn: dict[int, int] = {}
        chosen = []
        for y, x, c in self.points[row]:
            drawn[c] = drawn.get(c, 0) + 1
            if drawn[c] <= per_class:
                chosen.append((y, x, c))
        return chosen

    def tags(self, min_share: float = 0.0) -> np.ndarray:
        """bool [N, K]: classes that fill more than ``min_share`` of an image."""
        return self.counts > min_share * self.pixels[:, None]

    def mean_share(self, tag_share: float = 0.1, rounds: int = 10) -> np.ndarray:
        """float64 [K]: mean share of a class over the images that show it.

        An image shows a class that fills more than ``tag_share`` of this mean, which is therefore iterated
        ``rounds`` times from 0. Source: WeakSegDA, authors' trainer_base.py, there in pixels.
        """
        share = self.counts / self.pixels[:, None]
        mean = np.zeros(share.shape[1])
        for _ in range(rounds):
            shows = share > tag_share * mean
            mean = (share * shows).sum(0) / np.maximum(shows.sum(0), 1)
        return mean

    def relative_tags(self, tag_share: float = 0.1) -> np.ndarray:
        """bool [N, K]: WeakSegDA's image tags, classes that fill more than ``tag_share`` of their
        :meth:`mean_share`.

        The authors compare pixel counts and means of different resolutions. Their 0.1 corresponds to 0.025
        for the tags of Cityscapes and 0.218 for those of GTA5; shares do not depend on the resolution.
        """
        return self.counts > tag_share * self.mean_share(tag_share) * self.pixels[:, None]


def _fingerprint(domain: Domain) -> str:
    """Hash of everything that determines the classes of a label."""
    label_map = domain.label_map
    original = label_map.original or label_map  # tells numbers from colours in a palette file
    settings = json.dumps(
        [
            VERSION,
            str(domain.root.resolve()),
            domain.classes.names,
            sorted(label_map.ids.items()),
            sorted(label_map.colors.items()),
            sorted(label_map.names.items()),
            sorted(original.ids.items()),
            sorted(original.colors.items()),
        ]
    )
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def index_label(domain: Domain, index: int, previous: Any) -> dict[str, Any]:
    """Index line of a label; ``previous`` holds the lines of earlier builds by file."""
    path = domain.items[index].label
    assert path is not None
    line: dict[str, Any] = {"file": str(path)}
    try:
        status = path.stat()
        line |= {"size": status.st_size, "mtime": status.st_mtime_ns}
        line["digest"] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        old = previous.get(str(path))
        if old is not None and old.get("digest") == line["digest"] and "bad" not in old:
            return old | line
        label = domain.read_label(index)
    except OSError as error:
        return line | {"bad": f"cannot be read ({error.strerror})"}
    except BadFile as error:
        return line | {"bad": error.reason}
    counts = np.bincount(label.ravel(), minlength=256)
    rng = np.random.default_rng(int(line["digest"][:16], 16))
    points = []
    for value in np.flatnonzero(counts[:IGNORE]).tolist():
        pixels = np.flatnonzero(label.ravel() == value)
        for pixel in rng.choice(pixels, min(POINTS, len(pixels)), replace=False).tolist():
            points.append((*divmod(pixel, label.shape[1]), value))
    present = {str(value): int(counts[value]) for value in np.flatnonzero(counts[:IGNORE])}
    return line | {"pixels": label.size, "counts": present, "points": points}


def _load(path: Path) -> dict[str, dict[str, Any]]:
    """Complete lines of an index file by label file; later lines replace earlier ones."""
    lines: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                lines[line["file"]] = line
            except (ValueError, KeyError, TypeError):
                continue
    return lines


def _current(line: dict[str, Any] | None, path: Path) -> bool:
    """Whether the line describes the present file."""
    if line is None or "bad" in line:
        return False
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (line.get("size"), line.get("mtime"))


def build_index(
    domain: Domain, *, folder: Path | None = None, workers: int | None = None, quiet: bool = False
) -> Index:
    """Index of a labelled domain; labels that have not changed are not read again.

    Raises:
        UserError: images have no label, or the index file cannot be written.
    """
    labels = [item.label for item in domain.items]
    if any(label is None for label in labels):
        raise UserError(
            f"{domain.name} (split {domain.split}) has images without label and cannot be indexed"
        )
    folder = folder or cache_folder()
    path = folder / f"{domain.name}-{_fingerprint(domain)}.jsonl"
    try:
        lines = _load(path)
        stale = [i for i, label in enumerate(labels) if label and not _current(lines.get(str(label)), label)]
        if stale:
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                _end_line(file)
                title = f"indexing {domain.name}"
                for _, line in each(
                    index_label, domain, stale, lines, workers=workers, title=title, quiet=quiet
                ):
                    lines[line["file"]] = line
                    file.write(json.dumps(line).encode() + b"\n")
                    file.flush()
    except OSError as error:
        raise UserError(f"cannot write the index {path}: {error.strerror}; set FASTUDA_CACHE") from error
    return _assemble([lines[str(label)] for label in labels], len(domain.classes))


def _end_line(file: Any) -> None:
    """End a truncated line that an interrupted build has left."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _assemble(lines: Sequence[dict[str, Any]], classes: int) -> Index:
    counts = np.zeros((len(lines), classes), np.int64)
    pixels = np.ones(len(lines), np.int64)
    points: list[tuple[tuple[int, int, int], ...]] = []
    bad = []
    for row, line in enumerate(lines):
        if "bad" in line:
            bad.append(f"{line['file']} {line['bad']}")
            points.append(())
            continue
        pixels[row] = line["pixels"]
        for value, count in line["counts"].items():
            counts[row, int(value)] = count
        points.append(tuple((y, x, c) for y, x, c in line["points"]))
    return Index(counts, pixels, tuple(points), tuple(bad))
