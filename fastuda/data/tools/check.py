"""Checks of a whole data set before it is used."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.open import AUTO, open_domain
from fastuda.data.labels import IGNORE
from fastuda.data.tools.each import each
from fastuda.errors import UserError
from fastuda.system.files import written

SHEET_WIDTH = 320


class ItemStatistics(NamedTuple):
    """Size, classes and faults of an image and its label."""

    size: tuple[int, int] | None
    """Width and height of the image."""
    counts: np.ndarray | None
    """int64 [K + 1]: pixels per class, then ignored pixels."""
    problems: tuple[str, ...]
    digest: bytes
    """Hash of the image file, empty if it cannot be read."""


@dataclass
class Report:
    """Contents and faults of a data set."""

    domain: Domain
    labelled: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [K + 1]: pixels per class, then ignored pixels."""
    images: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [K + 1]: images that show each class."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self, listed: int = 20) -> str:
        """The report as text, with up to ``listed`` lines of each kind of fault."""
        domain = self.domain
        sizes = ", ".join(f"{w}x{h} ({n})" for (w, h), n in self.sizes.most_common(4))
        more = f" and {len(self.sizes) - 4} more" if len(self.sizes) > 4 else ""
        lines = [
            f"{domain.name}, split {domain.split}, in {domain.root}",
            f"  images   {len(domain)}, {self.labelled} with label",
            f"  sizes    {sizes}{more}",
        ]
        total = int(self.pixels.sum())
        if total:
            width = max(len(name) for name in (*domain.classes.names, "ignored"))
            lines.append(f"  {'class'.ljust(width)}  pixels %  images")
            for i, name in enumerate((*domain.classes.names, "ignored")):
                share = 100 * self.pixels[i] / total
                lines.append(f"  {name.ljust(width)}  {share:8.3f}  {self.images[i]:6d}")
        for title, messages in (("wrong", self.problems), ("note", self.notes)):
            lines += [f"  {title}: {message}" for message in messages[:listed]]
            if len(messages) > listed:
                lines.append(f"  {title}: ... and {len(messages) - listed} more")
        count = len(self.problems)
        lines.append(f"  {count} problem{'s' * (count > 1)}" if count else "  nothing wrong")
        return "\n".join(lines)


def _check_item(domain: Domain, index: int, settings: Any) -> ItemStatistics:
    """Decode both files of an item."""
    problems: list[str] = []
    size, counts, digest = None, None, b""
    try:
        digest = hashlib.blake2b(domain.items[index].image.read_bytes(), digest_size=16).digest()
        image = domain.open_image(index)
        size = image.size
    except OSError as error:
        problems.append(f"{domain.items[index].image} cannot be read ({error.strerror})")
    except BadFile as error:
        problems.append(str(error))
    if domain.items[index].label is not None:
        try:
            label = domain.read_label(index) if size is None else domain.read_pair(index)[1]
            pixels = np.bincount(label.ravel(), minlength=256)
            counts = np.append(pixels[: len(domain.classes)], pixels[IGNORE])
        except BadFile as error:
            if str(error) not in problems:
                problems.append(str(error))
    return ItemStatistics(size, counts, tuple(problems), digest)


def check_domain(
    domain: Domain, *, need_labels: bool, workers: int | None = None, quiet: bool = False
) -> Report:
    """Read every file of a domain.

    Problems are unreadable files, labels that differ in size from their image or hold a value that is not in
    the label map, and missing labels if ``need_labels``. Notes are identical images and classes that never
    occur.
    """
    classes = len(domain.classes)
    report = Report(domain, pixels=np.zeros(classes + 1, np.int64), images=np.zeros(classes + 1, np.int64))
    first: dict[bytes, Path] = {}
    for index, item in each(
        _check_item, domain, range(len(domain)), workers=workers, title="checking", quiet=quiet
    ):
        image, label = domain.items[index]
        report.problems += item.problems
        if label is not None:
            report.labelled += 1
        elif need_labels:
            report.problems.append(f"{image} has no label")
        if item.size is not None:
            report.sizes[item.size] += 1
        if item.counts is not None:
            report.pixels += item.counts
            report.images += item.counts > 0
        if item.digest and (twin := first.setdefault(item.digest, image)) != image:
            report.notes.append(f"{image} is the same image as {twin}")
    try:
        domain.check_labels(16)
    except UserError as error:  # faults of single files are listed above
        report.problems += [] if isinstance(error, BadFile) else [str(error)]
    if report.labelled and report.pixels.sum():
        absent = [name for name, n in zip(domain.classes.names, report.images, strict=False) if not n]
        if absent:
            report.notes.append(f"no pixel of {', '.join(absent)}")
    return report


def shared_with_evaluation(domain: Domain, spec: str, data_root: str | Path) -> list[str]:
    """Message if images of the domain are also in the split that evaluates it."""
    try:
        held_out = open_domain(spec, role="target", split=AUTO, data_root=data_root)
    except UserError:  # there is no such split
        return []
    images = {item.image for item in held_out.items}
    both = [item.image for item in domain.items if item.image in images]
    if not both or "all" in (domain.split, held_out.split) or domain.split == held_out.split:
        return []
    return [f"{len(both)} images are also in split {held_out.split}, the first is {both[0]}"]


def contact_sheet(domain: Domain, path: Path, rows: int = 4, columns: int = 3) -> Path:
    """Write a PNG of images spread over the domain, each above its label in colours, and return its path."""
    count = min(len(domain), rows * columns)
    cells = []
    for index in np.linspace(0, len(domain) - 1, count, dtype=int).tolist():
        try:
            image = domain.open_image(index)
            size = SHEET_WIDTH, max(1, SHEET_WIDTH * image.height // image.width)
            cell = [np.asarray(image.resize(size, Image.Resampling.BILINEAR))]
            if domain.items[index].label is not None:
                label = Image.fromarray(domain.read_pair(index)[1]).resize(size, Image.Resampling.NEAREST)
                cell.append(domain.classes.colorize(np.asarray(label)))
        except BadFile:
            continue
        cells.append(np.concatenate(cell))
    height = max((cell.shape[0] for cell in cells), default=1)
    sheet = np.full(
        ((height + 4) * -(-max(len(cells), 1) // columns), (SHEET_WIDTH + 4) * columns, 3), 255, np.uint8
    )
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        top, left = row * (height + 4), column * (SHEET_WIDTH + 4)
        sheet[top : top + cell.shape[0], left : left + SHEET_WIDTH] = cell
    with written(path) as draft:
        Image.fromarray(sheet).save(draft, "PNG")
    return path
